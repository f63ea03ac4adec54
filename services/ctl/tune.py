"""`tierline tune MODEL`: measures settings of one entry on this machine, and writes the best ones with `--apply`.

It starts engines of its own, one after the other, on cores and memory that no running work holds; a running service is
left alone, and follows the changed file only when somebody says `tierline registry reload`. What is tried is `tuning`'s
business, as are the order and the measurement.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from protocol.messages.session import StatusReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import try_status
from services.ctl.launch_view import looked_at
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.stack_files import checked_registry
from services.ctl.tuning.measure import FILE, Measurer, Speed, Unusable, registry_with
from services.ctl.tuning.search import Axis, Outcome, Point, Result, search
from services.ctl.tuning.space import Objective, axes_of, changes, start_of, words
from services.kit.registry import ModelEntry, Registry

_BUDGET_S: Final = 180.0
_STATUS_S: Final = 3.0


@dataclass(slots=True)
class Row:
    """One point that was measured, or could not be."""

    point: Point
    speeds: list[Speed] = field(default_factory=list)
    reason: str | None = None

    def median(self, name: str) -> float:
        """Median of one figure over the measurements of this point; 0 without any."""
        return statistics.median(getattr(speed, name) for speed in self.speeds) if self.speeds else 0.0


@dataclass(frozen=True, slots=True)
class Room:
    """What may be used beside a running stack."""

    cores: int
    memory_bytes: int | None
    """None = no stack runs: what the registry allows."""
    note: str | None = None


def add(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add("tune", _tune, "measure threads, slots, batches and speculation of one model on this machine")
    parser.add_argument("model", metavar="MODEL", help="name of its entry in models.yaml")
    parser.add_argument("--budget-s", type=float, default=_BUDGET_S, metavar="S", help="seconds it may take (180)")
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        help="latency: one stream; throughput: all slots at once (default: throughput where there are several slots)",
    )
    parser.add_argument("--apply", action="store_true", help="write the best settings into models.yaml; comments stay")


def _tune(args: Namespace, context: Context) -> ExitCode:
    if not args.budget_s > 0:  # nor is "nan"
        raise BadInput(f"--budget-s takes seconds above 0, not {args.budget_s:g}")
    registry = checked_registry(context.home)
    entry = _entry(registry, args.model)
    path = (context.home.registry / FILE).resolve()
    text = path.read_bytes().decode()  # with the line ends as they are
    room = room_beside(registry, args.model, asyncio.run(try_status(context.home, timeout_s=_STATUS_S)))
    if room.note is not None:
        context.screen.note(f"tierline: {room.note}")
    objective: Objective = args.objective or ("throughput" if entry.slots > 1 else "latency")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        measurer = Measurer(context.home, args.model, objective, Path(folder), room.memory_bytes)
        start = start_of(entry)
        launch, _, _ = looked_at(registry.launch(args.model), context.home)
        result, rows = _searched(measurer, start, axes_of(launch, room.cores, objective), args.budget_s, context)
        if rows[start].reason is not None:
            raise CommandError(f"{args.model} cannot be measured as it is: {rows[start].reason}")
        settings = changes(start, result.best)
        applied = bool(settings) and args.apply
        if applied:
            note = _note(result, objective, measurer.engine)
            _write(context, path, text, args.model, Point.of(settings), note, Path(folder))
    _show(
        context,
        args.model,
        measurer,
        start,
        result,
        rows,
        {
            "budget_s": args.budget_s,
            "took_s": round(time.monotonic() - began_s, 1),
            "settings": settings,
            "applied": applied,
            "file": str(path),
        },
    )
    return ExitCode.OK


def room_beside(registry: Registry, model: str, report: StatusReport | None) -> Room:
    """What a running stack leaves for measuring. Raises CommandError where that is too little for figures."""
    cores = len(registry.launch(model).cores) or registry.hardware.cores
    if report is None:
        return Room(cores, None)
    busy = {
        name: len(peer.in_flight)
        for name, entry in registry.served.items()
        for peer in report.peers
        if peer.service == f"inference-{name}" and peer.in_flight and entry.is_local
    }
    free = cores - sum(registry.models[name].threads for name in busy)
    at_work = ", ".join(f"{name}: {calls} call{'s' if calls > 1 else ''}" for name, calls in busy.items())
    if free < 1:
        raise CommandError(f"all {cores} cores are at work ({at_work}): wait until that has ended, or tierline down")
    memory = None
    if report.memory is not None:
        memory = max(0, report.memory.budget_bytes - report.memory.held_bytes)
    note = f"{at_work}: measured with the {free} cores that are left, figures are rough" if busy else None
    return Room(free, memory, note)


def _entry(registry: Registry, model: str) -> ModelEntry:
    if model not in registry.served:
        raise BadInput(f"there is no served model {model!r}, but {', '.join(registry.served)}")
    entry = registry.models[model]
    if not entry.is_local:
        raise BadInput(
            f"{model} has engine {entry.engine}: nothing on this machine computes it, so nothing can be tuned"
        )
    return entry


def _searched(
    measurer: Measurer, start: Point, axes: Sequence[Axis], budget_s: float, context: Context
) -> tuple[Result, dict[Point, Row]]:
    """Carry out the search; one line for each measurement."""
    rows: dict[Point, Row] = {}
    began_s = time.monotonic()
    steps = search(start, axes, budget_s)
    try:
        point = next(steps)
        while True:
            row = rows.setdefault(point, Row(point))
            score = None
            try:
                speed = measurer.measure(point)
            except Unusable as err:
                row.reason = str(err)
                said = f"refused: {err}"
            else:
                row.speeds.append(speed)
                score = speed.tokens_per_s
                said = f"{score:.1f} tokens/s"
            at_s = time.monotonic() - began_s
            context.screen.note(f"{at_s:6.1f} s  {words(point, start)}: {said}")
            point = steps.send(Outcome(score, at_s))
    except StopIteration as end:
        result: Result = end.value
        return result, rows


def _note(result: Result, objective: str, engine: str) -> str:
    """What stands behind a changed value: the date, and both figures."""
    today = datetime.now(UTC).date().isoformat()
    return (
        f"{today}: {result.best_score or 0:.1f} tokens/s, {result.start_score or 0:.1f} before "
        f"({objective}, {engine}, tierline tune)"
    )


def _write(context: Context, path: Path, text: str, model: str, point: Point, note: str, folder: Path) -> None:
    """Put the settings into models.yaml in one step, after the registry's reader has seen them."""
    try:
        registry_with(context.home, folder, model, point, note, text=text)
    except Unusable as err:
        raise CommandError(f"the settings found would make the registry invalid, nothing is written: {err}") from err
    if path.read_bytes() != text.encode():
        raise CommandError(f"{path} has changed while it was measured, nothing is written: start again")
    fresh = path.with_suffix(".part")
    fresh.write_bytes((folder / "registry" / FILE).read_bytes())
    fresh.chmod(path.stat().st_mode & 0o777)
    os.replace(fresh, path)


