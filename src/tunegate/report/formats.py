"""Numbers, times, sizes and untrusted text as a person reads them."""

from __future__ import annotations

import math
import re
from datetime import datetime

MINUS = "−"
DASH = "–"
_STAGE_TITLES = {
    "preflight": "Preflight",
    "ingest": "Ingest",
    "fetch": "The model fetched",
    "validate": "Data validation",
    "sft": "Supervised fine-tuning",
    "guard": "Safety after SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
    "decide": "Decision",
    "register": "Registration",
    "promote": "Promotion",
    "finish": "Report",
}
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def readable(text: object) -> str:
    """Text without the characters that neither XML nor a terminal may carry (control codes, lone surrogates).

    Each is replaced by U+FFFD so that a reader sees that something was there.
    """
    return _UNREADABLE.sub("�", str(text))


def number(value: float | None, digits: int = 3) -> str:
    """A number with about `digits` significant digits: `0.0123`, `1,234`, `3.2e−06`; a dash when there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10**6 or size < 10**-4:
        text = f"{value:.{max(digits - 2, 0)}e}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits - 1 - math.floor(math.log10(size))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS)


def decimals(step: float) -> int:
    """How many decimals show a difference of `step`: 0.05 needs 2, 20 needs none; at most 6."""
    if not math.isfinite(step) or step <= 0:
        return 2
    return min(max(-math.floor(math.log10(step) + 1e-9), 0), 6)


def fixed(value: float | None, places: int) -> str:
    """A number with so many decimals; very small and very large ones in powers of ten."""
    if value is None or not math.isfinite(value):
        return DASH
    if value != 0 and (abs(value) >= 10**7 or abs(value) < 10**-6):
        return number(value)
    text = f"{value:,.{places}f}"
    return (text.lstrip("-") if float(text.replace(",", "")) == 0 else text).replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, always with its sign."""
    return f"+{number(value, digits)}" if value is not None and value > 0 else number(value, digits)


def percent(value: float | None, digits: int | None = None) -> str:
    """A share as a percentage; one decimal below 10 % and above 90 %, where it matters."""
    if value is None or not math.isfinite(value):
        return DASH
    hundred = 100 * value
    if digits is None:
        whole = math.isclose(hundred, round(hundred), abs_tol=1e-9)
        digits = 0 if whole or 10 <= abs(hundred) <= 90 else 1
    return f"{hundred:.{digits}f}%".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """A duration: `0.4 s`, `38 s`, `4 min 05 s`, `2 h 07 min`."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Bytes as MB or GB (powers of 1000)."""
    if value is None or not math.isfinite(value):
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{1 if value < 100 * scale else 0}f} {unit}"
    return f"{value:.0f} B"


def money(value: float | None, currency: str) -> str:
    """An amount, to two decimals or to two significant digits when it is smaller than that."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:,.2f}" if value == 0 or abs(value) >= 0.1 else number(value, 2)
    return f"{text} {currency}".strip()


def digest(value: str | None) -> str:
    """The first eight characters of a digest."""
    return (value or "").removeprefix("sha256:")[:8]


def moment(value: str | None) -> str:
    """An ISO time as `22 Nov 2026, 09:41 UTC`; text that is no time is returned as it is."""
    parsed = parse_time(value)
    if parsed is None:
        return value or ""
    zone = parsed.tzname() or ""
    return f"{parsed.day} {parsed:%b %Y, %H:%M} {zone}".strip()


def parse_time(value: str | None) -> datetime | None:
    """An ISO 8601 time, or None."""
    try:
        return None if not value else datetime.fromisoformat(value)
    except ValueError:
        return None


def plural(count: float, noun: str, nouns: str | None = None) -> str:
    """`1 prompt`, `240 prompts`."""
    return f"{count:,.0f} {noun if count == 1 else nouns or noun + 's'}"


def stage_title(stage: str) -> str:
    """A stage's name as a heading."""
    return _STAGE_TITLES.get(stage, stage.replace("_", " ").capitalize())
