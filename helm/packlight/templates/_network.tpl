{{/* Who may talk to whom: router to decode, decode to prefill, these three to Redis, Prometheus to their metrics. Ports of
others are numbers: not every network plugin resolves names in egress rules. */}}

{{/* (dict "root" $ "component" "router"): a list of one peer. */}}
{{- define "packlight.peer" -}}
- podSelector:
    matchLabels:
      {{- include "packlight.selector" . | nindent 6 }}
{{- end }}

{{- define "packlight.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "packlight.fullname" .root }}-{{ .component }}
  labels:
    {{- include "packlight.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "packlight.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end }}

{{- define "packlight.toDns" -}}
- to:
    - namespaceSelector: {}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}

{{- define "packlight.toRedis" -}}
{{- if .Values.redis.bundled.enabled -}}
- to:
    {{- include "packlight.peer" (dict "root" . "component" "redis") | nindent 4 }}
  ports:
    - {protocol: TCP, port: 6379}
{{- else -}}
- to:
    {{- toYaml .Values.networkPolicy.redisTo | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.redisPorts }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}
{{- end }}

{{/* Nothing unless spans are sent. */}}
{{- define "packlight.toCollector" -}}
{{- if eq (dig "telemetry" "traces" "none" .Values.config) "otlp" }}
- to:
    {{- toYaml .Values.networkPolicy.tracesTo | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.tracesPorts }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}
{{- end }}

{{/* (dict "root" $ "port" "metrics") */}}
{{- define "packlight.fromMonitoring" -}}
{{- with .root.Values.networkPolicy.metricsFrom }}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    - {protocol: TCP, port: {{ $.port }}}
{{- end }}
{{- end }}

{{/* (dict "root" $ "component" "prefill" "direction" "from"): ports of transports that connect outside gRPC. */}}
{{- define "packlight.transfer" -}}
{{- with .root.Values.networkPolicy.transferPorts }}
- {{ $.direction }}:
    {{- include "packlight.peer" $ | nindent 4 }}
  ports:
    {{- range . }}
    - {{ include "packlight.ports" . }}
    {{- end }}
{{- end }}
{{- end }}

{{/* A port, or a range of ports like "7000-7100". */}}
{{- define "packlight.ports" -}}
{{- if kindIs "string" . -}}
{{- $ends := splitList "-" . -}}
{protocol: TCP, port: {{ first $ends }}, endPort: {{ last $ends }}}
{{- else -}}
{protocol: TCP, port: {{ int . }}}
{{- end -}}
{{- end }}

{{- define "packlight.networkPolicies" -}}
{{- $router := dict "root" . "component" "router" -}}
{{- $decode := dict "root" . "component" "decode" -}}
{{- $prefill := dict "root" . "component" "prefill" -}}
---
{{ include "packlight.policyHead" $router }}
  ingress:
    {{- if .Values.networkPolicy.routerFrom }}
    - from:
        {{- toYaml .Values.networkPolicy.routerFrom | nindent 8 }}
        {{- include "packlight.peer" (dict "root" . "component" "test") | nindent 8 }}
      ports:
        - {protocol: TCP, port: http}
    {{- with include "packlight.fromMonitoring" (dict "root" . "port" "http") | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- else }}
    - ports:
        - {protocol: TCP, port: http}
    {{- end }}
  egress:
    {{- include "packlight.toDns" . | nindent 4 }}
    {{- include "packlight.toRedis" . | nindent 4 }}
    {{- with include "packlight.toCollector" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    - to:
        {{- include "packlight.peer" $decode | nindent 8 }}
      ports:
        - {protocol: TCP, port: {{ int .Values.config.decode.port }}}
---
{{ include "packlight.policyHead" $decode }}
  ingress:
    - from:
        {{- include "packlight.peer" $router | nindent 8 }}
      ports:
        - {protocol: TCP, port: grpc}
    {{- with include "packlight.fromMonitoring" (dict "root" . "port" "metrics") | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "packlight.transfer" (merge (dict "direction" "from") $prefill) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  egress:
    {{- include "packlight.toDns" . | nindent 4 }}
    {{- include "packlight.toRedis" . | nindent 4 }}
    {{- with include "packlight.toCollector" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    - to:
        {{- include "packlight.peer" $prefill | nindent 8 }}
      ports:
        - {protocol: TCP, port: {{ int .Values.config.prefill.port }}}
    {{- with include "packlight.transfer" (merge (dict "direction" "to") $prefill) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
---
{{ include "packlight.policyHead" $prefill }}
  ingress:
    - from:
        {{- include "packlight.peer" $decode | nindent 8 }}
      ports:
        - {protocol: TCP, port: grpc}
    {{- with include "packlight.fromMonitoring" (dict "root" . "port" "metrics") | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "packlight.transfer" (merge (dict "direction" "from") $decode) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  egress:
    {{- include "packlight.toDns" . | nindent 4 }}
    {{- include "packlight.toRedis" . | nindent 4 }}
    {{- with include "packlight.toCollector" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "packlight.transfer" (merge (dict "direction" "to") $decode) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- if .Values.redis.bundled.enabled }}
---
{{ include "packlight.policyHead" (dict "root" . "component" "redis") }}
  ingress:
    - from:
        {{- range list $router $prefill $decode }}
        {{- include "packlight.peer" . | nindent 8 }}
        {{- end }}
      ports:
        - {protocol: TCP, port: redis}
  egress: []
{{- end }}
{{- end }}
