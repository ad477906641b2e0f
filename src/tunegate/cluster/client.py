"""What Tunegate asks of Kubeflow Pipelines: upload, run, look, stop, retry, schedule; with retries and readable errors.

Requests that may be sent twice are repeated after 429, 502, 503, 504 and dropped connections. Creating a run may not:
when the answer to that is lost, the run is looked up by its name, which is unique.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tunegate.cluster.compilation import CompiledPipeline
from tunegate.cluster.connection import Connection
from tunegate.cluster.errors import ClusterError, RefusedError
from tunegate.errors import SpecError

#: States in which a run stays (`V2beta1RuntimeState`).
FINAL_STATES = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})
#: Environment variable of Kubeflow's API server with the accounts that runs may ask for besides its default.
ALLOW_LIST = "ALLOWEDSERVICEACCOUNTS"
_TRANSIENT = frozenset({429, 502, 503, 504})
_LOGIN_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_WAITS = (1.0, 2.0, 4.0, 8.0)
_MAX_RETRY_AFTER = 60.0
_TIMEOUT = (10.0, 60.0)
_PAGE = 100
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ConflictError(RefusedError):
    """There is something of that name already."""


class MissingError(RefusedError):
    """There is nothing of that name or id."""


class _LostAnswerError(ClusterError):
    """The request may or may not have been carried out."""


@dataclass(frozen=True)
class Upload:
    """Where an uploaded version lies."""

    pipeline: str
    pipeline_id: str
    version: str
    version_id: str
    created: bool
    """False when this very version was there already."""


class Cluster:
    """Kubeflow Pipelines through its API.

    Args:
        connection: Where and as whom.
        pause: Waits a number of seconds between tries.
    """

    def __init__(self, connection: Connection, *, pause: Callable[[float], None] = time.sleep) -> None:
        import kfp_server_api  # type: ignore[import-untyped]

        self.connection = connection
        self._pause = pause
        api = connection.api
        self._health = kfp_server_api.HealthzServiceApi(api)
        self._pipelines = kfp_server_api.PipelineServiceApi(api)
        self._uploads = kfp_server_api.PipelineUploadServiceApi(api)
        self._experiments = kfp_server_api.ExperimentServiceApi(api)
        self._runs = kfp_server_api.RunServiceApi(api)
        self._recurring = kfp_server_api.RecurringRunServiceApi(api)

    # -- the server ------------------------------------------------------------------------------------------------

    @cached_property
    def health(self) -> Any:
        """`V2beta1GetHealthzResponse`: whether several users are served, and where pipelines are stored."""
        return self.call("reach Kubeflow Pipelines", self._health.healthz_service_get_healthz)

    @cached_property
    def server_version(self) -> str | None:
        """The server's release, e.g. `2.17.0`; None when it was built without one.

        The server says it in the health check, but its generated message type has no field for it.
        """
        answer = self.call(
            "reach Kubeflow Pipelines",
            self._health.healthz_service_get_healthz,
            _preload_content=False,
            _return_http_data_only=True,
        )
        tag = str(json.loads(answer.data).get("tag_name", ""))
        return tag if re.fullmatch(r"\d+\.\d+\.\d+.*", tag) else None

    @cached_property
    def namespace(self) -> str | None:
        """The namespace to name in requests: the user's where KFP serves several users, else None.

        Raises:
            SpecError: KFP serves several users and the namespace is not known.
        """
        if not self.health.multi_user:
            return None
        if self.connection.spec.namespace:
            return self.connection.spec.namespace
        if _NAMESPACE_FILE.exists():
            return _NAMESPACE_FILE.read_text().strip()
        raise SpecError(
            "this Kubeflow serves several users, so your namespace must be named",
            key="--namespace",
            fix="give --namespace PROFILE, or set TUNEGATE_KFP_NAMESPACE",
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {} if self.namespace is None else {"namespace": self.namespace}

    def link(self, path: str) -> str | None:
        """Address of a page of the Kubeflow UI; None when the API is reached past the UI."""
        spec = self.connection.spec
        return f"{spec.host}/#/{path}" if spec.host and spec.auth in {"dex", "bearer", "none"} else None

    # -- pipelines -------------------------------------------------------------------------------------------------

    def find_pipeline(self, name: str, *, shared: bool = False) -> Any | None:
        """The pipeline of this name (`V2beta1Pipeline`), or None.

        Args:
            name: Its name.
            shared: Look among those shared by all users instead of those of the namespace.
        """
        place = {} if shared else self._place
        try:
            return self.call(f"find {name}", self._pipelines.pipeline_service_get_pipeline_by_name, name, **place)
        except MissingError:
            return None

    def pipeline(self, name: str, *, shared: bool = False) -> Any:
        """The pipeline of this name.

        Raises:
            RefusedError: It was not uploaded yet.
        """
        found = self.find_pipeline(name, shared=shared)
        if found is None and not shared and self.namespace is not None:
            found = self.find_pipeline(name, shared=True)
        if found is None:
            raise RefusedError(
                "this pipeline was not uploaded yet", key="PIPELINE", value=name, fix="tunegate cluster upload"
            )
        return found

    def versions(self, pipeline_id: str) -> Iterator[Any]:
        """The versions of a pipeline (`V2beta1PipelineVersion`), newest first."""
        yield from self._pages(
            "list the versions",
            self._pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            pipeline_id,
            sort_by="created_at desc",
        )

    def version(self, pipeline_id: str, name: str | None = None) -> Any:
        """A version by its name or id, the newest without.

        Raises:
            RefusedError: There is none.
        """
        seen = []
        for version in self.versions(pipeline_id):
            if name is None or name in {version_name(version), version.pipeline_version_id}:
                return version
            seen.append(version_name(version))
        raise RefusedError(
            "there is no such version" if name else "the pipeline has no version",
            key="--version",
            value=name,
            fix=f"one of {', '.join(seen[:5])}" if seen else "tunegate cluster upload",
        )

    def upload(self, compiled: CompiledPipeline, *, shared: bool = False) -> Upload:
        """Upload a pipeline, as a new version where it exists; what is there already is left as it is.

        Raises:
            RefusedError: The server does not allow it, or does not accept the pipeline.
            ClusterError: The server cannot be reached.
        """
        pipeline = self.find_pipeline(compiled.name, shared=shared) or self._create_pipeline(compiled, shared)
        if found := self._find_version(pipeline.pipeline_id, compiled.version):
            return _uploaded(compiled, pipeline, found, created=False)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{compiled.name}.yaml"
            path.write_text(compiled.ir)
            try:
                version = self.call(
                    f"upload {compiled.version}",
                    self._uploads.upload_pipeline_version,
                    str(path),
                    name=compiled.version,
                    display_name=compiled.version,
                    pipelineid=pipeline.pipeline_id,
                    description=compiled.description,
                )
            except ConflictError:  # a twin was faster, or the answer to the first try was lost
                found = self._find_version(pipeline.pipeline_id, compiled.version)
                if found is None:
                    raise
                return _uploaded(compiled, pipeline, found, created=False)
        return _uploaded(compiled, pipeline, version, created=True)

    def _create_pipeline(self, compiled: CompiledPipeline, shared: bool) -> Any:
        import kfp_server_api

        body = kfp_server_api.V2beta1Pipeline(
            name=compiled.name,
            display_name=compiled.name,
            description=compiled.description,
            namespace=None if shared else self.namespace,
        )
        try:
            return self.call(f"create {compiled.name}", self._pipelines.pipeline_service_create_pipeline, body)
        except ConflictError:
            found = self.find_pipeline(compiled.name, shared=shared)
            if found is None:
                raise
            return found

    def _find_version(self, pipeline_id: str, name: str) -> Any | None:
        return next((v for v in self.versions(pipeline_id) if version_name(v) == name), None)

    # -- runs ------------------------------------------------------------------------------------------------------

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, made when there is none of this name."""
        import kfp_server_api

        wanted = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
        listed = self.call(
            "list the experiments", self._experiments.experiment_service_list_experiments, filter=wanted, **self._place
        )
        for experiment in listed.experiments or []:
            if experiment.display_name == name:
                return str(experiment.experiment_id)
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        created = self.call(
            f"create the experiment {name}", self._experiments.experiment_service_create_experiment, body
        )
        return str(created.experiment_id)

    def create_run(
        self,
        *,
        name: str,
        version: Any,
        parameters: Mapping[str, Any],
        experiment: str,
        pipeline_root: str | None = None,
        service_account: str | None = None,
    ) -> Any:
        """Start a run and return it (`V2beta1Run`).

        Args:
            name: Name shown in the UI; must be unique, since a run whose answer was lost is found by it.
            version: The `V2beta1PipelineVersion` to run.
            parameters: Values of the pipeline's parameters.
            experiment: Name of the experiment.
            pipeline_root: Where KFP keeps artifacts; None takes the cluster's default.
            service_account: Service account of the pods; None takes the cluster's default.
        """
        import kfp_server_api

        body = kfp_server_api.V2beta1Run(
            experiment_id=self.experiment_id(experiment),
            display_name=name,
            pipeline_version_reference=_reference(version),
            runtime_config=kfp_server_api.V2beta1RuntimeConfig(
                parameters=dict(parameters), pipeline_root=pipeline_root
            ),
            service_account=service_account,
        )
        try:
            return self.call("start the run", self._runs.run_service_create_run, body, repeatable=False)
        except RefusedError as error:
            raise _about_account(error, service_account) from None
        except _LostAnswerError:
            found = next((r for r in self.runs(limit=20) if r.display_name == name), None)
            if found is None:
                raise
            return found

    def run(self, run_id: str) -> Any:
        """A run with its tasks (`V2beta1Run`)."""
        return self.call(f"read the run {run_id}", self._runs.run_service_get_run, run_id)

    def runs(self, *, limit: int = 20) -> list[Any]:
        """The newest runs."""
        found = []
        for run in self._pages(
            "list the runs", self._runs.run_service_list_runs, "runs", sort_by="created_at desc", **self._place
        ):
            found.append(run)
            if len(found) == limit:
                break
        return found

    def find_run(self, text: str) -> Any:
        """A run by its id, the beginning of its id, its name, or `last`.

        Raises:
            RefusedError: No run or several runs match.
        """
        if len(text) == 36:
            return self.run(text)
        recent = self.runs(limit=_PAGE)
        matches = [r for r in recent if text in {"last", r.display_name} or r.run_id.startswith(text)]
        if text == "last" or len(matches) == 1:
            if matches:
                return self.run(matches[0].run_id)
            raise MissingError("there is no run yet", key="RUN", value=text, fix="tunegate cluster run SPEC.yaml")
        raise MissingError(
            "several runs match" if matches else "there is no such run among the newest",
            key="RUN",
            value=text,
            fix=f"one of {', '.join(r.run_id for r in (matches or recent)[:5]) or '(none yet)'}",
        )

    def stop(self, run_id: str) -> None:
        """End a run; its exit handler closes its records, where Argo lets it run after a stop."""
        self.call(f"stop the run {run_id}", self._runs.run_service_terminate_run, run_id)

    def retry(self, run_id: str) -> None:
        """Run the failed tasks of a run again; finished ones are kept."""
        self.call(f"retry the run {run_id}", self._runs.run_service_retry_run, run_id, repeatable=False)

    def pod_log(self, run_id: str, pod: str) -> str:
        """The log of a task's pod, from the pod or, when it is gone, from KFP's log archive.

        The server has this outside its generated API (`backend/src/apiserver/main.go`, `ReadRunLogV1`).
        """
        path = f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(pod)}/log"
        response = self.call(
            f"read the log of {pod}",
            self.connection.api.call_api,
            path,
            "GET",
            auth_settings=["Bearer"],
            response_type="str",
            _preload_content=False,
            _return_http_data_only=True,
        )
        return bytes(response.data).decode(errors="replace")

    # -- schedules -------------------------------------------------------------------------------------------------

    def schedule(
        self,
        *,
        name: str,
        version: Any,
        parameters: Mapping[str, Any],
        experiment: str,
        cron: str | None = None,
        every_seconds: int | None = None,
        max_concurrency: int = 1,
        catch_up: bool = False,
        pipeline_root: str | None = None,
        service_account: str | None = None,
    ) -> Any:
        """Make a recurring run that is pinned to a version (`V2beta1RecurringRun`).

        Args:
            name: Name of the schedule.
            version: The `V2beta1PipelineVersion` that every run of it uses.
            parameters: Values of the pipeline's parameters.
            experiment: Name of the experiment.
            cron: Six fields, the first being seconds.
            every_seconds: Seconds from start to start, in place of `cron`.
            max_concurrency: Number of its runs that may go on at once.
            catch_up: Whether runs missed during a pause are made up for.
            pipeline_root: Where KFP keeps artifacts; None takes the cluster's default.
            service_account: Service account of the pods; None takes the cluster's default.
        """
        import kfp_server_api

        trigger = kfp_server_api.V2beta1Trigger(
            cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron) if cron else None,
            periodic_schedule=(
                kfp_server_api.V2beta1PeriodicSchedule(interval_second=str(every_seconds)) if every_seconds else None
            ),
        )
        body = kfp_server_api.V2beta1RecurringRun(
            display_name=name,
            experiment_id=self.experiment_id(experiment),
            mode=kfp_server_api.RecurringRunMode.ENABLE,
            pipeline_version_reference=_reference(version),
            runtime_config=kfp_server_api.V2beta1RuntimeConfig(
                parameters=dict(parameters), pipeline_root=pipeline_root
            ),
            trigger=trigger,
            max_concurrency=str(max_concurrency),
            no_catchup=not catch_up,
            service_account=service_account,
        )
        create = self._recurring.recurring_run_service_create_recurring_run
        try:
            return self.call(f"schedule {name}", create, body, repeatable=False)
        except RefusedError as error:
            raise _about_account(error, service_account) from None
        except _LostAnswerError:
            found = next((s for s in self.schedules() if s.display_name == name), None)
            if found is None:
                raise
            return found

    def schedules(self) -> list[Any]:
        """All recurring runs."""
        return list(
            self._pages(
                "list the schedules",
                self._recurring.recurring_run_service_list_recurring_runs,
                "recurring_runs",
                sort_by="created_at desc",
                **self._place,
            )
        )

    def unschedule(self, name: str) -> Any:
        """Delete the recurring run of this name or id; runs that it started go on.

        Raises:
            RefusedError: There is none.
        """
        known = self.schedules()
        for schedule in known:
            if name in {schedule.display_name, schedule.recurring_run_id}:
                self.call(
                    f"delete the schedule {name}",
                    self._recurring.recurring_run_service_delete_recurring_run,
                    schedule.recurring_run_id,
                )
                return schedule
        names = ", ".join(s.display_name for s in known[:5])
        raise MissingError("there is no such schedule", key="NAME", value=name, fix=f"one of {names or '(none yet)'}")

    # -- sending ---------------------------------------------------------------------------------------------------

    def _pages(self, doing: str, method: Callable[..., Any], field: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self.call(doing, method, *args, page_size=_PAGE, page_token=token, **kwargs)
            yield from getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return

    def call(self, doing: str, method: Callable[..., Any], *args: Any, repeatable: bool = True, **kwargs: Any) -> Any:
        """Send one request, again where that is safe, and turn what goes wrong into a readable error.

        Args:
            doing: What the request is for, in the words of an error message ("Kubeflow did not let us …").
            method: Method of a `kfp_server_api` service.
            args: Its positional arguments.
            repeatable: Whether sending it twice does no harm.
            kwargs: Its keyword arguments.

        Raises:
            RefusedError: The server said no.
            ClusterError: The server could not be reached, or failed.
        """
        renewed = False
        for wait in (*_WAITS, None):
            problem = self._try(doing, method, args, {"_request_timeout": _TIMEOUT, **kwargs})
            if not isinstance(problem, _Problem):
                return problem
            if problem.login and self.connection.renew is not None and not renewed:
                renewed = True
                self.connection.renew()
                continue
            safe = repeatable or problem.status == 429  # a server that says "later" has done nothing
            if not problem.transient or not safe or wait is None:
                raise self._explain(doing, problem, lost=problem.transient and not safe)
            self._pause(min(max(wait, problem.retry_after), _MAX_RETRY_AFTER))
        raise AssertionError("the loop above returns or raises")  # pragma: no cover

    def _try(self, doing: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import urllib3
        from kfp_server_api.exceptions import ApiException  # type: ignore[import-untyped]

        try:
            result = method(*args, **kwargs)
        except ApiException as error:
            return _from_response(error)
        except urllib3.exceptions.SSLError as error:
            return _Problem(str(error), tls=True)
        except urllib3.exceptions.HTTPError as error:
            return _Problem(str(error) or type(error).__name__, transient=True)
        except AttributeError as error:
            # kfp_server_api stumbles over its own error when TLS fails: `ApiException.body` is None then.
            if isinstance(error.__context__, ApiException):
                return _Problem(str(error.__context__.reason), tls=True)
            raise
        response = self.connection.api.last_response if kwargs.get("_preload_content", True) else result
        kind = (response.headers if hasattr(response, "headers") else response.getheaders()).get("content-type", "")
        if kind.startswith("text/html"):
            return _Problem("it answered with a web page instead of data", login=True)
        return result

    def _explain(self, doing: str, problem: _Problem, *, lost: bool) -> ClusterError:
        key, auth = self.connection.host, self.connection.spec.auth
        what = f"Kubeflow Pipelines did not let us {doing}: {problem.reason}"
        if problem.tls:
            return ClusterError(
                f"the TLS certificate of Kubeflow Pipelines cannot be checked: {problem.reason}",
                key=key,
                fix="give the authority that signed it: --ca-file CA.pem, or TUNEGATE_KFP_CA_FILE",
            )
        if problem.login:
            fixes = {
                "bearer": "get a new token and set TUNEGATE_KFP_TOKEN",
                "dex": "check TUNEGATE_KFP_USERNAME and TUNEGATE_KFP_PASSWORD",
                "in-cluster": "mount a service account token for the audience pipelines.kubeflow.org",
                "kubeconfig": "log in to the cluster again (kubectl must work), or set TUNEGATE_KFP_TOKEN",
                "none": "it asks for a login: set TUNEGATE_KFP_TOKEN, or TUNEGATE_KFP_USERNAME and _PASSWORD",
            }
            return RefusedError(what, key=key, fix=fixes[auth or "none"])
        if problem.status == 403:
            where = f" in the namespace {self.connection.spec.namespace}" if self.connection.spec.namespace else ""
            return RefusedError(what, key=key, fix=f"ask for the role kubeflow-pipelines-edit{where}")
        if problem.status == 404:
            return MissingError(what, key=key, fix="check the name or id, and that --host is the address of the API")
        if problem.status == 409:
            return ConflictError(what, key=key, fix="choose another name")
        if problem.status and 400 <= problem.status < 500 and problem.status != 429:
            return RefusedError(what, key=key, fix="correct what it names")
        if lost:
            return _LostAnswerError(what, key=key, fix="see whether it happened all the same: tunegate cluster runs")
        fix = "try again in a minute" if problem.status else "check --host and that the server is up, then try again"
        return ClusterError(what, key=key, fix=fix)


def _about_account(error: RefusedError, service_account: str | None) -> RefusedError:
    """The error with the way out, where Kubeflow does not let a run have the service account that was asked for.

    Releases with kubeflow/pipelines pull request 14181 take accounts besides their default only from an allow-list.
    """
    if not service_account or service_account not in error.reason:
        return error
    fix = (
        f"have Kubeflow's administrator add {service_account} to {ALLOW_LIST} of the ml-pipeline deployment (with "
        "several users you also need the verb `use` on it), or start the run with Kubeflow's own account; "
        "docs/cluster/install.md has the commands"
    )
    return RefusedError(error.reason, key="--service-account", value=service_account, fix=fix)


@dataclass(frozen=True)
class _Problem:
    """Why a request failed."""

    reason: str
    status: int = 0
    transient: bool = False
    login: bool = False
    tls: bool = False
    retry_after: float = 0.0


def _from_response(error: Any) -> _Problem:
    status = int(error.status or 0)
    headers = error.headers or {}
    after = str(headers.get("retry-after", ""))
    reason = _message(error.body) or f"{status} {error.reason or ''}".strip()
    if status in _LOGIN_REDIRECTS:
        reason = "it redirects to a login page"
    return _Problem(
        reason,
        status=status,
        transient=status in _TRANSIENT,
        login=status == 401 or status in _LOGIN_REDIRECTS,
        retry_after=float(after) if after.isdigit() else 0.0,
    )


def _message(body: str | None) -> str:
    """The message in an error of KFP: gRPC gateway's `message`, or `error_message` of the upload server."""
    try:
        content = json.loads(body or "")
    except ValueError:
        return "" if (body or "").lstrip().startswith("<") else (body or "").strip()[:300]
    if not isinstance(content, dict):
        return ""
    text = content.get("message") or content.get("error_message") or content.get("error") or ""
    return str(text).splitlines()[0][:300] if text else ""


def _reference(version: Any) -> Any:
    import kfp_server_api

    return kfp_server_api.V2beta1PipelineVersionReference(
        pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
    )


def _uploaded(compiled: CompiledPipeline, pipeline: Any, version: Any, *, created: bool) -> Upload:
    return Upload(
        pipeline=compiled.name,
        pipeline_id=str(pipeline.pipeline_id),
        version=compiled.version,
        version_id=str(version.pipeline_version_id),
        created=created,
    )


def version_name(version: Any) -> str:
    """Name of a version; servers before 2.15 only have the display name."""
    return str(version.name or version.display_name)


def seconds_of(run: Any) -> float | None:
    """How long a run took, or has been going on, in seconds; None before its start."""
    if run.created_at is None:
        return None
    # KFP writes 1970-01-01 for a run that has not ended.
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else datetime.now(UTC)
    return float((ended - run.created_at).total_seconds())
