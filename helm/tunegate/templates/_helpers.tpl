{{- define "tunegate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* Short enough that the longest suffix fits into a label value of 63 characters. */ -}}
{{- define "tunegate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains (include "tunegate.name" .) .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tunegate.name" .) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tunegate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tunegate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tunegate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "tunegate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tunegate
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Pods of pipeline runs carry part-of and, as component, their stage; those of TrainJobs `run`. */ -}}
{{- define "tunegate.runLabels" -}}
app.kubernetes.io/part-of: tunegate
app.kubernetes.io/component: run
{{- end -}}

{{- define "tunegate.runSelector" -}}
matchLabels:
  app.kubernetes.io/part-of: tunegate
matchExpressions:
  - key: app.kubernetes.io/component
    operator: NotIn
    values: [mlflow, publish, audit, test]
{{- end -}}

{{- define "tunegate.configuration" -}}
MLFLOW_TRACKING_URI: {{ include "tunegate.trackingUri" . | quote }}
MLFLOW_DISABLE_TELEMETRY: "true"
{{- if .Values.mlflow.proxyArtifacts }}
# Models go to S3 in parts and in parallel instead of through one request to the MLflow server.
MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD: "true"
{{- end }}
AWS_REGION: {{ .Values.s3.region | quote }}
AWS_DEFAULT_REGION: {{ .Values.s3.region | quote }}
{{- with .Values.s3.endpoint }}
AWS_ENDPOINT_URL_S3: {{ . | quote }}
{{- end }}
KF_PIPELINES_ENDPOINT: {{ include "tunegate.kfpEndpoint" . | quote }}
{{- if .Values.kfp.multiUser }}
TUNEGATE_KFP_NAMESPACE: {{ .Release.Namespace | quote }}
{{- end }}
TUNEGATE_SERVICE_ACCOUNT: {{ include "tunegate.serviceAccount" (dict "root" . "role" "runner") | quote }}
TUNEGATE_S3_ROOT: {{ include "tunegate.s3Root" . | quote }}
{{- range $key, $value := .Values.configuration.extra }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "tunegate.runResources" -}}
resources:
  image: {{ eq .Values.runs.accelerator "cuda" | ternary (include "tunegate.cudaImage" .) (include "tunegate.image" .) }}
  image_pull_policy: {{ .Values.image.pullPolicy }}
  {{- with .Values.image.pullSecrets }}
  image_pull_secrets: {{ toJson . }}
  {{- end }}
  {{- with .Values.podSecurity.runAsUser }}
  run_as_user: {{ . | int64 }}
  {{- end }}
  config_maps:
    - name: {{ .Values.configuration.name }}
      keys: {{ include "tunegate.configuration" . | fromYaml | keys | sortAlpha | toJson }}
  {{- if or .Values.s3.existingSecret .Values.tracking.existingSecret }}
  secrets:
    {{- with .Values.s3.existingSecret }}
    - name: {{ . }}
      keys:
        {{ $.Values.s3.accessKeyKey }}: AWS_ACCESS_KEY_ID
        {{ $.Values.s3.secretKeyKey }}: AWS_SECRET_ACCESS_KEY
    {{- end }}
    {{- with .Values.tracking.existingSecret }}
    - name: {{ . }}
      keys:
        {{- range $.Values.tracking.secretKeys }}
        {{ . }}: {{ . }}
        {{- end }}
    {{- end }}
  {{- end }}
  {{- with .Values.ca.existingConfigMap }}
  certificates:
    config_map: {{ . }}
    key: {{ $.Values.ca.key }}
  {{- end }}
  {{- with .Values.runs.queue }}
  queue: {{ . }}
  {{- end }}
  {{- if .Values.trainer.enabled }}
  trainer:
    runtime: {{ .Values.trainer.runtimeName }}
    processes_per_node: {{ eq .Values.trainer.accelerator "cuda" | ternary .Values.trainer.gpusPerNode 1 }}
  {{- end }}
  {{- range $key := list "labels" "annotations" "defaults" "training" "stages" }}
  {{- with index $.Values.runs $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end -}}

