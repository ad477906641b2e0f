"""Evaluation: what a model does with harmful, harmless and everyday prompts, and how sure one can be of it.

Nothing heavy is imported with the package; the names below load their module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EmbeddingClassifier": "embeddings",
    "Evaluation": "results",
    "EvaluationSpec": "config",
    "LanguageModelJudge": "llm_judge",
    "RefusalClassifier": "refusal",
    "ResponseJudge": "refusal",
    "StringMatcher": "refusal",
    "evaluate": "suite",
    "read_evaluation": "results",
    "write_evaluation": "results",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
