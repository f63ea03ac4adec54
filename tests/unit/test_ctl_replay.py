"""`tierline replay` and `tierline journal` through their entry point, on real files."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from services.ctl.__main__ import main
from services.scheduler.journal import Journal
from tests.unit.journals import write_journal, write_long_task

Out = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path))
    folder = tmp_path / "journal"
    folder.mkdir()
    return folder / "journal.sqlite"


def said(out: Out, *argv: str, code: int = 0) -> str:
    assert main(argv) == code
    return out.readouterr().out


def checked(out: Out, *argv: str, code: int) -> dict[str, Any]:
    value = json.loads(said(out, "replay", *argv, "--check", "--json", code=code))
    assert isinstance(value, dict)
    return value


def change(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as database:
        assert database.execute(statement, values).rowcount >= 1


def test_every_fact_is_printed_with_its_effect(path: Path, capsys: Out) -> None:
    made = write_journal(path, 2)
    first = next(iter(made))
    lines = [json.loads(line) for line in said(capsys, "replay", "--json").splitlines()]
    assert len(lines) == sum(len(records) for records in made.values())
    told = {(line["task"], line["fact"], line["step"]): line["effect"] for line in lines}
    assert "task planning -> running" in told[first, "TaskPlanned", None]
    assert "step ready -> inferring" in told[first, "AttemptStarted", "S1"]
    assert "unblocked 0 -> 1" in told[first, "StepDone", "S1"]
    assert "task running -> succeeded" in told[first, "TaskEnded", None]
    text = said(capsys, "replay", str(path), "--task", first, "--until", "3").splitlines()
    assert len(text) == 3
    assert all(line.startswith(first) for line in text)


def test_a_sound_journal_passes_and_is_not_touched(path: Path, capsys: Out) -> None:
    write_journal(path, 3)
    before = path.read_bytes()
    assert checked(capsys, code=0)["contradictions"] == []
    assert path.read_bytes() == before
    assert "no contradiction" in said(capsys, "replay", str(path.parent), "--check")


def test_a_journal_that_is_being_written_can_be_replayed(path: Path, capsys: Out) -> None:
    journal = Journal(path)
    task = write_long_task(journal, 5_000, snapshots=True)
    assert checked(capsys, code=0)["facts"] == task.seq
    journal.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM facts WHERE seq = 4", "is missing"),
        ("UPDATE facts SET kind = 'StepDreamt' WHERE seq = 4", "bytes are not those"),
        ("UPDATE facts SET kind = 'StepDreamt', seal = NULL WHERE seq = 4", "does not know"),
        ("UPDATE facts SET data = x'80', seal = NULL WHERE seq = 4", "cannot be read"),
        ("UPDATE facts SET seq = seq + 1000 WHERE seq >= 4", "is missing"),
    ],
)
def test_what_cannot_be_is_reported_with_task_and_fact(path: Path, capsys: Out, statement: str, message: str) -> None:
    [task] = write_journal(path, 1)
    change(path, statement)
    [one] = checked(capsys, code=1)["contradictions"]
    assert (one["task"], one["seq"]) == (task, 4)
    assert message in one["message"]
    assert main(["replay"]) == 1
    assert "fact 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE tasks SET steps_done = 7", "steps_done = 7"),
        ("UPDATE tasks SET state = 'running'", "state = 'running'"),
        ("UPDATE tasks SET settled = 0", "settled = 0"),
        ("DELETE FROM tasks", "not in the index"),
        ("DELETE FROM facts", "has no facts"),
        ("UPDATE tallies SET tasks = 9 WHERE state = 'succeeded'", "9 tasks are counted"),
        ("UPDATE tasks SET compacted = 1", "still has facts"),
    ],
)
def test_an_index_that_tells_another_story_is_a_contradiction(
    path: Path, capsys: Out, statement: str, message: str
) -> None:
    write_journal(path, 1)
    change(path, statement)
    found = checked(capsys, code=1)["contradictions"]
    assert any(message in one["message"] for one in found), found


def test_a_snapshot_that_differs_from_the_fold_is_a_contradiction(path: Path, capsys: Out) -> None:
    journal = Journal(path)
    write_long_task(journal, 5_000, snapshots=True)
    journal.close()
    change(path, "UPDATE snapshots SET data = replace(data, 'S1.out', 'S9.out')")
    found = checked(capsys, code=1)["contradictions"]
    assert any("snapshot" in one["message"] for one in found), found


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE facts SET data = x'9180', seal = NULL WHERE seq = 8", "1 facts under 4 names"),
        ("UPDATE facts SET data = x'80', seal = NULL WHERE seq = 8", "cannot be read"),
        ("UPDATE facts SET seq = 7 WHERE seq = 8", "is missing"),
        ("UPDATE facts SET kind = 'StepDone ' || kind, seal = NULL WHERE seq = 8", "is missing"),
        ("DELETE FROM facts WHERE seq = 8", "is missing"),
    ],
)
def test_a_row_of_several_facts_that_cannot_be_is_reported(
    path: Path, capsys: Out, statement: str, message: str
) -> None:
    [task] = write_journal(path, 1, together=4)
    change(path, statement)
    [one] = checked(capsys, code=1)["contradictions"]
    assert (one["task"], one["seq"]) == (task, 5)
    assert message in one["message"]


@pytest.mark.parametrize("together", [1, 4])
def test_any_flipped_byte_of_a_fact_is_found_and_named(path: Path, capsys: Out, together: int) -> None:
    [task] = write_journal(path, 1, together)
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT seq, kind, data FROM facts").fetchall()
    assert max(kind.count(" ") for _, kind, _ in rows) == together - 1
    chosen = random.Random(7)
    for seq, kind, data in rows:
        at = chosen.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1 << chosen.randrange(8)]) + data[at + 1 :]
        change(path, "UPDATE facts SET data = ? WHERE seq = ?", flipped, seq)
        [one] = checked(capsys, code=1)["contradictions"]
        assert (one["task"], one["seq"]) == (task, seq - kind.count(" ")), "the first fact of the row"
        change(path, "UPDATE facts SET data = ? WHERE seq = ?", data, seq)
    assert checked(capsys, code=0)["contradictions"] == []


def test_a_row_that_is_no_longer_where_its_index_says_is_found(path: Path, capsys: Out) -> None:
    """Facts are found by their index, which still has the right name: reading alone would not notice."""
    [task] = write_journal(path, 1)
    with sqlite3.connect(path) as database:
        [(data,)] = database.execute("SELECT data FROM facts WHERE seq = 4").fetchall()
    damaged = bytearray(path.read_bytes())
    named = damaged.rindex(task.encode(), 0, damaged.index(data))
    damaged[named] ^= 1
    path.write_bytes(damaged)
    [one] = checked(capsys, code=1)["contradictions"]
    assert "facts_in_order" in one["message"]


def test_flipped_bytes_anywhere_in_the_file_end_in_a_message_never_in_a_traceback(path: Path, capsys: Out) -> None:
    write_journal(path, 2)
    sound = path.read_bytes()
    chosen = random.Random(11)
    found = 0
    for _ in range(60):
        damaged = bytearray(sound)
        for _ in range(4):
            damaged[chosen.randrange(len(damaged))] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        code = main(["replay", "--check"])
        assert code in (0, 1, 2)  # 0: the bytes were in free space, 2: the file no longer says what version it is
        found += code != 0
        capsys.readouterr()
    assert found > 10


def test_bad_usage_is_refused(path: Path, capsys: Out) -> None:
    assert main(["replay"]) == 2
    assert "no journal" in capsys.readouterr().err
    write_journal(path, 1)
    assert main(["replay", "--task", "t-none"]) == 2
    assert main(["replay", "--until", "0"]) == 2
    assert main(["journal", "compact", "--keep-days", "-1"]) == 2


def test_compact_and_stats_say_what_there_is(path: Path, capsys: Out) -> None:
    write_journal(path, 3)
    before = json.loads(said(capsys, "journal", "stats", "--json"))
    assert (before["tasks"], before["compacted"], before["snapshots"]) == (3, 0, 0)
    assert before["facts"] > 30
    done = json.loads(said(capsys, "journal", "compact", "--keep-days", "0", "--json"))
    # Tasks of 1970, by the virtual clock: beyond every limit.
    assert (done["compacted"], done["removed"], done["forgotten"]) == (3, 3, 3)
    after = json.loads(said(capsys, "journal", "stats", "--json"))
    assert (after["tasks"], after["facts"], after["removed"]) == (0, 0, 0)
    assert checked(capsys, code=0)["tasks"] == 0


def test_a_compacted_task_is_not_passed_over_in_silence(path: Path, capsys: Out) -> None:
    write_journal(path, 2)
    change(path, "DELETE FROM facts WHERE task = (SELECT MIN(task) FROM facts)")
    assert main(["replay"]) == 0
    told = capsys.readouterr()
    assert "TaskAccepted" in told.out
    assert "1 of 2 tasks are compacted" in told.err
