"""Files of a request: names, never paths; and which gate is for which of them."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from protocol.errors import CallFailed
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Category
from services.gates.sandbox import Limits, Sandbox, isolation
from services.gates.seccomp import program
from services.gates.workspace import make_workspace, private_folder
from services.kit.registry import GateEntry

PYTHON_GATE = GateEntry(
    name="unit",
    description="d",
    kinds=(ArtefactKind.CODE,),
    languages=("python",),
    category=Category.CODE,
    argv=("{python}", "-m", "pytest", "{artefact}"),
)


def code(name: str, value: str = "x = 1\n", content_type: str | None = None) -> Artefact:
    return Artefact(name=name, kind=ArtefactKind.CODE, value=value, content_type=content_type)


def test_artefacts_become_private_files_under_their_file_names(tmp_path: Path) -> None:
    made = make_workspace(tmp_path, [code("solution")], [Artefact(name="notes", value="n")])
    assert {name: path.read_text() for name, path in made.files().items()} == {
        "solution.py": "x = 1\n",
        "notes.md": "n",
    }
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    made.remove()
    assert list(tmp_path.iterdir()) == []


def test_two_artefacts_with_one_file_name_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CallFailed) as refused:
        make_workspace(tmp_path, [code("a"), code("a.py")], [])
    assert refused.value.failure.code == "gates.duplicate_file"
    assert refused.value.failure.category is Category.POLICY
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_under_check_wins_over_context_of_the_same_name(tmp_path: Path) -> None:
    made = make_workspace(tmp_path, [code("a", "new")], [code("a.py", "old")])
    assert made.files()["a.py"].read_text() == "new"


def test_a_gate_is_for_its_kind_and_language(tmp_path: Path) -> None:
    artefacts = [code("a"), code("b.sh"), code("c", content_type="text/x-shellscript"), Artefact(name="t", value="")]
    made = make_workspace(tmp_path, artefacts, [code("context")])
    assert [subject.file for subject in made.judged_by(PYTHON_GATE)] == ["a.py"]


def test_tests_are_taken_from_artefacts_and_context_by_their_names(tmp_path: Path) -> None:
    made = make_workspace(tmp_path, [code("a"), code("test_a")], [Artefact(name="b_test.py", value="")])
    assert [subject.file for subject in made.tests_for(PYTHON_GATE)] == ["test_a.py", "b_test.py"]
    alone = make_workspace(tmp_path, [code("a")], [code("data")])
    assert [subject.file for subject in alone.tests_for(PYTHON_GATE)] == ["a.py"]


def test_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / "gates" / "999999999"
    (dead / "x").mkdir(parents=True)
    own = private_folder(tmp_path)
    assert own.is_dir()
    assert not dead.exists()


def test_an_ordinary_user_becomes_nobody_and_root_keeps_only_what_dropping_needs() -> None:
    user, root = isolation(None), isolation(61_200)
    for arguments in (user, root):
        assert {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"} <= {*arguments}
    assert user[-5:] == ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    assert root[-6:] == ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]


def test_the_filter_is_whole_instructions_and_unknown_machines_have_none() -> None:
    for machine in ("x86_64", "aarch64"):
        code_of_machine = program(machine)
        assert code_of_machine is not None
        assert len(code_of_machine) % 8 == 0
    assert program("vax") is None


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", "."])
async def test_the_sandbox_takes_names_and_no_paths(name: str, tmp_path: Path) -> None:
    sandbox = Sandbox(())
    assert await sandbox.probe() is None
    with pytest.raises(ValueError, match="is a path"):
        await sandbox.run(["true"], files={name: tmp_path}, limits=Limits(1))


@pytest.mark.skipif(
    not (Path(sys.prefix) / "pyvenv.cfg").exists(), reason="needs a virtual environment to hide a part of"
)
async def test_a_home_below_a_visible_folder_is_still_hidden() -> None:
    home = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    sandbox = Sandbox((home,))
    assert await sandbox.probe() is None
    listing = f"import os; print(os.listdir({str(home)!r}))"
    ended = await sandbox.run([sandbox.python, "-c", listing], files={}, limits=Limits(5))
    assert ended.out.strip() == b"[]", ended.err
