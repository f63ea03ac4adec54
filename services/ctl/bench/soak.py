"""`tierline bench soak`: full load from several clients while processes are killed at random, then the books.

Real processes with noop tiers, so that the bus and its journal are the load. Every few seconds one of scheduler,
planner and the inference services gets kill -9 and is started again at once, as supervisord does. In the end what
clients were promised is compared with what they got and with what the journal says.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.journal_audit import Audit, audit
from services.ctl.bench.soak_load import LoadClient
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import BadInput, CommandError, ExitCode

_MODELS: Final = {
    "front": {"tier": "A", "engine": "noop", "slots": 8, "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "slots": 8, "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": 16, "context_tokens": 4096},
}
#: Who may be killed -> the capability whose next work shows that it is back.
_VICTIMS: Final = {
    "scheduler": "",
    "planner": "planner",
    **{f"inference-{name}": name for name in _MODELS},
}
_DRAIN_S: Final = 60.0
_LOADED_S: Final = 2.0
"""Load after all killed processes are back."""
_SAMPLE_S: Final = 0.25
_MAX_SECONDS: Final = 86_400
_MAX_CLIENTS: Final = 64
_LEAST_PAUSE_S: Final = 0.1
_MB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill -9; times in unix ms."""

    victim: str
    sent_ms: int
    dead_ms: int


