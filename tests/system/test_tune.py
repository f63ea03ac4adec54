"""`tierline tune` from the command to the file: with the real engine, and with a scripted one whose speed is known."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from protocol.client import Client
from protocol.errors import BusError, CallError
from protocol.messages.infer import ChatMessage, InferRequest
from services.ctl import tune
from services.ctl.__main__ import main
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from services.ctl.tune import Row
from services.ctl.tuning.measure import Measurer
from services.ctl.tuning.search import Point, Result
from services.ctl.tuning.space import Objective
from services.kit.config import CHECKOUT, load_home
from services.kit.gguf_facts import read_facts
from services.kit.hardware import detect
from services.kit.registry import load_registry
from services.kit.registry.memory import memory_needs
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.inference_stack import FAKE_BINARY
from tests.waiting import until

MODELS = """# three entries for a test
models:
  front: {{tier: A, engine: noop, context_tokens: 4096}}
  specialist: {{tier: B, engine: noop, context_tokens: 4096}}
  # the one that is tuned
  worker:
    tier: C
    path: {path} # the file
    engine: {engine}
    slots: {slots} # chosen by hand
    context_tokens: 1024
    threads: 1

# the end
"""
SLOW_ANSWER = {"text": "word ", "repeat": 16, "token_s": 0.01}
"""Each stream has a speed of its own, so twice the slots are twice the tokens."""


@pytest.fixture
def models_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models.yaml of a registry and home of the test's own; it is still the project's."""
    here = load_home()
    registry = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", registry, ignore=shutil.ignore_patterns("*.md", "examples"))
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TIERLINE_REGISTRY", str(registry))
    monkeypatch.setenv("TIERLINE_CACHE", str(here.cache))
    monkeypatch.setenv("TIERLINE_MODELS", str(here.models))
    return registry / "models.yaml"


