"""Reading the log: what projections still have to apply, and the rows that answers are made of.

A connection of its own, so that reading never waits for the writer (WAL). Nothing here changes the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.messages.memory import DecisionRecord, Episode, Explained, Outcome, Row, Spread, Value, WidthReport
from services.memory.embedding import Vector, from_bytes
from services.memory.log import LOG_FILE, read_meta
from services.memory.log_copy import damaged_lines
from services.memory.log_rows import RowDamaged, damaged_rows, fetched, find, opened, parts, selected
from services.memory.log_upkeep import stored_stages, stored_value, stored_values, wrong_values
from services.memory.routing import Observation
from services.memory.staged import STAGING
from services.memory.width_report import HISTORY, Decided, report

_ROWS_AT_ONCE: Final = 5_000


@dataclass(frozen=True, slots=True)
class DecisionAdded:
    """Row of a decision, as far as the graph needs it."""

    seq: int
    decision_id: str
    task_id: str
    subject: str
    task_type: str
    choice: str


@dataclass(frozen=True, slots=True)
class ChoiceFailed:
    """An outcome with a failure code, joined with the choice it speaks about."""

    seq: int
    decision_id: str
    subject: str
    task_type: str
    choice: str
    code: str


@dataclass(frozen=True, slots=True)
class Cured:
    """One cure that came with an outcome."""

    seq: int
    task_id: str
    task_type: str
    code: str
    finding: str
    action: str
    role: str


@dataclass(frozen=True, slots=True)
class EpisodeAdded:
    """Row of an episode with the vector of its objective."""

    seq: int
    task_id: str
    task_type: str
    vector: Vector | None
    """None while the stored one is that of an earlier embedder."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An outcome: the value of a choice has changed, and with it those of the episodes that it was made in."""

    seq: int
    task_id: str


Change = DecisionAdded | ChoiceFailed | Cured | EpisodeAdded | Scored

Choice = tuple[str, str, str]
"""Subject, task type, choice."""


@dataclass(frozen=True, slots=True)
class Past:
    """A finished task as the log tells it, without the value of what was done in it."""

    episode: Episode
    choices: tuple[Choice, ...]
    """All that were made in it, each once."""
    scored: tuple[Choice, ...]
    """Those of them that have an outcome."""


_OUTCOMES: Final = (
    f"SELECT {selected('outcomes', 'o')}, {selected('decisions', 'd')} FROM outcomes o "  # noqa: S608  literals
    "LEFT JOIN decisions d USING (decision_id) WHERE o.seq > ? AND o.seq <= ? ORDER BY o.seq"
)
_OBSERVED: Final = (
    f"SELECT {selected('outcomes', 'o')}, {selected('decisions', 'd')}, {selected('contexts', 'c')} "  # noqa: S608
    "FROM outcomes o LEFT JOIN decisions d USING (decision_id) LEFT JOIN contexts c ON c.task_id = d.task_id "
    "WHERE o.seq > ? AND o.seq <= ? ORDER BY o.seq"
)
_TAKEN: Final = (
    f"SELECT {selected('decisions', 'd')}, o.seq FROM decisions d "  # noqa: S608  literals
    "LEFT JOIN outcomes o USING (decision_id) WHERE d.task_id = ? ORDER BY d.seq"
)
_OF_CHOICE: Final = "WHERE subject = ? AND task_type = ? AND choice = ?"
_DECOMPOSITIONS: Final = (
    f"SELECT {selected('outcomes', 'o')}, {selected('decisions', 'd')} FROM outcomes o "  # noqa: S608  literals
    "JOIN decisions d USING (decision_id) WHERE d.subject = 'decomposition' "
    "AND json_extract(o.record, '$.staged') IS NOT NULL AND o.seq > ? ORDER BY o.seq DESC LIMIT ?"
)
_DECOMPOSITIONS_WITHIN: Final = 200_000
"""Rows of the log in which decompositions are looked for, so that a report does not take longer with every year."""


