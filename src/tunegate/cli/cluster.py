"""`cluster …`: compile, upload, run and look after pipelines on a Kubeflow cluster."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import AsJson, Assignments, Profile, SpecFile
from tunegate.errors import SpecError, TunegateError

if TYPE_CHECKING:
    from tunegate.cluster.client import Cluster
    from tunegate.cluster.compilation import CompiledPipeline
    from tunegate.cluster.connection import ConnectionSpec
    from tunegate.cluster.follow import ClusterRun
    from tunegate.config import TuneSpec
    from tunegate.resources import ResourcesSpec

cluster = typer.Typer(help="Run pipelines on a Kubeflow cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cluster, name="cluster")

Pipeline = Annotated[str, typer.Argument(metavar="[PIPELINE]", help="Name of the pipeline.")]
PipelineOption = Annotated[str, typer.Option("--pipeline", help="Name of the pipeline.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, its beginning, its name, or last.")]
Parameters = Annotated[
    list[str] | None, typer.Option("-p", "--param", metavar="KEY=VALUE", help="A pipeline parameter.")
]
SpecOption = Annotated[
    Path | None, typer.Option("--spec", metavar="SPEC.yaml", help="Take image and resources from this run spec.")
]
ResourcesFile = Annotated[
    Path | None,
    typer.Option(
        "--resources",
        metavar="FILE",
        envvar="TUNEGATE_RESOURCES",
        help="A `resources` section in a file of its own.",
    ),
]
Image = Annotated[str | None, typer.Option("--image", envvar="TUNEGATE_IMAGE", help="Image of every stage.")]
StorageRoot = Annotated[
    str | None,
    typer.Option(
        "--storage-root",
        envvar=["TUNEGATE_ROOT", "TUNEGATE_S3_ROOT"],
        help="s3:// prefix for records and artifacts.",
    ),
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow, as pods reach it.")
]
Experiment = Annotated[str, typer.Option("--experiment", help="Kubeflow experiment that runs are listed under.")]
VersionName = Annotated[
    str | None,
    typer.Option("--version", metavar="NAME", help="Run this uploaded version, or `newest`, as it is."),
]
PipelineRoot = Annotated[
    str | None, typer.Option("--pipeline-root", help="Where Kubeflow keeps artifacts, if not where it always does.")
]
ServiceAccount = Annotated[
    str | None,
    typer.Option("--service-account", envvar="TUNEGATE_SERVICE_ACCOUNT", help="Service account of the pods."),
]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting after this long.")]
Shared = Annotated[bool, typer.Option("--shared", help="For all users of Kubeflow, not only for your namespace.")]
DEFAULT_PIPELINE = "instruction-tuning"
DEFAULT_EXPERIMENT = "tunegate"
_MARKS = {"ok": ("✔", "green"), "warning": ("!", "yellow"), "failure": ("✘", "red"), "skipped": ("–", "bright_black")}


@cluster.callback()
def connection(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option("--host", envvar="TUNEGATE_KFP_HOST", help="URL of Kubeflow Pipelines.")
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(
            "--auth",
            envvar="TUNEGATE_KFP_AUTH",
            help="none, in-cluster, kubeconfig, bearer or dex; by default what fits the settings at hand.",
        ),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", envvar="TUNEGATE_KFP_NAMESPACE", help="Your Kubeflow namespace.")
    ] = None,
    kfp_namespace: Annotated[
        str, typer.Option("--kfp-namespace", help="Namespace that Kubeflow Pipelines is installed in.")
    ] = "kubeflow",
    kube_context: Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")] = None,
    ca_file: Annotated[
        str | None,
        typer.Option("--ca-file", envvar="TUNEGATE_KFP_CA_FILE", help="CA that signed Kubeflow's certificate (PEM)."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", envvar="TUNEGATE_KFP_TOKEN_FILE", help="File with a bearer token.")
    ] = None,
) -> None:
    """Run pipelines on a Kubeflow cluster.

    Secrets come from the environment: TUNEGATE_KFP_TOKEN, or TUNEGATE_KFP_USERNAME and TUNEGATE_KFP_PASSWORD.
    """
    from tunegate.cluster.connection import ConnectionSpec

    context.obj = ConnectionSpec(
        host=host,
        auth=auth,  # type: ignore[arg-type]  # checked when it is resolved
        namespace=namespace,
        kfp_namespace=kfp_namespace,
        context=kube_context,
        ca_file=ca_file,
        token_file=token_file,
    )


def open_cluster(context: typer.Context) -> Cluster:
    """Kubeflow Pipelines as the options before the command say."""
    from tunegate.cluster.client import Cluster
    from tunegate.cluster.connection import connect

    return Cluster(connect(context.obj))


def _load_resources(spec: TuneSpec | None, file: Path | None, image: str | None) -> ResourcesSpec:
    """The `resources` section: from a file of its own, else from the spec, with `--image` put in."""
    from tunegate.cluster.submission import read_resources
    from tunegate.resources import ResourcesSpec

    found = read_resources(file) if file else spec.resources if spec else ResourcesSpec()
    return ResourcesSpec.model_validate({**found.model_dump(exclude_unset=True), **({"image": image} if image else {})})


def _compile(
    name: str, spec_file: Path | None, resources: Path | None, image: str | None, parameters: list[str] | None
) -> CompiledPipeline:
    from tunegate.cluster.compilation import compile_pipeline, parse_parameters
    from tunegate.config import load_spec

    spec = load_spec(spec_file) if spec_file else None
    return compile_pipeline(
        name, spec=_load_resources(spec, resources, image), defaults=parse_parameters(parameters or [])
    )


@cluster.command("compile")
def compile_command(
    context: typer.Context,
    pipeline: Pipeline = DEFAULT_PIPELINE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output without.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="ir (IR YAML) or k8s (Pipeline and PipelineVersion resources).")
    ] = "ir",
    spec: SpecOption = None,
    resources: ResourcesFile = None,
    image: Image = None,
    parameters: Parameters = None,
) -> None:
    """Compile a pipeline with image, resources and defaults put in."""
    from tunegate.cluster.compilation import kubernetes_manifests

    if form not in {"ir", "k8s"}:
        raise SpecError("there is no such format", key="--format", value=form, fix="ir or k8s")
    compiled = _compile(pipeline, spec, resources, image, parameters)
    text = compiled.ir if form == "ir" else kubernetes_manifests(compiled, namespace=context.obj.namespace)
    if output is None:
        typer.echo(text, nl=False)
        return
    output.write_text(text)
    typer.echo(f"{output}: {compiled.version}", err=True)


@cluster.command()
def upload(
    context: typer.Context,
    pipeline: Pipeline = DEFAULT_PIPELINE,
    every: Annotated[bool, typer.Option("--all", help="Upload every pipeline that comes with Tunegate.")] = False,
    spec: SpecOption = None,
    resources: ResourcesFile = None,
    image: Image = None,
    parameters: Parameters = None,
    root: StorageRoot = None,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Upload a pipeline, as a new version where it exists; the same again changes nothing.

    -p and --storage-root become the defaults of the version's parameters, so that a run can be started in the
    Kubeflow UI without filling them in.
    """
    from tunegate.cluster.compilation import pipeline_names

    kubeflow = open_cluster(context)
    if root and root.startswith("s3://"):
        parameters = [*([] if _names(parameters, "storage_root") else [f"storage_root={root}"]), *(parameters or [])]
    done = []
    for name in pipeline_names() if every else [pipeline]:
        result = kubeflow.upload(_compile(name, spec, resources, image, parameters), shared=shared)
        done.append({**asdict(result), "link": kubeflow.link(_version_page(result.pipeline_id, result.version_id))})
        if not as_json:
            typer.echo(f"{result.version}: {'uploaded' if result.created else 'was there already'}")
    if as_json:
        emit_json(done)


