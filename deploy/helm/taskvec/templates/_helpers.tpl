{{- define "taskvec.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "taskvec.fullname" -}}
{{- $name := include "taskvec.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "taskvec.engineName" -}}
{{- include "taskvec.fullname" . }}-engine
{{- end -}}

{{- define "taskvec.selectorLabels" -}}
app.kubernetes.io/name: {{ include "taskvec.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Selector of the Deployment's pods, which clients reach. */}}
{{- define "taskvec.gatewaySelector" -}}
{{ include "taskvec.selectorLabels" . }}
app.kubernetes.io/component: gateway
{{- end -}}

{{- define "taskvec.engineSelector" -}}
{{ include "taskvec.selectorLabels" . }}
app.kubernetes.io/component: engine
{{- end -}}

{{- define "taskvec.labels" -}}
{{ include "taskvec.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Target of the Dockerfile that the Deployment runs. */}}
{{- define "taskvec.target" -}}
{{- get (dict "cpu" "cpu" "gpu" "vllm" "split" "gateway") .Values.mode -}}
{{- end -}}

{{/* Name of an image. Arguments: root, image (the values), target. */}}
{{- define "taskvec.image" -}}
{{- $repository := .image.repository | default .root.Values.image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default (printf "%s-%s" .root.Chart.AppVersion .target)) -}}
{{- end -}}
{{- end -}}

{{- define "taskvec.gatewayImage" -}}
{{- include "taskvec.image" (dict "root" . "image" .Values.image "target" (include "taskvec.target" .)) -}}
{{- end -}}

{{- define "taskvec.engineImage" -}}
{{- include "taskvec.image" (dict "root" . "image" .Values.engine.image "target" "vllm") -}}
{{- end -}}

{{- define "taskvec.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "taskvec.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* "true" if a rollout starts an additional pod. */}}
{{- define "taskvec.surges" -}}
{{- if and (ne .Values.strategy.type "Recreate") (not (has (dig "rollingUpdate" "maxSurge" "25%" .Values.strategy | toString) (list "0" "0%"))) }}true{{ end -}}
{{- end -}}

{{/* "true" if API keys are required. */}}
{{- define "taskvec.hasKeys" -}}
{{- if or .Values.auth.keys .Values.auth.existingSecret }}true{{ end -}}
{{- end -}}

{{- define "taskvec.keysSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "taskvec.fullname" .)) -}}
{{- end -}}

{{- define "taskvec.scheme" -}}
{{- if .Values.tls.existingSecret }}https{{ else }}http{{ end -}}
{{- end -}}

{{/* "true" if the model is a hub id: neither built in nor a folder. */}}
{{- define "taskvec.fromHub" -}}
{{- if and (contains "/" .Values.model.name) (not (hasPrefix "/" .Values.model.name)) }}true{{ end -}}
{{- end -}}

{{/* "true" if an init container downloads the model. */}}
{{- define "taskvec.downloads" -}}
{{- if and (include "taskvec.fromHub" .) .Values.model.download (not .Values.model.offline) }}true{{ end -}}
{{- end -}}

{{- define "taskvec.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}true{{ end -}}
{{- end -}}

{{/* Settings of taskvec without secrets, as a YAML mapping. */}}
{{- define "taskvec.settings" -}}
{{- $settings := dict
  "TASKVEC_HOST" .Values.service.host
  "TASKVEC_PORT" "8080"
  "TASKVEC_MODEL" .Values.model.name
  "TASKVEC_CACHE_DIR" "/cache/taskvec"
  "TASKVEC_DRAIN_GRACE" (include "taskvec.number" .Values.drain.grace)
  "TASKVEC_DRAIN_TIMEOUT" (include "taskvec.number" .Values.drain.timeout)
  "TASKVEC_ENGINE" (get (dict "cpu" "packed" "gpu" "vllm" "split" "remote") .Values.mode) -}}
{{- with .Values.model.revision }}{{ $_ := set $settings "TASKVEC_REVISION" . }}{{ end -}}
{{- if eq .Values.mode "cpu" }}{{ $_ := set $settings "TASKVEC_DEVICE" "cpu" }}{{ end -}}
{{- if eq .Values.mode "split" }}
{{- $url := printf "dns://%s.%s.svc:8000" (include "taskvec.engineName" .) .Release.Namespace }}
{{- $_ := set $settings "TASKVEC_ENGINE_URL" $url }}
{{- end -}}
{{- if include "taskvec.hasKeys" . }}
{{- $_ := set $settings "TASKVEC_KEYS_FILE" (printf "/etc/taskvec/keys/%s" .Values.auth.key) }}
{{- end -}}
{{- if .Values.tls.existingSecret }}
{{- $_ := set $settings "TASKVEC_TLS_CERT" "/etc/taskvec/tls/tls.crt" }}
{{- $_ := set $settings "TASKVEC_TLS_KEY" "/etc/taskvec/tls/tls.key" }}
{{- end -}}
{{- range $name, $value := .Values.config }}
{{- $_ := set $settings $name (ternary ($value | toJson) (include "taskvec.number" $value) (kindIs "map" $value)) }}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* A scalar as text. Helm reads whole numbers as floats, which print as 1e+06. */}}
{{- define "taskvec.number" -}}
{{- if kindIs "float64" . -}}
{{- if eq . (floor .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Location of the hub and its cache, for every container that reads a model. */}}
{{- define "taskvec.hubEnv" -}}
- name: HOME # keeps vLLM's compiled code as well
  value: /cache
- name: XDG_CACHE_HOME
  value: /cache
- name: USER # torch needs a user name, and the image may have none for the id in podSecurityContext
  value: taskvec
- name: HF_HOME
  value: /cache/huggingface
- name: HF_HUB_OFFLINE
  value: {{ ternary "1" "0" .Values.model.offline | quote }}
{{- with .Values.model.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.model.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.model.hub.key }}
{{- end }}
{{- end -}}

{{/* `taskvec engine-args`. Init containers run it for its side effects: it downloads and reads the
     model, and writes the copy that vLLM reads. Quoted for a shell; the schema forbids quotes in
     names. */}}
{{- define "taskvec.engineArgs" -}}
taskvec engine-args '{{ .Values.model.name }}' --cache-dir /cache/taskvec
{{- with .Values.model.revision }} --revision '{{ . }}'{{ end }}
{{- with .Values.config.TASKVEC_TASK_NAME }} --task-name '{{ . }}'{{ end }}
{{- if eq .Values.mode "split" }} --device {{ .Values.engine.device }}
{{- with .Values.config.TASKVEC_DTYPE }} --dtype {{ . }}{{ end }}
{{- with .Values.config.TASKVEC_MAX_TOKENS }} --max-tokens {{ int64 . }}{{ end }}
{{- end }}
{{- end -}}

{{/* Init container that downloads the model. Arguments: root, image. */}}
{{- define "taskvec.downloadContainer" -}}
- name: download
  image: {{ .image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [/bin/sh, -ec]
  args:
    - exec {{ include "taskvec.engineArgs" .root }}
  env:
    {{- include "taskvec.hubEnv" .root | nindent 4 }}
  resources: # the sum of what one file in flight and the check of the weights take
    requests:
      cpu: 500m
      memory: 512Mi
    limits:
      memory: 2Gi
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  volumeMounts:
    {{- include "taskvec.commonMounts" .root | nindent 4 }}
{{- end -}}

{{- define "taskvec.commonMounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* First part of the spec of all pods. */}}
{{- define "taskvec.podHead" -}}
serviceAccountName: {{ include "taskvec.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false # a Service named taskvec would set TASKVEC_PORT
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{/* Topology spread constraints. Arguments: root, selector (text). */}}
{{- define "taskvec.spread" -}}
{{- with .root.Values.topologySpread }}
{{- if .enabled }}
topologySpreadConstraints:
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Tolerations of pods with GPUs, followed by additional ones. Arguments: root, tolerations. */}}
{{- define "taskvec.gpuTolerations" -}}
{{- with .root.Values.gpu }}
{{- if and .tolerate (gt (int .count) 0) }}
- key: {{ .resourceName }}
  operator: Exists
  effect: NoSchedule
{{- end }}
{{- end }}
{{- with .tolerations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Resources of a pod with vLLM. */}}
{{- define "taskvec.gpuResources" -}}
{{- $gpus := int .Values.gpu.count -}}
{{- $resources := deepCopy .Values.gpu.resources -}}
{{- if gt $gpus 0 -}}
{{- $given := dict .Values.gpu.resourceName $gpus -}}
{{- $_ := set $resources "limits" (merge $given ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "taskvec.probe" -}}
httpGet:
  path: {{ .path }}
  port: http
  scheme: {{ .scheme | upper }}
{{ toYaml .probe }}
{{- end -}}
