{{/* A pool of workers: a Deployment and a headless Service for its metrics. Prefill and decode differ in their values
only. (dict "root" $ "role" "prefill") */}}

{{- define "packlight.worker" -}}
{{- $pool := include "packlight.pool" . | fromJson -}}
{{- $names := dict "root" .root "component" .role -}}
{{- $fullname := printf "%s-%s" (include "packlight.fullname" .root) .role -}}
{{- $section := get .root.Values.config .role -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "packlight.labels" $names | nindent 4 }}
spec:
  {{- if eq $pool.autoscaling.kind "none" }}
  replicas: {{ int $pool.replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  minReadySeconds: {{ include "packlight.minReadySeconds" .root }}
  progressDeadlineSeconds: {{ include "packlight.progressDeadline" (dict "root" .root "pod" $pool) }}
  strategy:
    rollingUpdate:
      {{- toYaml $pool.rollout | nindent 6 }}
  selector:
    matchLabels:
      {{- include "packlight.selector" $names | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "packlight.podLabels" $names | nindent 8 }}
        packlight/revision: {{ include "packlight.revision" .root | quote }}
        {{- with $pool.labels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with include "packlight.workerAnnotations" $pool | trim }}
      annotations:
        {{- . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "packlight.podSettings" .root | nindent 6 }}
      terminationGracePeriodSeconds: {{ include "packlight.gracePeriod" . }}
      {{- with include "packlight.placement" (dict "root" .root "component" .role "pod" $pool) | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with include "packlight.waitForModel" (dict "root" .root "image" $pool.image) | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      containers:
        - name: {{ .role }}
          image: {{ include "packlight.image" (dict "root" .root "image" $pool.image) }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          args: [{{ .role }}, --config, /etc/packlight/packlight.yaml]
          env:
            {{- include "packlight.env" .root | nindent 12 }}
            - name: PACKLIGHT_HEALTH_URL
              value: http://127.0.0.1:{{ int $section.metrics_port }}/health/ready
            {{- with include "packlight.rdmaEnv" $pool | trim }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- with $pool.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: grpc, containerPort: {{ int $section.port }}}
            - {name: metrics, containerPort: {{ int $section.metrics_port }}}
          {{- include "packlight.workerProbes" $pool | nindent 10 }}
          securityContext:
            {{- include "packlight.containerSecurity" (ternary (list "IPC_LOCK") list $pool.rdma.enabled) | nindent 12 }}
          resources:
            {{- include "packlight.workerResources" $pool | nindent 12 }}
          volumeMounts:
            {{- include "packlight.mounts" .root | nindent 12 }}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        {{- include "packlight.volumes" (dict "root" .root "cacheSize" $pool.cacheSize) | nindent 8 }}
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ $pool.sharedMemory }}}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "packlight.labels" $names | nindent 4 }}
spec:
  # Routers find workers in Redis. This names them for metrics, those that start or drain too.
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "packlight.selector" $names | nindent 4 }}
  ports:
    - {name: grpc, port: {{ int $section.port }}, targetPort: grpc}
    - {name: metrics, port: {{ int $section.metrics_port }}, targetPort: metrics}
{{- end }}

{{- define "packlight.workerAnnotations" -}}
{{- if and .rdma.enabled .rdma.networks }}
k8s.v1.cni.cncf.io/networks: {{ .rdma.networks | quote }}
{{- end }}
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "packlight.rdmaEnv" -}}
{{- if .rdma.enabled }}
{{- range $name, $value := .rdma.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Devices are limits: Kubernetes makes requests of them. */}}
{{- define "packlight.workerResources" -}}
{{- $limits := deepCopy (.resources.limits | default dict) -}}
{{- if .gpu.count -}}
  {{- $_ := set $limits .gpu.resource (int .gpu.count) -}}
{{- end -}}
{{- if .rdma.enabled -}}
  {{- $_ := set $limits .rdma.resource (int .rdma.count) -}}
{{- end -}}
{{ toYaml (set (deepCopy .resources) "limits" $limits) }}
{{- end }}
