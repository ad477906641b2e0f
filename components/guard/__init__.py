"""The `guard` component."""

from tunegate.components.guard.component import guard

__all__ = ["guard"]
