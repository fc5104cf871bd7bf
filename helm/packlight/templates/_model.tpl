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
    # The first process of a container does not notice SIGTERM unless it says what to do.
    command: [sh, -c, 'trap "exit 1" TERM; until [ -e "$0" ]; do echo "waiting for $0"; sleep 5; done', {{ include "packlight.downloadMarker" .root | quote }}]
    securityContext:
      {{- include "packlight.containerSecurity" list | nindent 6 }}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {memory: 64Mi}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* The spec of the job that downloads. */}}
{{- define "packlight.downloadJob" -}}
{{- $names := dict "root" $ "component" "model" -}}
{{- $download := .Values.model.download -}}
backoffLimit: 4
activeDeadlineSeconds: {{ int $download.timeoutSeconds }}
template:
  metadata:
    labels:
      {{- include "packlight.podLabels" $names | nindent 6 }}
  spec:
    {{- include "packlight.podSettings" . | nindent 4 }}
    restartPolicy: Never
    containers:
      - name: download
        image: {{ include "packlight.image" (dict "root" $ "image" $.Values.router.image) }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        command: [python, -c]
        args:
          - |
            {{- .Files.Get "scripts/download_model.py" | nindent 12 }}
        env:
          - {name: MODEL_REPO, value: {{ $download.repo | quote }}}
          - {name: MODEL_REVISION, value: {{ $download.revision | quote }}}
          - {name: MODEL_FILES, value: {{ join " " $download.files | quote }}}
          - {name: MODEL_MARKER, value: {{ include "packlight.downloadMarker" . | quote }}}
          - {name: HF_HOME, value: /tmp/huggingface}
          {{- with $download.tokenSecret }}
          {{- if .name }}
          - name: HF_TOKEN
            valueFrom:
              secretKeyRef:
                name: {{ .name }}
                key: {{ .key }}
          {{- end }}
          {{- end }}
        securityContext:
          {{- include "packlight.containerSecurity" list | nindent 10 }}
        resources:
          {{- toYaml $download.resources | nindent 10 }}
        volumeMounts:
          - {name: models, mountPath: /models}
          - {name: tmp, mountPath: /tmp}
    volumes:
      - name: models
        persistentVolumeClaim:
          claimName: {{ include "packlight.modelClaim" . }}
      - name: tmp
        emptyDir: {sizeLimit: 4Gi}
{{- end }}