def _names(parameters: list[str] | None, name: str) -> bool:
    return any(text.partition("=")[0].strip() == name for text in parameters or [])


def _version_page(pipeline_id: str, version_id: str) -> str:
    return f"pipelines/details/{pipeline_id}/version/{version_id}"


def _pick_version(
    kubeflow: Cluster, pipeline: str, version: str | None, resources: ResourcesSpec
) -> tuple[Any, dict[str, str]]:
    """The version to run, and the types of its parameters: a named one, or this very code, uploaded where needed."""
    from tunegate.cluster.compilation import compile_pipeline, parameter_types

    if version:
        found = kubeflow.pipeline(pipeline)
        chosen = kubeflow.version(found.pipeline_id, None if version == "newest" else version)
        spec = chosen.pipeline_spec or {}
        return chosen, parameter_types(spec.get("pipeline_spec", spec))
    compiled = compile_pipeline(pipeline, spec=resources)
    uploaded = kubeflow.upload(compiled)
    return kubeflow.version(uploaded.pipeline_id, uploaded.version_id), compiled.parameters


def _prepare(
    kubeflow: Cluster,
    *,
    spec_file: Path | None,
    profile: str | None,
    assignments: list[str] | None,
    parameters: list[str] | None,
    resources: Path | None,
    image: str | None,
    root: str | None,
    pipeline: str,
    version: str | None,
) -> tuple[Any, dict[str, Any], TuneSpec | None]:
    """The version, the parameters and the spec of a run or a schedule."""
    from tunegate.cluster.compilation import coerce_parameters, parse_parameters
    from tunegate.cluster.submission import run_parameters, storage_root
    from tunegate.config import load_spec

    given = parse_parameters(parameters or [])
    named = spec_file or profile or given.keys() & {"spec_uri", "profile", "overrides"}
    if pipeline == DEFAULT_PIPELINE and not named:  # the evaluation of a registered model takes all from its run
        raise SpecError("there is nothing to run", key="SPEC", fix="give a spec file, --profile, or -p spec_uri=s3://…")
    spec = None
    if spec_file or profile or assignments:
        spec = load_spec(spec_file, profile=profile, assignments=assignments or [])
    place = storage_root(given.get("storage_root") or root, spec, given)
    wanted = _load_resources(spec, resources, image)
    chosen, types = _pick_version(kubeflow, pipeline, version, wanted)
    values = run_parameters(
        spec=spec, spec_given=bool(spec_file or assignments), profile=profile, root=place, parameters=given
    )
    return chosen, coerce_parameters(types, values), spec


