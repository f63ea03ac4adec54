"""`tierline bench memory --crashes N`: what the memory loses and what it answers wrongly on its worst days.

A real hub and a real memory service; writers that tell it decisions and outcomes over the bus and keep their own books
of what was acknowledged. Against these books every answer is held, never against the memory's own word.

* kills: N times kill -9 at a random moment while six writers write; what was acknowledged must be there, once, and
  right. What was under way is told again, as the hub does.
* flips: a bit at a random place of every file of the store in turn, after a clean stop and after kill -9.
* deletions: every file of the store in turn after kill -9, then all projections together.
* full disk: the store on a tmpfs of its own (or, where nothing may be mounted, under a limit on the size of files)
  until writes are refused, then room again, then kill -9.

`lost`: acknowledged outcomes that cannot be explained any more. `wrong_answers`: answers that differ from the books, or
from what was answered before the harm. `rebuilt`, `restored`: projections and logs made anew, as the service's own log
tells.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.async_client import AsyncClient
from protocol.errors import CallError, CallFailed
from protocol.messages.memory import (
    Advise,
    DecisionRecord,
    Episode,
    Explain,
    MemoryFinal,
    MemoryRequest,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Stats,
    Values,
)
from services.ctl.bench.bare_stack import BareStack, StackNotReadyError

_WRITERS: Final = 6
_STEPS: Final = 3
_ROLES: Final = ("worker", "coder", "writer")
_WRITE_S: Final = (0.05, 0.6)
_ANSWER_S: Final = 60.0
_STARTS: Final = 3
_EXPLAINED_AT_ONCE: Final = 1_500
_DISK_MB: Final = 40
_ROOM_BYTES: Final = 400_000
_FILL_CHARS: Final = 4_000
_MOST_FILLED: Final = 4_000
_NOT_THE_STORE: Final = "lock"
_OBJECTIVES: Final = (
    "Compare the two contracts clause by clause, case {}",
    "Write a parser for invoices in Python, case {}",
    "Plan a journey through Portugal by train, case {}",
)


@dataclass(slots=True)
class Books:
    """What was told and what of it was acknowledged."""

    tasks: int = 0
    acknowledged: list[str] = field(default_factory=list)
    """Tasks whose outcomes and episode were acknowledged."""
    under_way: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def next_task(self) -> str:
        """A task that nobody has told yet."""
        self.tasks += 1
        return f"t{self.tasks}"


def measure(kills: int, seed: int) -> dict[str, Any]:
    """All figures; see the module's docstring."""
    return asyncio.run(_measure(kills, random.Random(seed)))  # noqa: S311  a workload, repeatable


async def _measure(kills: int, chance: random.Random) -> dict[str, Any]:
    began = time.monotonic()
    async with _stack() as (stack, client):
        books, events = Books(), Counter[str]()
        caught = 0
        for _ in range(kills):
            caught += await _write_until_killed(stack, client, books, chance)
            await _hold_against_books(stack, client, books)
        flips = await _harm_every_file(stack, client, books, signal.SIGTERM, lambda path: _flip(path, chance))
        flips += await _harm_every_file(stack, client, books, signal.SIGKILL, lambda path: _flip(path, chance))
        deletions = await _harm_every_file(stack, client, books, signal.SIGKILL, Path.unlink)
        deletions += await _delete_projections(stack, client, books)
        events += _events(stack)
    disk, full = await _fill_disk(chance)
    return {
        "kills": kills,
        "kills_under_writes": caught,
        "flips": flips,
        "deletions": deletions,
        "full_disk": disk,
        "acknowledged": len(books.acknowledged) * _STEPS + len(full.acknowledged) * _STEPS,
        "lost": (len(books.lost) + len(full.lost)) * _STEPS,
        "wrong_answers": len(books.wrong) + len(full.wrong),
        "rebuilt": events["memory.projection_rebuilt"],
        "restored": events["memory.log_restored"],
        "copies_renewed": events["memory.copy_renewed"],
        "seconds": round(time.monotonic() - began, 1),
        "details": [*sorted(books.lost | full.lost), *books.wrong, *full.wrong][:20],
    }


@asynccontextmanager
async def _stack() -> AsyncIterator[tuple[BareStack, AsyncClient]]:
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        stack = BareStack(Path(folder), core=("scheduler", "memory"))
        stack.argv = {name: stack.argv[name] for name in ("scheduler", "memory")}
        with stack:
            async with AsyncClient(stack.home.hub_address, name="crashes") as client:
                yield stack, client


# Writing, and asking.


async def _write_until_killed(stack: BareStack, client: AsyncClient, books: Books, chance: random.Random) -> bool:
    """Writers at work, kill -9, a new start, what was under way again; whether the kill came while somebody waited."""
    writers = [asyncio.create_task(_write(client, books)) for _ in range(_WRITERS)]
    await asyncio.sleep(chance.uniform(*_WRITE_S))
    stack.kill("memory")
    caught = bool(books.under_way)
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    await _start(stack)
    for task in sorted(books.under_way):
        for ask in told_of(task):
            await _ask(stack, client, ask)
        books.acknowledged.append(task)
    books.under_way.clear()
    return caught


