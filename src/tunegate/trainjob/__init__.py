"""Training on more than one node: TrainJobs of Kubeflow Trainer v2, built, submitted, followed, deleted."""
