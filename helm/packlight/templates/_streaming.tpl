{{/* What proxies must be told so that an answer streams: no buffering, and no time-out shorter than the router's. */}}

{{- define "packlight.streamingAnnotations" -}}
{{- $seconds := include "packlight.streamSeconds" . -}}
{{- if eq .Values.ingress.controller "nginx" -}}
nginx.ingress.kubernetes.io/proxy-buffering: "off"
nginx.ingress.kubernetes.io/proxy-http-version: "1.1"
nginx.ingress.kubernetes.io/proxy-read-timeout: {{ $seconds | quote }}
nginx.ingress.kubernetes.io/proxy-send-timeout: {{ $seconds | quote }}
nginx.ingress.kubernetes.io/proxy-body-size: {{ int64 .Values.config.router.max_body_bytes | quote }}
{{- else if eq .Values.ingress.controller "haproxy" -}}
haproxy.org/timeout-server: {{ printf "%ss" $seconds }}
{{- else if eq .Values.ingress.controller "alb" -}}
alb.ingress.kubernetes.io/load-balancer-attributes: idle_timeout.timeout_seconds={{ $seconds }}
alb.ingress.kubernetes.io/healthcheck-path: /health/ready
alb.ingress.kubernetes.io/target-type: ip
{{- end -}}
{{- end }}
