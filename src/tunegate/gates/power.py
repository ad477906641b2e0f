"""How many prompts the gates need: sample sizes before anything is run, and combinations that can never pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tunegate.evaluation.cases import TAGS, read_templates
from tunegate.evaluation.config import STARTER_QUESTIONS, EvaluationSpec, Tag
from tunegate.evaluation.questions import read_questions
from tunegate.evaluation.significance import required_n_limit, required_n_paired, required_n_win_rate
from tunegate.evaluation.statistics import PROPORTION_BOUNDS, bounded_difference, paired_proportions
from tunegate.gates.config import GatesSpec, MarginSpec


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is supposed to be true of a candidate that deserves to pass.

    Attributes:
        violation_rate: Its rate of unsafe answers, unattacked.
        attacked_violation_rate: Under attack, by prompt.
        over_refusal_rate: On look-alikes.
        everyday_refusal_rate: On everyday prompts.
        discordance: Share of harmful and look-alike prompts on which candidate and other model get different labels.
        attacked_discordance: The same under attack, by prompt.
        everyday_discordance: The same on everyday prompts.
        win_rate: Against the other model.
        tie_rate: Share of ties.
        power: Wanted chance that such a candidate passes one gate.
    """

    violation_rate: float = 0.03
    attacked_violation_rate: float = 0.12
    over_refusal_rate: float = 0.08
    everyday_refusal_rate: float = 0.01
    discordance: float = 0.06
    attacked_discordance: float = 0.10
    everyday_discordance: float = 0.02
    win_rate: float = 0.58
    tie_rate: float = 0.2
    power: float = 0.9


@dataclass(frozen=True, slots=True)
class Supply:
    """What the sources hold at most, as far as it is known before they are validated; None: not known.

    Attributes:
        prompts: Evaluation prompts by tag.
        heldout_pairs: Preference pairs that the reward model is measured on.
        heldout_conversations: Conversations for the negative log-likelihood.
    """

    prompts: Mapping[str, int] | None = None
    heldout_pairs: int | None = None
    heldout_conversations: int | None = None


@dataclass(frozen=True, slots=True)
class _Planned:
    """Prompts that the evaluation can use: its caps, or what the sources hold where that is less."""

    harmful: int
    lookalike: int
    everyday: int
    attacked: int
    tasks: int

    @classmethod
    def of(cls, evaluation: EvaluationSpec, supply: Supply) -> _Planned:
        harmful, lookalike, everyday = (_usable(evaluation, supply, tag) for tag in TAGS)
        attacked = min(harmful, evaluation.attacks.prompts) if evaluation.attacks.names else 0
        tasks = evaluation.capability.tasks if evaluation.capability.enabled else 0
        return cls(harmful, lookalike, everyday, attacked, tasks)

    @property
    def pairs(self) -> int:
        """Pairs of answers for the win rate."""
        return self.lookalike + self.everyday


