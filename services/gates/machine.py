"""Which gate starts when: the gates of every run as a graph, under the cores that the hub has reserved for the run.

Pure: events in, commands out; results and times come in with the events. It does not know what a gate does, how it
is killed or which artefacts it looks at (`app` does). Invariants: the cores of a run's running gates never exceed its
own; a run that is not cancelled ends in one Finish with exactly one result per gate, in the order asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages.failure import Category
from protocol.messages.gate import GateResult, Verdict


@dataclass(frozen=True, slots=True)
class PlannedGate:
    """One gate of a run."""

    name: str
    category: Category
    cores: int
    """0 = so short that it is not counted."""
    depends_on: tuple[str, ...] = ()
    """Gates that must not have failed before; one that the run does not hold is ignored."""
    required: bool = True
    stays: bool = False
    """Goes on when a required gate has failed: it costs nothing, and its findings help."""
    settled: GateResult | None = None
    """The result, where it is known without running: the gate is unknown, or nothing here is for it to judge."""


# Events


@dataclass(frozen=True, slots=True)
class RunAsked:
    """A request came in. Gate names are unique within it."""

    run: str
    gates: tuple[PlannedGate, ...]
    cores: int
    """Reserved for it; a gate that wants more gets all of them."""
    at_ms: int


@dataclass(frozen=True, slots=True)
class GateEnded:
    """A started gate is over, killed or not, and nothing of it runs any more."""

    run: str
    gate: str
    result: GateResult
    at_ms: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this run any more."""

    run: str
    at_ms: int


Event = RunAsked | GateEnded | Cancelled


# Commands


@dataclass(frozen=True, slots=True)
class StartGate:
    """Run it; end with GateEnded."""

    run: str
    gate: str


@dataclass(frozen=True, slots=True)
class KillGate:
    """Stop it at once; GateEnded is still expected, and its cores stay taken until then."""

    run: str
    gate: str


@dataclass(frozen=True, slots=True)
class Finish:
    """All results of a run, in the order asked for."""

    run: str
    results: tuple[GateResult, ...]


Command = StartGate | KillGate | Finish


@dataclass(slots=True)
class _Run:
    gates: dict[str, PlannedGate]
    cores: int
    results: dict[str, GateResult] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)
    """Running ones that were told to stop, because a required gate has failed."""
    cancelled: bool = False

    def cost(self, gate: PlannedGate) -> int:
        return min(gate.cores, self.cores)

    @property
    def free(self) -> int:
        return self.cores - sum(self.cost(self.gates[name]) for name in self.running)

    @property
    def uncounted(self) -> int:
        """Running gates that cost nothing."""
        return sum(self.gates[name].cores == 0 for name in self.running)


