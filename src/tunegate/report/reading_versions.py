"""The versions of the registered model: `balance.json`, or a balance that was just read from the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunegate.report.facts import Registration, Version, Versions
from tunegate.report.tolerant import estimate, mapping, mappings, real, string, strings, whole

_BASE = "base"


def read_versions(content: Mapping[str, Any], registration: Registration | None = None) -> Versions | None:
    """The balance over versions; None when there is nothing but the base model to show.

    Args:
        content: `tunegate.registry.balance.VersionBalance` as plain data, of whatever schema version.
        registration: The version of this run, which is shown in the candidate's colour.
    """
    own = registration.version if registration else ""
    points = [p for p in (_version(data, own) for data in mappings(content.get("points"))) if p is not None]
    if not any(p.version != _BASE for p in points):
        return None
    notes = []
    if (whole(content.get("judges")) or 0) > 1:
        notes.append("The answers of each version were compared by the judge of its own run.")
    left_out = mapping(content.get("left_out"))
    notes += [f"Version {number} is left out: {reason}." for number, reason in left_out.items()]
    return Versions(string(content.get("name")), points, notes)


def _version(data: Mapping[str, Any], own: str) -> Version | None:
    number = string(data.get("version"))
    useful, safe = estimate(data.get("useful")), estimate(data.get("safe"))
    if not number or useful is None or safe is None:
        return None
    aliases = tuple(strings(data.get("aliases")))
    if number == _BASE:
        role, label = "anchor", "Base"
    else:
        role = "champion" if "champion" in aliases else "candidate" if number == own or "candidate" in aliases else ""
        label = f"v{number}"
    return Version(
        version=number,
        label=label,
        role=role or "other",
        useful=useful,
        safe=safe,
        over_refusal=real(data.get("over_refusal")),
        aliases=aliases,
        verdict=string(data.get("verdict")),
        rejected=data.get("rejected") is True,
        parent=string(data.get("parent")),
        made_from=data.get("link") == "made from",
        comparable=data.get("comparable") is not False,
        on_front=data.get("on_front") is True,
    )
