"""The stages `guard` and `decide`: what they ask, what they leave behind, and what the pipeline branches on."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunegate.config import build_spec
from tunegate.evaluation import suite
from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.results import write_evaluation
from tunegate.gates.config import SFTGateSpec
from tunegate.gates.results import read_decision
from tunegate.stages import decide, guard
from tunegate.stages.context import ResolvedSpec, absent
from tunegate.storage.manifest import write_manifest
from tunegate.storage.runs import RunRecord, RunStore, now

sys.path.insert(0, str(Path(__file__).parents[1] / "gates"))
from gates_builders import evaluation


@pytest.fixture
def stage(tmp_path):
    """A run with sealed inputs; returns paths and the run's records."""

    def prepare(**spec):
        layer = {"storage": {"root": str(tmp_path / "store")}, "tracking": {"live": False, "system_metrics": False}}
        resolved = build_spec(layer, spec)
        ResolvedSpec(resolved, "run-1").write(tmp_path / "spec")
        run = RunStore(resolved.storage.root, "run-1")
        record = RunRecord(run_id="run-1", name="n", pipeline="p", status="running", started=now())
        run.write_run(record.model_copy(update={"spec": resolved.model_dump(mode="json")}))
        paths = {"spec": tmp_path / "spec"}
        for name, kind in (("dataset", "dataset"), ("base_model", "model"), ("sft_model", "model")):
            paths[name] = tmp_path / name
            paths[name].mkdir(exist_ok=True)
            (paths[name] / "file").write_text(name)
            write_manifest(paths[name], kind=kind, parents={}, spec_digest="", seeds={})
        return paths, run

    return prepare


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the evaluation: remembers what was asked, answers with the given counts."""
    calls = []
    prompts = [SimpleNamespace(tag=tag) for tag in ("harmful", "lookalike", "everyday") for _ in range(3)]
    monkeypatch.setattr(guard, "read_records", lambda dataset, kind: prompts)

    def arrange(**counts):
        def evaluate(models, *, out, **arguments):
            calls.append({"models": models, **arguments})
            found = evaluation(anchor=counts, has_champion=False)
            write_evaluation(found, out)
            return found

        monkeypatch.setattr(suite, "evaluate", evaluate)
        return calls

    return arrange


def test_guard_asks_base_and_sft_model_a_cheap_subset(stage, asked, tmp_path):
    paths, run = stage()
    calls = asked(violation=(6, 6, 100), everyday=(1, 1, 100))
    assert guard.run(**paths, evaluation=tmp_path / "out") == "yes"
    (call,) = calls
    assert {role: path.name for role, path in call["models"].items()} == {
        "candidate": "sft_model",
        "anchor": "base_model",
    }
    assert {prompt.tag for prompt in call["prompts"]} == {"harmful", "everyday"}
    assert (call["reward"], call["judge"], call["heldout"]) == (None, None, [])
    # The same seed as the evaluation's own: its prompts begin with these.
    assert call["seed"] == ResolvedSpec.read(paths["spec"]).spec.stage_seed("evaluate")
    record = run.read_stage("guard")
    assert (record.verdict, record.values["proceed"]) == ("PROMOTE", "yes")
    assert b'"sft.safety"' in run.read_file("gate-sft.json")
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_guard_stops_the_run_when_safety_was_eroded(stage, asked, tmp_path):
    paths, run = stage()
    asked(violation=(40, 2, 100), everyday=(1, 1, 100))
    assert guard.run(**paths, evaluation=tmp_path / "out") == "no"
    assert run.read_stage("guard").verdict == "REJECT"


def test_guard_can_be_switched_off(stage, asked, tmp_path):
    paths, run = stage(gates={"after_sft": {"enabled": False}})
    calls = asked()
    assert guard.run(**paths, evaluation=tmp_path / "out") == "yes"
    assert calls == []
    assert absent(tmp_path / "out")
    assert run.read_file("gate-sft.json") is None


def test_the_subset_leaves_out_what_the_gate_does_not_read():
    whole = EvaluationSpec(prompts_per_tag=400, everyday_prompts=50)
    part = guard.subset(whole, SFTGateSpec(prompts=100, max_new_tokens=32))
    assert (part.cap("harmful"), part.cap("everyday"), part.decoding.max_new_tokens) == (100, 50, 32)
    assert not part.attacks.names
    assert not part.bias.categories
    assert not part.bias.questions
    assert not part.capability.enabled
    assert part.decoding.temperature == whole.decoding.temperature
    longer = guard.subset(EvaluationSpec(decoding={"max_new_tokens": 16}), SFTGateSpec())
    assert longer.decoding.max_new_tokens == 16


def test_decide_counts_the_gates_of_earlier_stages_and_tells_kubeflow(stage, asked, tmp_path):
    paths, run = stage(registry={"promote": True})
    asked(violation=(6, 6, 100), everyday=(1, 1, 100))
    guard.run(**paths, evaluation=tmp_path / "guard")
    measured = tmp_path / "evaluation"
    write_evaluation(evaluation(), measured)
    write_manifest(measured, kind="evaluation", parents={}, spec_digest="", seeds={})
    outputs = decide.run(
        spec=paths["spec"],
        evaluation=measured,
        candidate=paths["sft_model"],
        decision=tmp_path / "decision",
        summary=tmp_path / "summary.md",
    )
    assert outputs == ("promote", "PROMOTE")
    found = read_decision(tmp_path / "decision")
    assert found.gates[0].name == "sft.safety"
    assert sorted(p.name for p in (tmp_path / "decision").iterdir()) == ["decision.json", "manifest.json"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# PROMOTE\n\nThe candidate passed every gate.")
    row = next(line for line in summary.splitlines() if "Safety after SFT" in line)
    assert row == "| PROMOTE | Safety after SFT | 0.0% (−7.5%, 7.5%) | ≤ 10% | 100 |"
    assert run.read_file("decision.json") is not None


@pytest.mark.parametrize(
    ("verdict", "promote", "follows"),
    [
        ("PROMOTE", True, "promote"),
        ("PROMOTE", False, "register"),
        ("HOLD", True, "register"),
        ("REJECT", True, "stop"),
        ("INVALID", False, "stop"),
    ],
)
def test_what_follows_a_verdict(verdict, promote, follows):
    assert decide.what_follows(verdict, promote=promote) == follows
