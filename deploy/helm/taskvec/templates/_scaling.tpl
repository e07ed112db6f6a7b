{{/* Kind and name of the scaled resource. */}}
{{- define "taskvec.scaled" -}}
apiVersion: apps/v1
{{- if eq .Values.mode "split" }}
kind: StatefulSet
name: {{ include "taskvec.engineName" . }}
{{- else }}
kind: Deployment
name: {{ include "taskvec.fullname" . }}
{{- end }}
{{- end -}}

{{/* Label matchers for the metrics of the scaled pods. */}}
{{- define "taskvec.scaledSeries" -}}
{{- $name := ternary (include "taskvec.engineName" .) (include "taskvec.fullname" .) (eq .Values.mode "split") -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ $name }}-.*"
{{- end -}}
