"""The memory service at its edges: handlers, threads, the lock on the folder.

The loop only validates and waits, so that pings are answered while SQLite and Kuzu write. The writer thread commits all
requests that arrived during the last commit in one transaction (group commit: at most as many as there are slots). The
projector thread follows after the acknowledgement, and answers questions in the order in which they came; so does the
advisor's thread, with routing alone, so that a plan never waits for the graph.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from protocol.codec import pack_body
from protocol.errors import CallFailed
from protocol.limits import MAX_BODY_BYTES
from protocol.messages.failure import Category, Failure
from protocol.messages.memory import (
    Advise,
    Arms,
    Explain,
    Export,
    Forget,
    Import,
    MemoryFinal,
    MemoryRequest,
    Rebuild,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Row,
    Stats,
    Values,
    Verify,
)
from services.kit.config import Home
from services.kit.logs import LogEvent
from services.kit.service import Call, Service
from services.memory.advisor import Advisor
from services.memory.background import step_back
from services.memory.embedding import BadVector, Embedder, Unembeddable, Vector
from services.memory.graph import files as graph_files
from services.memory.graph import vouched
from services.memory.graph_build import build_in_child, clear
from services.memory.graph_check import Checked, check_in_child
from services.memory.log import Entry, MemoryLog
from services.memory.log_restore import open_log
from services.memory.log_rows import LogDamaged, is_damage
from services.memory.machine import Found
from services.memory.manifest import ProjectionDoubt
from services.memory.projector import Projector, fresh_vectors
from services.memory.telling import Tell

SLOTS: Final = 16
UNEMBEDDABLE: Final = "memory.unembeddable"
MEMORY_OPENED: Final = LogEvent("memory.opened", "log_id log_seq embedder stale_vectors")
REEMBEDDED: Final = LogEvent("memory.reembedded", "episodes embedder")
FORGOTTEN: Final = LogEvent("memory.forgotten", "rows", "warning")
VALUES_MENDED: Final = LogEvent("memory.values_mended", "values", "warning")
MEMORY_UNUSABLE: Final = LogEvent("memory.unusable", "reason", "error")
ROUTING_OPENED: Final = LogEvent("memory.routing_opened", "verdict reason log_seq")
LOG_DAMAGED: Final = LogEvent("memory.log_damaged", "reason", "error")
PROJECTION_FAILED: Final = LogEvent("memory.projection_failed", "reason", "error")

_LOCK_FILE: Final = "lock"
_LOCK_WAIT_S: Final = 3.0  # supervisord starts a successor only after the end; the kernel closes files a moment later

PROJECTION_TROUBLE: Final = (RuntimeError, ProjectionDoubt, BadVector, OSError, sqlite3.Error)
"""What is left when rebuilding has not helped: no space, no memory, a log that cannot be read."""

_FOLLOW_AFTER_S: Final = 10.0
_FOLLOW_ROWS: Final = 10_000
"""Projections follow when the first of these is reached, or when a question needs them. A graph that takes every task
on its own costs ten times the CPU time of one that takes a few hundred together."""

_EXPORT_BYTES: Final = MAX_BODY_BYTES // 2
"""Rows of one export together; the rest is asked for next."""

Write = RecordDecisions | RecordOutcomes | Import
Ask = Write | Retrieve | Explain | Stats | Advise | Arms | Values | Export | Verify | Rebuild | Forget
Answer = MemoryFinal | Failure


class FolderTaken(Exception):
    """Another memory service of the same home is alive."""


class MemoryService:
    """One memory per home: owns `$TIERLINE_HOME/memory`."""

    def __init__(self, home: Home) -> None:
        self._folder = home.memory
        self._service = Service(home, "memory", ("memory",), slots=SLOTS)
        self._service.answer("memory.request", self._on_request)
        self._service.metrics = self._metrics
        self._writer = ThreadPoolExecutor(1, "memory-writer")
        self._follower = ThreadPoolExecutor(1, "memory-projector")
        self._builder = ThreadPoolExecutor(1, "memory-builder", initializer=step_back)
        self._renewing = asyncio.Lock()
        self._reembedding: asyncio.Task[None] | None = None
        self._counsel = ThreadPoolExecutor(1, "memory-advisor")
        self._log: MemoryLog | None = None
        self._advisor: Advisor | None = None
        self._embedder: Embedder | None = None
        self._projector: Projector | None = None
        self._lock: int | None = None
        self._pending: list[tuple[Write, asyncio.Future[Answer]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._advancing: asyncio.Task[None] | None = None
        self._behind = False
        self._hurry = asyncio.Event()
        self._followed_seq = 0
        self._groups = 0

    async def run(self) -> int:
        """Serve until SIGTERM; returns the exit status."""
        try:
            return await self._service.run(self._load)
        finally:
            await self._close()

    # Requests.

    async def _on_request(self, call: Call) -> MemoryFinal:
        ask = call.read(MemoryRequest).ask
        try:
            return await self._answer(ask)
        except (LogDamaged, sqlite3.Error) as err:
            if isinstance(err, sqlite3.Error) and not is_damage(err):
                raise
            self._give_up(err)
            raise CallFailed(_damage(self._folder, err)) from err

    async def _answer(self, ask: Ask) -> MemoryFinal:
        match ask:
            case RecordDecisions() | RecordOutcomes() | Import():
                return await self._write(ask)
            case Retrieve():
                return await self._ask_projector(partial(self._retrieve, ask))
            case Explain():
                return await self._ask_projector(partial(self._explain, ask))
            case Stats():
                routing = await self._ask_advisor(self._routing_stats)
                final = await self._ask_projector(self._stats)
                return final.model_copy(update={"stats": final.stats | routing.stats})
            case Advise():
                return await self._advised(ask)
            case Arms():
                return await self._ask_advisor(partial(self._arms, ask))
            case Values():
                return await self._ask_projector(partial(self._values, ask))
            case Export():
                return await self._ask_projector(partial(self._export, ask))
            case Verify():
                return await self._ask_projector(self._verify)
            case Rebuild():
                return await self._rebuild()
            case Forget():
                return await self._forget(ask)

    def _give_up(self, err: Exception) -> None:
        """Nothing may be answered from a damaged log. The next start makes it anew, see `log_restore.py`."""
        self._service.log.write(LOG_DAMAGED, reason=str(err))
        self._opened_log().distrust()
        self._service.end(f"the log is damaged: {err}")

    async def _write(self, ask: Write) -> MemoryFinal:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending.append((ask, answer))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        result = await answer
        if isinstance(result, Failure):
            raise CallFailed(result)
        return result

    async def _commit_all(self) -> None:
        """Commit group after group until nobody waits; the next group gathers while one is being written."""
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                group, self._pending = self._pending, []
                try:
                    results = await loop.run_in_executor(self._writer, self._commit, [ask for ask, _ in group])
                except Exception as err:  # noqa: BLE001  a bug there must end these calls, as one, and not all later ones
                    for _, answer in group:
                        if not answer.done():
                            answer.set_exception(err)
                    continue
                self._groups += 1
                for (_, answer), result in zip(group, results, strict=True):
                    if not answer.done():  # done: cancelled by the hub; what was stored stays stored
                        answer.set_result(result)
                self._behind = True
                if self._opened_log().seq - self._followed_seq >= _FOLLOW_ROWS:
                    self._hurry.set()
                if self._advancing is None:
                    self._advancing = asyncio.create_task(self._advance())
        finally:
            self._committing = None

    async def _advance(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            while self._behind:
                if not self._hurry.is_set():
                    with suppress(TimeoutError):  # nothing hurries
                        await asyncio.wait_for(self._hurry.wait(), _FOLLOW_AFTER_S)
                self._behind = False
                self._hurry.clear()
                self._followed_seq = self._opened_log().seq
                await loop.run_in_executor(self._counsel, self._counsellor().advance)
                await self._follow()
        except LogDamaged as err:
            self._give_up(err)
        except PROJECTION_TROUBLE as err:
            # Writes go on, the log is the truth; the next question tries again and fails with this reason if it must.
            self._service.log.write(PROJECTION_FAILED, reason=str(err))
        finally:
            self._advancing = None

    async def _follow(self) -> None:
        """Projections take in what was committed; the graph in its own thread, questions are answered meanwhile."""
        loop, projector = asyncio.get_running_loop(), self._opened()
        await loop.run_in_executor(self._follower, projector.follow)
        await asyncio.wrap_future(await loop.run_in_executor(self._follower, projector.advance_graph))
        await loop.run_in_executor(self._follower, projector.keep)

    async def _rebuild(self) -> MemoryFinal:
        mended = await asyncio.get_running_loop().run_in_executor(self._writer, self._opened_log().replay_values)
        if mended:
            self._service.log.write(VALUES_MENDED, values=mended)
        await self._renew()
        return await self._ask_projector(self._stats)

    async def _forget(self, ask: Forget) -> MemoryFinal:
        try:
            removed = await asyncio.get_running_loop().run_in_executor(self._writer, self._opened_log().forget, ask)
        except sqlite3.Error as err:
            raise CallFailed(self._unbuilt(f"the log could not be written: {err}")) from err
        if removed:
            self._service.log.write(FORGOTTEN, rows=removed)
            await self._ask_advisor(self._learn_anew)
            await self._renew()
        return MemoryFinal(forgotten=removed)

    async def _renew(self) -> None:
        """Make both projections anew beside those in use, then change over; questions are answered meanwhile."""
        loop = asyncio.get_running_loop()
        async with self._renewing:
            if self._reembedding is not None:
                await self._reembedding
            try:
                vectors = await loop.run_in_executor(self._builder, fresh_vectors, self._folder)
                await build_in_child(self._folder)
                await loop.run_in_executor(self._follower, self._opened().adopt, vectors)
            except PROJECTION_TROUBLE as err:
                raise CallFailed(self._unbuilt(str(err))) from err
            finally:
                clear(self._folder)

    async def _reembed(self) -> None:
        """Give every episode a vector of the embedder in use, a few at a time between other writes."""
        loop, log = asyncio.get_running_loop(), self._opened_log()
        embedder = self._embedder
        if embedder is None:
            raise RuntimeError("the embedder is not loaded")
        total = 0
        try:
            while made := await loop.run_in_executor(self._writer, log.reembed_some, embedder.embed):
                total += made
                await self._follow()
            await self._follow()
            self._service.log.write(REEMBEDDED, episodes=total, embedder=embedder.name)
        except LogDamaged as err:
            self._give_up(err)
        except (*PROJECTION_TROUBLE, Unembeddable) as err:
            self._service.log.write(PROJECTION_FAILED, reason=f"re-embedding stopped, the next start goes on: {err}")
        finally:
            self._reembedding = None

    async def _advised(self, ask: Advise) -> MemoryFinal:
        """Advice, and beside it what resembles the text where that is asked for, too."""
        if ask.retrieve is None:
            return await self._ask_advisor(partial(self._advise, ask))
        advised = self._ask_advisor(partial(self._advise, ask))
        found = self._ask_projector(partial(self._retrieve, ask.retrieve))
        advice, told = await asyncio.gather(advised, found, return_exceptions=True)
        if isinstance(advice, BaseException):
            raise advice
        if isinstance(told, CallFailed) and told.failure.code == UNEMBEDDABLE:
            return advice
        if isinstance(told, BaseException):
            raise told
        return told.model_copy(update={"advice": advice.advice})

    async def _ask_projector(self, work: Callable[[], MemoryFinal]) -> MemoryFinal:
        return await asyncio.get_running_loop().run_in_executor(self._follower, work)

    async def _ask_advisor(self, work: Callable[[], MemoryFinal]) -> MemoryFinal:
        return await asyncio.get_running_loop().run_in_executor(self._counsel, work)

    # In the advisor's thread.

    def _advise(self, ask: Advise) -> MemoryFinal:
        try:
            return MemoryFinal(advice=self._counsellor().advise(ask))
        except PROJECTION_TROUBLE as err:
            raise CallFailed(_trouble(f"the routing in {self._folder} cannot follow the log: {err}")) from err

    def _arms(self, ask: Arms) -> MemoryFinal:
        try:
            return MemoryFinal(arms=self._counsellor().arms(ask.subject))
        except PROJECTION_TROUBLE as err:
            raise CallFailed(_trouble(f"the routing in {self._folder} cannot follow the log: {err}")) from err

    def _learn_anew(self) -> MemoryFinal:
        try:
            self._counsellor().renew()
        except PROJECTION_TROUBLE as err:
            raise CallFailed(_trouble(f"the routing in {self._folder} cannot follow the log: {err}")) from err
        return MemoryFinal()

    def _routing_stats(self) -> MemoryFinal:
        return MemoryFinal(stats=self._counsellor().stats())

    # In the writer thread.

    def _commit(self, asks: Sequence[Write]) -> list[Answer]:
        if self._log is None or self._embedder is None:
            raise RuntimeError("the log is not open")
        answers: dict[int, Answer] = {}
        entries: dict[int, Entry] = {}
        for position, ask in enumerate(asks):
            if isinstance(ask, RecordDecisions):
                entries[position] = Entry(ask, self._context(ask.text))
                continue
            try:
                if isinstance(ask, Import):
                    entries[position] = Entry(ask, imported=tuple(map(self._imported, ask.rows)))
                    continue
                episode = ask.episode
                vector = None if episode is None else self._embedder.embed(episode.objective)
                entries[position] = Entry(ask, vector, self._context(ask.text))
            except Unembeddable as err:
                answers[position] = _refusal(
                    UNEMBEDDABLE,
                    f"ask.episode.objective: {err}; nothing of this request was stored. Send its outcomes without it.",
                )
        answers.update(zip(entries, self._log.commit(list(entries.values())), strict=True))
        return [answers[position] for position in range(len(asks))]

    def _imported(self, row: Row) -> Vector | None:
        if row.episode is None or self._embedder is None:
            return self._context(row.text)
        return self._embedder.embed(row.episode.objective)

    def _context(self, text: str) -> Vector | None:
        """None where a text has no vector: the outcomes of its decisions still speak for the choice as such."""
        if not text or self._embedder is None:
            return None
        try:
            return self._embedder.embed(text)
        except Unembeddable:
            return None

    # In the projector thread.

    def _retrieve(self, ask: Retrieve) -> MemoryFinal:
        try:
            episodes, lessons = self._opened().retrieve(ask)
            return MemoryFinal(episodes=episodes, lessons=lessons)
        except Unembeddable as err:
            raise CallFailed(_refusal(UNEMBEDDABLE, f"ask.text: {err}")) from err
        except PROJECTION_TROUBLE as err:
            raise CallFailed(self._unbuilt(str(err))) from err

    def _verify(self) -> MemoryFinal:
        try:
            return MemoryFinal(differences=self._opened().verify())
        except PROJECTION_TROUBLE as err:
            raise CallFailed(self._unbuilt(str(err))) from err

    def _values(self, ask: Values) -> MemoryFinal:
        return MemoryFinal(values=self._opened().reader.values_of(ask.subject))

    def _export(self, ask: Export) -> MemoryFinal:
        rows: list[Row] = []
        size = 0
        for row in self._opened().reader.rows(ask.after, ask.limit):
            size += len(pack_body(row))
            if rows and size > _EXPORT_BYTES:
                break
            rows.append(row)
        return MemoryFinal(rows=rows)

    def _unbuilt(self, why: str) -> Failure:
        return _trouble(f"the projections in {self._folder} cannot be built: {why}")

    def _explain(self, ask: Explain) -> MemoryFinal:
        answer = MemoryFinal(explained=self._opened().reader.explain(ask.decision_ids))
        size = len(pack_body(answer))
        if size > MAX_BODY_BYTES:
            raise CallFailed(
                _refusal("memory.answer_too_large", f"ask.decision_ids: the answer has {size} bytes; ask for fewer ids")
            )
        return answer

    def _stats(self) -> MemoryFinal:
        projector = self._opened()
        try:
            return MemoryFinal(stats=projector.stats(), width=projector.reader.width_report())
        except PROJECTION_TROUBLE as err:
            raise CallFailed(self._unbuilt(str(err))) from err

    # Opening and closing.

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._take_folder()
            self._embedder = await loop.run_in_executor(self._writer, Embedder)
            opened = await loop.run_in_executor(self._writer, self._open_log, loop)
            await loop.run_in_executor(self._counsel, self._open_advisor, loop)
            manifest, checked, doubt = await self._judge_graph()
            await loop.run_in_executor(self._follower, self._open_projector, loop, manifest, checked, doubt)
        except Exception as err:
            if isinstance(err, LogDamaged) and self._log is not None:
                self._log.distrust()
            self._service.log.write(MEMORY_UNUSABLE, reason=f"{type(err).__name__}: {err}")
            raise
        self._service.log.write(MEMORY_OPENED, **opened)
        if opened["stale_vectors"]:
            self._reembedding = asyncio.create_task(self._reembed())

    async def _take_folder(self) -> None:
        """Two memories on one folder would each miss what the other wrote. The lock ends with the process, even -9."""
        self._lock = os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = asyncio.get_running_loop().time() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                if asyncio.get_running_loop().time() > deadline:
                    raise FolderTaken(f"{self._folder} is held by another memory service: stop it first") from err
                await asyncio.sleep(0.1)
            else:
                return

    def _teller(self, loop: asyncio.AbstractEventLoop) -> Tell:
        """For other threads than the loop's."""

        def tell(event: LogEvent, **fields: object) -> None:
            loop.call_soon_threadsafe(partial(self._service.log.write, event, **fields))

        return tell

    def _open_log(self, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
        if self._embedder is None:
            raise RuntimeError("the embedder is not loaded")
        self._log = open_log(self._folder, self._embedder, self._teller(loop))
        stale = self._log.adopt_embedder(self._embedder.name, self._embedder.embed)
        clear(self._folder)
        return {
            "log_id": self._log.log_id,
            "log_seq": self._log.seq,
            "embedder": self._embedder.name,
            "stale_vectors": stale,
        }

    async def _judge_graph(self) -> tuple[Found | None, Checked | None, str | None]:
        """May the graph be opened in this process? What vouches for it, or why it must be rebuilt."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._follower, vouched, self._folder), None, None
        except FileNotFoundError:
            if not graph_files(self._folder):
                return None, None, "there is no graph"
        except ProjectionDoubt as err:
            return None, None, str(err)
        try:
            return None, await check_in_child(self._folder), None
        except ProjectionDoubt as err:
            return None, None, str(err)

    def _open_advisor(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._embedder is None:
            raise RuntimeError("the embedder is not loaded")
        self._advisor = Advisor(self._folder, self._embedder)
        fields = {"verdict": self._advisor.verdict.value, "reason": self._advisor.reason}
        seq = self._advisor.applied_seq
        loop.call_soon_threadsafe(partial(self._service.log.write, ROUTING_OPENED, log_seq=seq, **fields))

    def _open_projector(
        self,
        loop: asyncio.AbstractEventLoop,
        manifest: Found | None,
        checked: Checked | None,
        doubt: str | None,
    ) -> None:
        if self._embedder is None:
            raise RuntimeError("the embedder is not loaded")
        self._projector = Projector(self._folder, self._embedder, self._teller(loop))
        self._projector.start(manifest, checked, doubt)

    def _counsellor(self) -> Advisor:
        if self._advisor is None:
            raise RuntimeError("the memory is not open yet")
        return self._advisor

    def _opened_log(self) -> MemoryLog:
        if self._log is None:
            raise RuntimeError("the log is not open yet")
        return self._log

    def _opened(self) -> Projector:
        if self._projector is None:
            raise RuntimeError("the memory is not open yet")
        return self._projector

    async def _close(self) -> None:
        """After the last call: let both threads finish, leave projections that the next start can trust."""
        loop = asyncio.get_running_loop()
        if self._reembedding is not None:
            self._reembedding.cancel()
        if self._committing is not None:
            await self._committing
        self._hurry.set()
        if self._advancing is not None:
            await self._advancing
        await loop.run_in_executor(self._counsel, self._close_advisor)
        await loop.run_in_executor(self._follower, self._close_projector)
        await loop.run_in_executor(self._writer, self._close_log)
        self._follower.shutdown()
        self._counsel.shutdown()
        self._writer.shutdown()
        self._builder.shutdown()
        if self._lock is not None:
            os.close(self._lock)

    def _close_advisor(self) -> None:
        if self._advisor is not None:
            self._advisor.close()

    def _close_projector(self) -> None:
        if self._projector is not None:
            self._projector.close()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()

    def _metrics(self) -> dict[str, Any]:
        if self._log is None or self._projector is None:
            return {}
        return {
            "log_seq": self._log.seq,
            "vectors_seq": self._projector.vectors_seq,
            "graph_seq": self._projector.graph_seq,
            "routing_seq": self._advisor.applied_seq if self._advisor is not None else 0,
            "commit_groups": self._groups,
            "vectors_rebuilt": self._projector.rebuilt["vectors"],
            "graph_rebuilt": self._projector.rebuilt["graph"],
        }


def _trouble(what: str) -> Failure:
    return Failure(
        code="memory.projection",
        category=Category.RESOURCE,
        origin="memory",
        message=f"{what}; free disk space or memory there",
    )


def _damage(folder: Path, err: Exception) -> Failure:
    return Failure(
        code="memory.log_damaged",
        category=Category.RESOURCE,
        origin="memory",
        message=f"the log in {folder} is damaged and is being restored from its copy ({err}); ask again in a moment",
    )


def _refusal(code: str, message: str) -> Failure:
    return Failure(code=code, category=Category.POLICY, origin="memory", message=message)
