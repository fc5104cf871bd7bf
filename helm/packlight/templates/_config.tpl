{{/* What the chart takes from `config`, and what it refuses because the parts would not fit together. */}}

{{- define "packlight.configMap" -}}
{{ include "packlight.fullname" . }}-config-{{ include "packlight.config" . | sha256sum | trunc 8 }}
{{- end }}

{{/* What the processes read: `config`, and where the certificate is mounted. */}}
{{- define "packlight.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if include "packlight.tlsSecret" . -}}
  {{- $folder := "/etc/packlight/tls" -}}
  {{- $files := dict "ca" (printf "%s/ca.crt" $folder) "cert" (printf "%s/tls.crt" $folder) "key" (printf "%s/tls.key" $folder) -}}
  {{- $_ := set $config "tls" (merge $files ($config.tls | default dict)) -}}
{{- end -}}
{{ toYaml $config }}
{{- end }}

{{/* The secret with the certificate of all pods, or nothing. */}}
{{- define "packlight.tlsSecret" -}}
{{- $own := ternary (printf "%s-tls" (include "packlight.fullname" .)) "" (not (empty .Values.tls.certManager.issuerRef)) -}}
{{ .Values.tls.secretName | default $own }}
{{- end }}

{{/* (dict "root" $ "role" "router"): whole seconds that a pod of the role may take to end. */}}
{{- define "packlight.gracePeriod" -}}
{{- $drain := get .root.Values.config .role | dig "drain_s" 30 | ceil | int -}}
{{- $before := ternary .root.Values.router.preStopSeconds 0 (eq .role "router") | int -}}
{{ add $before $drain (int .root.Values.terminationMarginSeconds) }}
{{- end }}

{{/* A worker that is silent for this long is dead, so one that is alive for longer is known to every router. */}}
{{- define "packlight.minReadySeconds" -}}
{{ .Values.config.fleet.ttl_s | ceil | int }}
{{- end }}

{{/* How long a proxy must let a stream last: longer than the router does, so that the router's error is seen. */}}
{{- define "packlight.streamSeconds" -}}
{{ add (ceil .Values.config.router.request_timeout_s | int) 10 }}
{{- end }}

{{- define "packlight.checks" -}}
{{- $config := .Values.config -}}
{{- range $section := list "index" "fleet" -}}
  {{- if ne (get $config $section).backend "redis" -}}
    {{- fail (printf "config.%s.backend: must be redis, got %v: these are several processes" $section (get $config $section).backend) -}}
  {{- end -}}
{{- end -}}
{{- range $role := list "router" "prefill" "decode" -}}
  {{- $section := get $config $role -}}
  {{- if has $section.host (list "127.0.0.1" "localhost" "::1") -}}
    {{- fail (printf "config.%s.host: %s is inside the pod only: use 0.0.0.0, or :: for IPv6" $role $section.host) -}}
  {{- end -}}
{{- end -}}
{{- if $config.index.redis_url -}}
  {{- fail "config.index.redis_url: would differ from the fleet's: use redis.external" -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
  {{- $pool := include "packlight.pool" (dict "root" $ "role" $role) | fromJson -}}
  {{- $ranks := include "packlight.ranks" (dict "root" $ "role" $role) | int -}}
  {{- if and $pool.gpu.count (gt $ranks (int $pool.gpu.count)) -}}
    {{- fail (printf "config.%s.tensor_parallel: %d ranks need as many GPUs: raise gpu.count, which is %v, or leave it at auto" $role $ranks $pool.gpu.count) -}}
  {{- end -}}
  {{- $scaling := $pool.autoscaling -}}
  {{- if gt $scaling.minReplicas $scaling.maxReplicas -}}
    {{- fail (printf "%s.autoscaling: minReplicas %v is more than maxReplicas %v" $role $scaling.minReplicas $scaling.maxReplicas) -}}
  {{- end -}}
{{- end -}}
{{- $keys := .Values.router.apiKeys.secret.name -}}
{{- if and $keys (ne ($config.router.api_keys_file | default "") "/etc/packlight/api-keys") -}}
  {{- fail "config.router.api_keys_file: must be /etc/packlight/api-keys, where router.apiKeys.secret is mounted" -}}
{{- end -}}
{{- if and $config.router.api_keys_file (not $keys) -}}
  {{- fail "config.router.api_keys_file: give the file's secret, router.apiKeys.secret.name" -}}
{{- end -}}
{{- include "packlight.checkPorts" . -}}
{{- include "packlight.checkTls" . -}}
{{- include "packlight.checkRedis" . -}}
{{- include "packlight.checkModel" . -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
  {{- fail "ingress.hosts: name at least one host" -}}
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) -}}
  {{- fail "gateway.parentRefs: name at least one gateway" -}}
{{- end -}}
{{- end }}

{{- define "packlight.checkPorts" -}}
{{- range $setting := list "router.port" "prefill.port" "prefill.metrics_port" "decode.port" "decode.metrics_port" -}}
  {{- $parts := splitList "." $setting -}}
  {{- if not (dig (first $parts) (last $parts) 0 $.Values.config) -}}
    {{- fail (printf "config.%s: give a port, such as 9001: policies and probes must know it" $setting) -}}
  {{- end -}}
{{- end -}}
{{- range $ports := .Values.networkPolicy.transferPorts -}}
  {{- $ends := splitList "-" (toString $ports) -}}
  {{- if or (gt (int (first $ends)) (int (last $ends))) (gt (int (last $ends)) 65535) -}}
    {{- fail (printf "networkPolicy.transferPorts: %v is no range of ports: the first, a dash, and the last, at most 65535" $ports) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "packlight.checkTls" -}}
{{- $tls := .Values.config.tls | default dict -}}
{{- range $file := list "ca" "cert" "key" -}}
  {{- if get $tls $file -}}
    {{- fail (printf "config.tls.%s: give the secret, tls.secretName: the chart mounts it and says where" $file) -}}
  {{- end -}}
{{- end -}}
{{- $isOn := and (include "packlight.tlsSecret" .) (not $tls.allow_plain_transports) -}}
{{- range $name := .Values.config.decode.transports -}}
  {{- if and $isOn (has $name (list "process_group" "nixl")) -}}
    {{- fail (printf "config.decode.transports: TLS does not cover %s: leave it out, or set config.tls.allow_plain_transports" $name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "packlight.checkRedis" -}}
{{- $external := or .Values.redis.external.urlSecret.name .Values.redis.external.url -}}
{{- if and $external .Values.redis.bundled.enabled -}}
  {{- fail "redis: bundled.enabled and external are both given: switch one off" -}}
{{- end -}}
{{- if not (or $external .Values.redis.bundled.enabled) -}}
  {{- fail "redis: give redis.external.urlSecret.name (or .url), or set redis.bundled.enabled" -}}
{{- end -}}
{{- end }}

{{- define "packlight.checkModel" -}}
{{- $path := .Values.config.model.path -}}
{{- $download := .Values.model.download -}}
{{- if and $download.enabled .Values.model.volume -}}
  {{- fail "model: volume and download.enabled are both given: both would be /models" -}}
{{- end -}}
{{- if and $download.enabled (not (and $download.repo $download.folder)) -}}
  {{- fail "model.download: repo and folder are needed" -}}
{{- end -}}
{{- if and $download.enabled (ne $path (printf "/models/%s" $download.folder)) -}}
  {{- fail (printf "config.model.path: must be /models/%s, where model.download puts it, got %s" $download.folder $path) -}}
{{- end -}}
{{- if and (hasPrefix "/models" $path) (not (or $download.enabled .Values.model.volume)) -}}
  {{- fail (printf "config.model.path: %s needs model.volume or model.download" $path) -}}
{{- end -}}
{{- if and (contains "/" $path) (not (hasPrefix "/" $path)) -}}
  {{- fail (printf "config.model.path: pods do not download for themselves: use model.download.repo: %s" $path) -}}
{{- end -}}
{{- end }}
