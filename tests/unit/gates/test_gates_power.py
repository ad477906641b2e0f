"""Sample sizes, and settings that can never pass."""

import pytest
from scipy import stats

from tunegate.evaluation.config import EvaluationSpec
from tunegate.gates import Assumptions, GatesSpec, Supply, contradictions, sample_sizes
from tunegate.gates.config import MarginSpec
from tunegate.gates.rules import Named, against_limit

SPEC, EVALUATION = GatesSpec(), EvaluationSpec()


def test_the_recommended_sizes_suffice_for_every_gate_by_default():
    rows = sample_sizes(SPEC, EVALUATION)
    assert {row.gate for row in rows} >= {"violation_rate", "champion.violation", "anchor.win_rate", "improvement"}
    assert all(row.needed is not None and row.needed <= row.planned for row in rows)
    assert contradictions(SPEC, EVALUATION) == []


def test_a_rates_sample_size_has_the_power_by_the_gate_itself():
    row = next(r for r in sample_sizes(SPEC, EVALUATION) if r.gate == "violation_rate")
    from gates_builders import rate

    passes = sum(
        stats.binom.pmf(k, row.needed, 0.03)
        for k in range(row.needed + 1)
        if against_limit(Named("x", "X", "prompts"), rate("unsafe_rate", k, row.needed), 0.10, "below", 1).passed
    )
    assert 0.9 <= passes < 0.95


def test_tighter_limits_and_more_power_need_more():
    def needed(spec, assumed=None):
        return {row.gate: row.needed for row in sample_sizes(spec, EVALUATION, assumed)}

    loose, tight = needed(SPEC), needed(GatesSpec(maximum_violation_rate=0.06))
    assert tight["violation_rate"] > loose["violation_rate"]
    assert needed(SPEC, Assumptions(power=0.95))["champion.violation"] > loose["champion.violation"]
    assert needed(SPEC, Assumptions(violation_rate=0.12))["violation_rate"] is None
    assert "violation_rate" not in needed(GatesSpec(maximum_violation_rate=None))


@pytest.mark.parametrize(
    ("gates", "evaluation", "words"),
    [
        ({}, {"prompts_per_tag": 40}, "minimum_harmful"),
        ({}, {"everyday_prompts": 10}, "10 everyday prompts"),
        ({}, {"attacks": {"names": ()}}, "attacks.names"),
        ({}, {"attacks": {"prompts": 20}}, "attacks.prompts 20"),
        ({}, {"bias": {"categories": ()}}, "bias.categories"),
        ({}, {"bias": {"templates": 4}}, "4 templates"),
        ({"minimum_templates": 30}, {}, "24 templates"),
        ({"maximum_bias_score": 0.2}, {"bias": {"questions": ()}}, "gates.maximum_bias_score needs"),
        ({}, {"capability": {"enabled": False}}, "capability.enabled"),
        ({}, {"capability": {"conversations": 5}}, "conversations 5"),
        ({}, {"capability": {"tasks": 10}}, "gives 10"),
        ({"confidence": 0.99}, {}, "gates.confidence 0.99"),
        # 1 - 0.05^(1/n) <= 0.05 from n = 59 on
        ({"minimum_everyday": 50}, {"everyday_prompts": 50}, "use at least 59, or"),
        # 1 - 0.025^(1/n) <= 0.05 from n = 72 on
        ({"minimum_everyday": 60}, {"everyday_prompts": 60, "interval": "clopper-pearson"}, "use at least 72, or"),
        ({"maximum_bias_score": 0.2}, {}, "the 16 templates of starter:bias_questions.jsonl"),
        # z^2 / (n + z^2) <= 0.03 from n = 125 on
        ({"minimum_everyday": 60}, {"everyday_prompts": 100}, "champion.everyday_refusal 0.03 is kept"),
        ({"minimum_templates": 6}, {"bias": {"templates": 6}}, "6 templates a category cannot show"),
        ({"champion": {"tasks": 0.01}}, {}, "tasks cannot show that gates.champion.tasks"),
        ({"minimum_task_accuracy": 0.95}, {}, "40 tasks cannot show that gates.minimum_task_accuracy 0.95"),
        ({"minimum_pairs": 900}, {}, "give 800 pairs, gates.minimum_pairs asks for 900"),
        ({"minimum_per_hazard": 500}, {}, "leave no hazard with gates.minimum_per_hazard 500"),
        ({"maximum_violation_rate": 0.0}, {}, "use a wider limit"),
    ],
)
def test_contradictions_are_named_with_what_would_be_right(gates, evaluation, words):
    found = contradictions(GatesSpec(**gates), EvaluationSpec(**evaluation))
    assert any(words in line for line in found)


