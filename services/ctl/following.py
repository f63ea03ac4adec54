"""Follows one task to its end: a live table on a terminal, one line per event in a pipe, and what Ctrl-C does.

`run` and `watch` share it. For `run` the first Ctrl-C cancels the task and waits for what the hub says then; the second
one leaves at once. `watch` only looks on, so its first Ctrl-C leaves and the task goes on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import Group
from rich.live import Live
from rich.text import Text

from protocol.client import AsyncClient
from protocol.errors import BusError
from protocol.messages.result import TaskEvent, TaskView
from services.ctl.commands import Context
from services.ctl.hub import listening
from services.ctl.outcomes import CommandError, ExitCode, Unreachable
from services.ctl.progress import COLUMNS, Progress, event_line
from services.ctl.screen import Screen, grid, printable
from services.kit.clock import SteadyClock

_REFRESH_S: Final = 0.2
_WATCH_S: Final = 30 * 86_400.0
"""As long as a task may take; that the hub is gone is noticed otherwise."""
_LOOK_S: Final = 5.0
_GONE_S: Final = 60.0
_SHOWN_REASONS: Final = 3
"""Of those why a task waits: many steps mostly wait for the same."""


class LeftAlone(CommandError):
    """The user stopped looking on; the task itself goes on."""

    code = ExitCode.INTERRUPTED


async def follow(
    client: AsyncClient, task_id: str, context: Context, *, after_seq: int = 0, cancels: bool, records: bool = False
) -> TaskView:
    """Show the events of a task until it ends, and return it then.

    `cancels` says whether Ctrl-C cancels the task; `records` prints one JSON object per event. A hub that is restarted
    meanwhile is waited for; Unreachable is raised when none has listened for a minute, LeftAlone after Ctrl-C.
    """
    screen, progress, clock = context.screen, Progress(task_id), SteadyClock()
    with _live(screen) as live:
        async with (
            _ended_by(client, task_id, context, cancels=cancels) as ending,
            _ticking(live, progress, clock),
            _asking(client, progress, context),
            aclosing(client.watch(task_id, after_seq=after_seq, timeout_s=_WATCH_S)) as events,
        ):
            async for item in events:
                ending.check()
                if isinstance(item, TaskView):
                    progress.learn(item)
                    return item
                progress.apply(item)
                if records:
                    screen.record(item)
                elif live is None and not screen.json:
                    _say(screen, item, progress, to_output=not cancels)
                if item.event == "task.planned":
                    progress.learn(await client.show(task_id))
                    ending.check()
    raise CommandError(f"the hub ended the stream of {task_id} without a result; see: tierline show {task_id}")


def _say(screen: Screen, event: TaskEvent, progress: Progress, *, to_output: bool) -> None:
    """`watch` prints events as its result; for `run` they are about the work, so its output holds the result only."""
    if event.event == "step.tokens":
        return
    line = event_line(event, progress.began_ms or event.at_ms)
    if event.event == "swarm.turned" and event.step in progress.leading:
        line += f" ({printable(progress.leading[event.step].words())})"
    if to_output:
        screen.line(line)
    else:
        screen.note(line)


@contextmanager
def _live(screen: Screen) -> Iterator[Live | None]:
    if screen.rich is None:
        yield None
        return
    with Live(console=screen.rich, auto_refresh=False, transient=True) as live:
        yield live


@asynccontextmanager
async def _ticking(live: Live | None, progress: Progress, clock: SteadyClock) -> AsyncIterator[None]:
    """Redraw a few times a second, in this loop: a drawing thread would read the steps while they change."""

    async def redraw() -> None:
        while live is not None:
            room = max(5, live.console.height - 4)
            rows = progress.rows(clock.now_ms())
            if len(rows) > room:
                busy = [row for row in rows if row[1] not in ("done", "waiting")]
                rows = (busy or rows)[:room]
            why = [
                Text(f"waiting: {printable(reason)}", style="yellow") for reason in progress.waiting[:_SHOWN_REASONS]
            ]
            summary = Text(progress.summary(clock.now_ms()))
            live.update(Group(summary, grid(COLUMNS, rows, live=True), *why), refresh=True)
            await asyncio.sleep(_REFRESH_S)

    task = asyncio.create_task(redraw())
    try:
        yield
    finally:
        task.cancel()


@asynccontextmanager
async def _asking(client: AsyncClient, progress: Progress, context: Context) -> AsyncIterator[None]:
    """Ask why, whenever nothing has happened for a while, and say it where a table does not."""
    screen = context.screen

    async def ask() -> None:
        seen, said = progress.last_seq, list[str]()
        while True:
            await asyncio.sleep(_LOOK_S)
            if progress.last_seq != seen:
                seen, said = progress.last_seq, []
                continue
            with suppress(BusError):  # the hub is away, which is looked for elsewhere
                reasons = (await client.show(progress.task_id)).waiting
                if progress.last_seq == seen:
                    progress.waiting = reasons
            new = [one for one in progress.waiting if one not in said]
            if new and screen.rich is None and not screen.json:
                said = progress.waiting
                for one in new[:_SHOWN_REASONS]:
                    screen.note(printable(f"waiting: {one}"))

    task = asyncio.create_task(ask())
    try:
        yield
    finally:
        task.cancel()


@dataclass(slots=True)
class _Ending:
    """Why following ends before the task does; None while it does not."""

    error: CommandError | None = None

    def check(self) -> None:
        """Raise the reason. Needed beside the cancellation: `wait_for` of Python 3.11 may swallow one."""
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def _ended_by(client: AsyncClient, task_id: str, context: Context, *, cancels: bool) -> AsyncIterator[_Ending]:
    """End what runs inside on Ctrl-C, or when the hub stays away."""
    loop, following, screen = asyncio.get_running_loop(), asyncio.current_task(), context.screen
    ending, presses = _Ending(), 0
    helpers: list[asyncio.Task[None]] = []

    def end(error: CommandError) -> None:
        ending.error = error
        if following is not None:
            following.cancel()

    async def look_for_hub() -> None:
        missed = 0
        while missed * _LOOK_S < _GONE_S:
            await asyncio.sleep(_LOOK_S)
            missed = 0 if listening(context.home) else missed + 1
        end(Unreachable(f"no hub has listened for {_GONE_S:g} s; {task_id} goes on once it is back: tierline up"))

    async def cancel_task() -> None:
        try:
            await client.cancel(task_id, reason="Ctrl-C at the terminal")
        except BusError as err:
            screen.note(f"the task could not be cancelled: {err}; try: tierline cancel {task_id}")

    def pressed() -> None:
        nonlocal presses
        presses += 1
        if cancels and presses == 1:
            screen.note(f"cancelling {task_id}; Ctrl-C again leaves it to itself")
            helpers.append(asyncio.create_task(cancel_task()))
        else:
            end(LeftAlone(f"left {task_id}; it goes on: tierline watch {task_id}, tierline cancel {task_id}"))

    loop.add_signal_handler(signal.SIGINT, pressed)
    helpers.append(asyncio.create_task(look_for_hub()))
    try:
        yield ending
    except asyncio.CancelledError as err:
        if ending.error is None:
            raise
        raise ending.error from err
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        for task in helpers:
            task.cancel()
