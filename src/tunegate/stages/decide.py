"""Decide: the promotion gates."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tunegate.gates.results import GateResult
from tunegate.stages.context import Outcome, Output, ResolvedSpec, StageContext, run_stage
from tunegate.storage.runs import RunStore

#: What the gates of the earlier stages left in the run's records, in their order.
EARLIER_GATES = ("gate-data.json", "gate-sft.json", "gate-reward.json")


class Outputs(NamedTuple):
    """What the pipeline branches on. KFP's local runner resolves only an output called `Output` in a condition."""

    Output: str
    """`stop`, `register`, or `promote`."""
    verdict: str


def run(*, spec: Path, evaluation: Path, candidate: Path, decision: Path, summary: Path) -> Outputs:
    """Apply the gates.

    Args:
        spec: The spec artifact.
        evaluation: What was measured.
        candidate: The model that asks for promotion.
        decision: Where the decision goes.
        summary: Where the Markdown goes that Kubeflow shows.

    Returns:
        What follows, and the verdict.
    """

    def body(context: StageContext) -> Outcome:
        from tunegate.evaluation.results import read_evaluation
        from tunegate.gates.decision import decide
        from tunegate.gates.results import write_decision

        earlier = [
            GateResult.model_validate_json(data)
            for name in EARLIER_GATES
            if (data := context.run.read_file(name)) is not None
        ]
        result = decide(
            context.spec.gates,
            evaluation=read_evaluation(evaluation),
            earlier=earlier,
            evaluation_digest=context.digests["evaluation"],
            created=datetime.now(UTC),
            who=f"pipeline run {context.run.run_id} ({getpass.getuser()})",
        )
        write_decision(result, decision)
        passed = sum(1 for gate in result.gates if gate.passed)
        follows = what_follows(result.verdict, promote=context.spec.registry.promote)
        return Outcome(
            summary=f"{result.verdict}: {passed} of {len(result.gates)} gates passed; {result.reasons[0]}"
            if result.reasons
            else f"{result.verdict}: {passed} of {len(result.gates)} gates passed",
            verdict=result.verdict,
            figures={"gates/passed": passed, "gates/total": len(result.gates)},
            values={"follows": follows},
            files={"decision.json": result.model_dump_json(indent=2).encode()},
        )

    record = run_stage(
        "decide",
        spec,
        inputs={"evaluation": evaluation, "candidate": candidate},
        outputs={"decision": Output(decision, "decision")},
        sections=("gates", "registry"),
        body=body,
    )
    from tunegate.report.markdown import render_markdown

    resolved = ResolvedSpec.read(spec)
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(render_markdown(RunStore(resolved.spec.storage.root, resolved.run_id)))
    assert record.verdict is not None  # the body sets it
    return Outputs(record.values["follows"], record.verdict)


def what_follows(verdict: str, *, promote: bool) -> str:
    """What the pipeline does after a verdict.

    A HOLD is registered as well, since a person may approve it; only PROMOTE moves an alias by itself, and only when
    the spec asks for it.
    """
    if verdict not in {"PROMOTE", "HOLD"}:
        return "stop"
    return "promote" if verdict == "PROMOTE" and promote else "register"
