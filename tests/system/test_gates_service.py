"""The gates service as a real process behind a scripted hub, with real tools in the real sandbox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.base import Message
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.reply import ErrorReply
from services.gates.control_groups import ControlGroups
from tests.fakes.hub import ScriptedHub
from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]

MORE_GATES = """
  hasty:
    description: Runs the artefact for a short time, whatever it does.
    kinds: [code]
    category: CODE
    argv: ["{python}", "{artefact}"]
    executes: true
    timeout_s: 4
  patient:
    description: The same with time enough for anything on a busy machine.
    kinds: [code]
    category: CODE
    argv: ["{python}", "{artefact}"]
    executes: true
    timeout_s: 90
  patient2:
    description: The same again, to see two at once.
    kinds: [code]
    category: CODE
    argv: ["{python}", "{artefact}"]
    executes: true
    timeout_s: 90
  small:
    description: Runs the artefact with little memory.
    kinds: [code]
    category: CODE
    argv: ["{python}", "{artefact}"]
    executes: true
    memory_bytes: 209715200
  slowtool:
    description: A tool that hangs, whatever the artefact.
    kinds: [code]
    category: CODE
    argv: ["{python}", -c, "import time; time.sleep(60)"]
    timeout_s: 2
  loudtool:
    description: A tool that prints a gigabyte.
    kinds: [code]
    category: CODE
    argv: ["{python}", -c, "import os; [os.write(1, b'x' * 65536) for _ in range(16384)]"]
  nosuchtool:
    description: A command that no machine has.
    kinds: [code]
    category: CODE
    argv: [no-such-tool-anywhere, "{artefact}"]
  nosuchmodule:
    description: A module that no machine has.
    kinds: [code]
    category: CODE
    argv: ["{python}", -m, no_such_module_anywhere, "{artefact}"]
"""


EXIT_IN_A_FIXTURE = """
import pytest

@pytest.fixture
def leaving():
    yield
    pytest.exit("done", 0)

def test_a(leaving):
    pass

def test_b():
    assert 0
"""


class Stack:
    """A hub and one gates process with a home and a registry of their own."""

    def __init__(self, root: Path, prefix: tuple[str, ...] = ()) -> None:
        self.root = root
        self.registry = root / "registry"
        shutil.copytree(CHECKOUT / "registry", self.registry)
        table = self.registry / "gates.yaml"
        gates, policy = table.read_text().split("\npolicy:\n")
        unit = yaml.safe_load(gates)["gates"]["unit"] | {"timeout_s": 4}
        table.write_text(f"{gates}{MORE_GATES}  hasty_unit: {json.dumps(unit)}\n\npolicy:\n{policy}")
        hardware = self.registry / "hardware.yaml"
        hardware.write_text(hardware.read_text().replace("# cores: 2", "cores: 2"))
        self.home = root / "home"
        (self.home / "run").mkdir(parents=True, mode=0o700)
        self.hub = ScriptedHub(f"ipc://{self.home}/run/hub.sock")
        environment = {
            **os.environ,
            "TIERLINE_HOME": str(self.home),
            "TIERLINE_REGISTRY": str(self.registry),
            "A_SECRET": "in the environment",
        }
        command = [*prefix, sys.executable, "-m", "services.gates"]
        self.process = subprocess.Popen(command, cwd=CHECKOUT, env=environment)
        self.hub.await_peer("gates")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.hub.close()

    def ask(self, *gates: str, cores: int | None = None, **fields: Any) -> list[GateResult]:
        body = self.hub.ask("gates", "gate.request", request(*gates, **fields), cores=cores)
        assert isinstance(body, GateFinal), body
        return body.results

    def run_code(self, source: str, gate: str = "patient") -> GateResult:
        (result,) = self.ask(gate, artefacts=[python("program", source)])
        return result

    def test_code(self, tests: str, gate: str = "unit") -> GateResult:
        source = "def add(a, b):\n    return a + b\n"
        (result,) = self.ask(gate, artefacts=[python("sums", source)], context=[python("test_sums", tests)])
        return result

    def inside(self) -> list[psutil.Process]:
        """Everything that lives below the service: sandboxes and what runs in them."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if lives(one)]


