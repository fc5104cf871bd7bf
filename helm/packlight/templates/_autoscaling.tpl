{{/* A pool grows with what waits and with what is held. Pages that only cache a prefix are free for the asking. */}}

{{- define "packlight.poolBehavior" -}}
scaleDown:
  stabilizationWindowSeconds: {{ int .scaleDownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end }}

{{- define "packlight.hpaPool" -}}
{{- $fullname := printf "%s-%s" (include "packlight.fullname" .root) .role -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "packlight.labels" (dict "root" .root "component" .role) | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ $fullname }}
  minReplicas: {{ int .scaling.minReplicas }}
  maxReplicas: {{ int .scaling.maxReplicas }}
  behavior:
    {{- include "packlight.poolBehavior" .scaling | nindent 4 }}
  metrics:
    - type: Pods
      pods:
        metric:
          name: packlight_{{ .role }}_queued_requests
        target: {type: AverageValue, averageValue: {{ .scaling.queuedRequests | quote }}}
    {{- if .scaling.heldPagesPerPod }}
    - type: Pods
      pods:
        metric:
          name: packlight_{{ .role }}_pages
          selector:
            matchLabels: {state: held}
        target: {type: AverageValue, averageValue: {{ int .scaling.heldPagesPerPod | quote }}}
    {{- end }}
{{- end }}

{{- define "packlight.kedaPool" -}}
{{- $fullname := printf "%s-%s" (include "packlight.fullname" .root) .role -}}
{{- $labels := printf "namespace=%q,service=%q" .root.Release.Namespace $fullname -}}
{{- $pages := printf "packlight_%s_pages" .role -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "packlight.labels" (dict "root" .root "component" .role) | nindent 4 }}
spec:
  scaleTargetRef:
    name: {{ $fullname }}
  minReplicaCount: {{ int .scaling.minReplicas }}
  maxReplicaCount: {{ int .scaling.maxReplicas }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "packlight.poolBehavior" .scaling | nindent 8 }}
  triggers:
    - type: prometheus
      name: queued
      metricType: AverageValue
      metadata:
        serverAddress: {{ .root.Values.autoscaling.prometheusUrl }}
        query: {{ printf "sum(packlight_%s_queued_requests{%s})" .role $labels | squote }}
        threshold: {{ .scaling.queuedRequests | quote }}
    - type: prometheus
      name: held-pages
      metricType: Value
      metadata:
        serverAddress: {{ .root.Values.autoscaling.prometheusUrl }}
        query: {{ printf "sum(%s{state=\"held\",%s}) / sum(%s{%s})" $pages $labels $pages $labels | squote }}
        threshold: {{ .scaling.heldPages | quote }}
{{- end }}
