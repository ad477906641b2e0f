"""Tables and charts from results: `python render.py compare RESULT.json IMAGES` or `learn REWARD.json PPO.json IMAGES`.

The table goes to standard output as Markdown, the charts to files; a chart's two curves are Tunegate and TRL.
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from common import read
from markupsafe import Markup

from tunegate.report.curves import curve_panel
from tunegate.report.facts import Panel, Reference, Series
from tunegate.report.svg import join, tag

NAMES = {
    "ppo/ours-like": "PPO, like for like (fp32, separate critic)",
    "ppo/ours-shared": "PPO, as recommended (bf16, shared trunk, LoRA)",
    "sft/ours-bf16": "SFT, bf16",
    "sft/ours-fp32": "SFT, fp32",
    "reward/ours-bf16": "Reward model, bf16",
    "reward/ours-fp32": "Reward model, fp32",
}
PEERS = {
    "ppo/ours-like": ("ppo/trl-fp32", "ppo/trl-fp32-whole"),
    "ppo/ours-shared": ("ppo/trl-fp32", "ppo/trl-fp32-whole"),
    "sft/ours-bf16": ("sft/trl-bf16-padded", "sft/trl-bf16-packed"),
    "sft/ours-fp32": ("sft/trl-fp32-padded", "sft/trl-fp32-packed"),
    "reward/ours-bf16": ("reward/trl-bf16",),
    "reward/ours-fp32": ("reward/trl-fp32",),
}
SAME_ROWS = (("sft/ours-bf16", "sft/trl-bf16-padded"), ("reward/ours-bf16", "reward/trl-bf16"))
UNITS = {"update": ("s an update", True), "token": ("tokens/s", False), "pair": ("pairs/s", False)}


def table(result: dict[str, Any]) -> str:
    """The comparison as Markdown: rates, ratios by wall clock and by processor time, memory, share of the peak."""
    jobs = result["jobs"]
    ratios = {"rate_best": "ratio, best", "rate_median": "ratio, median", "rate_cpu": "ratio, processor time"}
    heads = ["", "Tunegate", "TRL", *ratios.values(), "memory, Tunegate", "TRL", "share of peak"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, label in NAMES.items():
        rivals = [jobs[peer] for peer in PEERS[name] if peer in jobs]
        if name not in jobs or not rivals:
            continue
        ours = jobs[name]
        theirs = max(rivals, key=lambda job: float(job["rate_best"]))  # the better of its layouts or microbatches
        unit, inverse = UNITS[ours["unit"]]
        rates = [1 / job["rate_best"] if inverse else job["rate_best"] for job in (ours, theirs)]
        share = f"{ours['share_of_peak']:.0%}" if "share_of_peak" in ours else ""
        cells = [
            label,
            f"{rates[0]:.3g} {unit}",
            f"{rates[1]:.3g}",
            *(f"{ours[key] / theirs[key]:.2f}" for key in ratios),
            *(f"{job['peak_bytes'] / 1e9:.1f} GB" for job in (ours, theirs)),
            share,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare_charts(result: dict[str, Any], images: Path) -> None:
    """Training losses of both sides on the same rows."""
    panels = []
    for ours, theirs in SAME_ROWS:
        if ours in result["jobs"] and theirs in result["jobs"]:
            panels.append(
                Panel(
                    NAMES[ours],
                    [
                        Series(label, _points(result["jobs"][job]["losses"]), role, marks=True)
                        for label, job, role in (("TRL", theirs, "sft"), ("Tunegate", ours, "candidate"))
                    ],
                )
            )
    if panels:
        write(panels, images / "training-benchmark.svg")


def learn_charts(reward: dict[str, Any] | None, ppo: dict[str, Any] | None, images: Path) -> None:
    """Reward training and the PPO runs."""
    if reward is not None and reward["loss"]:
        accuracy = [(float(step), float(value)) for step, value in reward["accuracy"]]
        loss = [(float(step), float(value)) for step, value in reward["loss"]]
        write(
            [
                Panel("Training loss", [Series("", loss, "reward")]),
                Panel("Training accuracy, next batch", [Series("", accuracy, "reward")], unit="share"),
            ],
            images / "training-reward.svg",
        )
    if ppo is not None:
        roles = ("sft", "candidate", "champion")

        def held_out(name: str) -> list[Series]:
            return [
                Series(f"seed {seed}", [(e["update"], e[name]) for e in run["evaluations"]], role, marks=True)
                for (seed, run), role in zip(ppo["runs"].items(), roles, strict=True)
            ]

        any_run = next(iter(ppo["runs"].values()))
        judge = [Panel("Judge's score, held-out", held_out("judge"))] if any_run["before"]["judge"] is not None else []
        write(
            [
                Panel("Reward, held-out prompts", held_out("reward")),
                Panel("KL to the reference, nats a response", held_out("kl"), references=[Reference(10.0, "limit")]),
                *judge,
            ],
            images / "training-ppo.svg",
        )


def _points(values: list[float]) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in enumerate(values, start=1)]


def write(panels: list[Panel], path: Path) -> None:
    """Panels side by side in one file that needs no style sheet beside it."""
    style = files("tunegate.report").joinpath("assets/report.css").read_text()
    width, height, gap = 340, 168, 64
    drawn = [
        tag(
            "g",
            tag("text", panel.title, x=4, y=14, style="font: 600 13px sans-serif; fill: var(--ink)"),
            tag("svg", curve_panel(panel), x=0, y=20, width=width, height=height, overflow="visible"),
            transform=f"translate({place * (width + gap)} 0)",
        )
        for place, panel in enumerate(panels)
    ]
    whole = len(panels) * (width + gap)
    svg = tag(
        "svg",
        # Labels at the ends of curves may stand out of their panel.
        tag("style", Markup(style.replace("<", "") + ".chart{overflow:visible}")),
        tag("rect", width="100%", height="100%", fill="var(--page)"),
        join(drawn),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {whole} {height + 24}",
        width=whole,
        height=height + 24,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(svg) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare")
    compare.add_argument("result", type=Path)
    compare.add_argument("images", type=Path)
    learn = commands.add_parser("learn")
    learn.add_argument("--reward", type=Path)
    learn.add_argument("--ppo", type=Path)
    learn.add_argument("images", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        result = read(given.result)
        sys.stdout.write(table(result))
        compare_charts(result, given.images)
        return
    learn_charts(read(given.reward) if given.reward else None, read(given.ppo) if given.ppo else None, given.images)


if __name__ == "__main__":
    main()