class GateMachine:
    """All runs of this process.

    `uncounted_at_once` bounds the gates of a run that cost no cores; `stop_after_failure` is the policy of gates.yaml.
    """

    def __init__(self, *, uncounted_at_once: int, stop_after_failure: bool) -> None:
        self._uncounted_at_once = uncounted_at_once
        self.stop_after_failure = stop_after_failure
        self._runs: dict[str, _Run] = {}

    @property
    def running(self) -> int:
        """Gates that run now."""
        return sum(len(run.running) for run in self._runs.values())

    @property
    def waiting(self) -> int:
        """Gates that have neither started nor a result."""
        return sum(
            len(run.gates) - len(run.results) - len(run.running) for run in self._runs.values() if not run.cancelled
        )

    def handle(self, event: Event) -> list[Command]:
        """Take one event. Raises KeyError for an event of an unknown run: the driver's mistake."""
        match event:
            case RunAsked(run, gates, cores, at_ms):
                return self._on_run_asked(run, gates, cores, at_ms)
            case GateEnded(run, gate, result, at_ms):
                return self._on_gate_ended(run, gate, result, at_ms)
            case Cancelled(run, at_ms):
                return self._on_cancelled(run, at_ms)

    def _on_run_asked(self, name: str, gates: tuple[PlannedGate, ...], cores: int, at_ms: int) -> list[Command]:
        if name in self._runs:
            raise KeyError(f"run {name} is there already")
        run = _Run({gate.name: gate for gate in gates}, max(1, cores))
        run.results = {gate.name: gate.settled for gate in gates if gate.settled is not None}
        self._runs[name] = run
        return self._advance(at_ms)

    def _on_gate_ended(self, name: str, gate: str, result: GateResult, at_ms: int) -> list[Command]:
        run = self._runs[name]
        run.running.remove(gate)
        run.results[gate] = _skipped(run, gate, "stopped", at_ms) if gate in run.stopped else result
        if run.cancelled and not run.running:
            del self._runs[name]
        return self._advance(at_ms)

    def _on_cancelled(self, name: str, at_ms: int) -> list[Command]:
        run = self._runs.get(name)
        if run is None or run.cancelled:
            return []  # it finished at the same moment
        run.cancelled = True
        kills: list[Command] = [KillGate(name, gate) for gate in run.gates if gate in run.running]
        if not kills:
            del self._runs[name]
        return kills + self._advance(at_ms)

    def _advance(self, at_ms: int) -> list[Command]:
        commands: list[Command] = []
        for name, run in list(self._runs.items()):
            if run.cancelled:
                continue
            _skip_hopeless(run, at_ms)
            if self.stop_after_failure and _culprit(run) is not None:
                commands += self._stop(name, run, at_ms)
                _skip_hopeless(run, at_ms)
            if len(run.results) == len(run.gates):
                del self._runs[name]
                commands.append(Finish(name, tuple(run.results[gate] for gate in run.gates)))
            else:
                commands += self._start(name, run)
        return commands

    def _stop(self, name: str, run: _Run, at_ms: int) -> list[Command]:
        """A required gate has failed: what costs something and has not ended is not begun, or stopped."""
        commands: list[Command] = []
        for gate in run.gates.values():
            if gate.stays or gate.name in run.results or gate.name in run.stopped:
                continue
            if gate.name in run.running:
                run.stopped.add(gate.name)
                commands.append(KillGate(name, gate.name))
            else:
                run.results[gate.name] = _skipped(run, gate.name, "not run", at_ms)
        return commands

    def _start(self, name: str, run: _Run) -> list[Command]:
        commands: list[Command] = []
        turn = True
        for gate in _ready(run):
            if gate.cores == 0:
                fits = run.uncounted < self._uncounted_at_once
            else:
                # Strictly in turn, or a wide gate would wait for ever behind narrow ones.
                turn = fits = turn and run.cost(gate) <= run.free
            if fits:
                run.running.add(gate.name)
                commands.append(StartGate(name, gate.name))
        return commands


def _culprit(run: _Run) -> str | None:
    """The first required gate that has failed."""
    failed = (name for name, gate in run.gates.items() if gate.required and name in run.results)
    return next((name for name in failed if run.results[name].verdict is Verdict.FAIL), None)


def _skipped(run: _Run, gate: str, what: str, at_ms: int) -> GateResult:
    return GateResult(
        gate=gate,
        verdict=Verdict.SKIPPED,
        category=run.gates[gate].category,
        required=run.gates[gate].required,
        message=f"{what}: {_culprit(run)}, which is required, has failed",
        started_ms=at_ms,
        ended_ms=at_ms,
    )


def _ready(run: _Run) -> list[PlannedGate]:
    return [
        gate
        for gate in run.gates.values()
        if gate.name not in run.results
        and gate.name not in run.running
        and all(other not in run.gates or other in run.results for other in gate.depends_on)
    ]


def _skip_hopeless(run: _Run, at_ms: int) -> None:
    """Give a result to every gate that waits for one which has not passed, and to those that wait for these."""
    changed = True
    while changed:
        changed = False
        for gate in run.gates.values():
            if gate.name in run.results or gate.name in run.running:
                continue
            for other in gate.depends_on:
                if (reason := _hindrance(run, other)) is not None:
                    run.results[gate.name] = GateResult(
                        gate=gate.name,
                        verdict=Verdict.SKIPPED,
                        category=gate.category,
                        required=gate.required,
                        message=f"not run: it depends on {other}, {reason}",
                        started_ms=at_ms,
                        ended_ms=at_ms,
                    )
                    changed = True
                    break


def _hindrance(run: _Run, name: str) -> str | None:
    """Why a gate that depends on this one cannot run; None if it can, or if that is not known yet."""
    result = run.results.get(name)
    if result is None or result.verdict is Verdict.PASS or not run.gates[name].required:
        return None
    if result.verdict is Verdict.SKIPPED:
        # Nothing to judge is no objection; skipped by a failure further up is.
        return None if run.gates[name].settled is not None else "which was skipped"
    return "which failed" if result.verdict is Verdict.FAIL else "which could not judge"
