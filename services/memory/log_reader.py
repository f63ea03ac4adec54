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

import numpy as np
import numpy.typing as npt

from protocol.messages.memory import DecisionRecord, Episode, Explained, Outcome, Row, Spread, Value, WidthReport
from services.memory.embedding import Vector, from_bytes
from services.memory.log import LOG_FILE
from services.memory.log_upkeep import stored_values, wrong_values
from services.memory.machine import episode_value
from services.memory.routing import Observation
from services.memory.staged import STAGING
from services.memory.width_report import HISTORY, Decided, report

_ROWS_AT_ONCE: Final = 2_000


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


Change = DecisionAdded | ChoiceFailed | Cured | EpisodeAdded

_CURES: Final = (
    "SELECT o.seq, d.task_id, d.task_type, json_extract(c.value, '$.failure_code'), "
    "json_extract(c.value, '$.finding'), json_extract(c.value, '$.action'), json_extract(c.value, '$.role') "
    "FROM outcomes o JOIN decisions d USING (decision_id), json_each(o.record, '$.cures') c "
    "WHERE o.seq > ? AND o.seq <= ?"
)

_CHANGES: Final = (
    "SELECT seq, decision_id, task_id, subject, task_type, choice FROM decisions WHERE seq > ? AND seq <= ?",
    (
        "SELECT o.seq, o.decision_id, d.subject, d.task_type, d.choice, o.failure_code FROM outcomes o "
        "JOIN decisions d USING (decision_id) WHERE o.failure_code IS NOT NULL AND o.seq > ? AND o.seq <= ?"
    ),
    _CURES,
    "SELECT seq, task_id, task_type, vector FROM episodes WHERE seq > ? AND seq <= ?",
)


_OBSERVATIONS: Final = (
    "SELECT o.seq, d.seq, d.subject, d.task_type, d.choice, d.record, o.record, c.vector FROM outcomes o "
    "JOIN decisions d USING (decision_id) LEFT JOIN contexts c ON c.task_id = d.task_id "
    "WHERE o.seq > ? AND o.seq <= ? ORDER BY o.seq"
)


_DECOMPOSITIONS: Final = (
    "SELECT d.record, o.record FROM outcomes o JOIN decisions d USING (decision_id) "
    "WHERE d.subject = 'decomposition' AND json_extract(o.record, '$.staged') IS NOT NULL AND o.seq > ? "
    "ORDER BY o.seq DESC LIMIT ?"
)
_DECOMPOSITIONS_WITHIN: Final = 200_000
"""Rows of the log in which decompositions are looked for, so that a report does not take longer with every year."""

_EXPORTED: Final = (
    "SELECT * FROM (SELECT seq, 'decision', record, text FROM decisions LEFT JOIN contexts USING (task_id) "
    "WHERE seq > ?1 ORDER BY seq LIMIT ?2) "
    "UNION ALL SELECT * FROM (SELECT seq, 'outcome', record, NULL FROM outcomes WHERE seq > ?1 ORDER BY seq LIMIT ?2) "
    "UNION ALL SELECT * FROM (SELECT seq, 'episode', record, NULL FROM episodes WHERE seq > ?1 ORDER BY seq LIMIT ?2) "
    "ORDER BY 1 LIMIT ?2"
)