async def _write(client: AsyncClient, books: Books) -> None:
    while True:
        task = books.next_task()
        books.under_way.add(task)
        try:
            for ask in told_of(task):
                await client.memory(MemoryRequest(ask=ask), timeout_s=_ANSWER_S)
        except CallError:  # killed meanwhile: it is told again after the start
            return
        books.under_way.remove(task)
        books.acknowledged.append(task)


def told_of(task: str, *, filling: str = "") -> tuple[RecordDecisions, RecordOutcomes]:
    """What is told of a task; follows from its name alone, so that the books need not keep it."""
    number = int(task[1:])
    text = _OBJECTIVES[number % len(_OBJECTIVES)].format(number)
    decisions = [
        DecisionRecord(
            decision_id=f"{task}-{step}",
            task_id=task,
            subject="role",
            choice=_ROLES[(number + step) % len(_ROLES)],
            alternatives=list(_ROLES),
            propensity=0.5,
            rule=filling,
            task_type="doc",
        )
        for step in range(_STEPS)
    ]
    outcomes = [
        Outcome(
            decision_id=f"{task}-{step}",
            reward=float((number + step) % 2),
            seconds=1.0 + number % 7,
            attempts=1,
            failure_code=None if (number + step) % 2 else "gate.unit",
            at_ms=number,
        )
        for step in range(_STEPS)
    ]
    episode = Episode(task_id=task, task_type="doc", objective=text, succeeded=True, seconds=2.0, at_ms=number)
    return RecordDecisions(decisions=decisions, text=text), RecordOutcomes(outcomes=outcomes, episode=episode)


async def _ask(stack: BareStack, client: AsyncClient, ask: Any) -> MemoryFinal:
    """An answer, however long it takes: a service that has found its log damaged ends, and is started again here."""
    end = time.monotonic() + _ANSWER_S
    while True:
        if stack.processes["memory"].poll() is not None:
            await _start(stack)
        try:
            return await client.memory(MemoryRequest(ask=ask), timeout_s=10)
        except CallError:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.2)


async def _start(stack: BareStack) -> None:
    """Start it as its supervisor does: one that finds its log damaged at once ends, and the next one restores it."""
    for left in reversed(range(_STARTS)):
        stack.start("memory")
        try:
            await asyncio.to_thread(stack.wait_ready, ["memory"])
        except StackNotReadyError:
            if not left or stack.processes["memory"].poll() is None:
                raise
        else:
            return


async def _stop(stack: BareStack, number: signal.Signals) -> None:
    stack.kill("memory", number)
    await asyncio.to_thread(stack.processes["memory"].wait, 30)


async def _explained(stack: BareStack, client: AsyncClient, tasks: Sequence[str]) -> dict[str, Outcome | None]:
    ids = [f"{task}-{step}" for task in tasks for step in range(_STEPS)]
    found: dict[str, Outcome | None] = {}
    for start in range(0, len(ids), _EXPLAINED_AT_ONCE):
        answer = await _ask(stack, client, Explain(decision_ids=ids[start : start + _EXPLAINED_AT_ONCE]))
        found |= {each.decision.decision_id: each.outcome for each in answer.explained}
    return found


async def _hold_against_books(stack: BareStack, client: AsyncClient, books: Books, *, counted: bool = True) -> None:
    """Every acknowledged outcome is there and is what was told; nothing is there twice."""
    found = await _explained(stack, client, books.acknowledged)
    for task in books.acknowledged:
        for outcome in told_of(task)[1].outcomes:
            answer = found.get(outcome.decision_id)
            if answer is None:
                books.lost.add(task)
            elif answer != outcome:
                books.wrong.append(f"{outcome.decision_id}: {answer}")
    if not counted:  # that needs the projections, and they need room
        return
    stats = (await _ask(stack, client, Stats())).stats
    expected = len(books.acknowledged)
    if (stats["outcomes"], stats["episodes"]) != (expected * _STEPS, expected):
        books.wrong.append(f"{stats['outcomes']} outcomes and {stats['episodes']} episodes of {expected} tasks")


async def _answers(stack: BareStack, client: AsyncClient) -> list[str]:
    """Answers to questions of every kind; what a start may change in them is left out."""
    texts = [text.format(7) for text in _OBJECTIVES]
    question = Question(
        key="q", subject="role", rules_choice="worker", options=[Option(choice=role) for role in _ROLES]
    )
    asks: list[Any] = [Retrieve(text=text, k=8) for text in texts]
    asks += [Advise(text=text, task_type="doc", questions=[question], seed=1) for text in texts]
    asks += [Values(subject="role")]
    return [(await _ask(stack, client, ask)).model_dump_json() for ask in asks]