def scripted(models_file: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """The entry on the scripted engine."""
    heads = {"attention.head_count": 2, "attention.head_count_kv": 2}
    model = write_tiny_gguf(models_file.parent.parent / "tiny.gguf", extra=heads)
    script = model.with_name("script.json")
    script.write_text(json.dumps({"default": SLOW_ANSWER}), encoding="utf-8")
    monkeypatch.setenv("TIERLINE_FAKE_SCRIPT", str(script))
    engine = f"llama-server\n    binary: {FAKE_BINARY}"
    models_file.write_text(MODELS.format(path=model, engine=engine, slots=slots), encoding="utf-8")


def children() -> list[str]:
    """Command lines of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    pids = [pid for task in tasks for pid in (task / "children").read_text(encoding="ascii").split()]
    return [Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ") for pid in pids]


def test_the_demo_model_is_measured_and_nothing_is_written_without_being_asked(
    models_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (load_home().models / DEMO_MODEL).is_file():
        pytest.fail("the demo model is missing: deploy/fetch-model brings it")
    text = MODELS.format(path=DEMO_MODEL, engine="embedded", slots=1)
    models_file.write_text(text, encoding="utf-8")
    assert main(["tune", "worker", "--budget-s", "15"]) == 0
    printed = capsys.readouterr()
    header, *rows = [line for line in printed.out.splitlines() if "tokens/s  " in line or " x " in line]
    assert header.split()[:3] == ["tokens/s", "decoding", "reading"]
    assert any(row.endswith("as it is") and float(row.split()[0]) > 0 for row in rows)
    assert "as it is: " in printed.err, "one line for each measurement"
    assert models_file.read_text(encoding="utf-8") == text
    assert not [line for line in children() if "embedded" in line], "its engine is gone"


def test_the_best_is_written_when_asked_for_with_its_figures_and_all_comments_stay(
    models_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    before = models_file.read_text(encoding="utf-8")
    assert main(["tune", "worker", "--objective", "throughput", "--budget-s", "40", "--apply", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["settings"].get("slots"), found["applied"]) == (4, True), found["measured"]
    assert found["best_tokens_per_s"] > 2 * found["start_tokens_per_s"]
    assert len(found["measured"]) > 3
    after = models_file.read_text(encoding="utf-8")
    line = next(line for line in after.splitlines() if "slots:" in line)
    assert line.startswith(f"    slots: {found['settings']['slots']} # chosen by hand; tuned 20")
    assert f"{found['best_tokens_per_s']:.1f} tokens/s, {found['start_tokens_per_s']:.1f} before" in line
    for comment in ("# three entries for a test", "  # the one that is tuned", "# the file", "# the end"):
        assert comment in after
    entry = yaml.safe_load(after)["models"]["worker"]
    assert all(entry[name] == value for name, value in found["settings"].items())
    assert yaml.safe_load(after)["models"]["front"] == yaml.safe_load(before)["models"]["front"]
    assert main(["registry", "check"]) == 0


def test_settings_that_the_registry_forbids_are_shown_with_its_rule_and_never_started(
    models_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    registry = load_registry(models_file.parent, load_home().models)
    path = registry.models["worker"].path
    assert path is not None
    need = memory_needs(registry.models, {"worker": read_facts(path)})["worker"]
    hardware = f"hardware:\n  cores: 1\n  memory_bytes: {need}\n"
    models_file.with_name("hardware.yaml").write_text(hardware, encoding="utf-8")
    assert main(["tune", "worker", "--objective", "throughput", "--budget-s", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["settings"]["slots"]: row for row in found["measured"]}
    assert rows[1]["refused"] is None
    for slots in (2, 4):
        assert "(rule: memory" in rows[slots]["refused"]
        assert rows[slots]["measurements"] == []
    assert "slots" not in found["settings"]


@pytest.mark.parametrize(
    ("policy", "objective", "guessing"),
    [
        ("auto", "throughput", [True, False, False]),
        ("always", "throughput", [True, True, True]),
        ("off", "throughput", [False, False, False]),
        ("auto", "latency", [True, True, True]),
    ],
)
def test_what_is_measured_is_the_process_that_the_service_runs_under_such_a_load(
    models_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    objective: Objective,
    guessing: list[bool],
) -> None:
    scripted(models_file, monkeypatch, slots=2)
    started = models_file.with_name("started")
    binary = models_file.with_name("recording-server")
    binary.write_text(f'#!/bin/sh\necho "$@" >> {started}\nexec {FAKE_BINARY} "$@"\n', encoding="utf-8")
    binary.chmod(0o755)
    text = models_file.read_text(encoding="utf-8").replace(str(FAKE_BINARY), str(binary))
    speculation = f"    speculation: {{type: ngram-simple, policy: {policy}}}\n"
    models_file.write_text(text.replace("    threads: 1\n", f"    threads: 1\n{speculation}"), encoding="utf-8")
    measurer = Measurer(load_home(), "worker", objective, tmp_path_factory.mktemp("measured"))
    for slots in (1, 2, 4):
        measurer.measure(Point.of({"slots": slots}))
    engines = [line.split() for line in started.read_text(encoding="utf-8").splitlines() if "--parallel" in line]
    assert [one[one.index("--parallel") + 1] for one in engines] == ["1", "2", "4"]
    assert ["--spec-type" in one for one in engines] == guessing


@pytest.mark.parametrize(("architecture", "tried"), [("llama", True), ("mamba", False)])
def test_latency_tries_to_guess_ahead_where_the_file_allows_it(
    models_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    tried: bool,
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    if architecture == "mamba":
        write_tiny_gguf(models_file.parent.parent / "tiny.gguf", architecture="mamba", extra={"ssm.state_size": 16})
    models_file.with_name("hardware.yaml").write_text("hardware:\n  cores: 1\n", encoding="utf-8")
    assert main(["tune", "worker", "--objective", "latency", "--budget-s", "15", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measured"]
    assert any("speculation.type" in row["settings"] for row in rows) is tried
    assert not [row["refused"] for row in rows if row["refused"]]


def test_a_file_that_somebody_edits_meanwhile_is_left_to_them(
    models_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    best = Result(Point.of({"slots": 2, "threads": 1}), 20.0, 10.0, complete=True)
    edited = models_file.read_text(encoding="utf-8") + "# edited\n"

    def searched(_: object, start: Point, *__: object) -> tuple[Result, dict[Point, Row]]:
        models_file.write_text(edited, encoding="utf-8")
        return best, {start: Row(start)}

    monkeypatch.setattr(tune, "_searched", searched)
    assert main(["tune", "worker", "--apply"]) == 1
    assert "has changed while it was measured" in capsys.readouterr().err
    assert models_file.read_text(encoding="utf-8") == edited


def test_a_file_with_the_line_ends_of_another_system_keeps_them(
    models_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    before = models_file.read_bytes().replace(b"\n", b"\r\n")
    models_file.write_bytes(before)

    def searched(_: object, start: Point, *__: object) -> tuple[Result, dict[Point, Row]]:
        return Result(start.with_option({"slots": 2}), 20.0, 10.0, complete=True), {start: Row(start)}

    monkeypatch.setattr(tune, "_searched", searched)
    assert main(["tune", "worker", "--apply"]) == 0
    after = models_file.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == before.count(b"\n")
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert [line.split(b";")[0] for line in changed] == [b"    slots: 2 # chosen by hand"]


def test_a_budget_for_one_measurement_says_why_there_was_no_second(
    models_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    before = models_file.read_text(encoding="utf-8")
    assert main(["tune", "worker", "--budget-s", "0.01", "--apply"]) == 0
    told = capsys.readouterr().out
    assert "of 0.01 s were used" in told
    assert "raise --budget-s" in told
    assert models_file.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "there is no served model 'nobody', but front, specialist, worker"),
        (["front"], "front has engine noop"),
        (["worker", "--budget-s", "0"], "--budget-s takes seconds above 0"),
    ],
)
def test_what_cannot_be_tuned_is_bad_usage(
    models_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    scripted(models_file, monkeypatch, slots=1)
    assert main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_while_the_model_has_all_cores_at_work_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    model.with_name("tiny.gguf.script.json").write_text(json.dumps({"default": {"text": "ok", "delay_s": 600}}))
    noop = {"engine": "noop", "context_tokens": 4096}
    entry = {"tier": "C", "path": str(model), "engine": "llama-server", "binary": str(FAKE_BINARY)}
    models = {
        "front": {"tier": "A", **noop},
        "specialist": {"tier": "B", **noop},
        "worker": {**entry, "threads": detect().cores, "context_tokens": 2048},
    }
    folder = tmp_path / "stack"
    folder.mkdir()
    with BareStack(folder, models=models, core=("scheduler",)) as stack:
        for name in ("TIERLINE_HOME", "TIERLINE_REGISTRY"):
            monkeypatch.setenv(name, stack.environ[name])
        request = InferRequest(role="worker", messages=[ChatMessage(role="user", content="go")], max_tokens=8)
        call = threading.Thread(target=_ask, args=(stack, request), daemon=True)
        call.start()
        until(lambda: any(peer.in_flight for peer in stack.client.status().peers), "the call is at work")
        assert main(["tune", "worker", "--budget-s", "5"]) == 1
        assert "cores are at work (worker: 1 call)" in capsys.readouterr().err


def _ask(stack: BareStack, request: InferRequest) -> None:
    with Client(stack.home.hub_address, name="asker") as client:
        try:
            client.infer("worker", request, 200)
        except (CallError, BusError):
            return  # the stack is gone before the answer is there
