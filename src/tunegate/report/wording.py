"""The report's sentences: verdicts in plain words, what to do next, titles of stages, metrics and curves."""

from __future__ import annotations

from typing import get_args

from tunegate.report import formats
from tunegate.report.facts import Facts, Gate, Outcome, Registration, Sample, Versions
from tunegate.resources import StageName
from tunegate.storage.runs import RunRecord, StageRecord

STAGE_ORDER: tuple[str, ...] = tuple(name for name in get_args(StageName) if name != "finish")
_TRAINING_STAGES = ("sft", "reward", "ppo")
#: What the balance over versions counts: usefulness and safety.
VERSION_AXES = ("Win rate against the base model", "Harmful requests safely declined")
TAG_ORDER = ("everyday", "lookalike", "harmful")
_TAG_TITLES = {
    "everyday": ("Everyday requests", "should be answered, and well"),
    "lookalike": ("Harmless requests that look harmful", "should be answered; declining is over-refusal"),
    "harmful": ("Harmful requests", "should be declined; answers are hidden until asked for"),
}
_TONES = {"PROMOTE": "pass", "DONE": "pass", "HOLD": "hold", "REJECT": "fail", "FAILED": "fail", "INVALID": "invalid"}
_MORE_PROMPTS = "tunegate run SPEC.yaml --set evaluation.prompts_per_tag=N"
_MORE_PAIRS = ("Give the reward model more pairs, or cleaner ones: see its figures below.", "")
_GENTLER_SFT = ("Train SFT more gently (sft.learning_rate, sft.epochs), and with refusals among its data.", "")
_HEADLINES = {
    "PROMOTE": "The candidate passed every gate. It may be promoted.",
    "HOLD": "The evidence does not decide yet. The candidate is neither good enough nor bad enough to say.",
    "REJECT": "The candidate must not be promoted: it breaks a limit.",
    "INVALID": "The evidence cannot be used, so nothing was decided about the model.",
}


def tone(word: str) -> str:
    """The style class of the verdict."""
    return _TONES.get(word, "none")


def tag_title(name: str) -> tuple[str, str]:
    """Heading and explanation for a tag of evaluation prompts."""
    return _TAG_TITLES.get(name, (f"{name.replace('_', ' ').capitalize()} prompts" if name else "Prompts", ""))


def label_tone(label: str, sample: Sample) -> str:
    """Whether a label is what one wants for this prompt."""
    if label == "incoherent":
        return "fail"
    if label == "refusal":
        return "pass" if sample.tag == "harmful" else "fail"
    if label == "compliance":
        return "fail" if sample.tag == "harmful" else "pass"
    return "none"


def run_title(facts: Facts) -> str:
    """The run's name with the model it started from."""
    name = facts.run.name if facts.run else "run"
    model = facts.spec.get("model", {}).get("source") if isinstance(facts.spec.get("model"), dict) else None
    return f"{name}, from {model}" if model else name


def outcome(
    run: RunRecord | None,
    stages: list[StageRecord],
    gates: list[Gate],
    decision_verdict: str,
    decision_reasons: list[str],
    data_reasons: list[str],
    registration: Registration | None,
) -> Outcome:
    """The verdict in words, or how far the run came when there is none."""
    status = run.status if run else "failed"
    run_id = run.run_id if run else ""
    if status in {"failed", "interrupted"}:
        return _stopped(run, stages, status, run_id)
    verdict = (decision_verdict or (run.verdict if run else None) or "").upper()
    if not verdict:
        running = [s.stage for s in stages if s.status == "running"]
        if status == "running":
            where = f" It is in the stage {running[-1]}." if running else ""
            return Outcome(
                "RUNNING", f"The run has not ended.{where}", [], [("See how far it is.", f"tunegate show {run_id}")]
            )
        return Outcome(
            "DONE", "The run ended without a decision.", [], [("See its records.", f"tunegate show {run_id}")]
        )
    blocking = [g for g in gates if g.verdict == verdict]
    headline = _HEADLINES.get(verdict, verdict)
    if verdict == "PROMOTE" and registration and "champion" in registration.aliases:
        headline = "The candidate passed every gate and is the champion now."
    reasons = decision_reasons
    if not reasons and data_reasons:
        headline, reasons = "The data was refused, so nothing was trained on it.", data_reasons
    elif not reasons and _about_sft(blocking):
        headline = "SFT made the model worse than the base model where it must not, so nothing was built on it."
    elif not reasons and _about_reward(blocking):
        headline = "The reward model is not good enough to train against, so PPO did not run."
    reasons = reasons or [g.reason for g in blocking if g.reason]
    return Outcome(verdict, headline, reasons, _next_steps(verdict, run_id, gates, registration))


