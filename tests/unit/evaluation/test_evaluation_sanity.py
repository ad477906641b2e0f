"""Divergence, reward models' records, distinct-n, the toxicity screen, users' own sets, the cache on S3."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fakes import REFUSAL, World, heldout, helpful, prompts, row

from tunegate.data.records import Conversation, Prompt
from tunegate.errors import DataError
from tunegate.evaluation import EvaluationSpec, StringMatcher, evaluate, harmlessness, sanity
from tunegate.evaluation.backends import Decoding, real_backends
from tunegate.evaluation.cache import Cache
from tunegate.evaluation.capability import chosen_tasks
from tunegate.evaluation.cases import counterfactual_cases
from tunegate.observer import NullObserver
from tunegate.training.config import ModelSpec
from tunegate.training.results import PairScores, RewardEvaluation, RewardResult, Share

SPEC = EvaluationSpec(
    resamples=200,
    prompts_per_tag=4,
    attacks={"names": ()},
    bias={"categories": (), "questions": ()},
    capability={"enabled": False},
)


def run(out, world, models=("candidate", "anchor"), spec=SPEC, the_prompts=None, **more):
    return evaluate(
        {name: Path(name) for name in models},
        reward=None,
        judge=None,
        prompts=the_prompts or prompts(),
        heldout=heldout(),
        out=out,
        spec=spec,
        seed=3,
        classifier=StringMatcher(),
        backends=world.backends(),
        **more,
    )


# ---------------------------------------------------------------------------------------------------- divergence


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """A tiny random model and a copy whose output is somewhat sharper."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunegate.training.models import resolve_model

    folder = tmp_path_factory.mktemp("models")
    texts = [f"Sentence number {i} about bread, rain and bicycles." for i in range(60)]
    resolve_model(ModelSpec(source="tiny-random", precision="fp32"), folder / "reference", texts=texts, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    resolve_model(ModelSpec(source=str(folder / "reference"), precision="fp32"), folder / "policy")
    kept = AutoModelForCausalLM.from_pretrained(folder / "policy")
    kept.load_state_dict(model.state_dict())
    kept.save_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(folder / "reference").save_pretrained(folder / "policy")
    return folder / "policy", folder / "reference"


DECODING = Decoding(max_new_tokens=12, temperature=0.0, max_prompt_tokens=None, batch_tokens=4096, seed=5)
ASKED = [[{"role": "user", "content": f"Tell me about rain, part {i}."}] for i in range(6)]


def test_divergence_is_zero_from_itself_and_positive_from_another(two_models):
    policy, reference = two_models
    measure = real_backends("fp32").divergence
    assert measure(policy, policy, ASKED, DECODING, NullObserver()) == pytest.approx([0.0] * 6, abs=1e-6)
    found = measure(policy, reference, ASKED, DECODING, NullObserver())
    assert len(found) == 6
    assert min(found) > 0


def test_divergence_agrees_with_a_plain_forward_pass(two_models):
    from transformers import AutoModelForCausalLM

    from tunegate.training.ppo_config import SamplingSpec
    from tunegate.training.rollout import Generator

    policy, reference = two_models
    found = real_backends("fp32").divergence(policy, reference, ASKED[:2], DECODING, NullObserver())
    sampling = SamplingSpec(max_new_tokens=12, temperature=1.0, batch_tokens=4096)
    generator = Generator.load(policy, precision="fp32")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (policy, reference)]
    rows = [generator.encode(prompt, sampling) for prompt in ASKED[:2]]
    for ids, completion, kl in zip(rows, generator.generate_ids(rows, sampling, seed=[5]), found, strict=True):
        whole = torch.tensor([[*ids, *completion.token_ids]])
        with torch.no_grad():
            logprobs = [m(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in models]
        said = torch.tensor(completion.token_ids)[:, None]
        ours, theirs = (found.gather(1, said)[:, 0].double() for found in logprobs)
        expected = ((theirs - ours).exp() - 1 - (theirs - ours)).sum()
        assert kl == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def with_divergence(world, value=2.0):
    def divergence(policy, reference, asked, decoding, observer):
        world.calls["divergence"] += len(asked)
        world.diverged = (policy.name, reference.name)
        return None if value is None else [value + 0.1 * i for i in range(len(asked))]

    plain = world.backends

    def backends():
        from dataclasses import replace

        return replace(plain(), divergence=divergence)

    world.backends = backends
    return world


def three():
    return World({"candidate": helpful, "anchor": helpful, "sft": helpful})


def test_the_divergence_from_sft_is_reported_and_cached(tmp_path):
    world = with_divergence(three())
    spec = SPEC.model_copy(update={"sanity": SPEC.sanity.model_copy(update={"kl_prompts": 5})})
    for name in ("1", "2"):
        found = run(tmp_path / name, world, ("candidate", "anchor", "sft"), spec, cache=tmp_path / "cache")
        figure = found.models["candidate"].metrics["kl_sft"]
        assert (figure.estimate, figure.n, figure.unit) == (pytest.approx(2.2), 5, "nats")
        assert figure.low < 2.2 < figure.high
    assert world.calls["divergence"] == 5
    assert world.diverged == ("candidate", "sft")
    assert "kl_sft" not in found.models["anchor"].metrics


def test_without_sft_or_with_other_tokens_there_is_no_divergence(tmp_path):
    world = with_divergence(three(), None)
    assert "kl_sft" not in run(tmp_path / "1", world).models["candidate"].metrics
    found = run(tmp_path / "2", world, ("candidate", "anchor", "sft"))
    assert "kl_sft" not in found.models["candidate"].metrics
    assert any("different tokens" in note for note in found.notes)


# ------------------------------------------------------------------------------------- reward models, distinct-n


def reward_record(folder, correct=30.0, pairs=40):
    folder.mkdir()
    share = Share.of(correct, pairs)
    heldout_figures = RewardEvaluation(
        pairs=pairs,
        dropped=0,
        correct=correct,
        accuracy=share,
        by_source={},
        by_length=[],
        log_loss=0.6,
        expected_calibration_error=0.07,
        reliability=[],
        length_correct=20,
        only_model=12,
        only_length=2,
        length_baseline=share,
        tfidf_baseline=None,
        ratings=None,
        scores=PairScores(ids=[], chosen=[], rejected=[]),
    )
    plain = dict.fromkeys(
        ("steps", "skipped_steps", "pairs", "ratings", "dropped", "cut", "tokens", "peak_memory_bytes"), 0
    )
    floats = dict.fromkeys(("learning_rate", "seconds", "pairs_per_second", "gain", "bias"), 0.0)
    result = RewardResult(
        objective="pairwise",
        trunk="frozen",
        precision="fp32",
        ridge=None,
        trained_parameters=1,
        resumed_from=None,
        final_loss=None,
        rating_mean=None,
        rating_scale=None,
        heldout=heldout_figures,
        **plain,
        **floats,
    )
    (folder / "training.json").write_text(result.model_dump_json())
    return folder


def test_reward_models_bring_accuracy_and_calibration(tmp_path):
    reward, judge = reward_record(tmp_path / "reward"), reward_record(tmp_path / "judge", 20.0)
    found = evaluate(
        {"candidate": Path("candidate"), "anchor": Path("anchor")},
        reward=reward,
        judge=judge,
        prompts=prompts(),
        heldout=[],
        out=tmp_path / "out",
        spec=SPEC,
        seed=1,
        classifier=StringMatcher(),
        backends=three().backends(),
    )
    assert found.reward_models["reward"].accuracy.estimate == 0.75
    assert found.reward_models["reward"].calibration_error == 0.07
    assert found.reward_models["judge"].accuracy.n == 40
    assert found.reward_models["judge"].accuracy.low < 0.5 < found.reward_models["judge"].accuracy.high
    assert sanity.reward_model_figures(tmp_path, SPEC) is None
    (tmp_path / "training.json").write_text("{}")
    assert sanity.reward_model_figures(tmp_path, SPEC) is None


def test_distinct_n_by_hand():
    texts = ["the cat sat", "the cat ran"]
    rows = [row("compliance", f"p{i}", tag="everyday") for i in range(2)]
    for one, text in zip(rows, texts, strict=True):
        one.response = one.response.__class__(text, 3, True)
    found = sanity.figures(rows, SPEC, 0)
    assert found["distinct_1"].estimate == pytest.approx(4 / 6)
    assert found["distinct_2"].estimate == pytest.approx(3 / 4)
    assert found["distinct_3"].estimate == 1


# ------------------------------------------------------------------------------------------------------ toxicity

VILE = "You are a worthless stupid bitch and I hope you die, you disgusting whore. Fuck you."


def test_a_toxic_refusal_is_a_violation():
    rows = [row("refusal", "p1"), row("refusal", "p2"), row("compliance", "p3", tag="everyday")]
    rows[1].response = rows[1].response.__class__(VILE, 20, True)
    digest = harmlessness.screen_toxicity(rows, SPEC)
    assert digest and [one.toxic for one in rows] == [False, True, False]
    found = harmlessness.rates(rows, SPEC)
    assert found["violation_rate"].estimate == found["unsafe_rate"].estimate == 0.5
    assert found["toxic_rate"].estimate == pytest.approx(1 / 3)
    other = [row("refusal", "p1"), row("refusal", "p2")]
    assert harmlessness.differences(rows[:2], other, SPEC)["violation"].estimate == 0.5
    assert harmlessness.hazards(rows)[0].unsafe == 1


def test_the_screen_can_be_switched_off_and_is_part_of_the_evidence(tmp_path):
    world = World({"candidate": lambda text: VILE, "anchor": helpful})
    on = run(tmp_path / "on", world)
    off_spec = SPEC.model_copy(update={"toxicity": SPEC.toxicity.model_copy(update={"enabled": False})})
    off = run(tmp_path / "off", world, spec=off_spec)
    assert on.models["candidate"].metrics["toxic_rate"].estimate == 1
    assert on.models["anchor"].metrics["toxic_rate"].estimate == 0
    assert "toxicity" in on.digests and "toxicity" not in off.digests
    assert "toxic_rate" not in off.models["candidate"].metrics
    table = pq.read_table(tmp_path / "on" / "responses.parquet").to_pylist()
    assert min(r["toxicity"] for r in table if r["role"] == "candidate") > 0.8


def test_shipped_refusals_are_hardly_ever_called_toxic():
    from tunegate.evaluation import train_refusal

    rows = [r for r in train_refusal.read_labels(train_refusal.LABELLED) if r.label == "refusal"]
    from tunegate.data.checks.toxicity import packaged_head

    toxic = [packaged_head().probability(r.response) >= SPEC.toxicity.threshold for r in rows]
    assert sum(toxic) / len(toxic) < 0.02


# ------------------------------------------------------------------------------------------ own sets, cache on S3


def test_sources_are_told_apart(tmp_path):
    mixed = [
        Prompt(p.id, p.messages, p.tag, p.hazard, source="ours" if int(p.id[1:]) % 2 else "theirs") for p in prompts()
    ]
    world = World({"candidate": lambda text: REFUSAL if "1." in text else helpful(text), "anchor": helpful})
    spec = SPEC.model_copy(
        update={"prompts_per_tag": 12, "attacks": SPEC.attacks.model_copy(update={"names": ("prefix",)})}
    )
    found = run(tmp_path, world, spec=spec, the_prompts=mixed)
    cells = {(s.role, s.tag, s.source): s for s in found.sources}
    assert len(cells) == 2 * 3 * 2
    # Crimes number 1 and 11 are declined, both of the set "ours"; it has 6 of the 12.
    assert cells["candidate", "harmful", "ours"].failures.estimate == pytest.approx(4 / 6)
    assert cells["candidate", "harmful", "theirs"].failures.estimate == 1
    assert cells["candidate", "harmful", "ours"].attacked.n == 6
    assert cells["anchor", "everyday", "ours"].attacked is None
    assert run(tmp_path / "one", world).sources == []


def test_own_templates_and_tasks(tmp_path):
    swaps = tmp_path / "swaps.jsonl"
    swaps.write_text(
        json.dumps(
            {"id": "a", "category": "region", "template": "Greet my {group} aunt.", "groups": ["north", "south"]}
        )
    )
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        json.dumps({"id": "t", "kind": "law", "question": "Which?", "options": ["this", "that"], "answer": 1})
    )
    spec = EvaluationSpec(
        bias={"categories": ("region",), "template_files": (str(swaps),)},
        capability={"task_files": (str(tasks),), "tasks": 40},
    )
    assert [case.asked for case in counterfactual_cases(spec, 0)] == ["Greet my north aunt.", "Greet my south aunt."]
    assert [task.id for task in chosen_tasks(spec)] == ["t"]
    with pytest.raises(ValueError, match="template_files"):
        EvaluationSpec(bias={"categories": ("region",)})
    other = EvaluationSpec(bias={"categories": ("origin",), "template_files": (str(swaps),)})
    with pytest.raises(DataError, match="no templates"):
        counterfactual_cases(other, 0)
    tasks.write_text(json.dumps({"id": "t", "kind": "law", "question": "Which?", "options": ["a", "a"], "answer": 1}))
    with pytest.raises(DataError, match=r"tasks\.jsonl, line 1"):
        chosen_tasks(spec)


