"""A damaged log is made anew from its copy, and the rows of the new one are those of the old one."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.messages.memory import DecisionRecord, Episode, Forget, Outcome, RecordDecisions, RecordOutcomes
from services.kit.logs import LogEvent
from services.memory.embedding import Embedder
from services.memory.log import LOG_FILE, Entry, MemoryLog
from services.memory.log_copy import COPY_FILE, LogCopy, read_copy
from services.memory.log_reader import LogReader
from services.memory.log_restore import open_log
from services.memory.log_rows import COLUMNS, LogDamaged, RowDamaged, find

TASKS = 12


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: LogEvent, **fields: object) -> None:
        self.events.append((event.name, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def decisions(task: int) -> RecordDecisions:
    records = [
        DecisionRecord(
            decision_id=f"t{task}-{step}",
            task_id=f"t{task}",
            subject="role",
            choice=f"c{(task + step) % 3}",
            propensity=0.5,
            task_type="doc",
        )
        for step in range(2)
    ]
    return RecordDecisions(decisions=records, text=f"Compare contract number {task} with the one before it")


def outcomes(task: int) -> RecordOutcomes:
    told = [
        Outcome(decision_id=f"t{task}-{step}", reward=float(task % 2), seconds=1.5, attempts=1, at_ms=task)
        for step in range(2)
    ]
    episode = Episode(
        task_id=f"t{task}",
        task_type="doc",
        objective=f"Compare contract {task} “gründlich”",
        succeeded=True,
        seconds=3.0,
    )
    return RecordOutcomes(outcomes=told, episode=episode)


def fill(folder: Path, embedder: Embedder) -> MemoryLog:
    log = open_log(folder, embedder, Told())
    log.adopt_embedder(embedder.name, embedder.embed)
    for task in range(TASKS):
        decided, done = decisions(task), outcomes(task)
        assert done.episode is not None
        entries = [Entry(decided, embedder.embed(decided.text)), Entry(done, embedder.embed(done.episode.objective))]
        log.commit(entries)
    log.commit([Entry(outcomes(0), embedder.embed("Compare contract 0"))])
    return log


def content(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables; of `meta` what a restored log must share with the old one."""
    db = sqlite3.connect(folder / LOG_FILE)
    rows = {table: sorted(find(db, table), key=repr) for table in COLUMNS}
    rows["meta"] = [row for row in rows["meta"] if row[0] in ("seq", "embedder")]
    db.close()
    return rows


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    fill(folder, embedder).close()
    return folder


@pytest.fixture(scope="module")
def unclean(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    """As after kill -9: everything is in the write-ahead log, no manifest."""
    live = tmp_path_factory.mktemp("live")
    folder = tmp_path_factory.mktemp("unclean") / "memory"
    log = fill(live, embedder)
    shutil.copytree(live, folder)
    log.close()
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "memory"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("clean", LOG_FILE),
        ("clean", COPY_FILE),
        ("clean", "log.manifest.json"),
        ("unclean", LOG_FILE),
        ("unclean", f"{LOG_FILE}-wal"),
        ("unclean", f"{LOG_FILE}-shm"),
        ("unclean", COPY_FILE),
    ],
)
def test_a_flipped_bit_anywhere_in_the_log_loses_no_row(
    request: pytest.FixtureRequest, tmp_path: Path, embedder: Embedder, which: str, name: str
) -> None:
    original: Path = request.getfixturevalue(which)
    expected = content(copy_of(original, tmp_path))
    chance = random.Random(5)
    told = Told()
    for number in range(40):
        shutil.rmtree(tmp_path / "memory")
        folder = copy_of(original, tmp_path)
        place = chance.randrange(1 << 24)
        flip(folder / name, place)
        log = open_log(folder, embedder, told)
        assert content(folder) == expected, f"bit {place} of {name}, round {number}"
        log.close()
    if (which, name) == ("clean", LOG_FILE):
        assert told.names.count("memory.log_restored") > 10, "most bits matter"
    if name == f"{LOG_FILE}-wal":
        assert "memory.log_restored" in told.names, "SQLite drops what follows a damaged frame without a word"
    if name == COPY_FILE:
        assert "memory.log_restored" not in told.names, "the log itself is sound"


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / LOG_FILE).unlink(),
        lambda folder: (folder / LOG_FILE).write_bytes(b"this is not a database" * 400),
        lambda folder: (folder / LOG_FILE).write_bytes((folder / LOG_FILE).read_bytes()[:9000]),
        lambda folder: (folder / COPY_FILE).unlink(),
        lambda folder: (folder / COPY_FILE).write_bytes((folder / COPY_FILE).read_bytes()[:-100]),
        lambda folder: (folder / COPY_FILE).write_bytes(b""),
    ],
    ids=["log deleted", "log overwritten", "log truncated", "copy deleted", "copy torn", "copy emptied"],
)
def test_without_the_log_or_without_its_copy_no_row_is_lost(
    clean: Path, tmp_path: Path, embedder: Embedder, harm: Callable[[Path], None]
) -> None:
    folder = copy_of(clean, tmp_path)
    expected = content(folder)
    harm(folder)
    open_log(folder, embedder, Told()).close()
    assert content(folder) == expected
    assert read_copy(folder).last_seq == dict(expected["meta"])["seq"], "the copy is whole again"
    told = Told()
    open_log(folder, embedder, told).close()
    assert told.names == []


