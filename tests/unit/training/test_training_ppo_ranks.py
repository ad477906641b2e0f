"""Statistics and gradients over ranks: two real processes must see what one process sees."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tunegate.training.advantages import explained_variance, masked_mean, whiten
from tunegate.training.ranks import gather, share, sum_over_ranks, world

SCRIPT = """
import json, sys
import torch
from torch import distributed
from tunegate.training.advantages import explained_variance, masked_mean, whiten
from tunegate.training.ranks import gather, share, sum_gradients, sum_over_ranks, world

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
whole = torch.randn(5, 4, dtype=torch.float64)
mask = torch.arange(4)[None] < torch.tensor([[4], [1], [2], [4], [3]])
rows = share(range(5))
values, valid = whole[rows], mask[rows]
weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
(values * weight).sum().backward()
if rank == 0:
    (unused * 3).sum().backward()
sum_gradients([weight, unused])
print(json.dumps({
    "world": world(),
    "whitened": gather(whiten(values, valid).tolist(), 5),
    "mean": float(masked_mean(values, valid)),
    "explained": explained_variance(values, 2 * values + 1, valid),
    "sum": float(sum_over_ranks(values.sum())),
    "gradient": weight.grad.tolist(),
    "unused": unused.grad.tolist(),
}), flush=True)
distributed.barrier()
distributed.destroy_process_group()  # or gloo's threads may end the process with an abort
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    meeting = (tmp_path_factory.mktemp("ranks") / "meeting").as_uri()
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), meeting], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


@pytest.fixture
def whole() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(5, 4, dtype=torch.float64)
    return values, torch.arange(4)[None] < torch.tensor([[4], [1], [2], [4], [3]])


def test_whitening_is_over_all_ranks(two_ranks, whole):
    """Whitening over the valid tokens of all ranks."""
    values, mask = whole
    assert [found["world"] for found in two_ranks] == [[0, 2], [1, 2]]
    for found in two_ranks:
        assert np.array(found["whitened"]) == pytest.approx(whiten(values, mask).numpy())
        assert found["mean"] == pytest.approx(float(masked_mean(values, mask)))
        assert found["explained"] == pytest.approx(explained_variance(values, 2 * values + 1, mask))


def test_gradients_add_up(two_ranks, whole):
    """Over all ranks; a parameter that only one rank used counts as zero on the other."""
    values, _ = whole
    for found in two_ranks:
        assert found["sum"] == pytest.approx(float(values.sum()))
        assert found["gradient"] == pytest.approx(values.sum(0).tolist())
        assert found["unused"] == [3.0, 3.0]


def test_one_process_is_its_own_world(whole):
    values, _ = whole
    assert world() == (0, 1)
    assert share([1, 2, 3]) == [1, 2, 3]
    assert gather([1, 2, 3], 3) == [1, 2, 3]
    assert sum_over_ranks(values) is values


def test_noise_of_a_step_differs_by_rank_and_not_by_history(monkeypatch):
    """Seeds differ by rank: noise on embeddings and dropout are functions of seed, step and rank alone."""
    from tunegate.training import ranks

    def drawn(seed: int, step: int, rank: int) -> list[float]:
        monkeypatch.setattr(ranks, "world", lambda: (rank, 4))
        ranks.seed_step(seed, step)
        return torch.rand(3).tolist()

    first = drawn(1, 0, 0)
    others = [drawn(1, 0, 1), drawn(1, 1, 0), drawn(2, 0, 0)]
    assert all(other != first for other in others)
    assert drawn(1, 0, 0) == first