@dataclass(slots=True)
class Residence:
    """Resident memory and processor time of the stack's processes over the run, sampled in a thread of its own."""

    stack: BareStack
    samples: list[dict[str, int]] = field(default_factory=list)
    cpu: dict[tuple[str, int], float] = field(default_factory=dict)
    """(Name, process id) -> seconds of processor time when last seen alive, user and system."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Residence:
        """Begin to sample."""
        self._thread = threading.Thread(target=self._sample, name="rss")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End sampling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def growth_mb(self) -> dict[str, float]:
        """Peak of each process in the last third of the run less that in the first third, in MiB.

        Peaks, since a killed process begins anew; every process, so that nothing can hide in another one.
        """
        third = max(1, len(self.samples) // 3)
        first, last = self.peaks_mb(self.samples[:third]), self.peaks_mb(self.samples[-third:])
        return {name: round(last.get(name, 0.0) - first.get(name, 0.0), 1) for name in self.stack.argv}

    def cpu_s(self) -> dict[str, float]:
        """Processor time of each service, that of killed processes included, their starts too."""
        return {
            name: round(sum(used for (owner, _), used in self.cpu.items() if owner == name), 1)
            for name in self.stack.argv
        }

    @staticmethod
    def peaks_mb(samples: Sequence[dict[str, int]]) -> dict[str, float]:
        """Highest resident memory of each process, in MiB."""
        peaks: Counter[str] = Counter()
        for sample in samples:
            peaks |= Counter(sample)  # the union of counters is their maximum
        return {name: round(peak / _MB, 1) for name, peak in peaks.items()}

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            sample = {}
            for name, process in list(self.stack.processes.items()):
                try:
                    seen = psutil.Process(process.pid)
                    sample[name] = seen.memory_info().rss
                    used = seen.cpu_times()
                    self.cpu[name, process.pid] = used.user + used.system
                except psutil.NoSuchProcess:
                    continue  # killed a moment ago; its successor is in the next sample
            self.samples.append(sample)


def add(commands: Commands) -> None:
    """Add `bench soak`."""
    parser = commands.add("soak", _run, "full load and random kill -9: what is lost, repeated, and how long it takes")
    parser.add_argument("--seconds", type=float, default=60, help="length of the load (default 60)")
    parser.add_argument("--clients", type=int, default=8, help="clients, each with four tasks under way (default 8)")
    parser.add_argument("--kill-every", type=float, default=2, help="seconds between two kills (default 2)")
    parser.add_argument("--seed", type=int, default=1, help="decides who is killed when (default 1)")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    if not 1 <= arguments.seconds <= _MAX_SECONDS:
        raise BadInput(f"--seconds {arguments.seconds:g}: expected 1 to {_MAX_SECONDS}")
    if not 1 <= arguments.clients <= _MAX_CLIENTS:
        raise BadInput(f"--clients {arguments.clients}: expected 1 to {_MAX_CLIENTS}")
    if not _LEAST_PAUSE_S <= arguments.kill_every <= _MAX_SECONDS:
        raise BadInput(f"--kill-every {arguments.kill_every:g}: expected {_LEAST_PAUSE_S:g} to {_MAX_SECONDS} seconds")
    figures = measure(arguments.seconds, arguments.clients, arguments.kill_every, arguments.seed)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    if not figures["accepted"]:
        raise CommandError("no task was accepted, so nothing could be lost: give it more time with --seconds")
    return ExitCode.FAILED if figures["lost"] or figures["duplicate_effects"] else ExitCode.OK


def measure(seconds: float, clients: int, kill_every_s: float, seed: int) -> dict[str, Any]:
    """Run it; see the keys of the result. `recovery_*` is from the kill to the first work done after it.

    Of a worker: the first answer to work that was handed out after its death. Of the hub: the first reply to a client
    after the first task that its successor accepted or ended.
    """
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        stack = BareStack(Path(folder), models=_MODELS, core=("scheduler", "planner", "memory"))
        with stack:
            loads = [LoadClient(stack.home.hub_address, number) for number in range(clients)]
            with Residence(stack) as residence:
                for load in loads:
                    load.start()
                kills = _kill_at_random(stack, seconds, kill_every_s, random.Random(seed))  # noqa: S311  repeatable
                stack.wait_ready()  # under load all the same: what was killed last has to show that it is back
                time.sleep(_LOADED_S)
                for load in loads:
                    load.drain(_DRAIN_S)
                for load in loads:
                    load.join()
        journal = audit(stack.home.journal / "journal.sqlite")
    return _figures(loads, kills, journal, residence)


def _kill_at_random(stack: BareStack, seconds: float, every_s: float, chance: random.Random) -> list[Kill]:
    kills: list[Kill] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, every_s))
        if time.monotonic() >= end:
            break
        victim = chance.choice(list(_VICTIMS))
        sent_ms = _now_ms()
        stack.kill(victim)
        kills.append(Kill(victim, sent_ms, _now_ms()))
        stack.start(victim)
    return kills


def _figures(
    loads: Sequence[LoadClient], kills: Sequence[Kill], journal: Audit, residence: Residence
) -> dict[str, Any]:
    promised = {task for load in loads for task in load.accepted}
    finished = sum(sum(load.states.values()) for load in loads)
    wrong = [text for load in loads for text in load.wrong]
    lost = set(journal.unfinished()) | (promised - journal.ended.keys())
    by_victim = _recoveries(kills, journal, [moment for load in loads for moment in load.replies_s])
    recoveries = sorted(seconds for values in by_victim.values() for seconds in values)
    return {
        "accepted": len(promised | journal.accepted.keys()),
        "finished": finished,
        "lost": max(len(lost), len(promised) - finished),
        "duplicate_effects": len(journal.repeated) + len(wrong),
        "recovery_p95_s": _percentile(recoveries, 0.95),
        "recovery_p50_s": _percentile(recoveries, 0.5),
        "recovery_max_s": recoveries[-1] if recoveries else None,
        "recovery_by_victim_s": {name: statistics.median(values) for name, values in sorted(by_victim.items())},
        "rss_growth_mb": round(sum(residence.growth_mb().values()), 1),
        "rss_growth_by_process_mb": residence.growth_mb(),
        "cpu_s_by_process": residence.cpu_s(),
        "rss_peak_mb": residence.peaks_mb(residence.samples),
        "failed": sum(count for load in loads for state, count in load.states.items() if state != "succeeded"),
        "kills": dict(sorted(Counter(kill.victim for kill in kills).items())),
        "unrecovered": len(kills) - len(recoveries),
        "refused": sum(load.refused for load in loads),
        "steps": journal.steps_done,
        "attempts_lost": journal.lost_attempts,
        "duplicates_refused": journal.duplicates_refused,
        "details": [*sorted(lost), *journal.repeated, *wrong][:20],
    }


def _recoveries(kills: Sequence[Kill], journal: Audit, replies_s: Sequence[float]) -> dict[str, list[float]]:
    """Victim -> seconds from each kill to the first work after it; a kill after which none came is left out."""
    facts_ms = sorted([*journal.accepted.values(), *(one.ended_ms for one in journal.worked.get("planner", []))])
    replies_ms = sorted(moment * 1000 for moment in replies_s)
    seconds: dict[str, list[float]] = {}
    for kill in kills:
        if kill.victim == "scheduler":
            first = min((moment for moment in facts_ms if moment > kill.dead_ms), default=None)
            back = None if first is None else min((moment for moment in replies_ms if moment >= first), default=None)
        else:
            worked = journal.worked.get(_VICTIMS[kill.victim], [])
            back = min((one.ended_ms for one in worked if one.started_ms > kill.dead_ms), default=None)
        if back is not None:
            seconds.setdefault(kill.victim, []).append(round((back - kill.sent_ms) / 1000, 3))
    return seconds


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest rank: the smallest value that at least this share of the values does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
