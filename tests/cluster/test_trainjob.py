"""TrainJobs: what is built, and how one is followed over everything that can happen to it."""

import json

import pytest
from fake_kubernetes import DROP, NAMESPACE, FakeKubernetes, becomes, condition, read_train_job

from tunegate.resources import ResourcesSpec
from tunegate.trainjob import client as trainjob_client
from tunegate.trainjob.client import TrainJobs, own_pod
from tunegate.trainjob.errors import TrainJobError, TrainJobFailedError, TrainJobRefusedError
from tunegate.trainjob.follow import run_to_end, state_of
from tunegate.trainjob.objects import Owner, job_name, run_label, train_job

RESOURCES = ResourcesSpec.model_validate(
    {
        "image": "registry.example.com/tunegate@sha256:" + "0" * 64,
        "image_pull_secrets": ["registry"],
        "training": {
            "cpu": "8",
            "cpu_limit": "16",
            "memory": "64Gi",
            "accelerator": "nvidia.com/gpu",
            "accelerators": 8,
            "shared_memory": "16Gi",
            "ephemeral_storage": "200Gi",
            "node_selector": {"pool": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
            "timeout_seconds": 7200,
            "nodes": 4,
        },
        "secrets": [{"name": "s3", "keys": {"accesskey": "AWS_ACCESS_KEY_ID"}}],
        "config_maps": [{"name": "tunegate-config", "keys": ["MLFLOW_TRACKING_URI"], "optional": True}],
        "environment": {"NCCL_DEBUG": "WARN"},
        "certificates": {"config_map": "own-ca"},
        "labels": {"team": "assistants"},
        "annotations": {"note": "x"},
        "queue": "gpu",
        "run_as_user": 10001,
    }
)
TASK = "s3://bucket/runs/r/distributed/x/task.json"


def build(resources=RESOURCES, stage="sft", **changes):
    arguments = {"name": job_name(stage, "a"), "namespace": NAMESPACE, "stage": stage, "run_id": "r"}
    return train_job(**{**arguments, "resources": resources, "task_uri": TASK, **changes})


# -- what is built -----------------------------------------------------------------------------------------------------


def test_everything_that_a_stage_can_get_is_in_its_trainjob():
    job = build(owner=Owner("pod-1", "uid-1"))
    read = read_train_job(job)
    assert (read.spec.runtime_ref.kind, read.spec.runtime_ref.name) == ("TrainingRuntime", "tunegate-torch")
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["command"] + trainer["args"] == ["torchrun", "--module", "tunegate.stages.distributed", TASK]
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"},
        "limits": {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "8"},
    }
    assert trainer["image"] == RESOURCES.image
    environment = {entry.pop("name"): entry for entry in trainer["env"]}
    assert environment["NCCL_DEBUG"] == {"value": "WARN"}
    assert environment["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["key"] == "accesskey"
    assert environment["MLFLOW_TRACKING_URI"]["valueFrom"]["configMapKeyRef"]["optional"] is True
    assert environment["AWS_CA_BUNDLE"] == {"value": "/etc/tunegate/ca/ca.crt"}
    assert not any(name.startswith("PET_") for name in environment), "Trainer refuses what it sets itself"
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert job["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "pod-1", "uid": "uid-1"}]
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "tunegate",
        "app.kubernetes.io/component": "sft",
        "tunegate.io/run": "r",
        "team": "assistants",
    }
    pod = template["spec"]
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert {v["name"] for v in pod["volumes"]} == {"shared-memory", "workspace", "stage-ca"}
    assert "env" not in pod["containers"][0], "Trainer refuses a patch of the node's environment"


def test_nothing_asked_for_leaves_the_nodes_to_the_runtime():
    job = build(ResourcesSpec.model_validate({"stages": {"ppo": {"nodes": 2}}}), stage="ppo")
    read_train_job(job)
    trainer = job["spec"]["trainer"]
    assert "resourcesPerNode" not in trainer and "image" not in trainer
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 1)
    assert "ownerReferences" not in job["metadata"] and "activeDeadlineSeconds" not in job["spec"]


@pytest.mark.parametrize(
    ("content", "processes"),
    [
        ({"training": {"accelerator": "nvidia.com/gpu", "accelerators": 4}}, 4),
        ({"training": {"accelerator": "nvidia.com/gpu", "accelerators": 4, "processes_per_node": 2}}, 2),
        ({"trainer": {"processes_per_node": 8}}, 8),
        ({}, 1),
    ],
)
def test_one_process_an_accelerator_unless_said_otherwise(content, processes):
    training = {"nodes": 2, **content.pop("training", {})}
    job = build(ResourcesSpec.model_validate({"training": training, **content}))
    assert job["spec"]["trainer"]["numProcPerNode"] == processes


