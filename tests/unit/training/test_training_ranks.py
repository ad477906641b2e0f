"""Whole trainings in two processes, data parallel and sharded: what one process learns, two learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranked_training as jobs
import torch
from safetensors.torch import load_file

from tunegate.errors import TrainingError, TrainingStoppedError
from tunegate.observer import RecordingObserver
from tunegate.training.config import DistributedSpec
from tunegate.training.launch import launch, process_count

TRAININGS = ("sft", "sft-lora", "reward", "ppo", "ppo-full", "grpo", "dpo")


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_reward, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("alone")
    return out, launch(jobs.train_all, tiny_model, tiny_reward, out, distributed=DistributedSpec(processes=1))


@pytest.fixture(scope="module", params=["none", "full"])
def together(request, tiny_model, tiny_reward, tmp_path_factory) -> tuple[Path, dict, RecordingObserver]:
    out, observer = tmp_path_factory.mktemp("together"), RecordingObserver()
    spec = DistributedSpec(processes=2, sharding=request.param)
    return out, launch(jobs.train_all, tiny_model, tiny_reward, out, distributed=spec, observer=observer), observer


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_learn_what_one_learns(tiny_model, alone, together, training):
    """Means over all ranks' tokens, whitening over all ranks, one KL controller: the same weights, plain or sharded."""
    (one, figures), (two, ranked, _) = alone, together
    assert (figures["world"], ranked["world"]) == (1, 2)
    assert torch.tensor(ranked[training]).numpy() == pytest.approx(torch.tensor(figures[training]).numpy(), rel=2e-3)
    expected, found = (load_file(root / training / "model.safetensors") for root in (one, two))
    start = load_file(tiny_model / "model.safetensors")
    assert expected.keys() == found.keys()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in expected.items() if name in start)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_the_caller_hears_what_rank_0_reports(together):
    _, _, observer = together
    assert len(observer.series("sft/loss")) == 10  # two trainings of five steps
    assert len(observer.series("ppo/kl")) == 6  # three trainings of two updates
    assert observer.last_progress is not None and observer.notes


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_one_rank_that_must_stop_stops_all_and_any_number_of_ranks_goes_on(tiny_model, alone, tmp_path, sharding):
    """A checkpoint is whole, however the training was sharded: it resumes in one process too."""
    spec = DistributedSpec(processes=2, sharding=sharding)
    with pytest.raises(TrainingStoppedError, match="step 3 of 5") as stopped:
        launch(jobs.fit_with_checkpoints, tiny_model, tmp_path, distributed=spec)
    assert stopped.value.exit_code == 75
    result = launch(jobs.fit_on, tiny_model, tmp_path, distributed=DistributedSpec(processes=1))
    assert result.resumed_from == 3
    found, expected = (load_file(p / "model.safetensors") for p in (tmp_path / "resumed", alone[0] / "sft"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_all_ranks_end_an_update_at_the_same_step(tiny_model, tiny_reward, tmp_path):
    """KL(new, old) above its limit is a figure of all ranks together."""
    steps = launch(jobs.stop_early, tiny_model, tiny_reward, tmp_path, distributed=DistributedSpec(processes=2))
    assert steps[0] == steps[1]
    assert any(early and taken < 6 for taken, early in steps[0])


@pytest.mark.slow
def test_errors_of_a_rank_are_the_callers(capfd):
    observer = RecordingObserver()
    spec = DistributedSpec(processes=2)
    with pytest.raises(TrainingError, match="it went wrong") as failed:
        launch(jobs.fail, distributed=spec, observer=observer)
    assert (failed.value.key, failed.value.value, failed.value.fix) == ("ppo.learning_rate", 3, "lower it")
    assert observer.notes == ["about to fail"]
    with pytest.raises(TrainingError, match=r"ended with status 1: .*out of memory, say"):
        launch(jobs.crash, distributed=spec)
    assert "Traceback" in capfd.readouterr().err


def test_as_many_processes_as_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(DistributedSpec()) == 4
    assert process_count(DistributedSpec(processes=2)) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert process_count(DistributedSpec()) == 1
    with pytest.raises(ValueError, match="1 to 64"):
        DistributedSpec(processes=0)
