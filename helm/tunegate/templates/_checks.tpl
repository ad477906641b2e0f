{{- /* What a JSON schema cannot say: settings that only together are right or wrong. All mistakes in one message. */ -}}
{{- define "tunegate.checks" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if not $v.s3.bucket -}}
{{- $wrong = append $wrong "s3.bucket: no bucket is given; set it to the bucket that keeps artifacts, models and checkpoints" -}}
{{- end -}}
{{- if and $v.s3.endpoint (not $v.s3.existingSecret) (not (contains "amazonaws.com" $v.s3.endpoint)) -}}
{{- $wrong = append $wrong (printf "s3.existingSecret: %s is not AWS, so service accounts bring no credentials for it; name a Secret with the keys %s and %s" $v.s3.endpoint $v.s3.accessKeyKey $v.s3.secretKeyKey) -}}
{{- end -}}
{{- if and (not $v.kfp.multiUser) (ne .Release.Namespace $v.kfp.namespace) -}}
{{- $wrong = append $wrong (printf "kfp.multiUser: single-user Kubeflow runs every pipeline in its own namespace %q, but this release goes to %q; install with --namespace %s, correct kfp.namespace, or set kfp.multiUser=true if %q is a profile's namespace" $v.kfp.namespace .Release.Namespace $v.kfp.namespace .Release.Namespace) -}}
{{- end -}}
{{- if and $v.kfp.multiUser (eq .Release.Namespace $v.kfp.namespace) -}}
{{- $wrong = append $wrong (printf "kfp.multiUser: multi-user Kubeflow runs pipelines in profile namespaces, but this release goes to %q, where Kubeflow itself is; install with --namespace PROFILE, or set kfp.multiUser=false" .Release.Namespace) -}}
{{- end -}}
{{- if $v.mlflow.enabled -}}
{{- if $v.tracking.uri -}}
{{- $wrong = append $wrong (printf "tracking.uri: %s is given, but mlflow.enabled=true would run a server as well; set mlflow.enabled=false to use the existing one, or leave tracking.uri empty" $v.tracking.uri) -}}
{{- end -}}
{{- if eq $v.mlflow.database.type "postgresql" -}}
{{- if not $v.mlflow.database.host -}}
{{- $wrong = append $wrong "mlflow.database.host: the MLflow server needs a PostgreSQL host; to try things out without one set mlflow.database.type=sqlite" -}}
{{- end -}}
{{- if not $v.mlflow.database.existingSecret -}}
{{- $wrong = append $wrong (printf "mlflow.database.existingSecret: name an existing Secret with the keys %s and %s of the PostgreSQL user" $v.mlflow.database.usernameKey $v.mlflow.database.passwordKey) -}}
{{- end -}}
{{- if and (hasPrefix "verify-" $v.mlflow.database.sslMode) (not $v.ca.existingConfigMap) -}}
{{- $wrong = append $wrong (printf "mlflow.database.sslMode: %s checks the server's certificate, which needs the authority's in ca.existingConfigMap" $v.mlflow.database.sslMode) -}}
{{- end -}}
{{- else if gt (int $v.mlflow.replicas) 1 -}}
{{- $wrong = append $wrong (printf "mlflow.replicas: %d pods cannot share an SQLite file; set 1, or mlflow.database.type=postgresql" (int $v.mlflow.replicas)) -}}
{{- end -}}
{{- if and $v.mlflow.ingress.enabled (not $v.mlflow.ingress.host) -}}
{{- $wrong = append $wrong "mlflow.ingress.host: the Ingress needs a host name" -}}
{{- end -}}
{{- if and $v.mlflow.metrics.serviceMonitor.enabled (not $v.mlflow.metrics.enabled) -}}
{{- $wrong = append $wrong "mlflow.metrics.serviceMonitor.enabled: there is nothing to scrape; set mlflow.metrics.enabled=true as well" -}}
{{- end -}}
{{- else if not $v.tracking.uri -}}
{{- $wrong = append $wrong "tracking.uri: without mlflow.enabled the URL of an existing MLflow server is needed" -}}
{{- end -}}
{{- range $role, $account := $v.serviceAccounts -}}
{{- if and (not $account.create) (not $account.name) -}}
{{- $wrong = append $wrong (printf "serviceAccounts.%s.name: with create=false name the existing service account" $role) -}}
{{- end -}}
{{- end -}}
{{- $cuda := or (eq $v.runs.accelerator "cuda") (and $v.trainer.enabled (eq $v.trainer.accelerator "cuda")) -}}
{{- if and $v.image.digest $cuda (not $v.image.cudaDigest) -}}
{{- $wrong = append $wrong "image.cudaDigest: image.digest pins the CPU image, but runs or TrainJobs use the CUDA image; pin that one too" -}}
{{- end -}}
{{- $nodes := int (dig "nodes" 1 $v.runs.training) -}}
{{- range $stage, $sizes := $v.runs.stages -}}
{{- $nodes = max $nodes (int (dig "nodes" 1 $sizes)) -}}
{{- end -}}
{{- if and (gt (int $nodes) 1) (not $v.trainer.enabled) -}}
{{- $wrong = append $wrong (printf "trainer.enabled: runs ask for training on %d nodes, which Kubeflow Trainer does; set trainer.enabled=true" (int $nodes)) -}}
{{- end -}}
{{- if and $v.tracking.existingSecret (not $v.tracking.secretKeys) -}}
{{- $wrong = append $wrong (printf "tracking.secretKeys: name the keys of %s that MLflow's client reads, e.g. [MLFLOW_TRACKING_TOKEN]" $v.tracking.existingSecret) -}}
{{- end -}}
{{- range $key, $_ := $v.configuration.extra -}}
{{- if regexMatch "(?i)(secret|password|token|access_key|_key$)" $key -}}
{{- $wrong = append $wrong (printf "configuration.extra.%s: looks like a credential, and a ConfigMap is readable by everybody in the namespace; put it into a Secret" $key) -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := $v.mlflow.extraEnv -}}
{{- if regexMatch "(?i)(secret|password|token|access_key|_key$)" $key -}}
{{- $wrong = append $wrong (printf "mlflow.extraEnv.%s: looks like a credential, which would stand in the Deployment for everybody to read" $key) -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nThe values cannot work:\n  - %s\n" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end -}}
