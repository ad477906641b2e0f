"""What the report shows, in its own words: plain records that the charts and templates take.

They are filled by `tunegate.report.reading`, which is the only module that knows the files of a run. Everything may be
missing: a run that failed early has few facts, and the report says so instead of failing too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tunegate.storage.runs import RunRecord, StageRecord

Unit = Literal["share", "nats", "reward", "tokens", "plain"]
"""How a number is written: a share as a percentage, the others as they are."""

State = Literal["yes", "no", "unclear", "missing"]
"""Whether an effect was shown, its opposite was, neither was, or nothing was measured."""

ROLES = ("anchor", "sft", "candidate", "champion")
ROLE_NAMES = {"anchor": "Base", "sft": "SFT", "candidate": "PPO", "champion": "Champion"}


def role_names(pipeline: str) -> dict[str, str]:
    """What the models of a run are called; the `evaluation` pipeline measures any model against any other."""
    other = {"candidate": "Evaluated", "champion": "Compared"} if pipeline == "evaluation" else {}
    return {**ROLE_NAMES, **other}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its confidence interval and the number of observations behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or the figure twice when it has none."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return low, high


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's finding."""

    name: str
    title: str
    verdict: str
    estimate: Estimate | None = None
    limit: float | None = None
    direction: Literal["above", "below", "within"] = "above"
    """On which side of the limit the gate passes; `within` means that the size must stay below the limit."""
    unit: Unit = "plain"
    reason: str = ""
    needed: int | None = None
    """How many more observations would probably decide it."""
    signed: bool = False
    """The figure is a difference and is written with its sign."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of an interval chart."""

    label: str
    estimate: Estimate
    role: str = "other"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reference:
    """A line that figures are read against: chance, a limit, a target."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One evaluated quantity for every model."""

    name: str
    title: str
    better: Literal["higher", "lower", "none"]
    unit: Unit
    by_role: dict[str, Estimate]
    key: bool = True
    """Shown at once; the others are a click away."""
    signed: bool = False
    """The figure is a difference and is written with its sign."""


@dataclass(frozen=True, slots=True)
class Effect:
    """One of the three cards that say whether training did what it should."""

    title: str
    claim: str
    state: State
    unit: Unit
    bars: list[Bar] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    detail: str = ""
    bound: tuple[str, float, float] | None = None
    """A figure against its upper bound: label, figure, bound."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said to a prompt."""

    text: str
    label: str = ""
    reward: float | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and every model's answer to it."""

    prompt: str
    """The last user turn."""
    tag: str
    hazard: str
    answers: dict[str, Answer]
    earlier: list[tuple[str, str]] = field(default_factory=list)
    """Role and text of the turns before it."""

    @property
    def harmful(self) -> bool:
        """Whether the answers are kept behind a click."""
        # Examples without a tag come from PPO's own prompts, which nobody has sorted.
        return self.tag in {"harmful", ""} or bool(self.hazard)


@dataclass(frozen=True, slots=True)
class Bin:
    """One bar of a histogram, or one point of a reliability curve."""

    low: float
    high: float
    n: float
    predicted: float | None = None
    observed: Estimate | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Rows of one chart that splits a figure up: by hazard, by group."""

    title: str
    note: str
    unit: Unit
    bars: list[Bar]
    references: list[Reference] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Balance:
    """A model's place between usefulness (x) and safety (y)."""

    role: str
    name: str
    useful: Estimate
    safe: Estimate
    over_refusal: float | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version's place between usefulness (x) and safety (y)."""

    version: str
    label: str
    role: str
    """Its colour: `champion`, `candidate` (the version of this run, or the newest one), `anchor` or `other`."""
    useful: Estimate
    safe: Estimate
    over_refusal: float | None = None
    aliases: tuple[str, ...] = ()
    verdict: str = ""
    rejected: bool = False
    parent: str = ""
    """The version it was made from, or measured against."""
    made_from: bool = False
    comparable: bool = True
    """Measured under the same conditions as the newest version."""
    on_front: bool = False


@dataclass(frozen=True, slots=True)
class Versions:
    """The balance over the versions of the registered model, as it stood when this run registered its own."""

    name: str
    points: list[Version]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart of curves over steps."""

    title: str
    series: list[Series]
    note: str = ""
    unit: Unit = "plain"
    references: list[Reference] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `(step, value)`."""

    label: str
    points: list[tuple[float, float]]
    role: str = "other"
    marks: bool = False
    """Few measured points (held-out checks) rather than a dense trace."""
    exact: bool = False
    """Set rather than measured, such as a learning rate: drawn without smoothing."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the data gate."""

    name: str
    title: str
    seen: int | None
    flagged: int | None
    share: Estimate | None
    threshold: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Count:
    """How many rows came in, stayed and were quarantined, for one kind or source of data."""

    label: str
    seen: float
    clean: float
    quarantined: float


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the data gate saw."""

    verdict: str
    reasons: list[str]
    checks: list[Check]
    kinds: list[Count]
    sources: list[Count]
    quarantine: list[tuple[str, float]]
    splits: list[tuple[str, float, float]]
    """Kind, rows for training, rows held out."""
    lengths: list[Bin]


@dataclass(frozen=True, slots=True)
class RewardFacts:
    """How far the reward model's scores can be believed."""

    reliability: list[Bin]
    by_length: list[Bar]
    by_source: list[Bar]
    calibration_error: float | None


@dataclass(frozen=True, slots=True)
class LineageNode:
    """An artifact."""

    name: str
    kind: str
    digest: str
    role: str = "other"
    """Which model it is, for its colour."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which artifact was made from which."""

    nodes: list[LineageNode]
    edges: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What the run cost, and what it was expected to."""

    currency: str
    total: float | None
    hourly_price: float | None
    per_stage: dict[str, float]
    planned: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict in words."""

    word: str
    """PROMOTE, HOLD, REJECT, INVALID, or FAILED, INTERRUPTED, RUNNING, DONE when no decision was reached."""
    headline: str
    reasons: list[str]
    next_steps: list[tuple[str, str]]
    """What to do, and the command that does it (may be empty)."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Registration:
    """What the registry holds of this run."""

    name: str
    version: str
    aliases: list[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a report can show of a run."""

    run_id: str
    run: RunRecord | None
    stages: list[StageRecord]
    outcome: Outcome
    gates: list[Gate]
    effects: list[Effect]
    balance: list[Balance]
    balance_limits: dict[str, float]
    useful_axis: str
    safe_axis: str
    metrics: list[Metric]
    differences: list[Metric]
    breakdowns: list[Breakdown]
    samples: list[Sample]
    evaluation_notes: list[str]
    judge: str
    """`independent`, `training` or `none`: who compared the answers."""
    confidence: float | None
    """Level of the intervals."""
    curves: dict[str, list[Panel]]
    more_curves: dict[str, list[Panel]]
    remarks: dict[str, list[str]]
    """What a reader of a stage's curves should know."""
    reward: RewardFacts | None
    data: DataFacts | None
    lineage: Lineage | None
    cost: Cost | None
    planned_seconds: dict[str, float]
    registration: Registration | None
    versions: Versions | None
    host: dict[str, str]
    spec: dict[str, Any]
    report_uri: str
