{{/* Where a model comes from: the image, a volume, or a claim that a job fills. */}}

{{/* Names a download by what it asks for; empty when there is none. */}}
{{- define "packlight.downloadKey" -}}
{{- with .Values.model.download -}}
{{- if .enabled -}}
{{ toJson (list .repo .revision .folder .files) | sha256sum | trunc 8 }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "packlight.modelClaim" -}}
{{ .Values.model.download.claim.existing | default (printf "%s-models" (include "packlight.fullname" .)) }}
{{- end }}

{{/* A file that is there when the whole download is. */}}
{{- define "packlight.downloadMarker" -}}
/models/{{ .Values.model.download.folder }}/.complete-{{ include "packlight.downloadKey" . }}
{{- end }}

{{/* The source of the volume at /models; empty when the image brings the model. */}}
{{- define "packlight.modelVolume" -}}
{{- if .Values.model.download.enabled -}}
persistentVolumeClaim:
  claimName: {{ include "packlight.modelClaim" . }}
{{- else if .Values.model.volume -}}
{{ toYaml .Values.model.volume }}
{{- end -}}
{{- end }}

{{/* (dict "root" $ "image" pool.image): nothing starts on half a model. */}}
{{- define "packlight.waitForModel" -}}
{{- if .root.Values.model.download.enabled }}
initContainers:
  - name: wait-for-model
    image: {{ include "packlight.image" . }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [sh, -c, 'until [ -e "$0" ]; do echo "waiting for $0"; sleep 5; done', {{ include "packlight.downloadMarker" .root | quote }}]
    securityContext:
      {{- include "packlight.containerSecurity" list | nindent 6 }}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {memory: 64Mi}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}