def _stopped(run: RunRecord | None, stages: list[StageRecord], status: str, run_id: str) -> Outcome:
    broken = next((s for s in stages if s.status in {"failed", "interrupted"}), None)
    stage = (run.failed_stage if run else None) or (broken.stage if broken else None)
    error = (broken.error if broken and broken.error else None) or (run.error if run else None) or ""
    done = [s for s in stages if s.status == "done"]
    spared = "" if any(s.stage == "register" for s in done) else " Nothing was registered or promoted by it."
    where = f" in {stage}" if stage else ""
    finished = (
        f"{formats.plural(len(done), 'stage')} had finished and will not run again."
        if done
        else "No stage had finished."
    )
    if run is None:
        return Outcome(
            "FAILED",
            "This run left no record: it ended before its preflight.",
            [],
            [("Check the spec and the environment.", "tunegate validate SPEC.yaml")],
            error,
        )
    resume = [("Take the run up where it stopped.", f"tunegate resume {run_id}")]
    if status == "interrupted":
        return Outcome("INTERRUPTED", f"The run was stopped{where}.", [finished], resume, error)
    steps = [("Mend what the message names, then take the run up.", f"tunegate resume {run_id}")]
    return Outcome("FAILED", f"The run failed{where}.{spared}", [finished], steps, error)


def _next_steps(
    verdict: str, run_id: str, gates: list[Gate], registration: Registration | None
) -> list[tuple[str, str]]:
    blocking = [g for g in gates if g.verdict == verdict]
    steps = {
        "PROMOTE": lambda: _after_promote(registration),
        "HOLD": lambda: _after_hold(blocking),
        "REJECT": lambda: _after_reject(blocking),
        "INVALID": lambda: _after_invalid(blocking),
    }.get(verdict, list)()
    return [*steps, ("See all numbers of this run.", f"tunegate show {run_id}")] if run_id else steps


def _after_promote(registration: Registration | None) -> list[tuple[str, str]]:
    if registration is None:
        return []
    name, version = registration.name, registration.version
    if "champion" in registration.aliases:
        return [
            (f"It is the champion: version {version} of {name}. Talk to it.", "tunegate chat champion"),
            ("If it misbehaves in use, go back to the model before.", f"tunegate rollback {name}"),
        ]
    return [
        ("Make it the champion.", f"tunegate promote {name} {version}"),
        ("Or talk to it first.", "tunegate chat candidate"),
    ]


def _after_hold(blocking: list[Gate]) -> list[tuple[str, str]]:
    if _about_reward(blocking):
        return [_MORE_PAIRS]
    needed = max((g.needed for g in blocking if g.needed), default=None)
    if needed is None:
        return [("More prompts would not decide it. Train further, or with better data, and run again.", "")]
    return [(f"Evaluate on more prompts: about {needed:,} more would decide the last of these.", _MORE_PROMPTS)]


def _after_reject(blocking: list[Gate]) -> list[tuple[str, str]]:
    if _about_reward(blocking):
        return [_MORE_PAIRS]
    if _about_sft(blocking):
        return [_GENTLER_SFT]
    titles = ", ".join(g.title for g in blocking[:3])
    steps = [(f"Read the answers that broke a limit ({titles}); they are below.", "")] if titles else []
    return [*steps, ("Mend the data, or train more gently: a larger ppo.kl.coefficient, fewer updates.", "")]


def _after_invalid(blocking: list[Gate]) -> list[tuple[str, str]]:
    if _about_sft(blocking) and not any(g.needed for g in blocking):
        return [_GENTLER_SFT]
    if any(g.name == "coherence" for g in blocking):
        return [("The candidate writes text that cannot be read: train SFT further, or PPO more gently.", "")]
    thin = [g for g in blocking if g.needed]
    if thin:
        most = max(g.needed or 0 for g in thin)
        return [(f"Evaluate on more prompts: {thin[0].title} lacks {most:,}.", _MORE_PROMPTS)]
    return [("Mend what the reasons name, then run again.", "")]


def _about_reward(blocking: list[Gate]) -> bool:
    return bool(blocking) and all(g.name in {"reward", "reward_accuracy"} for g in blocking)


def _about_sft(blocking: list[Gate]) -> bool:
    return bool(blocking) and all(g.name == "sft.safety" for g in blocking)


def version_notes(versions: Versions) -> list[str]:
    """What a reader of the versions' chart should know."""
    others = [v.label for v in versions.points if not v.comparable]
    told = f"{', '.join(others)}: measured on other prompts, otherwise, or against another base model" if others else ""
    return [note for note in (told, *versions.notes) if note]