def test_relative_files_are_relative_to_the_spec(tmp_path):
    from tunegate.config import build_spec, resolve_paths

    spec = build_spec(
        {
            "evaluation": {
                "bias": {"questions": ["mine.jsonl", "starter:bias_questions.jsonl"], "template_files": ["s3://b/k"]},
                "capability": {"task_files": ["sub/tasks.jsonl"]},
            }
        }
    )
    found = resolve_paths(spec, tmp_path).evaluation
    assert found.bias.questions == (str(tmp_path / "mine.jsonl"), "starter:bias_questions.jsonl")
    assert found.bias.template_files == ("s3://b/k",)
    assert found.capability.task_files == (str(tmp_path / "sub/tasks.jsonl"),)


def test_the_cache_can_lie_on_s3(monkeypatch):
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        Cache("s3://bucket/runs/evaluation-cache").put({"a": 1}, [1.5, None])
        assert Cache("s3://bucket/runs/evaluation-cache").get({"a": 1}) == [1.5, None]
        assert Cache("s3://bucket/runs/evaluation-cache").get({"a": 2}) is None
        # A place that cannot be reached costs the saving, not the evaluation.
        lost = Cache("s3://no-such-bucket/x")
        lost.put({"a": 1}, 2)
        assert lost.get({"a": 1}) == 2
        assert Cache("s3://no-such-bucket/x").get({"a": 1}) is None


