"""What gates' verdicts amount to. Pure; fails closed."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.gate import GateResult, Verdict


def gate_failure(asked: Iterable[str], results: list[GateResult]) -> Failure | None:
    """What the gates' verdicts amount to: None if every gate asked for passed or had nothing to judge.

    Fails closed: a gate that could not judge, or is missing among the results, is a failure too; an advisory one
    never is. The first bad verdict in declared order gives the category; the findings of all, advisory ones included,
    are kept for the next attempt.
    """
    findings = [finding for result in results for finding in result.findings][:200]
    by_name = {result.gate: result for result in results}
    for name in asked:
        result = by_name.get(name)
        if result is None:
            message = f"gate {name} gave no verdict"
            return Failure(code="gate.no_verdict", category=Category.RESOURCE, origin="gates", message=message)
        if result.verdict is Verdict.FAIL and result.required:
            said = result.message or f"{len(result.findings)} findings"
            message = f"gate {name} failed: {said}"
            own = findings or [Finding(gate=name, category=result.category, message=said)]
            return Failure(code=f"gate.{name}", category=result.category, origin="gates", message=message, findings=own)
    for result in results:
        if result.verdict is not Verdict.ERROR or not result.required:
            continue
        message = f"gate {result.gate} could not judge: {result.message}"
        return Failure(code=f"gate.{result.gate}.error", category=result.category, origin="gates", message=message)
    return None
