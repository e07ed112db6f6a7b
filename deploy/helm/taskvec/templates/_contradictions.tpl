{{/* Values that each are right and together are not: refused when rendered, each by one sentence
     that names them. */}}
{{- define "taskvec.contradictions" -}}
{{- $claim := .Values.model.cache.claim -}}
{{- $scaling := .Values.autoscaling -}}
{{- $budget := .Values.podDisruptionBudget -}}
{{- $monitor := .Values.metrics.monitor -}}

{{- if and .Values.auth.keys .Values.auth.existingSecret -}}
{{- fail "auth.keys and auth.existingSecret both hold the API keys: set one of them." -}}
{{- end -}}
{{- $limits := list "TASKVEC_KEY_REQUESTS_PER_MINUTE" "TASKVEC_KEY_TOKENS_PER_MINUTE" "TASKVEC_KEY_CONCURRENCY" "TASKVEC_LIMITS_URL" -}}
{{- range $limits -}}
{{- if and (hasKey $.Values.config .) (not (include "taskvec.hasKeys" $)) -}}
{{- fail (printf "config.%s limits API keys, and there are none: set auth.keys or auth.existingSecret." .) -}}
{{- end -}}
{{- end -}}

{{- if and .Values.model.offline (include "taskvec.fromHub" .) (not $claim.existing) -}}
{{- fail (printf "model.offline, and model.name %s is a hub's: name a folder, or a claim with the hub's cache as model.cache.claim.existing." .Values.model.name) -}}
{{- end -}}
{{- if and .Values.model.offline .Values.model.hub.endpoint -}}
{{- fail "model.offline never asks a hub, and model.hub.endpoint names one: set one of them." -}}
{{- end -}}
{{- if and .Values.model.revision (not (include "taskvec.fromHub" .)) -}}
{{- fail (printf "model.revision is for hub ids, and model.name is %s." .Values.model.name) -}}
{{- end -}}
{{- if and $claim.enabled (not $claim.existing) (not (has "ReadWriteMany" $claim.accessModes)) -}}
{{- if or (gt (int .Values.replicas) 1) (and (include "taskvec.autoscaled" .) (ne .Values.mode "split")) -}}
{{- fail "model.cache.claim is for one node (model.cache.claim.accessModes has no ReadWriteMany), and several pods share it: set ReadWriteMany, or replicas to 1 without autoscaling." -}}
{{- end -}}
{{- if include "taskvec.surges" . -}}
{{- fail "model.cache.claim is for one node (model.cache.claim.accessModes has no ReadWriteMany), and strategy.rollingUpdate.maxSurge starts a second pod beside the first: set ReadWriteMany, or strategy.type to Recreate." -}}
{{- end -}}
{{- end -}}
{{- if and .Values.engine.cache.persistent $claim.existing -}}
{{- fail "engine.cache.persistent and model.cache.claim.existing both say where engine servers keep the model: set one of them." -}}
{{- end -}}

{{- $copies := mul (.Values.config.TASKVEC_TENSOR_PARALLEL | default 1 | int) (.Values.config.TASKVEC_DATA_PARALLEL | default 1 | int) -}}
{{- if and (eq .Values.mode "gpu") (gt (int .Values.gpu.count) 0) (ne $copies (int64 .Values.gpu.count)) -}}
{{- fail (printf "config.TASKVEC_TENSOR_PARALLEL times config.TASKVEC_DATA_PARALLEL is %d, and gpu.count is %d: a pod takes the GPUs that it uses." $copies (int .Values.gpu.count)) -}}
{{- end -}}

{{- if and $scaling.hpa.enabled $scaling.keda.enabled -}}
{{- fail "autoscaling.hpa.enabled and autoscaling.keda.enabled: KEDA makes a HorizontalPodAutoscaler itself, so enable one of them." -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas %d is more than autoscaling.maxReplicas %d." (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if and $scaling.keda.enabled (not $scaling.keda.serverAddress) -}}
{{- fail "autoscaling.keda.enabled needs autoscaling.keda.serverAddress: which Prometheus has the series?" -}}
{{- end -}}

{{- if $budget.enabled -}}
{{- if eq (eq (toString $budget.minAvailable) "") (eq (toString $budget.maxUnavailable) "") -}}
{{- fail "podDisruptionBudget takes one of minAvailable and maxUnavailable: leave the other empty." -}}
{{- end -}}
{{- end -}}

{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts." -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs: which Gateway does it belong to?" -}}
{{- end -}}

{{- if and $monitor (include "taskvec.hasKeys" .) (eq (toString .Values.config.TASKVEC_METRICS_WITHOUT_KEY) "false") -}}
{{- fail "metrics.monitor scrapes without a key, and config.TASKVEC_METRICS_WITHOUT_KEY false asks for one: set one of them." -}}
{{- end -}}
{{- if and .Values.metrics.rules (not (.Files.Get "files/alerts.yaml")) -}}
{{- fail "metrics.rules needs the chart's files/alerts.yaml, which is not there." -}}
{{- end -}}
{{- if and .Values.metrics.dashboards.enabled (not (.Files.Glob "files/dashboards/*.json")) -}}
{{- fail "metrics.dashboards.enabled needs the chart's files/dashboards/*.json, and there are none." -}}
{{- end -}}

{{- $set := include "taskvec.settings" . | fromYaml | keys | concat (list "TASKVEC_API_KEYS" "TASKVEC_KEYS_FILE" "TASKVEC_ENGINE_API_KEY" "HF_TOKEN" "HF_ENDPOINT") -}}
{{- range include "taskvec.hubEnv" . | fromYamlArray -}}
{{- $set = append $set .name -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if has .name $set -}}
{{- fail (printf "extraEnv sets %s, which other values set: see config, model, auth, tls, drain and engine.apiKey." .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