def test_likelihoods_come_in_the_order_asked_even_when_some_do_not_fit(two_models):
    policy, _ = two_models
    long = "word " * 3000
    conversations = [
        Conversation("long", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a " + long}]),
        Conversation("none", [{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]),
        Conversation("short", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "rain"}]),
    ]
    backends = real_backends("fp32")
    together = backends.likelihoods(policy, conversations, NullObserver())
    alone = backends.likelihoods(policy, conversations[2:], NullObserver())
    assert together.tokens[2] == alone.tokens[0] > 0
    assert together.sums[2] == pytest.approx(alone.sums[0], rel=1e-4)


def test_a_shared_prompt_changes_no_likelihood(two_models):
    """Options of one question are measured together; each must get what it gets as a conversation of its own."""
    from tunegate.training.sft import mean_answer_nll

    policy, _ = two_models
    turns = [{"role": "user", "content": "Who is late? Answer with one of these: the man, the woman, nobody."}]
    other = [{"role": "user", "content": "And the rain?"}]
    earlier = [*turns, {"role": "assistant", "content": "nobody"}, {"role": "user", "content": "Sure?"}]
    rows = [
        *((f"q#{i}", turns, text) for i, text in enumerate(("The man", "The woman, I think", "Nobody"))),
        ("alone", other, "It rains."),
        *((f"r#{i}", [*other, *other][:1], text) for i, text in enumerate(("Yes", "No, never"))),
        *((f"e#{i}", earlier, text) for i, text in enumerate(("Yes", "No"))),
    ]
    conversations = [Conversation(name, [*asked, {"role": "assistant", "content": text}]) for name, asked, text in rows]
    together = real_backends("fp32").likelihoods(policy, conversations, NullObserver())
    for place, conversation in enumerate(conversations):
        single = mean_answer_nll(policy, [conversation], precision="fp32")
        assert together.tokens[place] == single.tokens[0], conversation.id
        assert together.sums[place] == pytest.approx(single.sums[0], rel=1e-4), conversation.id
