{{/* What every pod of Packlight has in common: identity, Redis, the model, scratch space, and no privileges. */}}

{{/* (dict "root" $ "pod" values-with-placement "component" "router") */}}
{{- define "packlight.placement" -}}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if .pod.topologySpread }}
topologySpreadConstraints:
  {{- range .pod.topologySpread }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "packlight.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end }}

{{/* The start of every pod spec. */}}
{{- define "packlight.podSettings" -}}
serviceAccountName: {{ include "packlight.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int .Values.podSecurity.runAsUser }}
  runAsGroup: {{ int .Values.podSecurity.runAsGroup }}
  fsGroup: {{ int .Values.podSecurity.runAsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* A list of capabilities to add, or none. */}}
{{- define "packlight.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with . }}
  add: {{ toJson . }}
  {{- end }}
{{- end }}

{{- define "packlight.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: POD_REVISION
  value: {{ include "packlight.revision" . | quote }}
{{ include "packlight.redisEnv" . }}
# Models come from /models or from the image, never from the network.
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}

{{- define "packlight.redisEnv" -}}
{{- $external := .Values.redis.external -}}
{{- $password := .Values.redis.bundled.passwordSecret -}}
{{- $bundled := printf "%s-redis:6379/0" (include "packlight.fullname" .) -}}
{{- if $external.urlSecret.name -}}
- name: REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ $external.urlSecret.name }}
      key: {{ $external.urlSecret.key }}
{{- else if $external.url -}}
- name: REDIS_URL
  value: {{ $external.url | quote }}
{{- else if $password.name -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $password.name }}
      key: {{ $password.key }}
- name: REDIS_URL
  value: {{ printf "redis://:$(REDIS_PASSWORD)@%s" $bundled | quote }}
{{- else -}}
- name: REDIS_URL
  value: {{ printf "redis://%s" $bundled | quote }}
{{- end }}
{{- end }}

{{- define "packlight.mounts" -}}
- {name: config, mountPath: /etc/packlight, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache/packlight}
{{- if include "packlight.modelVolume" . }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* (dict "root" $ "cacheSize" "4Gi" "apiKeys" true): the last for who checks keys. */}}
{{- define "packlight.volumes" -}}
- name: config
  projected:
    sources:
      - configMap:
          name: {{ include "packlight.configMap" .root }}
      {{- with .root.Values.redis.external.caSecret }}
      - secret:
          name: {{ . }}
          items: [{key: ca.crt, path: redis-ca/ca.crt}]
      {{- end }}
      {{- with include "packlight.tlsSecret" .root }}
      - secret:
          name: {{ . }}
          items:
            - {key: ca.crt, path: tls/ca.crt}
            - {key: tls.crt, path: tls/tls.crt}
            - {key: tls.key, path: tls/tls.key, mode: 0440}
      {{- end }}
      {{- with .root.Values.router.apiKeys }}
      {{- if and $.apiKeys .secret.name }}
      - secret:
          name: {{ .secret.name }}
          items: [{key: {{ .secret.key }}, path: api-keys}]
      {{- end }}
      {{- end }}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
  emptyDir: {sizeLimit: {{ .cacheSize }}}
{{- with include "packlight.modelVolume" .root }}
- name: models
  {{- . | nindent 2 }}
{{- end }}
{{- end }}