@cluster.command()
def run(
    context: typer.Context,
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    parameters: Parameters = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; made up when not given.")] = None,
    pipeline: PipelineOption = DEFAULT_PIPELINE,
    version: VersionName = None,
    resources: ResourcesFile = None,
    image: Image = None,
    root: StorageRoot = None,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    pipeline_root: PipelineRoot = None,
    service_account: ServiceAccount = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the run, exit as a local run would.")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Start a run. A spec file is put on S3; this code is uploaded as a version first, where it is not there yet."""
    from tunegate.stages.preflight import new_run_id

    kubeflow = open_cluster(context)
    chosen, values, resolved = _prepare(
        kubeflow,
        spec_file=spec,
        profile=profile,
        assignments=assignments,
        parameters=parameters,
        resources=resources,
        image=image,
        root=root,
        pipeline=pipeline,
        version=version,
    )
    started = kubeflow.create_run(
        name=name or new_run_id(resolved.name if resolved else pipeline),
        version=chosen,
        parameters=values,
        experiment=experiment,
        pipeline_root=pipeline_root,
        service_account=service_account,
    )
    link = kubeflow.link(f"runs/details/{started.run_id}")
    if not as_json:
        typer.secho(f"run {started.run_id} ({started.display_name})", bold=True, err=True)
        if link:
            typer.echo(link, err=True)
    if wait:
        _wait(kubeflow, started.run_id, root, timeout, as_json)
    elif as_json:
        emit_json({"run_id": started.run_id, "name": started.display_name, "state": started.state, "link": link})


@cluster.command("wait")
def wait_command(
    context: typer.Context,
    run: Run = "last",
    root: StorageRoot = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Follow a run to its end and exit as a local run would."""
    kubeflow = open_cluster(context)
    _wait(kubeflow, kubeflow.find_run(run).run_id, root, timeout, as_json)


def _wait(kubeflow: Cluster, run_id: str, root: str | None, timeout: float | None, as_json: bool) -> None:
    from tunegate.cli.progress import choose_view
    from tunegate.cluster.exit_codes import INTERRUPTED_EXIT_CODE
    from tunegate.cluster.follow import follow

    view = choose_view(verbose=False, quiet=as_json, log_path="")
    try:
        with view:
            ended = follow(kubeflow, run_id, watcher=view, root=root, timeout=timeout)
    except KeyboardInterrupt:
        typer.echo(f"the run goes on; end it with: tunegate cluster stop {run_id}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    if as_json:
        emit_json(_describe(ended))
    else:
        failed = ended.record is None or ended.record.verdict is None
        typer.secho(f"{ended.run.state.lower()}: {ended.reason}", fg="red" if failed else None)
        if failed:
            typer.echo(f"logs: tunegate cluster logs {run_id}; go on with: tunegate cluster retry {run_id}", err=True)
    raise typer.Exit(ended.exit_code)


def _describe(ended: ClusterRun) -> dict[str, Any]:
    record = ended.record.model_dump(mode="json", exclude={"spec"}) if ended.record else None
    return {
        "run_id": ended.run.run_id,
        "name": ended.run.display_name,
        "state": ended.run.state,
        "verdict": ended.record.verdict if ended.record else None,
        "reason": ended.reason,
        "exit_code": ended.exit_code,
        "record": record,
    }


@cluster.command()
def runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", min=1, max=500, help="Number of runs to show.")] = 20,
    root: StorageRoot = None,
    as_json: AsJson = False,
) -> None:
    """List the newest runs, with their verdicts where the records can be read."""
    from tunegate.cluster.client import seconds_of

    kubeflow = open_cluster(context)
    found = kubeflow.runs(limit=limit)
    verdicts = _verdicts(found, root)
    rows = [
        {
            "run_id": r.run_id,
            "name": r.display_name,
            "state": r.state,
            "verdict": verdicts.get(r.run_id),
            "started": r.created_at.isoformat(timespec="seconds") if r.created_at else None,
            "seconds": seconds_of(r),
        }
        for r in found
    ]
    if as_json:
        emit_json(rows)
        return
    if not rows:
        typer.echo("no runs yet; start one with: tunegate cluster run SPEC.yaml")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("run", "name", "started", "took", "state", "verdict"):
        table.add_column(column)
    for row in rows:
        took = "" if row["seconds"] is None else _duration(float(str(row["seconds"])))
        started = str(row["started"] or "")[:16].replace("T", " ")
        table.add_row(row["run_id"], row["name"], started, took, (row["state"] or "").lower(), row["verdict"] or "")
    Console().print(table)


def _verdicts(found: list[Any], root: str | None) -> dict[str, str]:
    """Verdict of each finished run, from its record; none at all where S3 cannot be read."""
    from tunegate.cluster.client import FINAL_STATES
    from tunegate.cluster.follow import record_store

    verdicts = {}
    for r in found:
        if r.state not in FINAL_STATES or (store := record_store(r, root)) is None:
            continue
        try:
            record = store.read_run()
        except TunegateError:
            break
        if record is not None and record.verdict:
            verdicts[r.run_id] = record.verdict
    return verdicts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


@cluster.command()
def logs(
    context: typer.Context,
    run: Run = "last",
    stage: Annotated[str | None, typer.Option("--stage", "-s", help="Only this stage, e.g. sft.")] = None,
    live: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the pod runs (needs Kubernetes).")] = False,
    root: StorageRoot = None,
) -> None:
    """Show what the stages of a run wrote."""
    from typing import get_args

    from tunegate.cluster.kube import open_kube
    from tunegate.cluster.logs import stage_logs
    from tunegate.resources import StageName

    if stage is not None and stage not in get_args(StageName):
        raise SpecError(
            "there is no such stage", key="--stage", value=stage, fix=f"one of {', '.join(get_args(StageName))}"
        )
    kubeflow = open_cluster(context)
    found = kubeflow.find_run(run)
    kube = open_kube(kubeflow.connection.spec, kubeflow.namespace)
    shown = False
    for log in stage_logs(kubeflow, found, stage=stage, kube=kube, root=root, live=live):
        shown = True
        typer.secho(f"--- {log.stage} ({log.origin})", bold=True)
        for line in log.lines:
            typer.echo(line, nl=False)
    if not shown:
        raise TunegateError(
            "there are no logs: the pods are gone, and neither KFP's archive nor the records have anything",
            key=found.run_id,
            fix="give --storage-root to read the records, or look while the pods exist (kubectl get pods)",
        )


@cluster.command()
def stop(context: typer.Context, run: Run) -> None:
    """End a run; its exit handler closes the records and writes the report."""
    kubeflow = open_cluster(context)
    found = kubeflow.find_run(run)
    kubeflow.stop(found.run_id)
    typer.echo(f"{found.run_id} ({found.display_name}) is being stopped")


@cluster.command()
def retry(
    context: typer.Context,
    run: Run,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the run, exit as a local run would.")] = False,
    root: StorageRoot = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Run the failed stages of a run again; finished ones are kept."""
    kubeflow = open_cluster(context)
    found = kubeflow.find_run(run)
    if found.state not in {"FAILED", "CANCELED"}:
        raise SpecError(
            "only a failed or stopped run can be retried", key="RUN", value=f"{found.run_id}: {found.state}"
        )
    kubeflow.retry(found.run_id)
    if not as_json:
        typer.echo(f"{found.run_id} ({found.display_name}) goes on")
    if wait:
        _wait(kubeflow, found.run_id, root, timeout, as_json)


@cluster.command()
def schedule(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")],
    spec: SpecFile = None,
    cron: Annotated[str | None, typer.Option("--cron", help="Five fields: minute hour day month weekday.")] = None,
    every: Annotated[str | None, typer.Option("--every", help="From start to start, e.g. 12h or 7d.")] = None,
    profile: Profile = None,
    assignments: Assignments = None,
    parameters: Parameters = None,
    pipeline: PipelineOption = DEFAULT_PIPELINE,
    version: VersionName = None,
    resources: ResourcesFile = None,
    image: Image = None,
    root: StorageRoot = None,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    pipeline_root: PipelineRoot = None,
    service_account: ServiceAccount = None,
    max_concurrency: Annotated[int, typer.Option(min=1, max=10, help="Runs of it that may go on at once.")] = 1,
    catch_up: Annotated[bool, typer.Option(help="Make up for runs missed while it was paused.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run again and again, always this version and this spec, until the schedule is made anew."""
    kubeflow = open_cluster(context)
    if any(s.display_name == name for s in kubeflow.schedules()):
        raise SpecError(
            "there is a schedule of this name", key="NAME", value=name, fix=f"tunegate cluster unschedule {name}"
        )
    seconds, fields = _interval(every), _cron(cron)
    if (seconds is None) == (fields is None):
        raise SpecError("a schedule needs either --cron or --every", key="--cron", fix='--cron "0 3 * * 1"')
    chosen, values, _ = _prepare(
        kubeflow,
        spec_file=spec,
        profile=profile,
        assignments=assignments,
        parameters=parameters,
        resources=resources,
        image=image,
        root=root,
        pipeline=pipeline,
        version=version,
    )
    if values.get("run_id"):
        raise SpecError(
            "runs of a schedule cannot share an id", key="-p run_id", value=values["run_id"], fix="leave it out"
        )
    made = kubeflow.schedule(
        name=name,
        version=chosen,
        parameters=values,
        experiment=experiment,
        cron=fields,
        every_seconds=seconds,
        max_concurrency=max_concurrency,
        catch_up=catch_up,
        pipeline_root=pipeline_root,
        service_account=service_account,
    )
    from tunegate.cluster.client import version_name

    if as_json:
        emit_json(
            {"recurring_run_id": made.recurring_run_id, "name": made.display_name, "version": version_name(chosen)}
        )
    else:
        typer.echo(f"{name}: {fields or every}, pinned to {version_name(chosen)}")


def _cron(text: str | None) -> str | None:
    """KFP's six fields (the first being seconds) from the usual five.

    Raises:
        SpecError: It has another number of fields.
    """
    if text is None:
        return None
    fields = text.split()
    if len(fields) == 5:
        return " ".join(["0", *fields])
    if len(fields) == 6:
        return " ".join(fields)
    raise SpecError("a cron expression has five fields", key="--cron", value=text, fix='--cron "0 3 * * 1"')


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _interval(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise SpecError("an interval is a number and s, m, h or d", key="--every", value=text, fix="--every 12h")
    return int(match[1]) * _UNITS[match[2]]


@cluster.command()
def schedules(context: typer.Context, as_json: AsJson = False) -> None:
    """List the schedules."""
    found = open_cluster(context).schedules()
    rows = [
        {
            "name": s.display_name,
            "recurring_run_id": s.recurring_run_id,
            "when": _when(s.trigger),
            "enabled": s.status != "DISABLED",
            "version_id": s.pipeline_version_reference.pipeline_version_id if s.pipeline_version_reference else None,
        }
        for s in found
    ]
    if as_json:
        emit_json(rows)
        return
    if not rows:
        typer.echo('no schedules; make one with: tunegate cluster schedule NAME SPEC.yaml --cron "0 3 * * 1"')
    for row in rows:
        typer.echo(f"{row['name']}  {row['when']}  {'' if row['enabled'] else 'paused'}".rstrip())


def _when(trigger: Any) -> str:
    if trigger is not None and trigger.cron_schedule is not None:
        return str(trigger.cron_schedule.cron)
    if trigger is not None and trigger.periodic_schedule is not None:
        return f"every {trigger.periodic_schedule.interval_second} s"
    return ""


@cluster.command()
def unschedule(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")]
) -> None:
    """Delete a schedule; runs that it started go on."""
    gone = open_cluster(context).unschedule(name)
    typer.echo(f"{gone.display_name} is deleted")


@cluster.command()
def doctor(
    context: typer.Context,
    pipeline: Pipeline = DEFAULT_PIPELINE,
    spec: SpecOption = None,
    resources: ResourcesFile = None,
    image: Image = None,
    root: StorageRoot = None,
    tracking_uri: TrackingUri = None,
    service_account: ServiceAccount = None,
    as_json: AsJson = False,
) -> None:
    """Check Kubeflow, S3, MLflow, image, service account and accelerators, and say what to change."""
    from tunegate.cluster.compilation import compile_pipeline
    from tunegate.cluster.doctor import examine, worst
    from tunegate.cluster.kube import open_kube
    from tunegate.components.image import IMAGE
    from tunegate.config import load_spec

    resolved = load_spec(spec) if spec else None
    wanted = _load_resources(resolved, resources, image)
    started = time.monotonic()
    target: ConnectionSpec = context.obj
    named = root or (resolved.storage.root if resolved and resolved.storage.root.startswith("s3://") else None)
    several = target.resolved_namespace()
    findings = []
    for finding in examine(
        connect=lambda: open_cluster(context),
        kube=open_kube(target, several),
        compiled=compile_pipeline(pipeline, spec=wanted),
        image=wanted.image or IMAGE,
        resources=wanted,
        root=named,
        tracking_uri=tracking_uri or (resolved.tracking.uri if resolved else None),
        service_account=service_account or ("default-editor" if several else "pipeline-runner"),
        kfp_namespace=target.kfp_namespace,
    ):
        findings.append(finding)
        if not as_json:
            mark, colour = _MARKS[finding.level]
            typer.echo(f"{typer.style(mark, fg=colour)} {finding.check}: {finding.message}")
            if finding.fix:
                typer.echo(f"    fix: {finding.fix}")
    if as_json:
        emit_json([asdict(f) for f in findings])
    else:
        bad = sum(f.level == "failure" for f in findings)
        typer.echo(f"{bad or 'nothing'} to mend ({time.monotonic() - started:.0f} s)", err=True)
    raise typer.Exit(worst(findings))
