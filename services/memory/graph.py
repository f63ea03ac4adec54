"""What was chosen in which episode, and what failed: a property graph (Kuzu), a projection of the log.

    (Episode)-[TOOK]->(Decision)-[OF_CHOICE]->(Choice)-[FAILED_WITH {times}]->(FailureMode)
    (Episode)-[IN_CLUSTER]->(TaskCluster)<-[HELPED_IN {times}]-(Mitigation)-[CURES]->(FailureMode)
    (Episode)-[CURED_BY {finding}]->(Mitigation)-[DONE_BY]->(Role)<-[NAMES_ROLE]-(Choice)-[NAMES_PERSONA]->(Persona)

Retrieval asks it which failures a choice is known for, and what cured the failures of similar episodes (`lineage.py`).
Failures are counted at the choice and cures at the cluster (today the type of task), so that a question costs what its
episodes are large, not what the history is long. How far it follows the log is kept inside it, in the transaction that
applies the rows. Kuzu may open a damaged file with silently wrong data or crash, so
whether a file may be opened is decided outside (`graph_keeper.py`, `graph_check.py`); two open databases in one process
lose rows, so there is one, in one thread.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import kuzu

from services.memory.log_reader import Change, ChoiceFailed, Cured, DecisionAdded, EpisodeAdded
from services.memory.machine import Found
from services.memory.manifest import Manifest, ProjectionDoubt, sha256_of, sync_folder

GRAPH_FILE: Final = "graph.kuzu"
_MANIFEST: Final = "graph.manifest.json"
_GIB: Final = 1 << 30
_MAX_DB_BYTES: Final = 16 * _GIB  # the default reserves 8 TiB of addresses, which fails under a memory limit
_BUFFER_BYTES: Final = 64 * 1024 * 1024
_ROWS_PER_CONNECTION: Final = 4_000
"""Kuzu keeps what it was given with every statement as long as its connection: a fresh one gives the memory back.
With one connection a minute of full load left 60 MB behind."""

Cure = tuple[str, str, str]
"""Failure code, what followed it (`retry` or `escalate`), and the role that then did it."""

_SCHEMA: Final = (
    "CREATE NODE TABLE Episode(task_id STRING PRIMARY KEY)",
    "CREATE NODE TABLE Decision(decision_id STRING PRIMARY KEY)",
    "CREATE NODE TABLE Choice(id STRING PRIMARY KEY, subject STRING, task_type STRING, name STRING)",
    "CREATE NODE TABLE FailureMode(code STRING PRIMARY KEY)",
    "CREATE NODE TABLE Role(name STRING PRIMARY KEY)",
    "CREATE NODE TABLE Persona(name STRING PRIMARY KEY)",
    "CREATE NODE TABLE TaskCluster(name STRING PRIMARY KEY)",
    "CREATE NODE TABLE Mitigation(id STRING PRIMARY KEY, action STRING)",
    "CREATE NODE TABLE Applied(id INT64 PRIMARY KEY, log_id STRING, seq INT64)",
    "CREATE REL TABLE TOOK(FROM Episode TO Decision)",
    "CREATE REL TABLE OF_CHOICE(FROM Decision TO Choice)",
    "CREATE REL TABLE FAILED_WITH(FROM Choice TO FailureMode, times INT64)",
    "CREATE REL TABLE NAMES_ROLE(FROM Choice TO Role)",
    "CREATE REL TABLE NAMES_PERSONA(FROM Choice TO Persona)",
    "CREATE REL TABLE IN_CLUSTER(FROM Episode TO TaskCluster)",
    "CREATE REL TABLE CURED_BY(FROM Episode TO Mitigation, finding STRING)",
    "CREATE REL TABLE CURES(FROM Mitigation TO FailureMode)",
    "CREATE REL TABLE DONE_BY(FROM Mitigation TO Role)",
    "CREATE REL TABLE HELPED_IN(FROM Mitigation TO TaskCluster, times INT64)",
)
# One row a statement with its key as parameter: only so does Kuzu use the primary key index. UNWIND over rows scans
# the tables, which made applying 2,000 decisions eight times slower once 50,000 were there.
_ADD_EPISODE: Final = "MERGE (e:Episode {task_id: $task_id}) RETURN e.task_id"
_ADD_CHOICE: Final = (
    "MERGE (c:Choice {id: $choice_id}) "
    "ON CREATE SET c.subject = $subject, c.task_type = $task_type, c.name = $name RETURN c.id"
)
_ADD_DECISION: Final = (
    "MATCH (e:Episode {task_id: $task_id}), (c:Choice {id: $choice_id}) "
    "CREATE (e)-[:TOOK]->(d:Decision {decision_id: $decision_id})-[:OF_CHOICE]->(c) RETURN d.decision_id"
)
_ADD_FAILURE_MODE: Final = "MERGE (m:FailureMode {code: $code}) RETURN m.code"
# Two statements, not one MERGE: that has found one relation twice after a few thousand rows and counted it twice.
_COUNT: Final = {
    "failed": (
        (
            "MATCH (c:Choice {id: $choice_id})-[f:FAILED_WITH]->(m:FailureMode {code: $code}) "
            "SET f.times = f.times + $times RETURN f.times"
        ),
        (
            "MATCH (c:Choice {id: $choice_id}), (m:FailureMode {code: $code}) "
            "CREATE (c)-[f:FAILED_WITH {times: $times}]->(m) RETURN f.times"
        ),
    ),
    "helped": (
        (
            "MATCH (m:Mitigation {id: $id})-[h:HELPED_IN]->(k:TaskCluster {name: $cluster}) "
            "SET h.times = h.times + $times RETURN h.times"
        ),
        (
            "MATCH (m:Mitigation {id: $id}), (k:TaskCluster {name: $cluster}) "
            "CREATE (m)-[h:HELPED_IN {times: $times}]->(k) RETURN h.times"
        ),
    ),
}
_NAME_CHOICE: Final = {
    "role": (
        "MATCH (c:Choice {id: $choice_id})-[:NAMES_ROLE]->(n:Role) RETURN n.name",
        "MERGE (n:Role {name: $name}) RETURN n.name",
        "MATCH (c:Choice {id: $choice_id}), (n:Role {name: $name}) CREATE (c)-[:NAMES_ROLE]->(n) RETURN n.name",
    ),
    "persona": (
        "MATCH (c:Choice {id: $choice_id})-[:NAMES_PERSONA]->(n:Persona) RETURN n.name",
        "MERGE (n:Persona {name: $name}) RETURN n.name",
        "MATCH (c:Choice {id: $choice_id}), (n:Persona {name: $name}) CREATE (c)-[:NAMES_PERSONA]->(n) RETURN n.name",
    ),
}
_ADD_CLUSTER: Final = "MERGE (k:TaskCluster {name: $name}) RETURN k.name"
_JOIN_CLUSTER: Final = (
    "MATCH (e:Episode {task_id: $task_id}), (k:TaskCluster {name: $name}) CREATE (e)-[:IN_CLUSTER]->(k) RETURN k.name"
)
_KNOWN_MITIGATION: Final = "MATCH (m:Mitigation {id: $id}) RETURN m.id"
_ADD_MITIGATION: Final = (
    "CREATE (m:Mitigation {id: $id, action: $action}) RETURN m.id",
    "MERGE (r:Role {name: $role}) RETURN r.name",
    "MERGE (f:FailureMode {code: $code}) RETURN f.code",
    "MATCH (m:Mitigation {id: $id}), (f:FailureMode {code: $code}) CREATE (m)-[:CURES]->(f) RETURN m.id",
    "MATCH (m:Mitigation {id: $id}), (r:Role {name: $role}) CREATE (m)-[:DONE_BY]->(r) RETURN m.id",
)
_ADD_CURE: Final = (
    "MERGE (k:TaskCluster {name: $cluster}) RETURN k.name",
    (
        "MATCH (e:Episode {task_id: $task_id}), (m:Mitigation {id: $id}) "
        "CREATE (e)-[:CURED_BY {finding: $finding}]->(m) RETURN m.id"
    ),
)
_CURED: Final = "MATCH (e:Episode)-[:CURED_BY]->(:Mitigation) RETURN DISTINCT e.task_id"
# A statement per key, since only so Kuzu takes its index: with a list of keys it goes through all episodes.
_CURES_OF: Final = "MATCH (e:Episode {task_id: $task_id})-[c:CURED_BY]->(m:Mitigation) RETURN m.id, c.finding"
_HELP_OF: Final = "MATCH (m:Mitigation {id: $id})-[h:HELPED_IN]->(k:TaskCluster) RETURN k.name, h.times"
# A fixed 40 ms, then 0.1 ms a row against 0.5 ms: for rebuilding and for the plans of large tasks.
_COPY_DECISIONS: Final = (
    "COPY Decision FROM (UNWIND $rows AS r RETURN r.decision_id)",
    "COPY TOOK FROM (UNWIND $rows AS r RETURN r.task_id, r.decision_id)",
    "COPY OF_CHOICE FROM (UNWIND $rows AS r RETURN r.decision_id, r.choice_id)",
)
_COPY_EPISODES: Final = "COPY Episode FROM (UNWIND $rows AS r RETURN r)"
_COPY_CLUSTERS: Final = "COPY IN_CLUSTER FROM (UNWIND $rows AS r RETURN r.task_id, r.name)"
_COPY_FROM_ROWS: Final = 100
_FAILURES_OF: Final = "MATCH (c:Choice {id: $id})-[f:FAILED_WITH]->(m:FailureMode) RETURN m.code, f.times"
_LINEAGE: Final = (
    (
        "MATCH (e:Episode)-[:TOOK]->(d:Decision)-[:OF_CHOICE]->(c:Choice) "
        "RETURN 'decision', d.decision_id, e.task_id, c.subject, c.task_type, c.name"
    ),
    (
        "MATCH (c:Choice)-[f:FAILED_WITH]->(m:FailureMode) "
        "RETURN 'failed', c.subject, c.task_type, c.name, m.code, f.times"
    ),
    "MATCH (e:Episode) RETURN 'episode', e.task_id",
    "MATCH (e:Episode)-[:IN_CLUSTER]->(k:TaskCluster) RETURN 'cluster', e.task_id, k.name",
    (
        "MATCH (e:Episode)-[c:CURED_BY]->(m:Mitigation)-[:CURES]->(f:FailureMode), (m)-[:DONE_BY]->(r:Role) "
        "RETURN 'cured', e.task_id, f.code, m.action, r.name, c.finding"
    ),
    (
        "MATCH (f:FailureMode)<-[:CURES]-(m:Mitigation)-[h:HELPED_IN]->(k:TaskCluster), (m)-[:DONE_BY]->(r:Role) "
        "RETURN 'helped', k.name, f.code, m.action, r.name, h.times"
    ),
    "MATCH (c:Choice)-[:NAMES_ROLE]->(r:Role) RETURN 'names', c.subject, c.task_type, c.name, r.name",
    "MATCH (c:Choice)-[:NAMES_PERSONA]->(p:Persona) RETURN 'names', c.subject, c.task_type, c.name, p.name",
)


class LineageGraph:
    """The open graph; belongs to one thread. Kuzu reports every failure as RuntimeError."""

    def __init__(self, folder: Path, new_for: str | None = None) -> None:
        """Open the graph in `folder`, or make an empty one that follows the log with the identity `new_for`."""
        self._folder = folder
        if new_for is not None:
            remove(folder)
        else:
            # From here on the files change, so what the manifest says of them is no longer true.
            (folder / _MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)
        self._database = kuzu.Database(
            folder / GRAPH_FILE, buffer_pool_size=_BUFFER_BYTES, max_db_size=_MAX_DB_BYTES, max_num_threads=1
        )
        self._connection = kuzu.Connection(self._database, num_threads=1)
        self._prepared: dict[str, kuzu.PreparedStatement] = {}
        self._given = 0
        """Rows and statements that the connection has seen."""
        if new_for is not None:
            for statement in _SCHEMA:
                self._run(statement)
            self._run("CREATE (:Applied {id: 0, log_id: $log_id, seq: 0})", {"log_id": new_for})
        self.found = self._read_found()
        """How far it follows which log."""

    @property
    def applied_seq(self) -> int:
        """Number of the last row of the log that is in the graph."""
        return self.found.applied_seq

    def apply(self, upto: int, changes: Sequence[Change]) -> None:
        """Add what the rows up to `upto` say, and `upto` itself, in one transaction."""
        self._renew_connection()
        decisions = [change for change in changes if isinstance(change, DecisionAdded)]
        tasks = dict.fromkeys(change.task_id for change in changes if isinstance(change, DecisionAdded | EpisodeAdded))
        choices = {_id_of(decision): decision for decision in decisions}
        failures = Counter((_id_of(c), c.code) for c in changes if isinstance(c, ChoiceFailed))
        self._run("BEGIN TRANSACTION")
        self._add_episodes(list(tasks))
        for ident, first in choices.items():
            names = {"subject": first.subject, "task_type": first.task_type, "name": first.choice}
            self._must(_ADD_CHOICE, {"choice_id": ident, **names})
            if first.subject in _NAME_CHOICE:
                self._name_choice(ident, first)
        self._add_decisions(decisions)
        self._join_clusters([change for change in changes if isinstance(change, EpisodeAdded)])
        for code in dict.fromkeys(code for _, code in failures):
            self._must(_ADD_FAILURE_MODE, {"code": code})
        for (ident, code), times in failures.items():
            self._count("failed", {"choice_id": ident, "code": code, "times": times})
        for cure in (change for change in changes if isinstance(change, Cured)):
            self._add_cure(cure)
        self._must("MATCH (a:Applied {id: 0}) SET a.seq = $seq RETURN a.seq", {"seq": upto})
        self._run("COMMIT")
        self.found = Found(self.found.log_id, upto)

    def failures_of(self, choice_ids: Sequence[str]) -> dict[str, Counter[str]]:
        """Choice (see `choice_id`) -> how often it has failed with which code."""
        self._renew_connection()
        return {choice: Counter(dict(self._run(_FAILURES_OF, {"id": choice}))) for choice in choice_ids}

    def cured_tasks(self) -> set[str]:
        """Episodes in which something was cured."""
        return {row[0] for row in self._run(_CURED)}

    def cures_of(self, task_ids: Sequence[str]) -> dict[str, list[tuple[Cure, str]]]:
        """Task -> what was cured in it, with what was found wrong."""
        self._renew_connection()
        return {
            task_id: [(_cure(ident), finding) for ident, finding in self._run(_CURES_OF, {"task_id": task_id})]
            for task_id in task_ids
        }

    def help_of(self, cures: Sequence[Cure]) -> dict[Cure, Counter[str]]:
        """Cure -> how often it has helped in which cluster of tasks."""
        self._renew_connection()
        return {cure: Counter(dict(self._run(_HELP_OF, {"id": json.dumps(cure)}))) for cure in cures}

    def lineage(self) -> Iterator[tuple[str | int, ...]]:
        """Everything in the graph, in the shape of `LogReader.lineage`; any order."""
        for statement in _LINEAGE:
            for row in self._run(statement):
                yield tuple(row)

    def close(self) -> None:
        """Checkpoint, close, and write the manifest with which the next start need not check the content."""
        found = self.found
        self._connection.close()
        self._database.close()
        sync_folder(self._folder)
        Manifest(found.log_id, found.applied_seq, {path.name: sha256_of(path) for path in files(self._folder)}).save(
            self._folder / _MANIFEST
        )

    def abandon(self) -> None:
        """Close without vouching for the files."""
        self._connection.close()
        self._database.close()

    def _read_found(self) -> Found:
        rows = self._run("MATCH (a:Applied {id: 0}) RETURN a.log_id, a.seq")
        if len(rows) != 1:
            raise ProjectionDoubt(f"{GRAPH_FILE} does not say how far it follows the log")
        return Found(str(rows[0][0]), int(rows[0][1]))

    def _add_episodes(self, task_ids: Sequence[str]) -> None:
        if len(task_ids) < _COPY_FROM_ROWS:
            for task_id in task_ids:
                self._must(_ADD_EPISODE, {"task_id": task_id})
            return
        known = {
            row[0]
            for row in self._run(
                "MATCH (e:Episode) WHERE e.task_id IN $task_ids RETURN e.task_id", {"task_ids": list(task_ids)}
            )
        }
        new = [task_id for task_id in task_ids if task_id not in known]
        if new:
            self._run(_COPY_EPISODES, {"rows": new})

    def _name_choice(self, ident: str, decision: DecisionAdded) -> None:
        named, add, join = _NAME_CHOICE[decision.subject]
        if not self._run(named, {"choice_id": ident}):
            self._must(add, {"name": decision.choice})
            self._must(join, {"choice_id": ident, "name": decision.choice})

    def _join_clusters(self, episodes: Sequence[EpisodeAdded]) -> None:
        for name in dict.fromkeys(episode.task_type for episode in episodes):
            self._must(_ADD_CLUSTER, {"name": name})
        rows = [{"task_id": episode.task_id, "name": episode.task_type} for episode in episodes]
        if len(rows) >= _COPY_FROM_ROWS:
            self._run(_COPY_CLUSTERS, {"rows": rows})
        else:
            for row in rows:
                self._must(_JOIN_CLUSTER, row)

    def _add_cure(self, cure: Cured) -> None:
        parameters = {
            "id": json.dumps([cure.code, cure.action, cure.role]),
            "action": cure.action,
            "role": cure.role,
            "code": cure.code,
            "cluster": cure.task_type,
            "task_id": cure.task_id,
            "finding": cure.finding,
        }
        known = self._run(_KNOWN_MITIGATION, {"id": parameters["id"]})
        for statement in (*(() if known else _ADD_MITIGATION), *_ADD_CURE):
            self._must(statement, {name: value for name, value in parameters.items() if f"${name}" in statement})
        self._count("helped", {"id": parameters["id"], "cluster": cure.task_type, "times": 1})

    def _count(self, what: str, parameters: dict[str, Any]) -> None:
        """Add to the number that a relation carries, or make the relation."""
        add, create = _COUNT[what]
        if not self._run(add, parameters):
            self._must(create, parameters)

    def _add_decisions(self, decisions: Sequence[DecisionAdded]) -> None:
        rows = [{"decision_id": d.decision_id, "task_id": d.task_id, "choice_id": _id_of(d)} for d in decisions]
        if len(rows) >= _COPY_FROM_ROWS:
            for statement in _COPY_DECISIONS:  # fails by itself where a key is not found
                self._run(statement, {"rows": rows})
        else:
            for row in rows:
                self._must(_ADD_DECISION, row)

    def _must(self, statement: str, parameters: dict[str, Any]) -> None:
        """Run a statement that returns the row it has written. A damaged key index would make it write nothing."""
        rows = self._run(statement, parameters)
        if len(rows) != 1:
            raise ProjectionDoubt(f"{statement.split(' RETURN ')[0]!r} wrote {len(rows)} rows for {parameters}")

    def _renew_connection(self) -> None:
        """Between transactions only: a connection takes its open one with it."""
        if self._given >= _ROWS_PER_CONNECTION:
            self._prepared.clear()
            self._connection.close()
            self._connection = kuzu.Connection(self._database, num_threads=1)
            self._given = 0

    def _run(self, statement: str, parameters: dict[str, Any] | None = None) -> list[list[Any]]:
        given = parameters or {}
        self._given += 1 + sum(len(value) for value in given.values() if isinstance(value, list))
        if statement not in self._prepared:
            self._prepared[statement] = _prepared(self._connection, statement, given)
        result: Any = self._connection.execute(self._prepared[statement], given)  # a list only for several statements
        rows: list[list[Any]] = result.get_all()
        result.close()
        return rows


def _prepared(connection: kuzu.Connection, statement: str, parameters: dict[str, Any]) -> kuzu.PreparedStatement:
    """Planned once and used again: planning is half of what a small statement costs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no later release of Kuzu will take this away
        return connection.prepare(statement, parameters)


