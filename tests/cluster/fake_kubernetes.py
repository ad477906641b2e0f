"""A Kubernetes API server on loopback, as far as TrainJobs need one: real HTTP, real message types, faults on demand.

TrainJobs are read with Kubeflow Trainer's own models (kubeflow-trainer-api), as strict as its CRD: a key that they do
not know is a 400, as is a value of the wrong type. Pods are those of the kubernetes client.
"""

import json
import re
import socket
import threading
from collections import deque
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes import client

DROP = "drop"
NAMESPACE = "team"
_JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
_RUNTIMES = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainingruntimes"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class FakeKubernetes:
    """The server and what it knows."""

    def __init__(self):
        self.jobs, self.pods, self.logs = {}, [], {}
        self.runtimes = {"tunegate-torch"}
        self.denied = set()
        self.requests, self.faults = [], deque()
        self.script = deque()
        """Each time a TrainJob is looked at, the next step (a function of it) is applied before."""
        self.on_create = lambda job: None
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def api(self):
        """A client of the server."""
        configuration = client.Configuration()
        configuration.host = self.url
        configuration.retries = False
        return client.ApiClient(configuration)

    def kubeconfig(self, path):
        """A kubeconfig for the server, for code that opens the client itself."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        path.write_text(json.dumps(content))
        return path

    def fail(self, *faults, method=None, path="", after=False):
        """Answer the next such requests with a fault: a status, (status, message, headers), or DROP; with `after` the
        request is carried out and only its answer is lost."""
        self.faults.extend((method, path, fault, after) for fault in faults)

    def calls(self, method):
        return [path for verb, path, _ in self.requests if verb == method]

    def add_pod(self, job, index, *, phase="Running", exit_code=None, message=None, reason=None, waiting=None, log=""):
        """A node of a TrainJob."""
        terminated = waiting_state = None
        if exit_code is not None:
            phase = "Failed" if exit_code else "Succeeded"
            terminated = client.V1ContainerStateTerminated(
                exit_code=exit_code,
                reason=reason or ("Error" if exit_code else "Completed"),
                message=message,
                finished_at=datetime(2026, 11, 22, 12, 0, 10 - index, tzinfo=UTC),
            )
        if waiting:
            phase = "Pending"
            waiting_state = client.V1ContainerStateWaiting(reason=waiting[0], message=waiting[1])
        state = client.V1ContainerState(terminated=terminated, waiting=waiting_state)
        conditions = None
        if phase == "Pending" and not waiting:
            scheduled = client.V1PodCondition(
                type="PodScheduled", status="False", reason="Unschedulable", message=message
            )
            conditions = [scheduled]
        name = f"{job}-node-0-{index}-abcde"
        pod = client.V1Pod(
            metadata=client.V1ObjectMeta(
                name=name,
                creation_timestamp=datetime(2026, 11, 22, 11, 0, tzinfo=UTC),
                labels={
                    "jobset.sigs.k8s.io/jobset-name": job,
                    "batch.kubernetes.io/job-completion-index": str(index),
                },
            ),
            status=client.V1PodStatus(
                phase=phase,
                conditions=conditions,
                container_statuses=[
                    client.V1ContainerStatus(
                        name="node", image="i", image_id="i", ready=False, restart_count=0, state=state
                    )
                ]
                if not conditions
                else None,
            ),
        )
        self.pods.append(client.ApiClient().sanitize_for_serialization(pod))
        self.logs[name] = log


def condition(kind, *, reason="Because", message="", status="True"):
    moment = datetime(2026, 11, 22, 12, 0, tzinfo=UTC).isoformat().replace("+00:00", "Z")
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": moment}


def becomes(*conditions, active=0):
    """A step after which a TrainJob has these conditions."""

    def apply(job):
        count = {"active": active, "ready": active, "failed": 0, "succeeded": 0, "suspended": 0}
        job["status"] = {"conditions": list(conditions), "jobsStatus": [{"name": "node", **count}]}

    return apply


def read_train_job(content):
    """The TrainJob as Trainer's models read it; raises on keys that they do not know and on wrong types."""
    read = TrainerV1alpha1TrainJob.from_dict(content)
    known = json.loads(json.dumps(read.to_dict(), default=str))
    lost = _lost(content, known, "")
    if lost:
        raise ValueError(f"unknown field {', '.join(lost)}")
    return read


