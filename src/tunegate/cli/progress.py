"""Views of a running pipeline: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tunegate.stages.observe import describe_event

STAGES = (
    ("preflight", "Preflight"),
    ("ingest", "Ingest"),
    ("validate", "Data gate"),
    ("sft", "SFT"),
    ("guard", "Safety after SFT"),
    ("reward", "Reward model"),
    ("ppo", "PPO"),
    ("evaluate", "Evaluate"),
    ("decide", "Decide"),
    ("register", "Register"),
    ("promote", "Promote"),
    ("finish", "Report"),
)
EVALUATION_STAGES = (
    ("preflight", "Preflight"),
    ("ingest", "Ingest"),
    ("fetch", "Fetch the model"),
    ("evaluate", "Evaluate"),
    ("decide", "Decide"),
    ("finish", "Report"),
)
_PLAIN_SECONDS = 10.0


@dataclass
class _Row:
    title: str
    state: str = "waiting"
    started: float | None = None
    ended: float | None = None
    text: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)


class PlainView:
    """One line an event, progress every ten seconds at most; for logs, pipes and CI."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last: dict[str, float] = {}

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def handle(self, event: Mapping[str, Any]) -> None:
        """See `tunegate.cluster.local.Watcher`."""
        kind, stage = event["event"], event["stage"]
        if kind in {"progress", "metrics"}:
            moment = time.monotonic()
            finished = kind == "progress" and event["done"] >= event["total"]
            if moment - self._last.get(f"{stage}/{kind}", 0.0) < _PLAIN_SECONDS and not finished:
                return
            self._last[f"{stage}/{kind}"] = moment
        stamp = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        print(f"{stamp} {describe_event(stage, kind, event)}", file=self._stream, flush=True)

    def tick(self) -> None:
        """Nothing to redraw."""


class LiveView:
    """A table of the stages that is redrawn in place: state, time, bar with rate and remaining time, latest figures."""

    def __init__(self, stages: Sequence[tuple[str, str]] = STAGES) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows = {stage: _Row(title) for stage, title in stages}
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=5, get_renderable=self._render, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def handle(self, event: Mapping[str, Any]) -> None:
        """See `tunegate.cluster.local.Watcher`."""
        kind = event["event"]
        if kind == "note":  # also about what is no stage, such as the run as a whole
            self._console.print(f"[dim]{event['stage']}: {event['message']}[/dim]", highlight=False)
            return
        row = self._rows.setdefault(event["stage"], _Row(event["stage"]))
        if kind == "started":
            row.state, row.started = "running", event["time"]
        elif kind in {"done", "failed", "reused"}:
            row.state, row.ended, row.progress = kind, event["time"], {}
            verdict = f"[{event['verdict']}] " if event.get("verdict") else ""
            row.text = f"{verdict}{event.get('summary') or ''}"
        elif kind == "progress":
            row.progress = dict(event)
        elif kind == "metrics":
            row.latest.update(event["values"])

    def tick(self) -> None:
        """The live display redraws itself."""

    def _render(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        marks = {"waiting": "·", "running": "▶", "done": "✔", "reused": "↺", "failed": "✘"}
        styles = {"waiting": "dim", "running": "bold", "done": "green", "reused": "cyan", "failed": "red"}
        for row in self._rows.values():
            style = styles[row.state]
            took = (row.ended or time.time()) - row.started if row.started else None
            table.add_row(
                Text(marks[row.state], style=style),
                Text(row.title, style=style),
                Text(f"{took:.0f} s" if took is not None else "", style="dim"),
                self._detail(row),
            )
        return table

    def _detail(self, row: _Row) -> Any:
        from rich.text import Text

        if row.state != "running":
            return Text(row.text, style="red" if row.state == "failed" else "", overflow="ellipsis", no_wrap=True)
        if not row.progress:
            return Text("…", style="dim")
        done, total = row.progress["done"], max(row.progress["total"], 1e-9)
        width = 24
        filled = int(width * min(done / total, 1.0))
        left = row.progress.get("left")
        figures = "  ".join(f"{k.split('/')[-1]} {v:.3g}" for k, v in list(row.latest.items())[:3])
        text = Text()
        text.append("━" * filled, style="cyan")
        text.append("━" * (width - filled), style="dim")
        text.append(f" {done:g}/{row.progress['total']:g} {row.progress['unit']}")
        text.append(f" {row.progress['rate']:.3g}/s", style="dim")
        if left is not None:
            text.append(f" {_clock(left)} left", style="dim")
        if row.progress.get("label"):
            text.append(f"  {row.progress['label']}", style="dim")
        text.append(f"  {figures}", style="dim")
        return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class VerboseView(PlainView):
    """Plain lines plus the pipeline's own log as it grows."""

    def __init__(self, log_path: str, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._log_path = log_path
        self._reader: TextIO | None = None

    def tick(self) -> None:
        """Pass on what the pipeline's log has gained."""
        if self._reader is None:
            try:
                self._reader = open(self._log_path, errors="replace")  # noqa: PTH123, SIM115
            except FileNotFoundError:
                return
        for line in self._reader:
            print(line, end="", file=self._stream, flush=True)


def choose_view(
    *, verbose: bool, quiet: bool, log_path: str, pipeline: str = "instruction-tuning"
) -> PlainView | LiveView:
    """The view that fits: quiet for `--json`, everything for `--verbose`, live in a terminal, else plain lines."""
    import os

    if quiet:
        return PlainView(open(os.devnull, "w"))  # noqa: PTH123
    if verbose:
        return VerboseView(log_path)
    stages = EVALUATION_STAGES if pipeline == "evaluation" else STAGES
    return LiveView(stages) if sys.stderr.isatty() else PlainView()
