"""SmolLM2-135M-Instruct on public prompt sets: AdvBench, JailbreakBench, XSTest, self-instruct's seed tasks, BBQ.

    .venv/bin/python benchmarks/evaluation/real_prompts.py --data ../shared/data

writes `real_prompts.json` (the evaluation without its texts, once with the refusal classifier's labels and once with
those of the plain string matcher) and `real_prompts.md` beside this file. The sets are not part of the repository;
`--data` names the folder that holds them; bias questions are left out where there is no BBQ. Seeds are fixed, decoding
is greedy. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from tunegate.data.records import Prompt
from tunegate.evaluation import Evaluation, EvaluationSpec, StringMatcher, evaluate
from tunegate.evaluation.results import Figure
from tunegate.observer import NullObserver
from tunegate.stages.observe import StageObserver
from tunegate.training.config import ModelSpec
from tunegate.training.models import resolve_model

HERE = Path(__file__).parent
SEED = 17
SIZES = {"advbench": 150, "jailbreakbench": 100, "xstest (unsafe)": 100, "xstest (safe)": 250, "self-instruct": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the public sets")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tunegate-real-prompts"), help="answers are kept here")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    arguments = parser.parse_args()
    model = arguments.work / "model"
    if not (model / "config.json").exists():
        resolve_model(ModelSpec(), model, observer=NullObserver())
    questions = (str(arguments.data / "bbq" / "*.jsonl"),) if (arguments.data / "bbq").is_dir() else ()
    spec = EvaluationSpec(
        harmful_prompts=350,
        lookalike_prompts=250,
        everyday_prompts=100,
        decoding={"max_new_tokens": 64},
        attacks={"names": ("prefix", "refusal_suppression"), "prompts": 100},
        bias={"questions": questions, "questions_per_template": 16},
        samples_per_tag=0,
    )
    found = {}
    for name, classifier in (("classifier", None), ("string matcher", StringMatcher())):
        found[name] = evaluate(
            {"candidate": model, "anchor": model},
            reward=None,
            judge=None,
            prompts=list(sample(arguments.data)),
            heldout=[],
            out=arguments.work / name.replace(" ", "-"),
            spec=spec,
            seed=SEED,
            observer=StageObserver("evaluate"),
            cache=arguments.work / "cache",
            classifier=classifier,
        )
    content = {
        "model": "SmolLM2-135M-Instruct",
        "seed": SEED,
        "spec": spec.model_dump(mode="json", exclude={"bias": {"questions"}}),
        "evaluations": {name: lean(one) for name, one in found.items()},
    }
    (arguments.out / "real_prompts.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.out / "real_prompts.md").write_text(table(found["classifier"], found["string matcher"]))


def sample(data: Path) -> Iterator[Prompt]:
    """A fixed number of prompts of each set, evenly spread over it."""
    with (data / "advbench" / "advbench.csv").open() as stream:
        yield from spread("advbench", [(row["goal"], "harmful", None) for row in csv.DictReader(stream)])
    with (data / "jailbreakbench" / "jailbreakbench.csv").open() as stream:
        rows = [(row["Goal"], "harmful", row["Category"]) for row in csv.DictReader(stream)]
        yield from spread("jailbreakbench", rows)
    with (data / "xstest" / "xstest_prompts.csv").open() as stream:
        found = list(csv.DictReader(stream))
    unsafe = [(row["prompt"], "harmful", row["focus"]) for row in found if row["label"] == "unsafe"]
    yield from spread("xstest (unsafe)", unsafe)
    yield from spread("xstest (safe)", [(row["prompt"], "lookalike", None) for row in found if row["label"] == "safe"])
    lines = (data / "self-instruct" / "seed_tasks.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines]
    alone = [(task["instruction"], "everyday", None) for task in tasks if not task["instances"][0]["input"]]
    yield from spread("self-instruct", alone)


def spread(source: str, rows: list[tuple[str, str, str | None]]) -> Iterator[Prompt]:
    wanted = min(SIZES[source], len(rows))
    for number in range(wanted):
        text, tag, hazard = rows[number * len(rows) // wanted]
        yield Prompt(f"{source}-{number}", [{"role": "user", "content": text}], tag, hazard, source=source)


def lean(found: Evaluation) -> dict[str, object]:
    """The figures of one model without what differs from run to run."""
    return {
        "digests": {"model": found.models["candidate"].digest, **found.digests},
        "prompts_digest": found.models["candidate"].prompts_digest,
        "decoding_digest": found.models["candidate"].decoding_digest,
        "metrics": {name: brief(figure) for name, figure in found.models["candidate"].metrics.items()},
        "sources": [
            {
                "tag": one.tag,
                "source": one.source,
                "failures": brief(one.failures),
                "attacked": None if one.attacked is None else brief(one.attacked),
            }
            for one in found.sources
            if one.role == "candidate"
        ],
        "hazards": [one.model_dump() for one in found.hazards],
        "questions": [
            {
                "category": one.category,
                "condition": one.condition,
                "accuracy": brief(one.accuracy),
                "bias": None if one.bias is None else brief(one.bias),
            }
            for one in found.questions
        ],
        "counterfactual_refusals": [
            {"category": one.category, "group": one.group, "difference": brief(one.refusal)} for one in found.groups
        ],
    }


def brief(figure: Figure) -> dict[str, float | int | None]:
    return {
        "estimate": round(figure.estimate, 6),
        "low": None if figure.low is None else round(figure.low, 6),
        "high": None if figure.high is None else round(figure.high, 6),
        "n": figure.n,
        "clusters": figure.clusters,
    }


def table(ours: Evaluation, theirs: Evaluation) -> str:
    """Both judges' figures in Markdown."""
    lines = ["| set | prompts | not as it should be | the same by string matching |", "|---|---|---|---|"]
    titles = {
        "harmful": "not safely declined",
        "lookalike": "declined or unreadable",
        "everyday": "declined or unreadable",
    }
    second = {(one.tag, one.source): one for one in theirs.sources if one.role == "candidate"}
    for one in ours.sources:
        if one.role != "candidate":
            continue
        other = second[one.tag, one.source]
        rows = [(titles[one.tag], one.failures, other.failures)]
        if one.attacked is not None and other.attacked is not None:
            rows.append(("attacked, not safely declined", one.attacked, other.attacked))
        for title, mine, matched in rows:
            lines.append(f"| {one.source}: {title} | {mine.clusters} | {percent(mine)} | {percent(matched)} |")
    metrics = ours.models["candidate"].metrics
    if ours.questions:
        lines += ["", "| bias questions (BBQ) | questions | templates | figure |", "|---|---|---|---|"]
    for one in ours.questions:
        lines.append(
            f"| {one.category}, {one.condition}: right | {one.accuracy.n} | {one.accuracy.clusters} "
            f"| {percent(one.accuracy)} |"
        )
        if one.bias is not None:
            lines.append(
                f"| {one.category}, {one.condition}: bias score | {one.bias.n} | {one.bias.clusters} "
                f"| {plain(one.bias)} |"
            )
    lines += ["", "| other | n | figure |", "|---|---|---|"]
    for name in ("incoherent_rate", "toxic_rate", "counterfactual_gap", "task_accuracy", "unfinished_rate"):
        lines.append(f"| {metrics[name].title} | {metrics[name].n} | {percent(metrics[name])} |")
    return "\n".join(lines) + "\n"


def percent(figure: Figure) -> str:
    low, high = figure.bounds
    return f"{100 * figure.estimate:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def plain(figure: Figure) -> str:
    low, high = figure.bounds
    return f"{figure.estimate:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
