"""Upkeep of the log inside a transaction of its writer: removing rows, and learning the values anew.

Values are derived from outcomes in their order, so they can always be replayed; what was forgotten leaves no mark on
them. Opening, transactions and everyday writes are `log.py`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from protocol.messages.memory import Forget, Outcome, Value
from services.memory.log_rows import RowDamaged, fetched, find, parts, put, selected
from services.memory.machine import scored, unseen

_OLD_TASKS: Final = (
    "SELECT task_id FROM (SELECT task_id, json_extract(record, '$.at_ms') AS at_ms FROM episodes UNION ALL "
    "SELECT d.task_id, json_extract(o.record, '$.at_ms') FROM outcomes o JOIN decisions d USING (decision_id)) "
    "GROUP BY task_id HAVING max(at_ms) < ?"
)
_SCORED: Final = (
    f"SELECT {selected('decisions', 'd')}, {selected('outcomes', 'o')} FROM outcomes o "  # noqa: S608  literals
    "JOIN decisions d USING (decision_id) ORDER BY o.seq"
)
_STAGE: Final = "stage:"
_OF_TASKS: Final = "SELECT decision_id FROM decisions WHERE task_id IN (SELECT task_id FROM forgotten)"
_OF_CHOICE: Final = "SELECT decision_id FROM decisions WHERE choice = ?1 AND (?2 IS NULL OR subject = ?2)"


def delete(db: sqlite3.Connection, ask: Forget) -> int:
    """Delete decisions, outcomes and episodes that `ask` names; returns how many rows went."""
    db.execute("CREATE TEMP TABLE IF NOT EXISTS forgotten (task_id TEXT PRIMARY KEY)")
    db.execute("DELETE FROM forgotten")
    db.executemany("INSERT OR IGNORE INTO forgotten VALUES (?)", [(task_id,) for task_id in ask.task_ids])
    if ask.before_ms is not None:
        db.execute(f"INSERT OR IGNORE INTO forgotten {_OLD_TASKS}", (ask.before_ms,))
    removed = 0
    for wanted, parameters in ((_OF_TASKS, ()), (_OF_CHOICE, (ask.choice, ask.subject))):
        for table in ("outcomes", "decisions"):
            query = f"DELETE FROM {table} WHERE decision_id IN ({wanted})"  # noqa: S608  literals above
            removed += db.execute(query, parameters).rowcount
    removed += db.execute("DELETE FROM episodes WHERE task_id IN (SELECT task_id FROM forgotten)").rowcount
    db.execute("DELETE FROM contexts WHERE task_id NOT IN (SELECT task_id FROM decisions)")
    db.execute("DELETE FROM forgotten")
    return removed


def replayed_values(db: sqlite3.Connection) -> Iterator[Value]:
    """The values that all outcomes, in their order, amount to."""
    values: dict[tuple[str, str, str], Value] = {}
    for row in fetched(db, _SCORED):
        decision, told = parts(row, "decisions", "outcomes")
        if decision is None or told is None:
            raise RowDamaged("an outcome without its decision")
        name = decision[3:6]
        outcome = Outcome.model_validate_json(told[-1])
        values[name] = scored(values.get(name) or unseen(*name), outcome.reward, outcome.seconds)
    yield from values.values()


def stored_values(db: sqlite3.Connection) -> Iterator[Value]:
    """The values as they stand."""
    yield from map(_as_value, find(db, "choice_values"))


def stored_value(db: sqlite3.Connection, subject: str, task_type: str, choice: str) -> Value | None:
    """The value of one choice; None where it was never scored."""
    rows = find(db, "choice_values", "WHERE subject = ? AND task_type = ? AND choice = ?", subject, task_type, choice)
    return next(map(_as_value, rows), None)


def wrong_values(db: sqlite3.Connection) -> list[tuple[Value | None, Value | None]]:
    """Pairs (stored, replayed) that differ; None where one side lacks the choice."""
    stored = {_key(value): value for value in stored_values(db)}
    right = {_key(value): value for value in replayed_values(db)}
    names = sorted(stored.keys() | right.keys())
    return [(stored.get(name), right.get(name)) for name in names if stored.get(name) != right.get(name)]


def replay_values(db: sqlite3.Connection) -> int:
    """Make every value what the outcomes amount to; returns how many were something else."""
    wrong = wrong_values(db)
    for stored, right in wrong:
        if right is not None:
            put_value(db, right)
        elif stored is not None:
            db.execute(
                "DELETE FROM choice_values WHERE subject = ? AND task_type = ? AND choice = ?",
                (stored.subject, stored.task_type, stored.choice),
            )
    return len(wrong)


def stage_key(decision: Sequence[Any]) -> str:
    """Key in `meta` under which it stands how many decompositions of one kind, type and cluster, were credited."""
    return f"{_STAGE}{decision[4]}:{json.loads(decision[-1]).get('cluster', '')}"


def stored_stages(db: sqlite3.Connection) -> dict[str, int]:
    """`<type of task>:<cluster>` -> decompositions that were credited, those that were forgotten since included."""
    return {key.removeprefix(_STAGE): int(value) for key, value in find(db, "meta") if key.startswith(_STAGE)}


def restore_stages(db: sqlite3.Connection, known: Mapping[str, Any]) -> None:
    """Put the stages into a log that is made anew: the ones that are known, and at least what its outcomes say."""
    stages = {key: int(value) for key, value in known.items() if key.startswith(_STAGE)}
    for row in fetched(db, _SCORED):
        decision, told = parts(row, "decisions", "outcomes")
        staged = json.loads(told[-1]).get("staged") if told is not None else None
        if decision is not None and staged is not None:
            key = stage_key(decision)
            stages[key] = max(stages.get(key, 0), int(staged["stage"]) + 1)
    for key, stage in stages.items():
        put(db, "meta", key, stage, verb="INSERT OR REPLACE")


def put_value(db: sqlite3.Connection, value: Value) -> None:
    """Store the value of one choice."""
    fields = (value.subject, value.task_type, value.choice, float(value.q), value.count, float(value.mean_seconds))
    put(db, "choice_values", *fields, verb="INSERT OR REPLACE")


def _as_value(row: tuple[Any, ...]) -> Value:
    subject, task_type, choice, q, count, mean_seconds = row
    return Value(subject=subject, task_type=task_type, choice=choice, q=q, count=count, mean_seconds=mean_seconds)


def _key(value: Value) -> tuple[str, str, str]:
    return value.subject, value.task_type, value.choice
