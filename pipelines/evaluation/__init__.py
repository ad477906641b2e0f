"""The `evaluation` pipeline."""

from tunegate.pipelines.evaluation.pipeline import evaluation

__all__ = ["evaluation"]
