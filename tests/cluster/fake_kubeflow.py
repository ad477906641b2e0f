"""A Kubeflow Pipelines API server on loopback: real HTTP, the message types of kfp_server_api, faults on demand.

Paths and status codes are those of the Go server (`backend/src/apiserver`): gRPC gateway errors for most services,
`{"error_message": …}` from the upload endpoint, the log route beside the generated API. It also answers the few
paths of Kubernetes, MLflow, an image registry and Dex that the `cluster` commands ask for.
"""

import json
import re
import socket
import threading
import uuid
from collections import deque
from datetime import UTC, datetime
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api
import yaml

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DROP = "drop"


class FakeKubeflow:
    """The server and what it knows."""

    def __init__(self, *, multi_user=False, ssl_context=None):
        self.multi_user = multi_user
        self.token = None
        self.release = "2.17.0"
        self.pipelines, self.versions, self.runs, self.experiments, self.schedules = {}, {}, {}, {}, {}
        self.logs = {}
        self.requests = []
        self.faults = deque()
        self.script = {}
        self.kubernetes = {}
        self.allowed = lambda attributes: True
        self.registry = {}
        self.dex = None
        self.mlflow = {"experiments/search": {}, "registered-models/search": {}}
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        scheme = "http"
        if ssl_context is not None:
            self.server.socket = ssl_context.wrap_socket(self.server.socket, server_side=True)
            scheme = "https"
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"{scheme}://{self.address}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, *faults, path=None, after=False):
        """Answer the next requests (to paths that contain `path`) with a fault each: a status, (status, headers, body),
        or DROP. With `after` the request is carried out first and only its answer is lost."""
        for fault in faults:
            self.faults.append((path, fault, after))

    def calls(self, method, path):
        return [r for r in self.requests if r[0] == method and re.search(path, r[1])]

    def add_run(self, *, state="RUNNING", parameters=None, name="a run", tasks=(), error=None, finished=None):
        run = api.V2beta1Run(
            run_id=str(uuid.uuid4()),
            display_name=name,
            state=state,
            created_at=datetime(2026, 11, 22, 9, 0, tzinfo=UTC),
            finished_at=finished or EPOCH,
            runtime_config=api.V2beta1RuntimeConfig(parameters=parameters or {}),
            run_details=api.V2beta1RunDetails(task_details=list(tasks)),
            error=error,
        )
        self.runs[run.run_id] = run
        return run

    def advance(self, run_id, *steps):
        """Each time the run is read, the next step (a function of the run) is applied."""
        self.script[run_id] = deque(steps)


def task(name, state, *, message=None, pod=None, parent=None, task_id=None):
    return api.V2beta1PipelineTaskDetail(
        task_id=task_id or str(uuid.uuid4()),
        display_name=name,
        state=state,
        create_time=datetime(2026, 11, 22, 9, 1, tzinfo=UTC),
        start_time=datetime(2026, 11, 22, 9, 1, tzinfo=UTC),
        end_time=EPOCH if state in {"RUNNING", "PENDING"} else datetime(2026, 11, 22, 9, 5, tzinfo=UTC),
        error=api.GoogleRpcStatus(code=2, message=message) if message else None,
        pod_name=pod,
        parent_task_id=parent,
    )


