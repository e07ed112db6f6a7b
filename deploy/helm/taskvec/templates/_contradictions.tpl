{{/* Valid values that contradict each other: rendering fails with one sentence that names them. */}}
{{- define "taskvec.contradictions" -}}
{{- $claim := .Values.model.cache.claim -}}
{{- $scaling := .Values.autoscaling -}}
{{- $budget := .Values.podDisruptionBudget -}}
{{- $monitor := .Values.metrics.monitor -}}

{{- if and .Values.auth.keys .Values.auth.existingSecret -}}
{{- fail "auth.keys and auth.existingSecret both contain the API keys: set only one of them." -}}
{{- end -}}
{{- $limits := list "TASKVEC_KEY_REQUESTS_PER_MINUTE" "TASKVEC_KEY_TOKENS_PER_MINUTE" "TASKVEC_KEY_CONCURRENCY" "TASKVEC_LIMITS_URL" -}}
{{- range $limits -}}
{{- if and (hasKey $.Values.config .) (not (include "taskvec.hasKeys" $)) -}}
{{- fail (printf "config.%s limits API keys, but no keys are configured: set auth.keys or auth.existingSecret." .) -}}
{{- end -}}
{{- end -}}

{{- if and .Values.model.offline (include "taskvec.fromHub" .) (not $claim.existing) -}}
{{- fail (printf "model.offline is set, but model.name %s is a hub id: use a folder, or set model.cache.claim.existing to a claim with the hub's cache." .Values.model.name) -}}
{{- end -}}
{{- if and .Values.model.offline .Values.model.hub.endpoint -}}
{{- fail "model.offline prevents access to a hub, but model.hub.endpoint names one: set only one of them." -}}
{{- end -}}
{{- if and .Values.model.revision (not (include "taskvec.fromHub" .)) -}}
{{- fail (printf "model.revision applies only to hub ids, but model.name is %s." .Values.model.name) -}}
{{- end -}}
{{- if and $claim.enabled (not $claim.existing) (not (has "ReadWriteMany" $claim.accessModes)) -}}
{{- if or (gt (int .Values.replicas) 1) (and (include "taskvec.autoscaled" .) (ne .Values.mode "split")) -}}
{{- fail "model.cache.claim is for one node (model.cache.claim.accessModes does not contain ReadWriteMany), but several pods use it: set ReadWriteMany, or replicas to 1 without autoscaling." -}}
{{- end -}}
{{- if include "taskvec.surges" . -}}
{{- fail "model.cache.claim is for one node (model.cache.claim.accessModes does not contain ReadWriteMany), but strategy.rollingUpdate.maxSurge starts a second pod before the first one ends: set ReadWriteMany, or strategy.type to Recreate." -}}
{{- end -}}
{{- end -}}
{{- if and .Values.engine.cache.persistent $claim.existing -}}
{{- fail "engine.cache.persistent and model.cache.claim.existing both define where engine servers store the model: set only one of them." -}}
{{- end -}}

{{- $copies := mul (.Values.config.TASKVEC_TENSOR_PARALLEL | default 1 | int) (.Values.config.TASKVEC_DATA_PARALLEL | default 1 | int) -}}
{{- if and (eq .Values.mode "gpu") (gt (int .Values.gpu.count) 0) (ne $copies (int64 .Values.gpu.count)) -}}
{{- fail (printf "config.TASKVEC_TENSOR_PARALLEL times config.TASKVEC_DATA_PARALLEL is %d, but gpu.count is %d: a pod must request exactly the GPUs that it uses." $copies (int .Values.gpu.count)) -}}
{{- end -}}

{{- if and $scaling.hpa.enabled $scaling.keda.enabled -}}
{{- fail "autoscaling.hpa.enabled and autoscaling.keda.enabled are both set, but KEDA creates a HorizontalPodAutoscaler itself: enable only one of them." -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas %d is greater than autoscaling.maxReplicas %d." (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if and $scaling.keda.enabled (not $scaling.keda.serverAddress) -}}
{{- fail "autoscaling.keda.enabled requires autoscaling.keda.serverAddress, the URL of the Prometheus that has the metrics." -}}
{{- end -}}

{{- if $budget.enabled -}}
{{- if eq (eq (toString $budget.minAvailable) "") (eq (toString $budget.maxUnavailable) "") -}}
{{- fail "podDisruptionBudget requires exactly one of minAvailable and maxUnavailable: leave the other one empty." -}}
{{- end -}}
{{- end -}}

{{- if and (has .Values.service.ipFamilyPolicy (list "PreferDualStack" "RequireDualStack")) (ne .Values.service.host "::") -}}
{{- fail (printf "service.ipFamilyPolicy %s gives the Service IPv6 addresses, but the pods listen on service.host %s: set service.host to ::." .Values.service.ipFamilyPolicy .Values.service.host) -}}
{{- end -}}

{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled requires ingress.hosts." -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled requires httpRoute.parentRefs, the Gateways of the route." -}}
{{- end -}}

{{- if and $monitor (include "taskvec.hasKeys" .) (eq (toString .Values.config.TASKVEC_METRICS_WITHOUT_KEY) "false") -}}
{{- fail "metrics.monitor scrapes without an API key, but config.TASKVEC_METRICS_WITHOUT_KEY false requires one: set only one of them." -}}
{{- end -}}
{{- if and .Values.metrics.rules (not (.Files.Get "files/alerts.yaml")) -}}
{{- fail "metrics.rules requires the chart's files/alerts.yaml, which is missing." -}}
{{- end -}}
{{- if and .Values.metrics.dashboards.enabled (not (.Files.Glob "files/dashboards/*.json")) -}}
{{- fail "metrics.dashboards.enabled requires files in the chart's files/dashboards/*.json, but the folder is empty." -}}
{{- end -}}

{{- $set := include "taskvec.settings" . | fromYaml | keys | concat (list "TASKVEC_API_KEYS" "TASKVEC_KEYS_FILE" "TASKVEC_ENGINE_API_KEY" "HF_TOKEN" "HF_ENDPOINT") -}}
{{- range include "taskvec.hubEnv" . | fromYamlArray -}}
{{- $set = append $set .name -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if has .name $set -}}
{{- fail (printf "extraEnv sets %s, which is derived from other values: see config, model, auth, tls, drain and engine.apiKey." .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