def lives(process: psutil.Process) -> bool:
    """False once it has ended, be it reaped or not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def python(name: str, source: str) -> Artefact:
    return Artefact(name=name, kind=ArtefactKind.CODE, value=source)


def request(*gates: str, **fields: Any) -> GateRequest:
    return GateRequest(gates=list(gates), **fields)


@contextmanager
def started(*prefix: str) -> Iterator[Stack]:
    root = Path(tempfile.mkdtemp(prefix="tg", dir="/tmp"))
    stack = Stack(root, prefix)
    try:
        yield stack
    finally:
        stack.close()
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with started() as running:
        yield running


def test_it_introduces_itself_with_a_slot_per_core(stack: Stack) -> None:
    assert stack.hub.hellos["gates"].capabilities == ["gate"]
    assert stack.hub.credit["gates"] >= 2
    assert stack.hub.pongs["gates"].reason is None


def test_good_code_passes_every_gate_and_results_keep_the_order(stack: Stack) -> None:
    results = stack.ask(
        "unit",
        "schema",
        "lint",
        "format",
        "lint",
        artefacts=[python("sums", "def add(a, b):\n    return a + b\n"), Artefact(name="data", kind="json", value=[1])],
        context=[python("test_sums", "from sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n")],
        json_schema={"type": "array", "items": {"type": "integer"}},
    )
    assert [(one.gate, one.verdict.value, one.message) for one in results] == [
        ("unit", "pass", ""),
        ("schema", "pass", ""),
        ("lint", "pass", ""),
        ("format", "pass", ""),
    ]
    pytest_gate = {one.gate: one for one in results}
    assert pytest_gate["unit"].started_ms >= pytest_gate["lint"].ended_ms
    assert list((stack.home / "gates").glob("*/*")) == []


def test_bad_format_and_lint_give_findings_with_place_and_rule(stack: Stack) -> None:
    form, lint, unit = stack.ask("format", "lint", "unit", artefacts=[python("a", "import os\nx =  1\nprint(y, os)\n")])
    assert (form.verdict, form.category.value) == (Verdict.FAIL, "FORMAT")
    assert [(one.file, one.line, one.rule) for one in form.findings][-1] == ("a.py", 2, "unformatted")
    places = [(one.artefact, one.file, one.line, one.column, one.rule) for one in lint.findings]
    assert places == [("a", "a.py", 3, 7, "F821")]
    assert unit.verdict is Verdict.SKIPPED
    # Either of the two may be the first to fail.
    assert unit.message in (
        "not run: it depends on lint, which failed",
        "not run: format, which is required, has failed",
    )


def test_code_that_does_not_parse_is_a_finding_and_not_a_broken_tool(stack: Stack) -> None:
    results = stack.ask("format", "lint", artefacts=[python("a", "def f(:\n")])
    assert [(one.verdict.value, one.findings[0].line, one.findings[0].rule) for one in results] == [
        ("fail", 1, "invalid-syntax")
    ] * 2


def test_a_failing_test_is_found_at_its_line(stack: Stack) -> None:
    result = stack.test_code("from sums import add\n\ndef test_add():\n    assert add(1, 2) == 4\n")
    (finding,) = result.findings
    assert (result.verdict, result.category.value) == (Verdict.FAIL, "CODE")
    assert (finding.file, finding.line, finding.artefact) == ("test_sums.py", 4, "test_sums")
    assert "assert 3 == 4" in finding.message


def test_values_against_the_schema_give_findings_with_the_path(stack: Stack) -> None:
    schema = {"type": "object", "properties": {"n": {"items": {"type": "integer"}}}}
    (result,) = stack.ask(
        "schema", artefacts=[Artefact(name="d", kind="json", value={"n": [1, "x"]})], json_schema=schema
    )
    (finding,) = result.findings
    assert (result.category.value, finding.rule, finding.artefact) == ("SCHEMA", "type", "d")
    assert finding.message.startswith("$.n[1]: ")


def test_a_schema_that_would_compute_for_ever_is_killed_while_the_service_answers(stack: Stack) -> None:
    table = stack.registry / "gates.yaml"
    assert "timeout_s: 10" in table.read_text()
    slow = request(
        "schema",
        artefacts=[Artefact(name="d", kind="json", value="a" * 60 + "!")],
        json_schema={"type": "string", "pattern": "^(a+)+$"},
    )
    waiting = stack.hub.request("gates", "gate.request", slow)
    assert stack.run_code("print(1)").verdict is Verdict.PASS
    _, body, _ = stack.hub.collect(waiting)
    assert isinstance(body, GateFinal)
    assert (body.results[0].verdict, body.results[0].category.value) == (Verdict.ERROR, "RESOURCE")
    assert "timed out" in body.results[0].message


@pytest.mark.parametrize(
    ("tests", "rule"),
    [
        ("import sys\n\ndef test_a():\n    pass\n\nsys.exit(0)\n", "no-tests"),
        ("import os\n\ndef test_a():\n    pass\n\nos._exit(0)\n", "no-report"),
        ("import os\n\ndef test_a():\n    os._exit(0)\n", "no-report"),
        ("import sys\n\ndef test_a():\n    sys.exit(0)\n", "failure"),
        ("import os\n\ndef test_a():\n    os.kill(os.getpid(), 9)\n", "no-report"),
        ("import pytest\n\ndef test_a():\n    pytest.exit('done', 0)\n", "inconsistent-report"),
        (EXIT_IN_A_FIXTURE, "inconsistent-report"),
        ("import pytest\n\ndef test_a():\n    pytest.skip('no')\n", "no-tests"),
        ("import pytest\n\npytest.skip('no', allow_module_level=True)\n", "no-tests"),
        ("x = 1\n", "no-tests"),
        ("import nothing_of_this_name\n", "error"),
        ("import atexit, os\natexit.register(os._exit, 0)\n\ndef test_a():\n    assert 0\n", "failure"),
    ],
)
def test_a_run_that_proves_nothing_is_not_a_pass(stack: Stack, tests: str, rule: str) -> None:
    result = stack.test_code(tests)
    assert (result.verdict, [finding.rule for finding in result.findings][:1]) == (Verdict.FAIL, [rule]), result


def test_a_workspace_cannot_replace_the_tool_or_the_artefact(stack: Stack) -> None:
    forged = [python("ruff", "print('[]')\n"), python("pytest", "raise SystemExit(0)\n")]
    results = stack.ask("lint", "unit", artefacts=[python("a", "missing\n")], context=forged)
    assert [one.verdict.value for one in results] == ["fail", "skipped"]
    rewriting = "def test_a():\n    open('sums.py', 'w').write('x')\n"
    assert "Read-only file system" in stack.test_code(rewriting).findings[0].message


def test_a_hanging_test_is_killed_at_its_timeout_with_everything_it_started(stack: Stack) -> None:
    tests = "import subprocess, time\n\ndef test_a():\n    subprocess.Popen(['sleep', '777'])\n    time.sleep(600)\n"
    result = stack.test_code(tests, "hasty_unit")
    assert (result.verdict, result.category.value, result.findings[0].rule) == (Verdict.FAIL, "CODE", "timed-out")
    assert "4 s" in result.message
    assert stack.inside() == []
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "777"]]


def test_a_flood_of_output_is_cut_off(stack: Stack) -> None:
    result = stack.run_code("while True:\n    print('x' * 10_000)\n")
    assert (result.verdict, result.findings[0].rule) == (Verdict.FAIL, "flooded")
    assert stack.inside() == []


def test_a_fork_bomb_is_bounded_and_leaves_others_room(stack: Stack) -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    waiting = stack.hub.request("gates", "gate.request", request("hasty", artefacts=[python("bomb", bomb)]))
    stack.hub.until(lambda: len(stack.inside()) > 10, "it multiplies")
    beside = stack.run_code("import threading\nfor _ in range(20):\n    threading.Thread(target=print).start()\n")
    most = len(stack.inside())
    _, body, _ = stack.hub.collect(waiting)
    assert beside.verdict is Verdict.PASS, beside
    assert isinstance(body, GateFinal)
    assert body.results[0].findings[0].rule == "timed-out"
    assert most < 100
    assert stack.inside() == []


def test_memory_is_bounded_for_one_process_and_for_many(stack: Stack) -> None:
    alone = stack.run_code("x = bytearray(3 * 1024**3)\n")
    assert "MemoryError" in alone.findings[0].message
    source = "import os, time\nos.fork(); os.fork(); os.fork()\nx = b'x' * (300 << 20)\ntime.sleep(300)\n"
    many = stack.run_code(source)
    assert many.findings[0].rule == "grew"


def test_a_burst_of_many_processes_is_over_before_anybody_could_have_looked(stack: Stack) -> None:
    if ControlGroups.found() is None:
        pytest.skip("no control groups can be made here: bounds on all processes together are looked at from outside")
    source = "import os\nos.fork(); os.fork()\nx = b'x' * (80 << 20)\n"
    assert stack.run_code(source, "small").findings[0].rule == "grew"
    assert stack.run_code("x = b'x' * (80 << 20)\n", "small").verdict is Verdict.PASS
    until(lambda: left_groups() == [], "the last process is reaped, and its group is gone")


def left_groups() -> list[Path]:
    """Control groups of gates that are still there."""
    return list(Path("/sys/fs/cgroup").rglob("tierline-gate-*"))


def test_there_is_no_network(stack: Stack) -> None:
    source = (
        "import socket\n"
        "for address in (('127.0.0.1', 22), ('192.0.2.1', 80), ('8.8.8.8', 53)):\n"
        "    with socket.socket() as s:\n"
        "        s.settimeout(1)\n"
        "        assert s.connect_ex(address) != 0, address\n"
        "assert [name for _, name in socket.if_nameindex()] == ['lo']\n"
        "try:\n"
        "    socket.socket(socket.AF_VSOCK)\n"
        "    raise AssertionError('vsock')\n"
        "except OSError:\n"
        "    pass\n"
    )
    assert stack.run_code(source).message == ""


def test_home_registry_bus_and_environment_are_not_there(stack: Stack) -> None:
    (stack.home / "secret").write_text("s")
    source = (
        "import os, pathlib\n"
        f"for path in ({str(stack.home)!r}, {str(stack.home / 'run' / 'hub.sock')!r}, {str(stack.registry)!r},\n"
        f"             {str(CHECKOUT / 'registry')!r}, {str(CHECKOUT / 'services')!r}, {str(CHECKOUT / '.git')!r},\n"
        f"             '/etc/passwd', '/etc/shadow', '/var', '/home', '/proc/1/root/etc'):\n"
        "    try:\n"
        "        found = os.path.lexists(path)\n"
        "    except OSError:\n"
        "        found = False\n"
        "    assert not found, path\n"
        "for process in pathlib.Path('/proc').glob('[0-9]*/environ'):\n"
        "    try:\n"
        "        assert b'A_SECRET' not in process.read_bytes()\n"
        "    except PermissionError:\n"
        "        pass\n"
        "assert sorted(os.listdir('/proc/self/fd')) == ['0', '1', '2', '3'], os.listdir('/proc/self/fd')\n"
        "assert os.getuid() != 0\n"
    )
    assert stack.run_code(source).message == ""


def test_only_the_workspace_and_tmp_can_be_written_and_not_without_end(stack: Stack) -> None:
    source = (
        "import errno, os, sys\n"
        "for folder in ('/', '/usr', '/etc', '/dev', '/run', '/proc/sys/kernel', sys.prefix, sys.base_prefix):\n"
        "    try:\n"
        "        open(os.path.join(folder, 'x'), 'w')\n"
        "        raise AssertionError(folder)\n"
        "    except OSError:\n"
        "        pass\n"
        "for folder in ('.', '/tmp', '/dev/shm'):\n"
        "    written = 0\n"
        "    try:\n"
        "        for number in range(100):\n"
        "            with open(f'{folder}/{number}', 'wb') as file:\n"
        "                written += file.write(b'x' * (16 << 20))\n"
        "        raise AssertionError('no bound')\n"
        "    except OSError as err:\n"
        "        assert err.errno == errno.ENOSPC, err\n"
        "    assert written <= 64 << 20\n"
    )
    assert stack.run_code(source).message == ""


def test_no_way_to_more_rights(stack: Stack) -> None:
    source = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for flag in (0x10000000, 0x00020000, 0x40000000):\n"
        "    assert libc.unshare(flag) == -1\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1\n"
        "assert libc.ptrace(16, os.getppid(), 0, 0) == -1\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "status = dict(line.split(':\\t') for line in lines if ':\\t' in line)\n"
        "assert {int(status[name], 16) for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')} == {0}, status\n"
        "assert (status['NoNewPrivs'], status['Seccomp']) == ('1', '2'), status\n"
        "try:\n"
        "    os.setuid(0)\n"
        "    raise AssertionError('root')\n"
        "except OSError:\n"
        "    pass\n"
    )
    assert stack.run_code(source).message == ""


def test_a_missing_tool_is_an_error_and_never_a_pass(stack: Stack) -> None:
    results = stack.ask("nosuchtool", "nosuchmodule", artefacts=[python("a", "x = 1\n")])
    assert [(one.verdict.value, one.category.value) for one in results] == [("error", "RESOURCE")] * 2
    assert results[0].message.startswith("gate.tool_missing: the command 'no-such-tool-anywhere' is not installed")


def test_an_unknown_gate_is_an_error_by_policy_and_the_others_still_run(stack: Stack) -> None:
    results = stack.ask("nonsense", "lint", artefacts=[python("a", "x = 1\n")])
    assert [(one.verdict.value, one.category.value) for one in results] == [("error", "POLICY"), ("pass", "FORMAT")]
    assert "it has: schema, taskir, data," in results[0].message


def test_a_gate_without_anything_to_judge_says_so(stack: Stack) -> None:
    (result,) = stack.ask("unit", artefacts=[Artefact(name="notes", value="hello")])
    assert result.verdict is Verdict.SKIPPED
    assert result.message == "nothing to judge: unit is for code in python; under check: notes.md (text)"


def test_independent_gates_overlap_in_time(stack: Stack) -> None:
    artefacts = [python("a", "import time\ntime.sleep(0.2)\n")]
    alone = stack.ask("patient", "patient2", artefacts=artefacts)
    assert alone[0].ended_ms <= alone[1].started_ms, (
        "without a word from the hub a run has the cores of its widest gate"
    )
    other = [python("b", "import time\ntime.sleep(2.5)\n")]
    first, second = stack.ask("patient", "patient2", artefacts=other, cores=2)
    assert (first.verdict, second.verdict) == (Verdict.PASS, Verdict.PASS)
    assert max(first.started_ms, second.started_ms) < min(first.ended_ms, second.ended_ms)


def test_cancel_kills_the_tree_and_frees_the_cores(stack: Stack) -> None:
    source = "import os, time\nos.fork()\nos.fork()\ntime.sleep(300)\n"
    waiting = stack.hub.request("gates", "gate.request", request("patient", artefacts=[python("a", source)]), key="k1")
    stack.hub.until(lambda: len(stack.inside()) >= 6, "four processes run in their sandbox")
    stack.hub.send(stack.hub.peers["gates"], "gate.cancel", Message(), key="k1", corr=waiting)
    _, body, _ = stack.hub.collect(waiting)
    assert stack.inside() == []
    assert isinstance(body, ErrorReply)
    assert body.failure.code == "call.cancelled"
    assert list((stack.home / "gates").glob("*/*")) == []
    assert stack.run_code("print(1)").verdict is Verdict.PASS


def test_past_its_deadline_a_request_ends_as_a_timeout(stack: Stack) -> None:
    body: Message = stack.hub.ask(
        "gates",
        "gate.request",
        request("patient", artefacts=[python("a", "import time\ntime.sleep(300)\n")]),
        deadline=int(time.time() * 1000) + 1_500,
    )
    assert isinstance(body, ErrorReply)
    assert (body.failure.code, body.failure.category.value) == ("gates.deadline", "TIMEOUT")
    assert stack.inside() == []


def test_kill_9_of_the_service_takes_its_sandboxes_along() -> None:
    with started() as stack:
        source = "import time\ntime.sleep(300)\n"
        stack.hub.request("gates", "gate.request", request("patient", artefacts=[python("a", source)]))
        stack.hub.until(lambda: len(stack.inside()) >= 3, "it runs in its sandbox")
        inside = stack.inside()
        stack.process.kill()
        psutil.wait_procs(inside, timeout=60)
        assert not [one for one in inside if lives(one)]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a capability away, which needs root")
def test_without_a_sandbox_commands_are_refused_and_builtin_gates_go_on() -> None:
    with started("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin") as stack:
        assert (stack.hub.pongs["gates"].reason or "").startswith("sandbox.unavailable: ")
        artefacts = [python("a", "x = 1\n"), Artefact(name="d", kind="json", value=1)]
        lint, schema = stack.ask("lint", "schema", artefacts=artefacts)
        assert (lint.verdict, lint.category.value) == (Verdict.ERROR, "RESOURCE")
        assert lint.message.startswith("sandbox.unavailable: ")
        assert schema.verdict is Verdict.PASS


def test_a_broken_registry_refuses_the_start_with_file_and_line(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "registry", tmp_path / "registry")
    table = tmp_path / "registry" / "gates.yaml"
    table.write_text(table.read_text().replace("depends_on: [lint]", "depends_on: [lynt]"))
    environment = {**os.environ, "TIERLINE_HOME": str(tmp_path / "h"), "TIERLINE_REGISTRY": str(tmp_path / "registry")}
    ended = subprocess.run(
        [sys.executable, "-m", "services.gates"],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ended.returncode == 2
    assert "gates.yaml:" in ended.stderr
    assert "lynt" in ended.stderr