class LogReader:
    """A read-only view of the log; belongs to one thread. Numbers and rows are those of the last commit.

    Whatever reads a row raises RowDamaged where it is not what was written: it must not be answered from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._db = sqlite3.connect(
            f"{(folder / LOG_FILE).as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10
        )

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @property
    def log_id(self) -> str:
        """Identity of the log."""
        return str(self._meta("log_id"))

    @property
    def seq(self) -> int:
        """Number of the last committed row."""
        return int(self._meta("seq"))

    def position(self) -> tuple[str, int]:
        """Identity of the log and number of the last committed row, read together."""
        found = dict(find(self._db, "meta", "WHERE key IN ('log_id', 'seq')"))
        if len(found) < 2:
            raise RowDamaged("meta lacks the log's identity or its last row")
        return str(found["log_id"]), int(found["seq"])

    @property
    def stale(self) -> tuple[int, int]:
        """Episodes after the first and up to the second row have vectors of an earlier embedder; equal = none."""
        return int(self._meta("stale_after")), int(self._meta("stale_until"))

    def stale_episodes(self) -> int:
        """How many episodes have no vector of the embedder in use yet."""
        query = "SELECT count(*) FROM episodes WHERE seq > ? AND seq <= ?"
        return int(self._db.execute(query, self.stale).fetchone()[0])

    def changes(self, after: int, upto: int, stale: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, list[Change]]]:
        """What follows row `after` up to and including row `upto`: pairs of (last seq covered, changes in order).

        Episodes among the `stale` rows, see the property, come without a vector.
        """
        while after < upto:
            last = min(upto, after + _ROWS_AT_ONCE)
            window = "WHERE seq > ? AND seq <= ?"
            found: list[Change] = []
            for ident, seq, task_id, *named, _ in find(self._db, "decisions", window, after, last):
                found.append(DecisionAdded(seq, ident, task_id, *named))
            for outcome, decision in self._outcomes(after, last):
                found += _told_by(outcome, decision)
            for task_id, seq, task_type, _, vector in find(self._db, "episodes", window, after, last):
                old = stale[0] < seq <= stale[1]
                found.append(EpisodeAdded(seq, task_id, task_type, None if old else from_bytes(vector)))
            yield last, sorted(found, key=lambda change: change.seq)
            after = last

    def observations(self, after: int, upto: int) -> Iterator[tuple[int, list[Observation]]]:
        """Scored decisions whose outcome follows row `after`, up to and including row `upto`; pairs as in `changes`."""
        vectors: dict[str, Vector] = {}
        while after < upto:
            last = min(upto, after + _ROWS_AT_ONCE)
            yield last, [_observation(row, vectors) for row in fetched(self._db, _OBSERVED, after, last)]
            after = last

    def lineage(self, upto: int) -> Iterator[tuple[str | int, ...]]:
        """The rows that the graph stands for at `upto`, in the shape of `graph.lineage`; any order."""
        for ident, _, task_id, *named, _ in find(self._db, "decisions", "WHERE seq <= ?", upto):
            yield ("decision", ident, task_id, *named)
        failed: Counter[tuple[str, ...]] = Counter()
        helped: Counter[tuple[str, str, str, str]] = Counter()
        for outcome, decision in self._outcomes(0, upto):
            for told in _told_by(outcome, decision):
                if isinstance(told, ChoiceFailed):
                    failed[told.subject, told.task_type, told.choice, told.code] += 1
                elif isinstance(told, Cured):
                    helped[told.task_type, told.code, told.action, told.role] += 1
                    yield ("cured", told.task_id, told.code, told.action, told.role, told.finding)
        for choice_and_code, times in failed.items():
            yield ("failed", *choice_and_code, times)
        for kind, times in helped.items():
            yield ("helped", *kind, times)
        for subject, task_type, choice in self._db.execute(
            "SELECT DISTINCT subject, task_type, choice FROM decisions "
            "WHERE subject IN ('role', 'persona') AND seq <= ?",
            (upto,),
        ):
            yield ("names", subject, task_type, choice, choice)
        for task_id, _, task_type, *_ in find(self._db, "episodes", "WHERE seq <= ?", upto):
            yield ("cluster", task_id, task_type)
        for (task_id,) in self._db.execute(
            "SELECT task_id FROM episodes WHERE seq <= ?1 UNION SELECT task_id FROM decisions WHERE seq <= ?1", (upto,)
        ):
            yield ("episode", task_id)

    def episode_seqs(self, upto: int) -> npt.NDArray[np.int64]:
        """Row numbers of all episodes up to `upto`, rising: the ids that the vector index must hold."""
        rows = self._db.execute("SELECT seq FROM episodes WHERE seq <= ? ORDER BY seq", (upto,)).fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def kinds(self, upto: int) -> Iterator[tuple[int, str]]:
        """Row number and task type of every episode up to `upto`, in order."""
        yield from self._db.execute("SELECT seq, task_type FROM episodes WHERE seq <= ? ORDER BY seq", (upto,))

    def past(self, seq: int) -> Past | None:
        """The episode at this row with what was chosen in it; None where it was forgotten."""
        row = next(find(self._db, "episodes", "WHERE seq = ?", seq), None)
        if row is None:
            return None
        taken: dict[Choice, bool] = {}
        for *decision, scored in fetched(self._db, _TAKEN, row[0]):
            name: Any = opened("decisions", decision)[3:6]
            taken[name] = taken.get(name, False) or scored is not None
        done = tuple(name for name, scored in taken.items() if scored)
        return Past(Episode.model_validate_json(row[3]), tuple(taken), done)

    def q_of(self, choice: Choice) -> float:
        """Value of a choice that was scored. Raises RowDamaged where there is none."""
        value = next(find(self._db, "choice_values", _OF_CHOICE, *choice), None)
        if value is None:
            raise RowDamaged(f"{choice[2]!r} was scored and has no value")
        return float(value[3])

    def value(self, subject: str, task_type: str, choice: str) -> Value | None:
        """What this choice is worth; None where it was never scored."""
        return stored_value(self._db, subject, task_type, choice)

    def values_of(self, subject: str) -> list[Value]:
        """All values of a subject, best first."""
        found = [value for value in stored_values(self._db) if value.subject == subject]
        return sorted(found, key=lambda value: (value.task_type, -value.q, value.choice))

    def width_report(self) -> WidthReport:
        """How the last decisions whether to split came out; see `width_report.py`."""
        found = fetched(self._db, _DECOMPOSITIONS, self.seq - _DECOMPOSITIONS_WITHIN, HISTORY)
        decided = [_decided(*parts(row, "outcomes", "decisions")) for row in found][::-1]
        stages = stored_stages(self._db)
        now = stages.get(f"{decided[-1].task_type}:{decided[-1].cluster}", 0) if decided else 0
        return report(decided, max(stages.values(), default=0), STAGING.weight(now))

    def rows(self, after: int, limit: int) -> list[Row]:
        """Up to `limit` rows after row `after`, in order, as they are exported."""
        found: list[tuple[int, dict[str, object]]] = []
        window = "WHERE seq > ? ORDER BY seq LIMIT ?"
        for _, seq, task_id, *_, record in find(self._db, "decisions", window, after, limit):
            context = next(find(self._db, "contexts", "WHERE task_id = ?", task_id), None)
            found.append((seq, {"decision": json.loads(record), "text": "" if context is None else context[1]}))
        for _, seq, _, record in find(self._db, "outcomes", window, after, limit):
            found.append((seq, {"outcome": json.loads(record)}))
        for _, seq, _, record, _ in find(self._db, "episodes", window, after, limit):
            found.append((seq, {"episode": json.loads(record)}))
        found.sort(key=lambda row: row[0])
        return [Row.model_validate({"seq": seq, **content}) for seq, content in found[:limit]]

    def vectors(self, after: int, upto: int) -> Iterator[EpisodeAdded]:
        """Episodes after row `after` up to row `upto` with their vectors, in order."""
        window = "WHERE seq > ? AND seq <= ? ORDER BY seq"
        for task_id, seq, task_type, _, vector in find(self._db, "episodes", window, after, upto):
            yield EpisodeAdded(seq, task_id, task_type, from_bytes(vector))

    def damage(self) -> list[str]:
        """What is wrong with the file, with its rows and with its copy; empty where all are sound."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check").fetchall()]
        found = [text for text in found if text != "ok"] + list(damaged_rows(self._db))
        lines = damaged_lines(self._folder)
        return found + ([f"{lines} lines of its copy are not what was written"] if lines else [])

    def wrong_values(self) -> list[tuple[Value | None, Value | None]]:
        """Values that are not what the outcomes amount to: pairs (stored, replayed)."""
        return wrong_values(self._db)

    def explain(self, decision_ids: Sequence[str]) -> list[Explained]:
        """Decisions in the order asked for, unknown ids left out, each with its outcome and the values to compare."""
        return [explained for ident in decision_ids if (explained := self._explain(ident)) is not None]

    def counts(self) -> dict[str, int]:
        """Rows per table, and the duplicates that had no effect."""
        tables = {"decisions": "decisions", "outcomes": "outcomes", "episodes": "episodes", "values": "choice_values"}
        counts = {
            name: int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  literals above
            for name, table in tables.items()
        }
        return counts | {"duplicates": int(self._meta("duplicates")), "log_seq": self.seq}

    def _explain(self, decision_id: str) -> Explained | None:
        row = next(find(self._db, "decisions", "WHERE decision_id = ?", decision_id), None)
        if row is None:
            return None
        decision = DecisionRecord.model_validate_json(row[-1])
        told = next(find(self._db, "outcomes", "WHERE decision_id = ?", decision_id), None)
        outcome = None if told is None else Outcome.model_validate_json(told[-1])
        values = self._values(decision, dict.fromkeys([decision.choice, *decision.alternatives]))
        return Explained(decision=decision, outcome=outcome, values=values)

    def _values(self, decision: DecisionRecord, choices: Collection[str]) -> list[Value]:
        found = (self.value(decision.subject, decision.task_type, choice) for choice in choices)
        return [value for value in found if value is not None]

    def _outcomes(self, after: int, upto: int) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Rows of outcomes with those of their decisions, in order."""
        for row in fetched(self._db, _OUTCOMES, after, upto):
            outcome, decision = parts(row, "outcomes", "decisions")
            if outcome is None or decision is None:
                raise RowDamaged("an outcome has no decision")
            yield outcome, decision

    def _meta(self, key: str) -> str | int:
        return read_meta(self._db, key)


def _decided(told: tuple[Any, ...] | None, taken: tuple[Any, ...] | None) -> Decided:
    if told is None or taken is None:
        raise RowDamaged("an outcome has no decision")
    decision, outcome = json.loads(taken[-1]), json.loads(told[-1])
    features = decision.get("features", {})
    return Decided(
        task_type=decision["task_type"],
        cluster=decision.get("cluster", ""),
        reward=outcome["reward"],
        shaped=outcome["staged"]["shaped"],
        seconds=outcome["seconds"],
        spread=Spread.model_validate(outcome["spread"]),
        rules_width=features.get("rules_width", 1.0),
        widest=features.get("widest", 1.0),
    )


def _told_by(outcome: tuple[Any, ...], decision: tuple[Any, ...]) -> Iterator[Scored | ChoiceFailed | Cured]:
    """What follows from one outcome."""
    ident, seq, code, record = outcome
    task_id, subject, task_type, choice = decision[2:6]
    yield Scored(seq, task_id)
    if code is not None:
        yield ChoiceFailed(seq, ident, subject, task_type, choice, code)
    if '"cures":[]' not in record:  # most have none, and parsing is most of the work here
        for cure in json.loads(record).get("cures", []):
            names = (cure[name] for name in ("failure_code", "finding", "action", "role"))
            yield Cured(seq, task_id, task_type, *names)


class _StagedTold(msgspec.Struct):
    finish: float
    stage: int


class _OutcomeTold(msgspec.Struct):
    """What routing learns from an outcome's record; the rest of it is skipped, which is most of the work of reading."""

    reward: float
    seconds: float
    staged: _StagedTold | None = None