def _usable(evaluation: EvaluationSpec, supply: Supply, tag: Tag) -> int:
    cap = evaluation.cap(tag)
    return cap if supply.prompts is None else min(cap, supply.prompts.get(tag, 0))


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What one gate needs.

    Attributes:
        gate: Its name.
        limit: Its limit or margin.
        assumed: What is supposed, in words.
        needed: Prompts or pairs; None when no number suffices.
        unit: `harmful prompts`, `lookalike prompts`, `everyday prompts` or `pairs`.
        planned: How many the evaluation's caps and the sources allow.
    """

    gate: str
    limit: float
    assumed: str
    needed: int | None
    unit: str
    planned: int

    @property
    def enough(self) -> bool:
        """Whether so many are planned."""
        return self.needed is not None and self.needed <= self.planned


def sample_sizes(
    gates: GatesSpec, evaluation: EvaluationSpec, assumed: Assumptions | None = None, supply: Supply | None = None
) -> list[SampleSize]:
    """The prompts that each gate with a limit needs.

    Rates against limits are counted over the binomial distribution with the evaluation's own bounds; margins and win
    rates use the normal approximation at the score test's variance. Attacked prompts are counted once a prompt, as if
    the wrappers agreed.
    """
    given = assumed or Assumptions()
    level, power = gates.confidence, given.power
    use = _Planned.of(evaluation, supply or Supply())
    found = []
    for gate, limit, rate, unit, planned in (
        ("violation_rate", gates.maximum_violation_rate, given.violation_rate, "harmful prompts", use.harmful),
        (
            "attacked_violation_rate",
            gates.maximum_attacked_violation_rate,
            given.attacked_violation_rate,
            "harmful prompts",
            use.attacked,
        ),
        (
            "over_refusal_rate",
            gates.maximum_over_refusal_rate,
            given.over_refusal_rate,
            "lookalike prompts",
            use.lookalike,
        ),
        (
            "everyday_refusal_rate",
            gates.maximum_everyday_refusal_rate,
            given.everyday_refusal_rate,
            "everyday prompts",
            use.everyday,
        ),
    ):
        if limit is not None:
            bounds = evaluation.interval
            needed = (
                required_n_limit(rate, limit, confidence=level, power=power, method=bounds) if rate < limit else None
            )
            found.append(SampleSize(gate, limit, f"true rate {rate:.1%}", needed, unit, planned))
    for role, margins in (("champion", gates.champion), ("anchor", gates.anchor)):
        for name, margin, differ, unit, planned in (
            ("violation", margins.violation, given.discordance, "harmful prompts", use.harmful),
            (
                "attacked_violation",
                margins.attacked_violation,
                given.attacked_discordance,
                "harmful prompts",
                use.attacked,
            ),
            ("over_refusal", margins.over_refusal, given.discordance, "lookalike prompts", use.lookalike),
            (
                "everyday_refusal",
                margins.everyday_refusal,
                given.everyday_discordance,
                "everyday prompts",
                use.everyday,
            ),
        ):
            if margin is not None:
                needed = required_n_paired(margin, 0.0, differ, confidence=level, power=power)
                supposed = f"{differ:.0%} of the labels differ"
                found.append(SampleSize(f"{role}.{name}", margin, supposed, needed, unit, planned))
        if margins.helpfulness is not None:
            needed = required_n_win_rate(
                given.win_rate, tie_rate=given.tie_rate, margin=margins.helpfulness, confidence=level, power=power
            )
            supposed = f"wins {given.win_rate:.0%}, {given.tie_rate:.0%} ties"
            limit = 0.5 - margins.helpfulness
            found.append(SampleSize(f"{role}.win_rate", limit, supposed, needed, "pairs", use.pairs))
    if gates.require_improvement:
        needed = required_n_win_rate(given.win_rate, tie_rate=given.tie_rate, confidence=level, power=power)
        supposed = f"wins {given.win_rate:.0%}, {given.tie_rate:.0%} ties"
        found.append(SampleSize("improvement", 0.5, supposed, needed, "pairs", use.pairs))
    return found


def contradictions(
    gates: GatesSpec, evaluation: EvaluationSpec, *, champion: bool = True, supply: Supply | None = None
) -> list[str]:
    """Settings with which no candidate can ever be promoted, each with what would be right; known before any work.

    Args:
        gates: Limits and margins.
        evaluation: What will be measured, and on how many prompts at most.
        champion: Whether there is a champion to compare with; without one its margins do not count.
        supply: What the sources hold, if that is known.
    """
    compared = [("champion", gates.champion)] * champion + [("anchor", gates.anchor)]
    held = supply or Supply()
    planned = _Planned.of(evaluation, held)
    found = []
    if evaluation.confidence < gates.confidence:
        found.append(
            f"evaluation.confidence {evaluation.confidence} is below gates.confidence {gates.confidence}; raise it"
        )
    found += _thin_prompts(gates, evaluation, held, planned, compared)
    found += _thin_attacks(gates, evaluation, planned, compared)
    found += _thin_swaps(gates, evaluation)
    found += _thin_capability(gates, evaluation, held, planned, compared)
    found += _thin_reward(gates, held)
    found += _thin_after_sft(gates, held)
    found += _out_of_reach(gates, evaluation, planned, compared)
    return list(dict.fromkeys(found))


_Compared = Sequence[tuple[str, MarginSpec]]


def _thin_prompts(
    gates: GatesSpec, evaluation: EvaluationSpec, held: Supply, planned: _Planned, compared: _Compared
) -> list[str]:
    """Gates on rates, margins and win rates with fewer prompts than they count as evidence."""
    margins = [m for _, m in compared]
    helpfulness = any(m.helpfulness is not None for m in margins)
    readers: dict[Tag, list[float | None]] = {
        "harmful": [gates.maximum_violation_rate, gates.maximum_hazard_violation_rate, *(m.violation for m in margins)],
        "lookalike": [gates.maximum_over_refusal_rate, *(m.over_refusal for m in margins)],
        "everyday": [gates.maximum_everyday_refusal_rate, *(m.everyday_refusal for m in margins)],
    }
    found = []
    for tag in TAGS:
        minimum, usable = getattr(gates, f"minimum_{tag}"), _usable(evaluation, held, tag)
        if usable < minimum and any(limit is not None for limit in readers[tag]):
            found.append(_lacking(evaluation, held, tag, f"gates.minimum_{tag} asks for {minimum}"))
    everything = max(gates.minimum_harmful, gates.minimum_lookalike, gates.minimum_everyday)
    if gates.maximum_incoherent_rate is not None and planned.harmful + planned.pairs < everything:
        found.append(
            f"{planned.harmful + planned.pairs} prompts in all are too few for gates.maximum_incoherent_rate, which "
            f"wants {everything} (the largest of gates.minimum_harmful, minimum_lookalike, minimum_everyday); add "
            "prompts or set it to null"
        )
    if gates.maximum_hazard_violation_rate is not None and planned.harmful < gates.minimum_per_hazard:
        found.append(
            f"{planned.harmful} harmful prompts leave no hazard with gates.minimum_per_hazard "
            f"{gates.minimum_per_hazard}; lower it, or set gates.maximum_hazard_violation_rate to null"
        )
    if helpfulness and planned.pairs < gates.minimum_pairs:
        found.append(
            f"{planned.lookalike} lookalike and {planned.everyday} everyday prompts give {planned.pairs} pairs, "
            f"gates.minimum_pairs asks for {gates.minimum_pairs}; add prompts or lower it"
        )
    return found


def _lacking(evaluation: EvaluationSpec, held: Supply, tag: Tag, asked: str) -> str:
    usable = _usable(evaluation, held, tag)
    if usable < evaluation.cap(tag):
        return f"data.evaluation holds {usable} {tag} prompts, {asked}; add prompts with this tag or lower the minimum"
    return f"evaluation allows {usable} {tag} prompts, {asked}; raise evaluation.prompts_per_tag or lower the minimum"


def _thin_attacks(gates: GatesSpec, evaluation: EvaluationSpec, planned: _Planned, compared: _Compared) -> list[str]:
    limits = {
        "maximum_attacked_violation_rate": gates.maximum_attacked_violation_rate,
        **{f"{role}.attacked_violation": margins.attacked_violation for role, margins in compared},
    }
    wanted = ", ".join(f"gates.{name}" for name, limit in limits.items() if limit is not None)
    if not wanted:
        return []
    if not evaluation.attacks.names:
        return [f"{wanted} need attacked prompts; name evaluation.attacks.names or set them to null"]
    if evaluation.attacks.prompts < gates.minimum_harmful:
        return [
            f"evaluation.attacks.prompts {evaluation.attacks.prompts} is below gates.minimum_harmful "
            f"{gates.minimum_harmful}; raise it"
        ]
    if planned.attacked < gates.minimum_harmful:
        return [f"{wanted} want {gates.minimum_harmful} harmful prompts to attack, there are {planned.attacked}"]
    return []


def _thin_swaps(gates: GatesSpec, evaluation: EvaluationSpec) -> list[str]:
    limits = {
        "maximum_group_refusal_difference": gates.maximum_group_refusal_difference,
        "maximum_group_reward_difference": gates.maximum_group_reward_difference,
    }
    wanted = ", ".join(f"gates.{name}" for name, limit in limits.items() if limit is not None)
    found = []
    if gates.maximum_bias_score is not None and not evaluation.bias.questions:
        found.append("gates.maximum_bias_score needs evaluation.bias.questions; name them or set it to null")
    elif gates.maximum_bias_score is not None and set(evaluation.bias.questions) == {STARTER_QUESTIONS}:
        asked = len({question.template for question in read_questions(evaluation.bias.questions)})
        if asked < gates.minimum_templates:  # how many an own file holds is known when it is read
            found.append(
                f"the {asked} templates of {STARTER_QUESTIONS} are below gates.minimum_templates "
                f"{gates.minimum_templates}; give BBQ itself in evaluation.bias.questions, or set "
                "gates.maximum_bias_score to null"
            )
    if not wanted:
        return found
    if not evaluation.bias.categories:
        return [*found, f"{wanted} need swaps; name evaluation.bias.categories or set them to null"]
    used = evaluation.bias.templates
    if not evaluation.bias.template_files:  # how many an own file holds is known when it is read
        shipped = Counter(template.category for template in read_templates())
        used = min(used, *(shipped[category] for category in evaluation.bias.categories))
    if used < gates.minimum_templates:
        found.append(f"{used} templates a category are below gates.minimum_templates {gates.minimum_templates}")
    if (margin := gates.maximum_group_refusal_difference) is not None:
        reachable = partial(_groups_within, margin, evaluation)
        found += _too_few("gates.maximum_group_refusal_difference", margin, used, "templates a category", reachable)
    return found


def _thin_capability(
    gates: GatesSpec, evaluation: EvaluationSpec, held: Supply, planned: _Planned, compared: _Compared
) -> list[str]:
    found = []
    heldout = held.heldout_conversations
    wanted = {
        **{f"gates.{role}.tasks": margins.tasks for role, margins in compared},
        "gates.minimum_task_accuracy": gates.minimum_task_accuracy,
    }
    for role, margins in compared:
        if margins.nll is None:
            continue
        if not evaluation.capability.enabled:
            found.append(f"gates.{role}.nll needs evaluation.capability.enabled")
        elif evaluation.capability.conversations < gates.minimum_conversations:
            found.append(
                f"evaluation.capability.conversations {evaluation.capability.conversations} is below "
                f"gates.minimum_conversations {gates.minimum_conversations}"
            )
        elif heldout is not None and heldout < gates.minimum_conversations:
            found.append(
                f"{heldout} held-out conversations are too few for gates.minimum_conversations "
                f"{gates.minimum_conversations}; give more, or raise data.heldout_fraction"
            )
    for name, limit in wanted.items():
        if limit is not None and planned.tasks < gates.minimum_tasks:
            found.append(f"{name} needs {gates.minimum_tasks} tasks, evaluation.capability gives {planned.tasks}")
    return found


def _thin_reward(gates: GatesSpec, held: Supply) -> list[str]:
    if held.heldout_pairs is None or held.heldout_pairs >= gates.minimum_reward_pairs:
        return []
    return [
        f"{held.heldout_pairs} held-out preference pairs are too few for gates.minimum_reward_pairs "
        f"{gates.minimum_reward_pairs}; give more, or raise data.heldout_fraction"
    ]


def _thin_after_sft(gates: GatesSpec, held: Supply) -> list[str]:
    """The gate after SFT reads harmful and everyday prompts."""
    wanted: dict[Tag, float | None] = {
        "harmful": gates.after_sft.violation,
        "everyday": gates.after_sft.everyday_refusal,
    }
    if not gates.after_sft.enabled or held.prompts is None:
        return []
    return [
        f"data.evaluation holds {held.prompts.get(tag, 0)} {tag} prompts, gates.after_sft.minimum_prompts asks for "
        f"{gates.after_sft.minimum_prompts}; add prompts with this tag or lower the minimum"
        for tag, limit in wanted.items()
        if limit is not None and held.prompts.get(tag, 0) < gates.after_sft.minimum_prompts
    ]


def _out_of_reach(gates: GatesSpec, evaluation: EvaluationSpec, planned: _Planned, compared: _Compared) -> list[str]:
    """Limits and margins that not even a model without a single failure could be shown to keep with so few prompts."""
    found = []
    for name, limit, count, things in (
        ("maximum_violation_rate", gates.maximum_violation_rate, planned.harmful, "harmful prompts"),
        (
            "maximum_attacked_violation_rate",
            gates.maximum_attacked_violation_rate,
            planned.attacked,
            "attacked prompts",
        ),
        ("maximum_over_refusal_rate", gates.maximum_over_refusal_rate, planned.lookalike, "lookalike prompts"),
        ("maximum_everyday_refusal_rate", gates.maximum_everyday_refusal_rate, planned.everyday, "everyday prompts"),
    ):
        if limit is not None and count:
            found += _too_few(f"gates.{name}", limit, count, things, partial(_rate_within, limit, evaluation))
    if (accuracy := gates.minimum_task_accuracy) is not None and planned.tasks:
        reachable = partial(_rate_within, 1.0 - accuracy, evaluation)
        found += _too_few("gates.minimum_task_accuracy", accuracy, planned.tasks, "tasks", reachable)
    for role, margins in compared:
        for name, margin, count, things in (
            ("violation", margins.violation, planned.harmful, "harmful prompts"),
            ("attacked_violation", margins.attacked_violation, planned.attacked, "attacked prompts"),
            ("over_refusal", margins.over_refusal, planned.lookalike, "lookalike prompts"),
            ("everyday_refusal", margins.everyday_refusal, planned.everyday, "everyday prompts"),
            ("tasks", margins.tasks, planned.tasks, "tasks"),
        ):
            if margin is not None and count:
                found += _too_few(
                    f"gates.{role}.{name}", margin, count, things, partial(_margin_kept, margin, evaluation)
                )
    return found


def _rate_within(limit: float, evaluation: EvaluationSpec, n: int) -> bool:
    return PROPORTION_BOUNDS[evaluation.interval](0, n, evaluation.confidence)[1] <= limit


def _margin_kept(margin: float, evaluation: EvaluationSpec, n: int) -> bool:
    return paired_proportions(0, 0, n, evaluation.confidence).high <= margin


def _groups_within(margin: float, evaluation: EvaluationSpec, n: int) -> bool:
    return bounded_difference([0.0] * n, evaluation.confidence).high < margin


def _too_few(key: str, limit: float, planned: int, things: str, reachable: Callable[[int], bool]) -> list[str]:
    if reachable(planned):
        return []
    enough = next((n for n in range(planned, 20_000) if reachable(n)), None)
    advice = f"use at least {enough}, or a wider limit" if enough else "use a wider limit"
    return [f"{planned} {things} cannot show that {key} {limit} is kept, not even without a single failure; {advice}"]
