{{/* What objects are called and labelled, which images they run, and what makes a revision. */}}

{{- define "packlight.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "packlight.fullname" -}}
{{- $name := include "packlight.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{ .Values.fullnameOverride | default $full | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* (dict "root" $ "component" "router"): what selectors match. It never changes in the life of a release. */}}
{{- define "packlight.selector" -}}
app.kubernetes.io/name: {{ include "packlight.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "packlight.labels" -}}
{{ include "packlight.selector" . }}
app.kubernetes.io/part-of: packlight
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of pods: nothing that would restart them without need. */}}
{{- define "packlight.podLabels" -}}
{{ include "packlight.selector" . }}
app.kubernetes.io/part-of: packlight
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* (dict "root" $ "image" (dict "repository" .. "digest" ..)) */}}
{{- define "packlight.image" -}}
{{- $registry := .root.Values.image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") -}}
{{- if .image.digest -}}
{{ printf "%s@%s" $name .image.digest }}
{{- else -}}
{{ printf "%s:%s" $name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* A pool's values: `workers`, and what `prefill` or `decode` say otherwise. As JSON. */}}
{{- define "packlight.pool" -}}
{{- $pool := include "packlight.overlay" (dict "base" .root.Values.workers "over" (get .root.Values .role)) | fromJson -}}
{{- if eq (toString $pool.gpu.count) "auto" -}}
  {{- $hasGPUs := .root.Values.config | dig "model" "device" "cpu" | toString | hasPrefix "cuda" -}}
  {{- $_ := set $pool.gpu "count" (ternary (include "packlight.ranks" . | int) 0 $hasGPUs) -}}
{{- end -}}
{{ toJson $pool }}
{{- end }}

{{/* (dict "root" $ "role" "decode"): the processes that the model is divided among in each pod. */}}
{{- define "packlight.ranks" -}}
{{ get .root.Values.config .role | dig "tensor_parallel" 1 | int }}
{{- end }}

{{/* Mappings merged, everything else replaced. Sprig's merges take `0`, `false` and `""` for not said. */}}
{{- define "packlight.overlay" -}}
{{- $merged := deepCopy .base -}}
{{- range $key, $value := .over -}}
  {{- $under := get $merged $key -}}
  {{- if and (kindIs "map" $value) (kindIs "map" $under) -}}
    {{- $_ := set $merged $key (include "packlight.overlay" (dict "base" $under "over" $value) | fromJson) -}}
  {{- else -}}
    {{- $_ := set $merged $key $value -}}
  {{- end -}}
{{- end -}}
{{ toJson $merged }}
{{- end }}

{{/* The same for both pools of a release, other as soon as they would compute something else. */}}
{{- define "packlight.revision" -}}
{{- if .Values.revision -}}
{{ .Values.revision }}
{{- else -}}
{{- $images := list -}}
{{- range $role := list "prefill" "decode" -}}
  {{- $pool := include "packlight.pool" (dict "root" $ "role" $role) | fromJson -}}
  {{- $images = append $images (include "packlight.image" (dict "root" $ "image" $pool.image)) -}}
{{- end -}}
{{- $parts := list .Chart.Version $images (include "packlight.config" . | fromYaml) .Values.model.volume (include "packlight.downloadKey" .) -}}
{{ toJson $parts | sha256sum | trunc 12 }}
{{- end -}}
{{- end }}

{{- define "packlight.serviceAccount" -}}
{{- $own := ternary (include "packlight.fullname" .) "default" .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default $own }}
{{- end }}