def _lost(given, known, path):
    if isinstance(given, dict):
        return [
            line
            for key, value in given.items()
            for line in (
                _lost(value, known[key], f"{path}.{key}") if isinstance(known, dict) and key in known
                else [f"{path}.{key}"] if value not in ({}, [], None) else []
            )
        ]  # fmt: skip
    if isinstance(given, list):
        return [line for index, value in enumerate(given) for line in _lost(value, known[index], f"{path}[{index}]")]
    return []


class _Handler(BaseHTTPRequestHandler):
    fake: FakeKubernetes
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    log_message = lambda *_: None  # noqa: E731

    def handle_any(self):
        self.__dict__.pop("_send", None)
        split = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(split.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.requests.append((self.command, split.path, self.query))
        fault = self._fault(split.path)
        if fault and not fault[1]:
            return self._break(fault[0])
        if fault:
            self._send = lambda *_: self._break(fault[0])
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, split.path)):
                return function(self, *match.groups())
        return self.status(404, "NotFound", "the server could not find the requested resource")

    do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

    def _fault(self, path):
        for number, (method, part, fault, after) in enumerate(self.fake.faults):
            if method in {None, self.command} and part in path:
                del self.fake.faults[number]
                return fault, after
        return None

    def _break(self, fault):
        if fault == DROP:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        status, message, headers = fault if isinstance(fault, tuple) else (fault, f"fault {fault}", {})
        content = client.V1Status(api_version="v1", kind="Status", status="Failure", code=status, message=message)
        return type(self)._send(self, status, client.ApiClient().sanitize_for_serialization(content), headers)

    def _send(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def status(self, code, reason, message):
        content = client.V1Status(
            api_version="v1", kind="Status", status="Failure", code=code, reason=reason, message=message
        )
        self._send(code, client.ApiClient().sanitize_for_serialization(content))

    def create(self):
        job = json.loads(self.body)
        try:
            read_train_job(job)
        except ValueError as error:
            return self.status(400, "BadRequest", f"strict decoding error: {error}")
        name = job["metadata"]["name"]
        if name in self.fake.jobs:
            return self.status(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.fake.jobs[name] = job
        self.fake.on_create(job)
        return self._send(201, job)

    def look(self, name):
        job = self.fake.jobs.get(name)
        if job is not None and self.fake.script:
            self.fake.script.popleft()(job)
            job = self.fake.jobs.get(name)
        if job is None:
            return self.status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        return self._send(200, job)

    def listing(self):
        key, value = self.query["labelSelector"].split("=")
        items = [job for job in self.fake.jobs.values() if job["metadata"]["labels"].get(key) == value]
        self._send(200, {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJobList", "items": items})

    def delete(self, name):
        if self.fake.jobs.pop(name, None) is None:
            return self.status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        self.fake.pods = [
            p for p in self.fake.pods if p["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] != name
        ]
        return self.status(200, "", "")

    def runtime(self, name):
        if name not in self.fake.runtimes:
            return self.status(404, "NotFound", f'trainingruntimes.trainer.kubeflow.org "{name}" not found')
        return self._send(200, {"kind": "TrainingRuntime", "metadata": {"name": name}})

    def access_review(self):
        review = json.loads(self.body)
        attributes = review["spec"]["resourceAttributes"]
        asked = (
            attributes["verb"] + " " + "/".join(filter(None, [attributes["resource"], attributes.get("subresource")]))
        )
        review["status"] = {"allowed": asked not in self.fake.denied}
        self._send(201, review)

    def list_pods(self):
        key, value = self.query["labelSelector"].split("=")
        items = [pod for pod in self.fake.pods if pod["metadata"]["labels"].get(key) == value]
        self._send(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})

    def log(self, name):
        assert self.query["container"] == "node"
        lines = self.fake.logs[name].splitlines(keepends=True)
        self._send(200, "".join(lines[-int(self.query["tailLines"]) :]).encode())


_ROUTES = [
    ("POST", _JOBS, _Handler.create),
    ("GET", _JOBS, _Handler.listing),
    ("GET", f"{_JOBS}/([^/]+)", _Handler.look),
    ("DELETE", f"{_JOBS}/([^/]+)", _Handler.delete),
    ("GET", f"{_RUNTIMES}/([^/]+)", _Handler.runtime),
    ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", _Handler.access_review),
    ("GET", _PODS, _Handler.list_pods),
    ("GET", f"{_PODS}/([^/]+)/log", _Handler.log),
]