def test_names_fit_the_host_names_of_the_pods():
    name = job_name("reward", "any")
    assert name == job_name("reward", "any") != job_name("reward", "other")
    assert len(f"{name}-node-0-999") <= 63 and name[0].isalpha()
    assert run_label("2026-demo") == "2026-demo"
    assert len(run_label("x" * 128)) == 40
    assert len(run_label("ends-with-a-dash-")) == 40


def test_the_runtimes_of_chart_and_manifests_have_what_trainjobs_patch():
    """Strategic merge joins lists by name (volumes, containers) and by path (mounts): names must agree."""
    from kubernetes_support import MANIFESTS, build_kustomization, case_values, read_documents, render_chart

    chart = read_documents(render_chart(case_values("trainer"))["templates/trainer.yaml"])
    addon = read_documents(build_kustomization(MANIFESTS / "addons" / "trainer"))
    for runtime in (next(o for o in objects if o["kind"] == "TrainingRuntime") for objects in (chart, addon)):
        assert runtime["metadata"]["name"] == ResourcesSpec().trainer.runtime
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert (job["name"], container["name"]) == ("node", "node")
        assert {"shared-memory", "workspace"} <= {v["name"] for v in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert mounts["/workspace"] == "workspace" and mounts["/dev/shm"] == "shared-memory"
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
        environment = {e["name"]: e.get("value") for e in build()["spec"]["trainer"]["env"]}
        assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert "command" not in container


# -- how it is followed ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake():
    server = FakeKubernetes()
    yield server
    server.close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def jobs(fake, waits):
    return TrainJobs(fake.api, NAMESPACE, pause=waits.append)


def follow(jobs, job=None, **changes):
    notes = []
    run_to_end(jobs, job or build(), note=notes.append, pause=lambda _: None, **changes)
    return notes


def test_a_job_is_made_followed_and_complete(fake, jobs):
    cleared = []
    fake.script.extend(
        [
            becomes(condition("Suspended", reason="Suspended", message="queued")),
            becomes(),
            becomes(active=1),
            becomes(active=1),
            becomes(condition("Complete", reason="AllJobsCompleted")),
        ]
    )
    notes = follow(jobs, fresh=lambda: cleared.append(1))
    assert cleared == [1]
    name = build()["metadata"]["name"]
    assert notes == [
        f"{name} is submitted: 4 nodes",
        f"{name}: waiting for its turn (Suspended: queued)",
        f"{name}: 4 nodes are starting",
        f"{name}: 4 nodes are training",
    ]


def test_a_failed_job_brings_back_what_its_nodes_said_first_failure_first(fake, jobs):
    name = build()["metadata"]["name"]
    fake.add_pod(name, 0, exit_code=1, log="step 1\nstep 2\nConnectionResetError: peer closed\n")
    fake.add_pod(name, 1, exit_code=137, reason="OOMKilled", message="rank 1: out of memory")
    fake.add_pod(name, 2, phase="Running")
    # Node 1 ended before node 0 did.
    fake.pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = "2026-11-22T12:00:59Z"
    fake.script.append(becomes(condition("Failed", reason="FailedJobs", message="jobset failed")))
    with pytest.raises(TrainJobFailedError) as caught:
        follow(jobs)
    text = str(caught.value)
    assert "FailedJobs: jobset failed" in text
    assert text.index("node 1") < text.index("node 0")
    assert "exit code 137 (OOMKilled): rank 1: out of memory" in text
    assert "    ConnectionResetError: peer closed" in text
    assert "node 2" not in text
    assert "more memory" in caught.value.fix
    assert caught.value.exit_code == 1


def test_a_deadline_says_which_setting_it_was(fake, jobs):
    fake.script.append(becomes(condition("Failed", reason="DeadlineExceeded", message="TrainJob was active too long")))
    with pytest.raises(TrainJobFailedError) as caught:
        follow(jobs)
    assert "timeout_seconds" in caught.value.fix


def test_logs_that_may_not_be_read_do_not_hide_the_failure(fake, jobs):
    name = build()["metadata"]["name"]
    fake.add_pod(name, 0, exit_code=1, message="rank 0: DataError")
    fake.fail(403, path="/log")
    fake.script.append(becomes(condition("Failed", reason="FailedJobs")))
    with pytest.raises(TrainJobFailedError, match="rank 0: DataError"):
        follow(jobs)


def test_nodes_that_cannot_start_are_told(fake, jobs):
    name = build()["metadata"]["name"]
    fake.add_pod(name, 0, waiting=("ImagePullBackOff", "no such image"))
    fake.add_pod(name, 1, phase="Pending", message="0/3 nodes are available: Insufficient nvidia.com/gpu")
    fake.script.extend([becomes(), becomes(condition("Complete"))])
    notes = follow(jobs)
    assert any("ImagePullBackOff: no such image" in note and "Insufficient nvidia.com/gpu" in note for note in notes)


def test_a_retried_stage_takes_up_the_job_that_its_first_try_made(fake, jobs):
    fake.jobs[build()["metadata"]["name"]] = build()
    fake.script.extend([becomes(active=1), becomes(condition("Complete"))])
    notes = follow(jobs, fresh=lambda: pytest.fail("a job that goes on must keep what it has written"))
    assert "following it" in notes[0]
    assert fake.calls("POST") == []


def test_a_twin_that_was_faster_is_no_error(fake, jobs):
    """Another try of the stage makes the job between our look and our request: 409."""
    looks = []

    def twin(path):
        looks.append(path)
        fake.jobs[build()["metadata"]["name"]] = build()

    original = jobs.create

    def create(job):
        twin(job)
        return original(job)

    jobs.create = create
    fake.script.extend([becomes(), becomes(condition("Complete"))])
    notes = follow(jobs)
    assert "following it" in notes[0] and len(looks) == 1


def test_a_job_whose_creation_s_answer_was_lost_is_not_made_twice(fake, jobs, waits):
    fake.fail(DROP, method="POST", after=True)
    fake.script.extend([becomes(), becomes(condition("Complete"))])
    notes = follow(jobs)
    assert len(fake.calls("POST")) == 2 and waits == [1.0]
    assert "following it" in notes[0]


def test_a_job_that_failed_before_is_made_anew(fake, jobs):
    old = build()
    becomes(condition("Failed"))(old)
    fake.jobs[old["metadata"]["name"]] = old
    cleared = []
    fake.on_create = lambda job: fake.script.append(becomes(condition("Complete")))
    notes = follow(jobs, fresh=lambda: cleared.append(1))
    assert "last checkpoint" in notes[0] and cleared == [1]
    assert len(fake.calls("DELETE")) == len(fake.calls("POST")) == 1


def test_a_job_of_other_work_is_not_taken_for_ours(fake, jobs):
    other = build(task_uri="s3://bucket/other/task.json")
    fake.jobs[other["metadata"]["name"]] = other
    with pytest.raises(TrainJobRefusedError, match="for other work"):
        follow(jobs)


def test_a_job_that_is_being_deleted_is_waited_for(fake, jobs):
    old = build()
    old["metadata"]["deletionTimestamp"] = "2026-11-22T12:00:00Z"
    fake.jobs[old["metadata"]["name"]] = old
    fake.script.append(lambda job: fake.jobs.clear())
    fake.on_create = lambda job: fake.script.append(becomes(condition("Complete")))
    assert "is submitted" in follow(jobs)[0]
    fake.jobs[old["metadata"]["name"]] = old
    moments = iter([0.0, 100.0, 301.0])
    with pytest.raises(TrainJobError, match="still being deleted"):
        follow(jobs, clock=lambda: next(moments))


def test_a_job_that_vanishes_is_started_again_from_its_checkpoints_and_not_for_ever(fake, jobs):
    fake.script.extend([becomes(), lambda job: fake.jobs.clear()])
    created = []

    def made(job):
        created.append(job)
        if len(created) == 2:
            fake.script.append(becomes(condition("Complete")))

    fake.on_create = made
    notes = follow(jobs)
    assert len(created) == 2 and any("is gone" in note for note in notes)
    fake.jobs.clear()
    fake.on_create = lambda job: fake.script.append(lambda job: fake.jobs.clear())
    with pytest.raises(TrainJobFailedError, match="keeps deleting it"):
        follow(jobs)


def test_no_permission_says_what_to_give(fake, jobs):
    message = 'trainjobs.trainer.kubeflow.org is forbidden: User "system:serviceaccount:team:default" cannot create'
    fake.fail((403, message, {}), method="POST")
    with pytest.raises(TrainJobRefusedError) as caught:
        follow(jobs)
    assert message in caught.value.reason and "trainer.enabled=true" in caught.value.fix
    assert caught.value.exit_code == 2


def test_a_webhook_s_refusal_is_told_in_its_words(fake, jobs):
    message = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: Invalid'
    fake.fail((403, message, {}), method="POST")
    with pytest.raises(TrainJobRefusedError) as caught:
        follow(jobs)
    assert "denied the request" in caught.value.reason and "resources section" in caught.value.fix


def test_a_wrong_object_is_refused_once(fake, jobs, waits):
    job = build()
    job["spec"]["trainer"]["nodes"] = 3
    with pytest.raises(TrainJobRefusedError, match=r"unknown field \.spec\.trainer\.nodes"):
        follow(jobs, job)
    assert waits == []


def test_without_trainer_or_runtime_the_way_out_is_told(fake, jobs):
    jobs.check_runtime("tunegate-torch", "TrainingRuntime")
    fake.runtimes = set()
    with pytest.raises(TrainJobRefusedError) as caught:
        jobs.check_runtime("tunegate-torch", "TrainingRuntime")
    assert "trainer.enabled" in caught.value.fix and caught.value.value == "tunegate-torch"
    with pytest.raises(TrainJobRefusedError):
        jobs.check_runtime("tunegate-torch", "ClusterTrainingRuntime")
    fake.fail((404, "the server could not find the requested resource", {}), method="POST")
    with pytest.raises(TrainJobRefusedError, match="install Kubeflow Trainer"):
        follow(jobs)


def test_an_api_that_is_busy_or_drops_connections_is_asked_again(fake, jobs, waits):
    fake.fail((429, "slow down", {"Retry-After": "7"}), 503, DROP, method="GET")
    fake.on_create = lambda job: fake.script.append(becomes(condition("Complete")))
    follow(jobs)
    assert waits == [7.0, 2.0, 4.0]


def test_an_outage_in_the_middle_is_waited_out_and_one_without_end_is_not(fake, jobs):
    def outage(job):
        fake.fail(*[503] * 5, method="GET", path="/trainjobs/")
        fake.fail(403, method="GET", path="/pods")

    fake.script.extend([outage, becomes(condition("Complete"))])
    notes = follow(jobs)
    assert any("goes on, trying again" in note for note in notes)
    fake.jobs.clear()
    fake.script.append(lambda job: fake.fail(*[503] * 100, method="GET"))
    ticks = iter(range(0, 100_000, 400))
    with pytest.raises(TrainJobError, match="fault 503"):
        follow(jobs, clock=lambda: float(next(ticks)))
    assert not isinstance(TrainJobError, TrainJobRefusedError)


def test_the_exit_handler_deletes_the_jobs_of_its_run_only(fake, jobs):
    for run_id, identity in (("r", "a"), ("r", "b"), ("other", "c")):
        job = build(name=job_name("sft", identity), run_id=run_id)
        fake.jobs[job["metadata"]["name"]] = job
    names = jobs.of_run("r")
    assert names == [job_name("sft", "a"), job_name("sft", "b")]
    assert [jobs.delete(name) for name in names] == [True, True]
    assert list(fake.jobs) == [job_name("sft", "c")]
    assert jobs.delete(names[0]) is False


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        (None, ""),
        ([condition("Suspended", status="False")], ""),
        ([condition("Suspended")], "Suspended"),
        ([condition("Suspended"), condition("Complete")], "Complete"),
        ([condition("Complete"), condition("Failed")], "Failed"),
    ],
)
def test_states(conditions, state):
    assert state_of({"status": {"conditions": conditions}} if conditions else {})[0] == state


def test_the_client_is_opened_in_a_pod_and_with_a_kubeconfig(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(trainjob_client, "_SERVICE_ACCOUNT", tmp_path / "none")
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(tmp_path / "missing"))
    with pytest.raises(TrainJobRefusedError, match="cannot be used from here"):
        TrainJobs.open()
    monkeypatch.setattr(location, str(fake.kubeconfig(tmp_path / "kubeconfig")))
    assert TrainJobs.open().namespace == NAMESPACE
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    assert own_pod() is None
    monkeypatch.setenv("KFP_POD_NAME", "p")
    monkeypatch.setenv("KFP_POD_UID", "u")
    assert own_pod() == ("p", "u")
    assert json.dumps(build(owner=Owner(*own_pod())))
