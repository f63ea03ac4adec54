"""Which models are served at all: a circuit per capability, opened by processes that fail again and again. Pure.

What fails here is the backend, never an answer: lost workers and the errors of category PEER and RESOURCE that end a
whole call. The breaker itself is `services.kit.breaker`; its probe is an ordinary waiting call, so it works with one
backend per tier: while a circuit is open calls wait, then exactly one of them is let through to find out. It has done
so when it ends in anything but such an error, or when it has run for `PROBE_RUN_MS` with its worker alive: a slow
answer is no failure. Failures that one call brings upon every process that takes it count once, they are the step's
(`worker_deaths`); the calls that die together with one process are one failure.

Leaves to others: holding calls back (`broker.py`), going to a lateral model (`machine.py`, `engine.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.messages.reply import ErrorReply
from services.kit import breaker as k
from services.kit.registry import FailureCaps
from services.scheduler.failures import is_backends_fault

PROBE_RUN_MS: Final = 5_000
SAME_INCIDENT_MS: Final = 200
"""Failures of one capability within so long of each other are one: a process died with several calls."""


def policy_of(caps: FailureCaps) -> k.BreakerPolicy:
    """The breaker's policy out of `failures.yaml`."""
    return k.BreakerPolicy(
        failures=caps.circuit_failures,
        window_ms=caps.circuit_window_ms,
        pause_ms=caps.circuit_pause_ms,
        pause_max_ms=caps.circuit_pause_max_ms,
    )


@dataclass(slots=True)
class _Circuit:
    """One capability that has failed lately."""

    breaker: k.Breaker
    failed_ms: int
    key: str
    """The call behind the newest failure that counted."""
    reason: str | None = None
    probe: str | None = None
    """Key of the call that is let through to find out."""
    probe_number: int = 0
    probe_since_ms: int = 0


@dataclass(slots=True)
class Circuits:
    """Circuits of the capabilities that have failed; whoever has none is well. Changes are told by `take`."""

    policy: k.BreakerPolicy
    _circuits: dict[str, _Circuit] = field(default_factory=dict)
    _changes: list[tuple[str, str | None]] = field(default_factory=list)

    def admits(self, target: str, at_ms: int) -> bool:
        """Whether a call for this capability may be handed out now: any while it is well, one when a probe is due."""
        circuit = self._circuits.get(target)
        if circuit is None or circuit.breaker.admits:
            return True
        self._tell(target, circuit, circuit.breaker.handle(k.Ticked(at_ms)))
        if circuit.breaker.state is k.BreakerState.OPEN:
            circuit.probe = None
            return False
        return circuit.probe is None

    def started(self, target: str, key: str, at_ms: int) -> None:
        """A call that was admitted is at a worker; it is the probe if one was due."""
        circuit = self._circuits.get(target)
        if circuit is not None and not circuit.breaker.admits:
            circuit.probe, circuit.probe_since_ms = key, at_ms

    def reason(self, target: str) -> str | None:
        """Why calls for this capability wait, for people; None if they do not."""
        circuit = self._circuits.get(target)
        return None if circuit is None or circuit.breaker.admits else circuit.reason

    def failed(self, target: str, key: str, reason: str, at_ms: int) -> None:
        """A worker of this capability died, or could not do this call, through no fault of the call's own."""
        circuit = self._circuits.get(target)
        if circuit is None:
            circuit = _Circuit(k.Breaker(self.policy, state=k.BreakerState.CLOSED), at_ms, key)
            self._circuits[target] = circuit
        elif circuit.probe == key:
            self._end_probe(target, circuit, reason, at_ms)
            return
        elif circuit.key == key or at_ms - circuit.failed_ms < SAME_INCIDENT_MS:
            return
        circuit.failed_ms, circuit.key = at_ms, key
        self._tell(target, circuit, circuit.breaker.handle(k.Failed(at_ms, reason[:300])))

    def ended(self, target: str, key: str, at_ms: int) -> None:
        """A call has its ending, and the backend is not to blame for it."""
        circuit = self._circuits.get(target)
        if circuit is None:
            return
        if circuit.probe == key:
            self._end_probe(target, circuit, None, at_ms)
        circuit.breaker.handle(k.Succeeded(at_ms))

    def withdrawn(self, target: str, key: str) -> None:
        """A call is over without a word about the backend: if it was the probe, the next one is."""
        circuit = self._circuits.get(target)
        if circuit is not None and circuit.probe == key:
            circuit.probe = None

    def on_tick(self, at_ms: int) -> None:
        """Time: a probe that has run for long enough has gone well, and old failures count no longer."""
        for target, circuit in list(self._circuits.items()):
            if circuit.probe is not None and at_ms - circuit.probe_since_ms >= PROBE_RUN_MS:
                self._end_probe(target, circuit, None, at_ms)
            elif circuit.breaker.admits and at_ms - circuit.failed_ms >= self.policy.window_ms:
                del self._circuits[target]

    def take(self) -> list[tuple[str, str | None]]:
        """Circuits that opened (with the reason) or closed (None) since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def open(self) -> dict[str, str]:
        """Capability -> reason, for every circuit that is not closed."""
        return {name: one.reason or "" for name, one in sorted(self._circuits.items()) if not one.breaker.admits}

    def _end_probe(self, target: str, circuit: _Circuit, reason: str | None, at_ms: int) -> None:
        circuit.probe = None
        circuit.failed_ms = at_ms
        self._tell(target, circuit, circuit.breaker.handle(k.ProbeEnded(at_ms, circuit.probe_number, reason)))

    def _tell(self, target: str, circuit: _Circuit, commands: list[k.Command]) -> None:
        for command in commands:
            if isinstance(command, k.Probe):
                circuit.probe_number = command.number
            else:
                circuit.reason = command.reason
                self._changes.append((target, command.reason))


def fault_of(kind: str, body: bytes) -> str | None:
    """What a worker's ending says against the worker itself; None for one that is about the work."""
    if kind != "error":
        return None
    try:
        failure = unpack_body(ErrorReply, body).failure
    except BadFrame as err:
        return f"sent an error that cannot be read: {err}"
    return f"{failure.code}: {failure.message}" if is_backends_fault(failure) else None