@pytest.mark.parametrize(
    ("supply", "words"),
    [
        (Supply(prompts={"harmful": 60, "lookalike": 400, "everyday": 400}), "data.evaluation holds 60 harmful"),
        (Supply(prompts={"harmful": 400, "lookalike": 400}), "data.evaluation holds 0 everyday prompts"),
        (Supply(prompts={"harmful": 400, "lookalike": 110, "everyday": 30}), "give 140 pairs"),
        (Supply(prompts={"harmful": 110, "lookalike": 400, "everyday": 20}), "gates.after_sft.minimum_prompts"),
        (Supply(prompts={"harmful": 50, "lookalike": 9, "everyday": 9}), "68 prompts in all are too few"),
        (Supply(heldout_pairs=40), "40 held-out preference pairs"),
        (Supply(heldout_conversations=12), "12 held-out conversations"),
    ],
)
def test_sources_that_hold_too_little_for_a_gate_are_named(supply, words):
    assert any(words in line for line in contradictions(SPEC, EVALUATION, supply=supply))


def test_sources_that_hold_enough_contradict_nothing():
    plenty = Supply({"harmful": 500, "lookalike": 500, "everyday": 500}, heldout_pairs=80, heldout_conversations=90)
    assert contradictions(SPEC, EVALUATION, supply=plenty) == []


def test_planned_prompts_are_no_more_than_the_sources_hold():
    supply = Supply(prompts={"harmful": 60, "lookalike": 500, "everyday": 0})
    planned = {row.gate: row.planned for row in sample_sizes(SPEC, EVALUATION, supply=supply)}
    assert planned["violation_rate"] == 60
    assert planned["attacked_violation_rate"] == 60
    assert planned["over_refusal_rate"] == 400
    assert planned["improvement"] == 400


def test_contradictions_are_true_no_candidate_can_pass():
    """A perfect candidate at the largest size that is called impossible fails, at the next one it passes."""
    from gates_builders import against, rate

    named = Named("x", "X", "prompts")
    for n, passes in ((58, False), (59, True)):
        assert against_limit(named, rate("unsafe_rate", 0, n), 0.05, "below", 1).passed is passes
    for n, passes in ((124, False), (125, True)):
        assert against_limit(named, against("violation", 0, 0, n), 0.03, "below", 1).passed is passes


def test_unset_limits_need_nothing():
    nothing = MarginSpec(**dict.fromkeys(MarginSpec.model_fields))
    gates = GatesSpec(
        champion=nothing,
        anchor=nothing,
        maximum_attacked_violation_rate=None,
        maximum_group_refusal_difference=None,
        minimum_harmful=1,
        minimum_lookalike=1,
        minimum_everyday=1,
        maximum_violation_rate=None,
        maximum_over_refusal_rate=None,
        maximum_everyday_refusal_rate=None,
        maximum_incoherent_rate=None,
        maximum_hazard_violation_rate=None,
    )
    small = EvaluationSpec(
        prompts_per_tag=4, attacks={"names": ()}, bias={"categories": ()}, capability={"enabled": False}
    )
    assert contradictions(gates, small) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"maximum_attacked_violation_rate": 0.05}, "at least the latter"),
        ({"maximum_hazard_violation_rate": 0.05}, "at least the latter"),
        ({"maximum_violation_rate": 10}, "less than or equal to 1"),
        ({"max_violation_rate": 0.1}, "Extra inputs"),
        ({"minimum_harmful": 0}, "greater than or equal to 1"),
        ({"confidence": 95}, "less than"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        GatesSpec(**values)


def test_without_a_champion_its_margins_do_not_count():
    small = EvaluationSpec(everyday_prompts=100)
    assert any("champion.everyday_refusal" in line for line in contradictions(SPEC, small))
    assert contradictions(SPEC, small, champion=False) == []
