"""Why work that could run does not: the sentence an operator needs when a task seems stuck. Pure, for views only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from protocol.messages.session import PeerState
from services.scheduler.broker import Broker
from services.scheduler.calls import Call
from services.scheduler.loading import Loading
from services.scheduler.tasks import TaskRecord

_MAX_REASONS: Final = 20


def reasons(broker: Broker, loading: Loading, task: TaskRecord, started_ms: int, at_ms: int) -> list[str]:
    """One sentence per waiting call of this task, at most twenty; empty when all that can run does."""
    if task.state.final:
        return []
    waiting = [call for call in broker.calls.values() if call.task == task.id and call.worker is None]
    return [f"{_what(task, call)} {_why(broker, loading, call, started_ms, at_ms)}" for call in waiting[:_MAX_REASONS]]


def _what(task: TaskRecord, call: Call) -> str:
    if call.step is None:
        return "planning" if call.kind == "plan.request" else "the final check"
    if call.kind != "infer.request":
        return f"the gate run of step {call.step}"
    return f"step {call.step} (role {task.steps[call.step].role})"


def _why(broker: Broker, loading: Loading, call: Call, started_ms: int, at_ms: int) -> str:
    if call.hold_until_ms > at_ms:
        return f"waits {(call.hold_until_ms - at_ms) / 1000:.1f} s before it is tried again"
    circuit = broker.circuits.reason(call.target)
    if circuit is not None:
        return f"waits for {call.target}: {circuit}"
    peers = [peer for peer in broker.peers.values() if call.target in peer.capabilities]
    if not peers:
        since = datetime.fromtimestamp(broker.gone_ms.get(call.target, started_ms) / 1000, UTC)
        return f"waits for {call.target}: 0 workers alive since {since:%Y-%m-%dT%H:%M:%SZ}"
    memory = loading.reason(call.target, at_ms)
    if memory is not None:
        return memory
    ready = [peer for peer in peers if peer.state is PeerState.READY and peer.is_heard(at_ms)]
    if not ready:
        states = ", ".join(f"{peer.service} {peer.report(at_ms).state} {peer.reason or ''}".strip() for peer in peers)
        return f"waits for {call.target}: 0 of {len(peers)} workers ready ({states})"
    if all(peer.free(at_ms) <= 0 for peer in ready):
        queued = len(broker.lines.waiting(call.target))
        calls = "1 call waits" if queued == 1 else f"{queued} calls wait"
        return f"waits for a slot of {call.target}: all are busy, {calls}"
    return f"waits for {call.needs.cores} cores: {broker.tokens.free_cores} of {broker.tokens.cores} are free"