def _show(
    context: Context,
    model: str,
    measurer: Measurer,
    start: Point,
    result: Result,
    rows: dict[Point, Row],
    outcome: dict[str, Any],
) -> None:
    ordered = sorted(rows.values(), key=lambda row: -row.median("tokens_per_s"))
    if context.screen.json:
        figures = [
            {
                "settings": dict(row.point.settings),
                "measurements": [asdict(speed) for speed in row.speeds],
                "tokens_per_s": round(row.median("tokens_per_s"), 2),
                "refused": row.reason,
            }
            for row in ordered
        ]
        context.screen.document(
            {
                "model": model,
                "engine": measurer.engine,
                "objective": measurer.objective,
                "start": dict(start.settings),
                "best": dict(result.best.settings),
                "start_tokens_per_s": result.start_score,
                "best_tokens_per_s": result.best_score,
                "gain": round(result.gain, 3),
                "complete": result.complete,
                **outcome,
                "measured": figures,
            }
        )
        return
    screen = context.screen
    screen.line(f"{model}: {measurer.objective}, engine {measurer.engine}, as it is: {words(start)}")
    screen.table(
        ("tokens/s", "decoding", "reading", "accepted", "measured", "settings"),
        [
            (
                f"{row.median('tokens_per_s'):.1f}" if row.speeds else "refused",
                f"{row.median('generated_tokens_per_s'):.1f}" if row.speeds else "",
                f"{row.median('prompt_tokens_per_s'):.0f}" if row.speeds else "",
                f"{row.median('accepted_share'):.0%}" if row.median("accepted_share") else "",
                f"{len(row.speeds)} x",
                words(row.point, start) + (f": {row.reason}" if row.reason else ""),
            )
            for row in ordered
        ],
    )
    if not result.complete:
        used = f"{outcome['took_s']:g} of {outcome['budget_s']:g} s were used"
        why = "the next measurement, with those of the last comparison, would have taken longer than what is left"
        screen.line(f"the time was up before everything was compared: {used}, and {why}; raise --budget-s")
    if not outcome["settings"]:
        screen.line("nothing was found that is better by 3 % when measured in turn: the entry stays as it is")
        return
    gain = f"{result.best_score:.1f} tokens/s instead of {result.start_score:.1f} when measured in turn"
    screen.line(f"best: {words(result.best, start)}: {gain}")
    if outcome["applied"]:
        screen.line(f"written to {outcome['file']}; 'tierline registry reload' takes it up")
    else:
        screen.line("nothing is written; --apply writes it into models.yaml")