def test_a_damaged_log_without_a_copy_is_refused_with_what_to_do(
    clean: Path, tmp_path: Path, embedder: Embedder
) -> None:
    folder = copy_of(clean, tmp_path)
    (folder / COPY_FILE).unlink()
    flip(folder / LOG_FILE, 40)
    (folder / LOG_FILE).write_bytes(b"this is not a database" * 400)
    with pytest.raises(LogDamaged, match="restore the file from a backup"):
        open_log(folder, embedder, Told())


@pytest.mark.parametrize(
    ("statement", "ask"),
    [
        ("UPDATE decisions SET choice = 'other'", lambda reader: reader.explain(["t1-0"])),
        ("UPDATE outcomes SET record = replace(record, '1.0', '0.0')", lambda reader: reader.explain(["t1-0"])),
        ("UPDATE choice_values SET q = 0.9", lambda reader: reader.values_of("role")),
        ("UPDATE outcomes SET failure_code = 'x'", lambda reader: list(reader.changes(0, reader.seq))),
        ("UPDATE contexts SET text = 'other'", lambda reader: list(reader.observations(0, reader.seq))),
        ("UPDATE decisions SET task_type = 'code'", lambda reader: reader.past(5)),
        ("UPDATE episodes SET record = replace(record, 'true', 'false')", lambda reader: reader.past(5)),
        ("UPDATE meta SET value = 1 WHERE key = 'seq'", lambda reader: reader.seq),
        ("UPDATE episodes SET task_type = 'code'", lambda reader: reader.rows(0, 9)),
    ],
)
def test_a_row_that_is_not_what_was_written_is_never_read(
    clean: Path, tmp_path: Path, embedder: Embedder, statement: str, ask: Callable[[LogReader], object]
) -> None:
    folder = copy_of(clean, tmp_path)
    expected = content(folder)
    log = open_log(folder, embedder, Told())
    log._db.execute(statement)
    reader = LogReader(folder)
    with pytest.raises(RowDamaged, match="is not what was written"):
        ask(reader)
    assert reader.damage()
    reader.close()
    log.distrust()
    log.close()
    told = Told()
    open_log(folder, embedder, told).close()
    assert told.names == ["memory.log_restored"]
    assert content(folder) == expected


def test_a_log_of_the_first_layout_gets_checksums_and_a_copy(clean: Path, tmp_path: Path, embedder: Embedder) -> None:
    folder = copy_of(clean, tmp_path)
    expected = content(folder)
    (folder / COPY_FILE).unlink()
    db = sqlite3.connect(folder / LOG_FILE, isolation_level=None)
    for table in COLUMNS:
        db.execute(f"ALTER TABLE {table} DROP COLUMN crc")
    db.execute("UPDATE meta SET value = 1 WHERE key = 'layout'")
    db.execute("DELETE FROM meta WHERE key = 'copy'")
    db.close()
    told = Told()
    open_log(folder, embedder, told).close()
    assert told.names == ["memory.log_migrated"]
    assert content(folder) == expected
    assert read_copy(folder).last_seq == dict(expected["meta"])["seq"]


def test_what_was_forgotten_does_not_come_back_from_the_copy(clean: Path, tmp_path: Path, embedder: Embedder) -> None:
    folder = copy_of(clean, tmp_path)
    log = open_log(folder, embedder, Told())
    assert log.forget(Forget(task_ids=["t3"])) == 5
    log.close()
    assert b"t3-0" not in (folder / COPY_FILE).read_bytes()
    expected = content(folder)
    (folder / LOG_FILE).unlink()
    open_log(folder, embedder, Told()).close()
    assert content(folder) == expected


def test_a_copy_that_has_no_room_catches_up(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    log = open_log(tmp_path, embedder, told)
    with monkeypatch.context() as full:
        full.setattr(LogCopy, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for task in range(2):
            assert [answer.stored for answer in log.commit([Entry(decisions(task))])] == [2]
    assert told.names == ["memory.copy_behind"]
    log.commit([Entry(decisions(2))])
    log.close()
    assert sorted(read_copy(tmp_path).rows) == [1, 2, 3, 4, 5, 6]