def absent(facts: Facts, what: str, stage: str) -> str:
    """Why a section is empty."""
    record = next((s for s in facts.stages if s.stage == stage), None)
    if record is not None and record.status == "done":
        return f"{what} in this run."
    if record is not None:
        how = {"running": "has not ended", "interrupted": "was interrupted"}.get(record.status, "failed")
        return f"{what}: the stage {stage} {how}."
    if facts.outcome.word == "RUNNING":
        return f"{what} yet."
    if facts.run is not None and facts.run.pipeline == "evaluation" and stage in _TRAINING_STAGES:
        return f"{what}: this pipeline only evaluates a model that exists."
    last = facts.stages[-1].stage if facts.stages else None
    return f"{what}: the run ended in {last}." if last else f"{what}: the run did not get that far."


def headline_facts(facts: Facts) -> list[tuple[str, str]]:
    """The few facts beside the verdict."""
    rows: list[tuple[str, str]] = []
    if facts.registration:
        aliases = ", ".join(facts.registration.aliases)
        rows.append(
            (
                "Registered as",
                f"{facts.registration.name} version {facts.registration.version}"
                + (f" ({aliases})" if aliases else ""),
            )
        )
    took = total_seconds(facts)
    if took is not None:
        rows.append(("Took", formats.seconds(took)))
    peak = max((s.peak_memory_bytes or 0 for s in facts.stages), default=0)
    if peak:
        rows.append(("Peak memory", formats.size(peak)))
    if facts.cost and facts.cost.total is not None and (facts.cost.total > 0 or facts.cost.hourly_price):
        rows.append(("Cost", formats.money(facts.cost.total, facts.cost.currency)))
    if facts.gates:
        passed = sum(g.verdict.upper() in {"PROMOTE", "PASS"} for g in facts.gates)
        rows.append(("Gates passed", f"{passed} of {len(facts.gates)}"))
    if facts.run and facts.run.spec_digest:
        rows.append(("Spec", formats.digest(facts.run.spec_digest)))
    return rows


def total_seconds(facts: Facts) -> float | None:
    """From the run's start to its end; the stages' sum when the run has no end."""
    if facts.run:
        start, end = formats.parse_time(facts.run.started), formats.parse_time(facts.run.ended)
        if start and end:
            return (end - start).total_seconds()
    known = [s.seconds for s in facts.stages if s.seconds is not None]
    return sum(known) if known else None


def answers_lead(facts: Facts) -> str:
    """Where labels and rewards come from."""
    if facts.samples and not any(a.label for s in facts.samples for a in s.answers.values()):
        return "Held-out prompts before and after PPO, with the reward model's score. There was no evaluation."
    text = "The same decoding for every model. Labels come from the refusal classifier"
    if any(a.reward is not None for s in facts.samples for a in s.answers.values()):
        source = (
            "a judge that PPO never trained on"
            if facts.judge == "independent"
            else "the reward model that PPO trained on"
        )
        text += f", rewards from {source}"
    return text + "."


def data_lead(facts: Facts) -> str:
    """What came in and what was kept, in one sentence."""
    if facts.data is None:
        return ""
    counts = facts.data.kinds or facts.data.sources
    seen, out = sum(c.seen for c in counts), sum(c.quarantined for c in counts)
    if not seen:
        return "The data gate ran."
    lost = f"{out:,.0f} ({formats.percent(out / seen)}) {'was' if out == 1 else 'were'}" if out else "none was"
    kept = f"{formats.plural(seen, 'row')} came in, {lost} quarantined."
    return kept + (
        " The dataset may be trained on."
        if facts.data.verdict.upper() in {"PROMOTE", "PASS"}
        else " The dataset was refused."
    )


def cost_lead(facts: Facts) -> str:
    """The total, the price it comes from and the plan."""
    cost = facts.cost
    if cost is None:
        return ""
    if not cost.hourly_price:
        return "No hourly price is set (cost.hourly_price), so this run is counted as free."
    text = f"{formats.money(cost.total, cost.currency)} at {formats.money(cost.hourly_price, cost.currency)} an hour."
    if cost.planned is not None:
        text += f" The plan had said {formats.money(cost.planned, cost.currency)}."
    return text


def environment(facts: Facts) -> list[tuple[str, str]]:
    """Where and with what the run was made."""
    rows: list[tuple[str, str]] = []
    run = facts.run
    if run:
        rows += [
            ("Run", run.run_id),
            ("Pipeline", run.pipeline),
            ("Started", formats.moment(run.started)),
            ("Code", run.code_version),
            ("Spec digest", run.spec_digest),
            ("Seed", str(facts.spec.get("seed", ""))),
            ("MLflow run", run.mlflow_run_id or ""),
        ]
    rows += [(key.replace("_", " ").capitalize(), value) for key, value in facts.host.items()]
    return [(name, value) for name, value in rows if value]
