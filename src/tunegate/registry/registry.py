"""The registry's public face: register, promote, roll back, look. The work is in the modules beside this one."""

from __future__ import annotations

from tunegate.registry.aliases import Approval, Promotion, approve, promote, reject, rollback
from tunegate.registry.audit import (
    Audit,
    Finding,
    RegistryStatus,
    Verification,
    VersionStatus,
    audit,
    fetch,
    history,
    status,
    verify,
)
from tunegate.registry.balance import BalancePoint, VersionBalance, balance
from tunegate.registry.ledger import Event
from tunegate.registry.versions import Registered, champion_model, register

__all__ = [
    "Approval",
    "Audit",
    "BalancePoint",
    "Event",
    "Finding",
    "Promotion",
    "Registered",
    "RegistryStatus",
    "Verification",
    "VersionBalance",
    "VersionStatus",
    "approve",
    "audit",
    "balance",
    "champion_model",
    "fetch",
    "history",
    "promote",
    "register",
    "reject",
    "rollback",
    "status",
    "verify",
]
