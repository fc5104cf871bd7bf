{{/* When a pod has started, lives, and can serve. */}}

{{/* (dict "root" $ "pod" values): a rollout that is not getting on is said to fail only when a start, or the download
that it waits for, could not be. */}}
{{- define "packlight.progressDeadline" -}}
{{- $download := .root.Values.model.download -}}
{{- $waiting := ternary (int $download.timeoutSeconds) 0 $download.enabled -}}
{{ add $waiting (int .pod.startupTimeoutSeconds) (include "packlight.minReadySeconds" .root | int) 300 }}
{{- end }}

{{/* The router listens once its model is read, and is ready while workers are alive that can serve and it is not
draining. Only a router whose event loop answers nothing at all is restarted. */}}
{{- define "packlight.routerProbes" -}}
startupProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 2
  failureThreshold: {{ div (add (int .startupTimeoutSeconds) 1) 2 }}
readinessProbe:
  httpGet: {path: /health/ready, port: http}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* A worker has started when its weights are loaded and its gRPC port is open, lives while its event loop goes round,
and is ready while the fleet's registry is there and it is not draining. Rollouts wait for that. Whether it gets
requests is not decided here: routers go by its heartbeats. */}}
{{- define "packlight.workerProbes" -}}
startupProbe:
  httpGet: {path: /health/startup, port: metrics}
  periodSeconds: 2
  failureThreshold: {{ div (add (int .startupTimeoutSeconds) 1) 2 }}
readinessProbe:
  httpGet: {path: /health/ready, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 2
livenessProbe:
  httpGet: {path: /health/live, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}
