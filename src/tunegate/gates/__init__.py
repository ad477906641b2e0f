"""Gates: from measurements to a verdict, with the statistics that such a verdict needs.

Nothing heavy is imported with the package; the names below load their module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Assumptions": "power",
    "Decision": "results",
    "GateResult": "results",
    "GatesSpec": "config",
    "RewardFigures": "results",
    "SFTGateSpec": "config",
    "Supply": "power",
    "contradictions": "power",
    "decide": "decision",
    "gate_data": "stage_gates",
    "gate_reward": "stage_gates",
    "gate_sft": "stage_gates",
    "read_decision": "results",
    "sample_sizes": "power",
    "write_decision": "results",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
