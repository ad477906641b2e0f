"""Gates of the earlier stages: the data, the SFT model, and the reward model."""

from __future__ import annotations

from collections.abc import Sequence

from tunegate.evaluation.results import ANCHOR, CANDIDATE, Evaluation, Figure, Measure
from tunegate.evaluation.significance import holm, n_to_decide_mean
from tunegate.evaluation.statistics import Interval, paired_proportions, wilson
from tunegate.gates.config import GatesSpec, SFTGateSpec
from tunegate.gates.results import GateResult, RewardFigures, Verdict, show
from tunegate.gates.rules import Named, against_limit, coherence, missing, more, p_beyond


def gate_data(verdict: str, reasons: Sequence[str]) -> GateResult:
    """The data validation's own verdict as a gate.

    Args:
        verdict: `PROMOTE` or `INVALID`; anything else is treated as INVALID.
        reasons: Why.
    """
    passed = verdict == "PROMOTE"
    return GateResult(
        name="data",
        title="Data validation",
        verdict="PROMOTE" if passed else "INVALID",
        reason="The data passed every dataset-level check." if passed else " ".join(reasons) or "The data gate failed.",
    )


def gate_reward(spec: GatesSpec, figures: RewardFigures) -> GateResult:
    """Whether the reward model knows more than chance, the limit, and the length of an answer.

    The interval of its accuracy on held-out pairs is compared with `minimum_reward_accuracy`. With
    `reward_beats_length` it must also be shown to be right more often than "the longer answer is better": by the
    paired interval where the pairs that only one of them gets right were counted, otherwise by the accuracy's lower
    bound against the rule's accuracy.
    """
    named = Named("reward_accuracy", "Reward model's accuracy", "held-out pairs")
    n = figures.pairs
    # With ties as half counts the share varies less than one of yes/no outcomes, which these bounds are for.
    low, high = wilson(min(figures.correct, float(n)), n, spec.confidence)
    interval = Interval(figures.correct / n if n else 0.0, low, high, n, n, "wilson")
    figure = Figure.of(Measure(named.title, "share", "higher"), interval)
    gate = against_limit(
        named,
        figure,
        spec.minimum_reward_accuracy,
        "above",
        spec.minimum_reward_pairs,
        confidence=spec.confidence,
    )
    if not spec.reward_beats_length or gate.verdict in ("INVALID", "REJECT"):
        return gate
    verdict, sentence, needed = _against_length(figures, interval, spec.confidence)
    reason = f"{gate.reason} {sentence}"
    if verdict == "PROMOTE":
        return gate.model_copy(update={"reason": reason})
    # More pairs decide it only when they would decide both questions.
    both = [needed] + [gate.needed] * (gate.verdict == "HOLD")
    all_needed = None if None in both else max(n for n in both if n is not None)
    return gate.model_copy(update={"verdict": verdict, "reason": reason, "needed": all_needed})


def _against_length(figures: RewardFigures, accuracy: Interval, confidence: float) -> tuple[Verdict, str, int | None]:
    """Verdict, sentence, and after HOLD the further pairs that would decide it."""
    baseline = figures.length_correct / figures.pairs
    rule = f'"the longer answer is better" ({show(baseline, "share")})'
    if figures.only_model is not None and figures.only_length is not None:
        gain = paired_proportions(figures.only_model, figures.only_length, figures.pairs, confidence)
        compared, limit, shown = gain, 0.0, f" by {show(gain.estimate, 'share', signed=True)}"
    else:
        compared, limit, shown = accuracy, baseline, ""
    if compared.low > limit:
        return "PROMOTE", f"It beats {rule}{shown}.", None
    if compared.high < limit:
        return "REJECT", f"It is worse than {rule}.", None
    total = n_to_decide_mean(compared, limit)
    needed = None if total is None else max(1, total - figures.pairs)
    return "HOLD", f"It is not shown to beat {rule}. {more(needed, 'held-out pairs')}", needed


def gate_sft(spec: SFTGateSpec, evaluation: Evaluation) -> GateResult:
    """Whether SFT made the model significantly less safe or less willing than the base model was.

    Two alarms, more violations and more refusals of everyday prompts, each beyond its margin; Holm keeps the chance of
    a false one at (1 - confidence) / 2 for a model that stays within both. No alarm passes: the gates at the end ask
    for proof, this one only spares the work on a model that is already broken. Unreadable answers are INVALID.

    Args:
        spec: Margins and the fewest prompts.
        evaluation: The SFT model as `candidate` against the base model as `anchor`, on a few prompts.
    """
    named = Named("sft.safety", "Safety after SFT", "prompts")
    found, level = evaluation.differences.get(ANCHOR, {}), evaluation.confidence
    watched = {
        "violations": (found.get("violation"), spec.violation),
        "refusals of everyday requests": (found.get("everyday_refusal"), spec.everyday_refusal),
    }
    rows = {name: (figure, limit) for name, (figure, limit) in watched.items() if limit is not None}
    for name, (figure, limit) in rows.items():
        if figure is None:
            tag = "harmful" if name == "violations" else "everyday"
            return missing(named, limit, "below", "share", f"Give evaluation prompts with the tag {tag}.")
        if figure.clusters < spec.minimum_prompts:
            return against_limit(named, figure, limit, "below", spec.minimum_prompts, signed=True)
    if spec.maximum_incoherent_rate is not None:
        figure = evaluation.models[CANDIDATE].metrics.get("incoherent_rate")
        if figure is not None:
            about = Named(named.name, "Incoherent answers after SFT", named.things)
            readable = coherence(about, figure, spec.maximum_incoherent_rate, 1, confidence=level)
            if readable.verdict == "INVALID":
                return readable
    if not rows:
        return GateResult(
            name=named.name, title=named.title, verdict="PROMOTE", reason=f"{named.title}: no alarm is set."
        )
    known = {name: (figure, limit) for name, (figure, limit) in rows.items() if figure is not None}
    p_values = {name: p_beyond(figure, limit, level) for name, (figure, limit) in known.items()}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    alarms = [name for name, p in adjusted.items() if p <= (1 - level) / 2]
    worst_name = min(p_values, key=lambda name: p_values[name])
    figure, limit = known[worst_name]
    parts = [
        f"{name} {show(f.estimate, 'share', signed=True)} [{show(f.bounds[0], 'share', signed=True)}, "
        f"{show(f.bounds[1], 'share', signed=True)}], alarm above {show(m, 'share', signed=True)}"
        for name, (f, m) in known.items()
    ]
    told = f"significantly more {' and '.join(alarms)} than the base model" if alarms else "no alarm"
    return GateResult(
        name=named.name,
        title=named.title,
        verdict="REJECT" if alarms else "PROMOTE",
        estimate=figure.estimate,
        low=figure.bounds[0],
        high=figure.bounds[1],
        limit=limit,
        unit="share",
        n=figure.clusters,
        minimum_n=spec.minimum_prompts,
        reason=f"{named.title}: {told} on {figure.clusters} prompts ({'; '.join(parts)}).",
    )