def _now():
    return datetime.now(UTC)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeKubeflow
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    log_message = lambda *_: None  # noqa: E731

    def handle_any(self):
        self.__dict__.pop("_send", None)  # a handler lives as long as its connection, a fault for one request
        split = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(split.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.requests.append((self.command, split.path, dict(self.query), self.headers, self.body))
        fault = self._fault(split.path)
        if fault and not fault[2]:
            return self._break(fault[1])
        kfp = split.path.startswith("/apis/v")
        if kfp and self.fake.token and self.headers.get("Authorization") != f"Bearer {self.fake.token}":
            return self._error(401, 16, "Failed to authorize the request: the token is expired")
        if kfp and self.fake.dex and self.fake.dex["cookie"] not in (self.headers.get("Cookie") or ""):
            return self._send(302, b"", {"Location": "/dex/auth?client_id=kubeflow"})
        if fault:
            self._send = lambda *_, **__: self._break(fault[1])
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, split.path)):
                return function(self, *[unquote(g) for g in match.groups()])
        return self._error(404, 5, f"Not Found: {split.path}")

    do_GET = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def _fault(self, path):
        if self.fake.faults and (self.fake.faults[0][0] is None or self.fake.faults[0][0] in path):
            return self.fake.faults.popleft()
        return None

    def _break(self, fault):
        if fault == DROP:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        status, headers, body = fault if isinstance(fault, tuple) else (fault, {}, None)
        return type(self)._send(self, status, (body or json.dumps({"message": f"fault {status}"})).encode(), headers)

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply(self, model):
        content = api.ApiClient().sanitize_for_serialization(model)
        self._send(200, json.dumps(content).encode())

    def _error(self, status, code, message):
        content = {"error": message, "code": code, "message": message, "details": []}
        self._send(status, json.dumps(content).encode())

    def read(self, kind):
        class Response:
            data = self.body.decode()

        return api.ApiClient().deserialize(Response, kind)

    # -- pipelines

    def health(self):
        # As the Go server writes it: with fields that the message type does not have.
        content = {"commit_sha": "unknown", "tag_name": self.fake.release, "multi_user": self.fake.multi_user}
        self._send(200, json.dumps({**content, "pipeline_store": "database"}).encode())

    def create_pipeline(self):
        wanted = self.read("V2beta1Pipeline")
        if any(p.name == wanted.name for p in self.fake.pipelines.values()):
            return self._error(409, 6, f"Already exist: the name {wanted.name} already exist")
        wanted.pipeline_id, wanted.created_at = str(uuid.uuid4()), _now()
        self.fake.pipelines[wanted.pipeline_id] = wanted
        return self.reply(wanted)

    def pipeline_by_name(self, name):
        for pipeline in self.fake.pipelines.values():
            if pipeline.name == name and (pipeline.namespace or None) == self.query.get("namespace"):
                return self.reply(pipeline)
        return self._error(404, 5, f"Pipeline {name} not found")

    def upload_version(self):
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        part = next(p for p in BytesParser().parsebytes(head + self.body).walk() if p.get_filename())
        documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
        name = self.query["name"]
        if any(v.name == name for v in self.fake.versions.values()):
            message = json.dumps({"error_message": "Failed to create a pipeline version", "error_details": "exists"})
            return self._send(409, message.encode())
        spec = {"pipeline_spec": documents[0], "platform_spec": documents[1]} if len(documents) > 1 else documents[0]
        version = api.V2beta1PipelineVersion(
            pipeline_id=self.query["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            name=name,
            display_name=self.query.get("display_name", name),
            created_at=_now(),
            pipeline_spec=spec,
        )
        self.fake.versions[version.pipeline_version_id] = version
        return self.reply(version)

    def list_versions(self, pipeline_id):
        found = [v for v in self.fake.versions.values() if v.pipeline_id == pipeline_id]
        found.sort(key=lambda v: v.created_at, reverse=True)
        page, token = self._page(found)
        self.reply(api.V2beta1ListPipelineVersionsResponse(pipeline_versions=page, next_page_token=token))

    def _page(self, found):
        start, size = int(self.query.get("page_token") or 0), min(int(self.query.get("page_size", 10)), 3)
        return found[start : start + size], str(start + size) if start + size < len(found) else ""

    # -- runs

    def list_experiments(self):
        wanted = json.loads(self.query["filter"])["predicates"][0]["stringValue"]
        found = [e for e in self.fake.experiments.values() if e.display_name == wanted]
        self.reply(api.V2beta1ListExperimentsResponse(experiments=found))

    def create_experiment(self):
        experiment = self.read("V2beta1Experiment")
        experiment.experiment_id = str(uuid.uuid4())
        self.fake.experiments[experiment.experiment_id] = experiment
        self.reply(experiment)

    def create_run(self):
        run = self.read("V2beta1Run")
        run.run_id, run.created_at, run.finished_at, run.state = str(uuid.uuid4()), _now(), EPOCH, "PENDING"
        self.fake.runs[run.run_id] = run
        self.reply(run)

    def list_runs(self):
        found = sorted(self.fake.runs.values(), key=lambda r: r.created_at, reverse=True)
        page, token = self._page(found)
        self.reply(api.V2beta1ListRunsResponse(runs=page, next_page_token=token))

    def get_run(self, run_id):
        run = self.fake.runs.get(run_id)
        if run is None:
            return self._error(404, 5, f"Run {run_id} not found")
        steps = self.fake.script.get(run_id)
        if steps:
            steps.popleft()(run)
        return self.reply(run)

    def terminate_run(self, run_id):
        self.fake.runs[run_id].state = "CANCELING"
        self._send(200, b"{}")

    def retry_run(self, run_id):
        self.fake.runs[run_id].state = "RUNNING"
        self._send(200, b"{}")

    def run_log(self, run_id, pod):
        text = self.fake.logs.get((run_id, pod))
        if text is None:
            body = json.dumps({"error_message": f"Failed to read logs for run {run_id}"})
            return self._send(500, body.encode())
        return self._send(200, text.encode(), {"Content-Type": "text/plain"})

    # -- recurring runs

    def create_schedule(self):
        schedule = self.read("V2beta1RecurringRun")
        schedule.recurring_run_id, schedule.status = str(uuid.uuid4()), "ENABLED"
        schedule.created_at = _now()
        self.fake.schedules[schedule.recurring_run_id] = schedule
        self.reply(schedule)

    def list_schedules(self):
        page, token = self._page(list(self.fake.schedules.values()))
        self.reply(api.V2beta1ListRecurringRunsResponse(recurring_runs=page, next_page_token=token))

    def delete_schedule(self, schedule_id):
        del self.fake.schedules[schedule_id]
        self._send(200, b"{}")

    # -- Kubernetes

    def kubernetes(self, path):
        found = self.fake.kubernetes.get(path.rstrip("/"))
        if found is None:
            return self._send(404, json.dumps({"kind": "Status", "code": 404, "reason": "NotFound"}).encode())
        if isinstance(found, int):
            return self._send(found, json.dumps({"kind": "Status", "code": found, "reason": "Forbidden"}).encode())
        if selector := self.query.get("labelSelector"):
            wanted = dict(part.split("=", 1) for part in selector.split(","))
            items = [i for i in found["items"] if wanted.items() <= i["metadata"].get("labels", {}).items()]
            found = {**found, "items": items}
        return self._send(200, found if isinstance(found, bytes) else json.dumps(found).encode())

    def access_review(self):
        review = json.loads(self.body)
        attributes = review["spec"]["resourceAttributes"]
        review["status"] = {"allowed": self.fake.allowed(attributes)}
        self._send(201, json.dumps(review).encode())

    # -- MLflow, a registry, Dex

    def mlflow(self, path):
        found = self.fake.mlflow.get(path)
        if isinstance(found, int):
            return self._send(found, json.dumps({"error_code": "PERMISSION_DENIED", "message": "no"}).encode())
        return self._send(200, json.dumps(found or {}).encode())

    def manifest(self, name, reference):
        if self.headers.get("Authorization") != "Bearer pull":
            challenge = f'Bearer realm="{self.fake.url}/token",service="registry",scope="repository:{name}:pull"'
            return self._send(401, b"{}", {"WWW-Authenticate": challenge})
        digest = self.fake.registry.get(f"{name}:{reference}")
        if digest is None:
            return self._send(404, b"{}")
        return self._send(200, b"{}", {"Docker-Content-Digest": digest})

    def registry_token(self):
        self._send(200, b'{"token": "pull"}')

    def page(self, text="<html>Kubeflow</html>", headers=None):
        self._send(200, text.encode(), {"Content-Type": "text/html", **(headers or {})})

    def kubeflow_page(self):
        if self.fake.dex and self.fake.dex["cookie"] not in (self.headers.get("Cookie") or ""):
            return self._send(302, b"", {"Location": "/dex/auth?client_id=kubeflow"})
        return self.page()

    def dex_choice(self):
        self.page("<html>choose a connector</html>")

    def dex_connector(self):
        self._send(302, b"", {"Location": "/dex/auth/local/login?state=abc"})

    def dex_form(self):
        self.page("<html><form method=post></form></html>")

    def dex_login(self):
        form = {k: v[0] for k, v in parse_qs(self.body.decode()).items()}
        if form != {"login": self.fake.dex["user"], "password": self.fake.dex["password"]}:
            return self.page("<html>Invalid Email Address and password.</html>")
        cookie = f"{self.fake.dex['cookie']}; Path=/"
        return self._send(303, b"", {"Location": "/pipeline", "Set-Cookie": cookie})


_V2 = "/apis/v2beta1"
_ROUTES = [
    ("GET", f"{_V2}/healthz", _Handler.health),
    ("POST", f"{_V2}/pipelines", _Handler.create_pipeline),
    ("GET", f"{_V2}/pipelines/names/([^/]+)", _Handler.pipeline_by_name),
    ("POST", f"{_V2}/pipelines/upload_version", _Handler.upload_version),
    ("GET", f"{_V2}/pipelines/([^/]+)/versions", _Handler.list_versions),
    ("GET", f"{_V2}/experiments", _Handler.list_experiments),
    ("POST", f"{_V2}/experiments", _Handler.create_experiment),
    ("POST", f"{_V2}/runs", _Handler.create_run),
    ("GET", f"{_V2}/runs", _Handler.list_runs),
    ("GET", f"{_V2}/runs/([^/:]+)", _Handler.get_run),
    ("POST", f"{_V2}/runs/([^/:]+):terminate", _Handler.terminate_run),
    ("POST", f"{_V2}/runs/([^/:]+):retry", _Handler.retry_run),
    ("GET", "/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", _Handler.run_log),
    ("POST", f"{_V2}/recurringruns", _Handler.create_schedule),
    ("GET", f"{_V2}/recurringruns", _Handler.list_schedules),
    ("DELETE", f"{_V2}/recurringruns/([^/:]+)", _Handler.delete_schedule),
    ("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", _Handler.access_review),
    ("GET", r"(/api/v1/.*|/apis/(?:apps|kueue\.x-k8s\.io|trainer\.kubeflow\.org)/.*)", _Handler.kubernetes),
    ("GET", "/api/2.0/mlflow/(.*)", _Handler.mlflow),
    ("POST", "/api/2.0/mlflow/(.*)", _Handler.mlflow),
    ("HEAD", "/v2/(.+)/manifests/(.+)", _Handler.manifest),
    ("GET", "/token", _Handler.registry_token),
    ("GET", "/pipeline", _Handler.kubeflow_page),
    ("GET", "/dex/auth", _Handler.dex_choice),
    ("GET", "/dex/auth/local", _Handler.dex_connector),
    ("GET", "/dex/auth/local/login", _Handler.dex_form),
    ("POST", "/dex/auth/local/login", _Handler.dex_login),
]