{{- define "tunegate.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{- define "tunegate.cudaImage" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag -}}
{{- if .Values.image.cudaDigest -}}
{{ .Values.image.repository }}@{{ .Values.image.cudaDigest }}
{{- else -}}
{{ .Values.image.repository }}:{{ $tag }}-cuda
{{- end -}}
{{- end -}}

{{- define "tunegate.serviceAccount" -}}
{{- $account := index .root.Values.serviceAccounts .role -}}
{{- default (printf "%s-%s" (include "tunegate.fullname" .root) .role) $account.name -}}
{{- end -}}

{{- define "tunegate.kfpEndpoint" -}}
{{- default (printf "http://ml-pipeline.%s.svc.cluster.local:8888" .Values.kfp.namespace) .Values.kfp.endpoint -}}
{{- end -}}

{{- define "tunegate.trackingUri" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "tunegate.fullname" . }}-mlflow.{{ .Release.Namespace }}.svc.cluster.local:{{ .Values.mlflow.service.port }}
{{- else -}}
{{ .Values.tracking.uri }}
{{- end -}}
{{- end -}}

{{- define "tunegate.s3Root" -}}
s3://{{ .Values.s3.bucket }}{{ with .Values.s3.prefix | trimAll "/" }}/{{ . }}{{ end }}
{{- end -}}

{{- /* Port of a URL: the one written, else that of its scheme. */ -}}
{{- define "tunegate.urlPort" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host -}}
{{- if $port -}}
{{- trimPrefix ":" $port -}}
{{- else if eq $url.scheme "http" -}}
80
{{- else -}}
443
{{- end -}}
{{- end -}}

{{- define "tunegate.s3Port" -}}
{{- include "tunegate.urlPort" (default "https://s3.amazonaws.com" .Values.s3.endpoint) -}}
{{- end -}}

{{- /* Pod and container settings that satisfy the restricted Pod Security Standard. */ -}}
{{- define "tunegate.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ . | int64 }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ . | int64 }}
{{- end }}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ . | int64 }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tunegate.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "tunegate.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* How boto3 reaches S3. Without existingSecret the credentials come from the service account. */ -}}
{{- define "tunegate.s3Env" -}}
- name: AWS_REGION
  value: {{ .Values.s3.region | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.s3.region | quote }}
{{- with .Values.s3.endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.accessKeyKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretKeyKey }}
{{- end }}
{{- end -}}

{{- define "tunegate.trackingEnv" -}}
{{- with .Values.tracking.existingSecret }}
{{- range $.Values.tracking.secretKeys }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.tracking.existingSecret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tunegate.caEnv" -}}
{{- if .Values.ca.existingConfigMap }}
{{- range list "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" "SSL_CERT_FILE" }}
- name: {{ . }}
  value: /etc/tunegate/ca/ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{- define "tunegate.caMount" -}}
{{- if .Values.ca.existingConfigMap }}
- name: ca
  mountPath: /etc/tunegate/ca
  readOnly: true
{{- end }}
{{- end -}}

{{- define "tunegate.caVolume" -}}
{{- if .Values.ca.existingConfigMap }}
- name: ca
  configMap:
    name: {{ .Values.ca.existingConfigMap }}
    items:
      - key: {{ .Values.ca.key }}
        path: ca.crt
{{- end }}
{{- end -}}

{{- /* Nothing of the image is written to: home and caches are on a scratch volume. */ -}}
{{- define "tunegate.scratchEnv" -}}
- name: HOME
  value: /tmp
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
{{- end -}}

{{- /* One container that runs a command of Tunegate with the environment of runs. Takes root, name, command,
resources, account, token (whether to mount a token for the Kubeflow API) and upload (whether to mount the runs' resources). */ -}}
{{- define "tunegate.jobPod" -}}
{{- $ := .root -}}
metadata:
  labels:
    {{- include "tunegate.labels" $ | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    {{- with $.Values.jobs.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $.Values.jobs.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "tunegate.serviceAccount" (dict "root" $ "role" .account) }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "tunegate.pullSecrets" $ | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "tunegate.podSecurityContext" $ | nindent 4 }}
  containers:
    - name: {{ .name }}
      image: {{ include "tunegate.image" $ }}
      imagePullPolicy: {{ $.Values.image.pullPolicy }}
      command: {{ toJson .command }}
      envFrom:
        - configMapRef:
            name: {{ $.Values.configuration.name }}
      env:
        {{- include "tunegate.scratchEnv" $ | nindent 8 }}
        {{- include "tunegate.s3Env" $ | nindent 8 }}
        {{- with include "tunegate.trackingEnv" $ | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with include "tunegate.caEnv" $ | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if .token }}
        - name: KF_PIPELINES_SA_TOKEN_PATH
          value: /var/run/secrets/kubeflow/pipelines/token
        {{- end }}
        {{- if .upload }}
        - name: TUNEGATE_RESOURCES
          value: /etc/tunegate/resources/resources.yaml
        {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      securityContext:
        {{- include "tunegate.containerSecurityContext" $ | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- with include "tunegate.caMount" $ | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if .token }}
        - name: kubeflow-token
          mountPath: /var/run/secrets/kubeflow/pipelines
          readOnly: true
        {{- end }}
        {{- if .upload }}
        - name: resources
          mountPath: /etc/tunegate/resources
          readOnly: true
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: 1Gi
    {{- with include "tunegate.caVolume" $ | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if .token }}
    - name: kubeflow-token
      projected:
        sources:
          - serviceAccountToken:
              path: token
              audience: pipelines.kubeflow.org
              expirationSeconds: 7200
    {{- end }}
    {{- if .upload }}
    - name: resources
      configMap:
        name: {{ include "tunegate.fullname" $ }}-resources
    {{- end }}
  {{- with $.Values.jobs.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.Values.jobs.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