# Harm.


async def _harm_every_file(
    stack: BareStack, client: AsyncClient, books: Books, number: signal.Signals, harm: Callable[[Path], None]
) -> int:
    """Stop, harm one file, start, compare; for every file that is there after this kind of stop."""
    done = 0
    for name in await _names_after(stack, client, books, number):
        expected = await _touched(stack, client, books)
        await _stop(stack, number)
        for path in stack.home.memory.glob(name):
            if path.stat().st_size:
                harm(path)
                done += 1
        await _compare(stack, client, books, expected, f"{name} after {number.name}")
    return done


async def _names_after(stack: BareStack, client: AsyncClient, books: Books, number: signal.Signals) -> list[str]:
    """Patterns for the files that this kind of stop leaves; row numbers in names change."""
    await _touched(stack, client, books)
    await _stop(stack, number)
    names = sorted(path.name for path in stack.home.memory.iterdir() if path.is_file() and path.name != _NOT_THE_STORE)
    await _start(stack)
    return list(
        dict.fromkeys(f"{name.split('-')[0]}-*" if name.endswith((".faiss", ".npz")) else name for name in names)
    )


async def _touched(stack: BareStack, client: AsyncClient, books: Books) -> list[str]:
    """One more task, so that kill -9 finds every file in use; then the answers to compare with."""
    task = books.next_task()
    for ask in told_of(task):
        await _ask(stack, client, ask)
    books.acknowledged.append(task)
    return await _answers(stack, client)


async def _delete_projections(stack: BareStack, client: AsyncClient, books: Books) -> int:
    expected = await _touched(stack, client, books)
    await _stop(stack, signal.SIGKILL)
    paths = [path for pattern in ("vectors*", "graph*", "routing*") for path in stack.home.memory.glob(pattern)]
    for path in paths:
        path.unlink()
    await _compare(stack, client, books, expected, "without any projection")
    return len(paths)


async def _compare(stack: BareStack, client: AsyncClient, books: Books, expected: list[str], harm: str) -> None:
    await _start(stack)
    found = await _answers(stack, client)
    books.wrong += [f"{harm}: {text[:200]}" for text, right in zip(found, expected, strict=True) if text != right]
    await _hold_against_books(stack, client, books)


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def _events(stack: BareStack) -> Counter[str]:
    lines = (stack.home.logs / "memory.jsonl").read_text(encoding="utf-8").splitlines()
    return Counter(str(json.loads(line)["event"]) for line in lines)


# A full disk.


async def _fill_disk(chance: random.Random) -> tuple[str, Books]:
    """How the disk was made small, and the books of what was written there."""
    books = Books()
    async with _stack() as (stack, client):
        await _stop(stack, signal.SIGTERM)
        mounted = _mount(stack.home.memory, _DISK_MB)
        try:
            await _start(stack)
            if not mounted:
                _limit(stack, _ROOM_BYTES)
            refused = await _write_until_refused(client, books, chance)
            if not refused:
                books.wrong.append("the disk was full, and no write was refused")
            await _hold_against_books(stack, client, books, counted=False)
            if mounted:
                _run("mount", "-o", f"remount,size={4 * _DISK_MB}m", str(stack.home.memory))
            else:
                _limit(stack, resource.RLIM_INFINITY)
            for task in sorted(books.under_way):
                for ask in told_of(task, filling="x" * _FILL_CHARS):
                    await _ask(stack, client, ask)
                books.acknowledged.append(task)
            await _stop(stack, signal.SIGKILL)
            await _start(stack)
            await _hold_against_books(stack, client, books)
            await _stop(stack, signal.SIGTERM)
        finally:
            if mounted:
                stack.kill("memory")
                _run("umount", str(stack.home.memory))
    return "tmpfs" if mounted else "limit on the size of files", books


async def _write_until_refused(client: AsyncClient, books: Books, chance: random.Random) -> bool:
    """Write until the memory says that there is no room; what was refused stays under way."""
    for _ in range(_MOST_FILLED):
        task = books.next_task()
        books.under_way.add(task)
        filling = "".join(chance.choices("abcdefgh", k=_FILL_CHARS))
        try:
            for ask in told_of(task, filling=filling):
                await client.memory(MemoryRequest(ask=ask), timeout_s=_ANSWER_S)
        except CallFailed as failed:
            if failed.failure.code != "memory.log_write":
                raise
            return True
        books.under_way.remove(task)
        books.acknowledged.append(task)
    return False


def _mount(folder: Path, megabytes: int) -> bool:
    with suppress(FileNotFoundError):
        return _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tierline-bench", str(folder))
    return False


def _run(*argv: str) -> bool:
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


def _limit(stack: BareStack, room: int) -> None:
    sizes = [path.stat().st_size for path in stack.home.memory.glob("log.*")]
    limit = room if room == resource.RLIM_INFINITY else max(sizes, default=0) + room
    resource.prlimit(stack.processes["memory"].pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
