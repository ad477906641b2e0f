"""Fetch: bring a model that exists (a folder, a run's, a registered version), and what belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunegate.data import read_records
from tunegate.errors import ModelError
from tunegate.stages.context import Outcome, Output, StageContext, mark_absent, run_stage
from tunegate.storage.manifest import MANIFEST_NAME
from tunegate.storage.runs import RunStore, list_runs
from tunegate.storage.stores import bring_tree, open_store

NONE = "none"
"""Given in place of a model: do without one."""

#: Stage and output of a run that hold a model, in the order in which they are looked for.
_OUTPUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "candidate": (("ppo", "model"), ("fetch", "candidate"), ("sft", "model")),
    "sft_model": (("sft", "model"), ("fetch", "sft_model")),
    "reward": (("reward", "model"), ("fetch", "reward")),
    "judge": (("reward", "judge"), ("fetch", "judge")),
}


@dataclass(frozen=True)
class Fetched:
    """Where a model came from.

    Attributes:
        title: In words.
        run_id: The run that trained it, if it is known.
    """

    title: str
    run_id: str | None = None


def run(
    *,
    spec: Path,
    dataset: Path,
    model: str,
    reward: str,
    judge: str,
    candidate: Path,
    sft_model: Path,
    reward_model: Path,
    judge_model: Path,
) -> str:
    """Bring the model to evaluate, the SFT model it came from, and the reward models that compare answers.

    Args:
        spec: The spec artifact.
        dataset: The dataset, for the tokenizer of a model made on the spot.
        model: A folder, `s3://` prefix, known name or Hub id, the id of a run, `NAME@VERSION` or `NAME@ALIAS` of the
            registry, or an alias of the spec's registered model.
        reward: The reward model that PPO trained on: a folder, `s3://` prefix or the id of a run; empty takes that of
            the run that made the model, `none` does without.
        judge: The reward model that PPO never saw; likewise.
        candidate: Where the model goes.
        sft_model: Where the SFT model goes, or the mark of its absence.
        reward_model: Where the reward model goes; likewise.
        judge_model: Where the judge goes; likewise.

    Returns:
        What was fetched, in words.
    """

    def body(context: StageContext) -> Outcome:
        found = bring(model, candidate, context, texts=_texts(dataset))
        parts = [found.title]
        for name, given, out in (
            ("sft_model", "", sft_model),
            ("reward", reward, reward_model),
            ("judge", judge, judge_model),
        ):
            title = _companion(name, given, found, out, context)
            parts += [f"{name.removesuffix('_model')}: {title}"] if title else []
        return Outcome(summary="; ".join(parts), values={"model": found.title, "run_id": found.run_id or ""})

    record = run_stage(
        "fetch",
        spec,
        inputs={"dataset": dataset},
        outputs={
            "candidate": Output(candidate, "model"),
            "sft_model": Output(sft_model, "model"),
            "reward": Output(reward_model, "reward_model"),
            "judge": Output(judge_model, "reward_model"),
        },
        sections=("model", "registry"),
        body=body,
        # A name of a registry stands for another version tomorrow.
        cacheable=False,
        arguments={"model": model, "reward": reward, "judge": judge},
    )
    return record.values["model"]


def bring(name: str, out: Path, context: StageContext, *, texts: Iterable[str] = ()) -> Fetched:
    """Write the model that a name stands for to a folder, unchanged where it is an artifact already.

    Args:
        name: See `run`.
        out: The folder.
        context: Of the stage; says where the runs and the registry are.
        texts: What the tokenizer of `tiny-random` is trained on.

    Raises:
        ModelError: Nothing goes by that name.
        RegistryError: The registry has no such model or version, or cannot be reached.
        GateError: The registered files are not those that were registered.
    """
    from tunegate.registry import names
    from tunegate.registry.versions import download_model
    from tunegate.training.config import ModelSpec
    from tunegate.training.models import resolve_model

    if not name:
        raise ModelError("there is no model to evaluate", key="model", value=name, fix="name one")
    registered, separator, which = name.partition("@")
    if name in names.ALIASES:
        registered, separator, which = context.spec.registry.model_name, "@", name
    if separator and not Path(name).exists():
        version = download_model(context.tracking_uri, registered, which, out)
        return Fetched(f"{registered} version {version.number}", version.tags.get(names.TAG_RUN_ID))
    if (uri := _of_another_run(name, "candidate", context)) is not None:
        bring_tree(uri, out)
        return Fetched(f"model of run {name}", name)
    if _is_artifact(name):
        bring_tree(name, out)
        return Fetched(name)
    source = ModelSpec(**{**context.spec.model.model_dump(), "source": name, "revision": _revision(name, context)})
    facts = resolve_model(source, out, texts=texts, seed=context.spec.stage_seed("ingest"), observer=context.observer)
    return Fetched(f"{name} ({facts.parameters / 1e6:.0f}M parameters)")


def _revision(name: str, context: StageContext) -> str | None:
    return context.spec.model.revision if name == context.spec.model.source else None


def _companion(name: str, given: str, found: Fetched, out: Path, context: StageContext) -> str:
    """Bring a model that belongs to the evaluated one; says what came, or nothing where there is none."""
    if given == NONE:
        mark_absent(out, f"{name} is {NONE}")
        return ""
    where = given or found.run_id or ""
    uri = _of_another_run(where, name, context) if where else None
    if uri is not None:
        bring_tree(uri, out)
        return f"of run {where}"
    if not given:
        mark_absent(out, f"no {name} was given, and the model's own run has none here")
        return ""
    if not _is_artifact(given) and not Path(given).is_dir():
        raise ModelError(
            "there is no such reward model",
            key=name,
            value=given,
            fix="give its folder, an s3:// prefix, or the id of the run that trained it",
        )
    bring_tree(given, out)
    return given


def _of_another_run(run_id: str, role: str, context: StageContext) -> str | None:
    return None if run_id == context.run.run_id else model_of_run(context.spec.storage.root, run_id, role)


def model_of_run(root: str, run_id: str, role: str = "candidate") -> str | None:
    """Where the model lies that a run made for a role; None when there is no such run or it made none.

    Args:
        root: The storage root.
        run_id: The run.
        role: `candidate`, `sft_model`, `reward` or `judge`.
    """
    if run_id not in {record.run_id for record in list_runs(root)}:
        return None
    store = RunStore(root, run_id)
    for stage, output in _OUTPUTS[role]:
        record = store.read_stage(stage)
        if record is not None and record.status == "done" and output in record.outputs:
            return record.outputs[output].uri
    return None


def _is_artifact(uri: str) -> bool:
    """Whether a folder (here or on S3) was sealed by a stage."""
    if uri.startswith("s3://"):
        return open_store(uri).get(MANIFEST_NAME) is not None
    return (Path(uri) / MANIFEST_NAME).is_file()


def _texts(dataset: Path) -> Iterator[str]:
    for record in read_records(dataset, "sft", "train"):
        for message in record.messages:
            yield message["content"]