def files(folder: Path) -> list[Path]:
    """Files Kuzu keeps for the graph: the database, and after an unclean stop its write-ahead log."""
    return sorted(folder.glob(f"{GRAPH_FILE}*"))


def remove(folder: Path) -> None:
    """Delete the graph and its manifest."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in files(folder):
        path.unlink()
    sync_folder(folder)


def take_over(source: Path, target: Path) -> None:
    """Replace the graph in `target` by a cleanly closed one from another folder. Raises ProjectionDoubt."""
    try:
        vouched(source)
    except FileNotFoundError as err:
        raise ProjectionDoubt(f"no graph was left in {source}") from err
    remove(target)
    for path in files(source):
        path.rename(target / path.name)
    sync_folder(target)


def vouched(folder: Path) -> Found:
    """What the manifest of a cleanly closed graph says, once its files have been compared with it.

    Raises FileNotFoundError without a manifest (never there, or not closed), ProjectionDoubt if anything differs.
    """
    manifest = Manifest.load(folder / _MANIFEST)
    names = {path.name for path in files(folder)}
    if names != manifest.files.keys():
        raise ProjectionDoubt(f"the files are {sorted(names)}, the manifest names {sorted(manifest.files)}")
    for name, expected in manifest.files.items():
        if sha256_of(folder / name) != expected:
            raise ProjectionDoubt(f"{name} has been altered: its sha256 is not the one in the manifest")
    return Found(manifest.log_id, manifest.applied_seq)


def choice_id(subject: str, task_type: str, choice: str) -> str:
    """Key of a choice among the nodes."""
    return json.dumps([subject, task_type, choice])


def _id_of(change: DecisionAdded | ChoiceFailed) -> str:
    return choice_id(change.subject, change.task_type, change.choice)


def _cure(ident: str) -> Cure:
    code, action, role = json.loads(ident)
    return code, action, role