class LogReader:
    """A read-only view of the log; belongs to one thread. Numbers and rows are those of the last commit."""

    def __init__(self, folder: Path) -> None:
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
            decisions, failures, cures, episodes = (
                self._db.execute(query, (after, last)).fetchall() for query in _CHANGES
            )
            found: list[Change] = [DecisionAdded(*row) for row in decisions]
            found += [ChoiceFailed(*row) for row in failures]
            found += [Cured(*row) for row in cures]
            found += [
                EpisodeAdded(seq, task_id, task_type, None if stale[0] < seq <= stale[1] else from_bytes(vector))
                for seq, task_id, task_type, vector in episodes
            ]
            yield last, sorted(found, key=lambda change: change.seq)
            after = last

    def observations(self, after: int, upto: int) -> Iterator[tuple[int, list[Observation]]]:
        """Scored decisions whose outcome follows row `after`, up to and including row `upto`; pairs as in `changes`."""
        while after < upto:
            last = min(upto, after + _ROWS_AT_ONCE)
            yield last, [_observation(row) for row in self._db.execute(_OBSERVATIONS, (after, last))]
            after = last

    def lineage(self, upto: int) -> Iterator[tuple[str | int, ...]]:
        """The rows that the graph stands for at `upto`, in the shape of `graph.lineage`; any order."""
        for row in self._db.execute(
            "SELECT decision_id, task_id, subject, task_type, choice FROM decisions WHERE seq <= ?", (upto,)
        ):
            yield ("decision", *row)
        for row in self._db.execute(
            "SELECT d.subject, d.task_type, d.choice, o.failure_code, count(*) FROM outcomes o "
            "JOIN decisions d USING (decision_id) WHERE o.failure_code IS NOT NULL AND o.seq <= ? GROUP BY 1, 2, 3, 4",
            (upto,),
        ):
            yield ("failed", *row)
        helped: Counter[tuple[str, str, str, str]] = Counter()
        for _, task_id, task_type, code, finding, action, role in self._db.execute(_CURES, (0, upto)):
            helped[task_type, code, action, role] += 1
            yield ("cured", task_id, code, action, role, finding)
        for kind, times in helped.items():
            yield ("helped", *kind, times)
        for subject, task_type, choice in self._db.execute(
            "SELECT DISTINCT subject, task_type, choice FROM decisions "
            "WHERE subject IN ('role', 'persona') AND seq <= ?",
            (upto,),
        ):
            yield ("names", subject, task_type, choice, choice)
        for row in self._db.execute("SELECT task_id, task_type FROM episodes WHERE seq <= ?", (upto,)):
            yield ("cluster", *row)
        for (task_id,) in self._db.execute(
            "SELECT task_id FROM episodes WHERE seq <= ?1 UNION SELECT task_id FROM decisions WHERE seq <= ?1", (upto,)
        ):
            yield ("episode", task_id)

    def episode_seqs(self, upto: int) -> npt.NDArray[np.int64]:
        """Row numbers of all episodes up to `upto`, rising: the ids that the vector index must hold."""
        rows = self._db.execute("SELECT seq FROM episodes WHERE seq <= ? ORDER BY seq", (upto,)).fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def episode_seqs_of(self, task_type: str) -> npt.NDArray[np.int64]:
        """Row numbers of the episodes of one task type."""
        rows = self._db.execute("SELECT seq FROM episodes WHERE task_type = ? ORDER BY seq", (task_type,)).fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def episode(self, seq: int) -> Episode | None:
        """The episode at this row, with the value of what was done in it; None where it was forgotten."""
        row = self._db.execute("SELECT record FROM episodes WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            return None
        episode = Episode.model_validate_json(row[0])
        rows = self._db.execute(
            "SELECT DISTINCT v.subject, v.task_type, v.choice, v.q FROM decisions d "
            "JOIN outcomes USING (decision_id) JOIN choice_values v USING (subject, task_type, choice) "
            "WHERE d.task_id = ?",
            (episode.task_id,),
        ).fetchall()
        return episode.model_copy(update={"q": episode_value([row[3] for row in rows], episode.succeeded)})

    def value(self, subject: str, task_type: str, choice: str) -> Value | None:
        """What this choice is worth; None where it was never scored."""
        row = self._db.execute(
            "SELECT q, count, mean_seconds FROM choice_values WHERE subject = ? AND task_type = ? AND choice = ?",
            (subject, task_type, choice),
        ).fetchone()
        if row is None:
            return None
        return Value(subject=subject, task_type=task_type, choice=choice, q=row[0], count=row[1], mean_seconds=row[2])

    def values_of(self, subject: str) -> list[Value]:
        """All values of a subject, best first."""
        found = [value for value in stored_values(self._db) if value.subject == subject]
        return sorted(found, key=lambda value: (value.task_type, -value.q, value.choice))

    def width_report(self) -> WidthReport:
        """How the last decisions whether to split came out; see `width_report.py`."""
        rows = self._db.execute(_DECOMPOSITIONS, (self.seq - _DECOMPOSITIONS_WITHIN, HISTORY)).fetchall()
        decided = [_decided(json.loads(decision), json.loads(outcome)) for decision, outcome in reversed(rows)]
        stages = dict(self._db.execute("SELECT task_type, credited FROM stages").fetchall())
        now = stages.get(decided[-1].task_type, 0) if decided else 0
        return report(decided, max(stages.values(), default=0), STAGING.weight(now))

    def rows(self, after: int, limit: int) -> list[Row]:
        """Up to `limit` rows after row `after`, in order, as they are exported."""
        rows = self._db.execute(_EXPORTED, (after, limit)).fetchall()
        return [
            Row.model_validate({"seq": seq, kind: json.loads(record), "text": text or ""})
            for seq, kind, record, text in rows
        ]

    def vectors(self, after: int, upto: int) -> Iterator[EpisodeAdded]:
        """Episodes after row `after` up to row `upto` with their vectors, in order."""
        for seq, task_id, task_type, vector in self._db.execute(
            "SELECT seq, task_id, task_type, vector FROM episodes WHERE seq > ? AND seq <= ? ORDER BY seq",
            (after, upto),
        ):
            yield EpisodeAdded(seq, task_id, task_type, from_bytes(vector))

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file; empty where it is sound."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA quick_check").fetchall()]
        return [] if found == ["ok"] else found

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
        row = self._db.execute(
            "SELECT d.record, o.record FROM decisions d LEFT JOIN outcomes o USING (decision_id) WHERE decision_id = ?",
            (decision_id,),
        ).fetchone()
        if row is None:
            return None
        decision = DecisionRecord.model_validate_json(row[0])
        outcome = None if row[1] is None else Outcome.model_validate_json(row[1])
        values = self._values(decision, dict.fromkeys([decision.choice, *decision.alternatives]))
        return Explained(decision=decision, outcome=outcome, values=values)

    def _values(self, decision: DecisionRecord, choices: Collection[str]) -> list[Value]:
        found = (self.value(decision.subject, decision.task_type, choice) for choice in choices)
        return [value for value in found if value is not None]

    def _meta(self, key: str) -> str | int:
        value: str | int = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
        return value


def _decided(decision: dict[str, Any], outcome: dict[str, Any]) -> Decided:
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


def _observation(row: tuple[int, int, str, str, str, str, str, bytes | None]) -> Observation:
    seq, decision_seq, subject, task_type, choice, decision_text, outcome_text, vector = row
    # Plain JSON: both were validated before they were stored, and an old row lacks the newer fields.
    decision, outcome = json.loads(decision_text), json.loads(outcome_text)
    staged = outcome.get("staged")
    return Observation(
        seq=seq,
        decision_seq=decision_seq,
        subject=subject,
        task_type=task_type,
        # The width of a plan stands behind a `/`: what is learned of a shape holds for all its widths.
        choice=choice.partition("/")[0] if subject == "decomposition" else choice,
        cluster=decision.get("cluster", ""),
        vector=None if vector is None else from_bytes(vector),
        reward=outcome["reward"],
        seconds=outcome["seconds"],
        model=decision.get("model", ""),
        prompt=decision.get("prompt", ""),
        finish=None if staged is None else staged["finish"],
        stage=0 if staged is None else staged["stage"],
    )