class _DecisionTold(msgspec.Struct):
    """The same of a decision's; an old one lacks these fields."""

    cluster: str = ""
    model: str = ""
    prompt: str = ""


_READ_OUTCOME: Final = msgspec.json.Decoder(_OutcomeTold)
_READ_DECISION: Final = msgspec.json.Decoder(_DecisionTold)


def _observation(row: Sequence[Any], vectors: dict[str, Vector]) -> Observation:
    """`vectors` holds those of the tasks before, since outcomes of a task come together."""
    told, taken, context = parts(row, "outcomes", "decisions", "contexts")
    if told is None or taken is None:
        raise RowDamaged("an outcome has no decision")
    # Both were validated before they were stored.
    decision, outcome = _READ_DECISION.decode(taken[-1]), _READ_OUTCOME.decode(told[-1])
    subject, choice = taken[3], taken[5]
    staged = outcome.staged
    if context is not None and context[0] not in vectors:
        vectors.clear()
        vectors[context[0]] = from_bytes(context[2])
    return Observation(
        seq=told[1],
        decision_seq=taken[1],
        subject=subject,
        task_type=taken[4],
        # The width of a plan stands behind a `/`: what is learned of a shape holds for all its widths.
        choice=choice.partition("/")[0] if subject == "decomposition" else choice,
        cluster=decision.cluster,
        vector=None if context is None else vectors[context[0]],
        reward=outcome.reward,
        seconds=outcome.seconds,
        model=decision.model,
        prompt=decision.prompt,
        finish=None if staged is None else staged.finish,
        stage=0 if staged is None else staged.stage,
    )
