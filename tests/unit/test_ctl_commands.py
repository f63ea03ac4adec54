"""Exit codes and messages of the command line, through its entry point, without any service running."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from pathlib import Path

import pytest

from protocol.limits import MAX_ARTEFACT_CHARS
from services.ctl import hardware as hardware_command
from services.ctl.__main__ import GROUPS, build_parser, main
from services.ctl.bench.demo_models import DEMO_MODEL
from services.ctl.doctor import run_checks
from services.kit.config import CHECKOUT, load_home
from services.kit.registry import load_registry
from tests.fakes.gguf_files import write_tiny_gguf

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TIERLINE_REGISTRY", raising=False)
    monkeypatch.delenv("TIERLINE_MODELS", raising=False)
    monkeypatch.delenv("TIERLINE_CACHE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def bad_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", folder)
    text = (folder / "models.yaml").read_text()
    (folder / "models.yaml").write_text(text.replace("slots: 2", "slots: none", 1))
    (folder / "roles.yaml").write_text((folder / "roles.yaml").read_text().replace("model: worker", "model: wroker", 1))
    monkeypatch.setenv("TIERLINE_REGISTRY", str(folder))
    return folder


def usage(out: Out, *argv: str) -> str:
    assert main(argv) == 2
    assert main([*argv, "--json"]) == 2
    told = out.readouterr()
    error = json.loads(told.out)["error"]
    assert error["exit"] == 2
    assert f"error: {error['message']}\n" in told.err
    assert told.err.startswith("usage: tierline")
    return told.err


def test_the_command_of_a_model_is_printed_with_the_line_behind_each_flag(capsys: Out) -> None:
    assert main(["models", "--explain", "front"]) == 1  # this home has no models folder
    told = capsys.readouterr().out
    assert "--ctx-size" in told
    assert "models.yaml:18 front.context_tokens" in told
    assert "refused: cannot open the model file" in told
    assert main(["models", "--explain", "fron"]) == 2
    assert "front, specialist, worker" in capsys.readouterr().err


def test_saved_contexts_for_which_the_disk_has_no_room_are_told_with_the_line_that_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    models, registry = tmp_path / "models", tmp_path / "registry"
    models.mkdir()
    write_tiny_gguf(models / "m.gguf", context_tokens=4096)
    monkeypatch.setenv("TIERLINE_MODELS", str(models))
    monkeypatch.setenv("TIERLINE_REGISTRY", str(registry))
    registry.mkdir()
    entry = "  m:\n    tier: A\n    path: m.gguf\n    prefix_disk_bytes: {size}\n"
    (registry / "roles.yaml").write_text(
        "roles:\n  tester:\n    {description: tests, model: m, prompt: Answer., max_tokens: 16}\n"
    )
    for file in ("personas", "gates"):
        (registry / f"{file}.yaml").write_text(f"{file}: {{}}\n")
    for file in ("failures", "hardware"):
        shutil.copy(CHECKOUT / "registry" / f"{file}.yaml", registry)
    for command in (["registry", "check"], ["models", "--explain", "m"]):
        (registry / "models.yaml").write_text("models:\n" + entry.format(size=2**50))
        main([*command, "--json"])
        told = capsys.readouterr().out
        (note,) = (one for one in json.loads(told)["notes"] if "prefix-disk" in one)
        assert note.startswith("models.yaml:5: models.m.prefix_disk_bytes: no beginnings and contexts")
        (registry / "models.yaml").write_text("models:\n" + entry.format(size=1024**2))
        main([*command, "--json"])
        assert "prefix-disk" not in capsys.readouterr().out


def test_a_command_is_needed_and_the_wrong_one_is_met_with_the_list(capsys: Out) -> None:
    assert "required: COMMAND" in usage(capsys)
    assert "'doctor'" in usage(capsys, "docter")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "x", "--priority", "urgent"], "'interactive', 'batch'"),
        (["run", "x", "--max-tokens", "many"], "--max-tokens"),
        (["run", "x", "--type", "poem"], "'chat'"),
        (["show"], "TASK"),
        (["registry"], "COMMAND"),
        (["bench", "barrier", "--runs", "0"], "a whole number from 1"),
        (["bench", "prefix", "--runs", "-1"], "a whole number from 1"),
        (["bench", "overhead", "--runs", "-1"], "a whole number from 1"),
        (["bench", "overhead", "--history", "0"], "a whole number from 1"),
    ],
)
def test_bad_usage_says_what_is_possible(capsys: Out, argv: list[str], words: str) -> None:
    assert words in usage(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], "give either an objective"),
        (["run", "x", "--file", "task.yaml"], "give either an objective"),
        (["submit", "--file", "missing.yaml"], "missing.yaml"),
        (["run", "x", "--input", "missing.md"], "missing.md"),
        (["run", "x", "--deadline", "-1"], "deadline_s: "),
        (["run", "x", "--max-tokens", "0"], "budget.max_tokens: "),
        (["plan", "x", "--tokens-per-s", "0"], "--tokens-per-s"),
        (["plan", "x", "--gates", "no-such-gate"], "no-such-gate"),
        (["list", "--limit", "0"], "--limit 0"),
        (["bench", "soak", "--seconds", "nan"], "--seconds nan"),
        (["bench", "soak", "--clients", "-4"], "--clients -4"),
        (["bench", "soak", "--kill-every", "0"], "--kill-every 0"),
        (["tail", "nothing"], "nothing"),
        (["models", "load", "front", "--wait", "nan"], "--wait nan"),
        (["registry", "reload", "--timeout", "-1"], "--timeout -1"),
        (["tune", "front", "--budget-s", "nan"], "--budget-s takes seconds above 0"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(capsys: Out, argv: list[str], words: str) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (b'"one"\nnot JSON\n', ":2: not JSON"),
        (b'"one"\n\n["two"]\n', ":3: no prompt"),
        (b'"one"\n"half a pair \\ud800"\n', ":2: no prompt"),
        (b'"one"\n"%s"\n' % (b"x" * (MAX_ARTEFACT_CHARS + 1)), ":2: no prompt: String should have at most"),
        (b'"one"\n"caf\xe9"\n', ":2: not UTF-8"),
        (b"\n \n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named_by_file_and_line(
    tmp_path: Path, capsys: Out, prompts: bytes, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(prompts)
    assert main(["batch", "worker", "--file", str(file)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert words in told


def test_prompts_from_a_standard_input_that_is_closed_are_bad_input(
    capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of a descriptor that is closed
    assert main(["batch", "worker", "--file", "-"]) == 2
    assert "name a file" in capsys.readouterr().err


def test_only_a_line_feed_ends_a_prompt_and_a_byte_order_mark_is_none(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff"one"\r\n"a line\u2028another\x85third"\n'.encode())
    assert main(["batch", "worker", "--file", str(file)]) == 3, "read, and no hub is there"
    assert "tierline up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("[]", "is an object"),
        ("{", "not JSON"),
        ('{"type": "objekt"}', "$.type"),
        ('{"type": "number", "maximum": NaN}', "NaN"),
        ('{"type": "integer", "maximum": 1%s}' % ("0" * 30), "cannot be written"),
    ],
)
def test_a_batch_is_not_begun_with_a_schema_that_every_answer_would_fail_for(
    tmp_path: Path, capsys: Out, schema: str, words: str
) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "schema.json"
    prompts.write_text('"one"\n', "utf-8")
    file.write_text(schema, "utf-8")
    assert main(["batch", "worker", "--file", str(prompts), "--schema", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"--schema {file}" in told
    assert words in told
    assert main(["batch", "worker", "--file", str(prompts), "--timeout", "nan"]) == 2


@pytest.mark.parametrize(
    "argv",
    [["run", "x"], ["submit", "x"], ["show", "t"], ["watch", "t"], ["cancel", "t"], ["list"], ["explain", "t"]],
)
def test_without_a_hub_every_task_command_exits_3_and_says_how_to_start_one(capsys: Out, argv: list[str]) -> None:
    assert main(argv) == 3
    assert "tierline up" in capsys.readouterr().err
    assert main([*argv, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit"] == 3
    assert "tierline up" in error["message"]


def test_a_socket_that_nobody_listens_on_is_no_hub(home: Path, capsys: Out) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run" / "hub.sock").touch()
    assert main(["list"]) == 3
    assert "tierline up" in capsys.readouterr().err


def test_status_of_a_stopped_stack_exits_3(capsys: Out) -> None:
    assert main(["status", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["hub"] is None


def test_down_of_a_stopped_stack_is_no_error(capsys: Out) -> None:
    assert main(["down"]) == 0
    assert "nothing was running" in capsys.readouterr().out


def test_up_refuses_a_bad_registry_with_file_and_line(bad_registry: Path, capsys: Out) -> None:
    assert main(["up"]) == 2
    assert "models.yaml:" in capsys.readouterr().err


def test_registry_check_prints_every_problem_with_file_and_line(bad_registry: Path, capsys: Out) -> None:
    assert main(["registry", "check", "--no-files"]) == 2
    err = capsys.readouterr().err
    assert "models.front.slots" in err
    assert "wroker" in err
    assert "models.yaml:" in err
    assert "roles.yaml:" in err


def test_registry_check_of_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TIERLINE_REGISTRY", str(tmp_path / "nowhere"))
    assert main(["registry", "check", "--json"]) == 2
    assert "nowhere" in json.loads(capsys.readouterr().out)["error"]["details"][0]


def test_the_shipped_registry_is_good(capsys: Out) -> None:
    assert main(["registry", "check", "--no-files"]) == 0
    assert main(["roles", "--json"]) == 0
    assert main(["models"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_plan_shows_the_example_without_running_anything(home: Path, capsys: Out) -> None:
    assert main(["plan", "--file", str(CHECKOUT / "deploy" / "example.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["source"] == "client"
    assert [(edge["step"], edge["depends_on"]) for edge in plan["removed_edges"]] == [("S6", "S5")]
    forecast = plan["forecast"]
    assert (forecast["levels"], forecast["width"]) == (3, 3)
    assert forecast["critical"] == ["S1", "S2", "S6"]
    assert forecast["critical_s"] == pytest.approx((60 + 60 + 160) / 30)
    assert forecast["tokens"] == 600
    assert {model["name"] for model in forecast["models"]} == {"front", "worker"}
    before, after = plan["discovery"]["before"], plan["discovery"]["after"]
    assert (after["levels"], after["width"], after["predicted_s"]) == (3, 3, forecast["makespan_s"])
    assert before["predicted_s"] > after["predicted_s"]
    assert not home.exists()


def test_plan_of_an_objective_uses_the_rules_and_says_why(capsys: Out) -> None:
    assert main(["plan", "compare apples, pears and plums", "--type", "doc"]) == 0
    out = capsys.readouterr().out
    assert "plan by rules" in out
    assert "critical path" in out
    assert "\x1b" not in out


def test_json_may_stand_before_or_after_the_command() -> None:
    parser = build_parser()
    assert parser.parse_args(["--json", "list"]).json
    assert parser.parse_args(["list", "--json"]).json
    assert not parser.parse_args(["list"]).json


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_adds_the_commands_that_it_is_found_by(group: str) -> None:
    added = [name for name, parser in _commands([GROUPS[group][0]]).items() if parser.prog.startswith("tierline ")]
    assert tuple(added) == GROUPS[group]


def test_all_groups_are_there_when_no_command_is_named() -> None:
    everything = [name for names in GROUPS.values() for name in names]
    assert list(_commands([])) == list(_commands(["--help"])) == list(_commands(["nonsense"])) == everything


def test_a_command_imports_no_other_group() -> None:
    code = (
        "import sys; from services.ctl.__main__ import build_parser; build_parser(['--json', 'list']);"
        "print(*(name for name in sys.modules if name.startswith('services.')))"
    )
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "services.ctl.tasks" in imported
    assert not {"services.ctl.bench", "services.ctl.stack", "services.memory.routing"} & set(imported)


def _commands(argv: list[str]) -> dict[str, ArgumentParser]:
    for action in build_parser(argv)._actions:
        if isinstance(action, _SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def test_doctor_says_for_every_check_what_to_do(capsys: Out) -> None:
    assert main(["doctor", "--json"]) == 1  # this home has no model files
    checks = json.loads(capsys.readouterr().out)["checks"]
    names = {check["name"] for check in checks}
    assert {"python", "socket path", "disk", "memory", "sandbox", "gate tools", "model front", "engine front"} <= names
    assert all(check["advice"] for check in checks if check["verdict"] != "ok")
    assert any(check["name"] == "model front" and check["verdict"] == "fail" for check in checks)


def test_doctor_finds_a_home_whose_socket_paths_are_too_long(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TIERLINE_HOME", "/tmp/" + "x" * 90)
    main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["socket path"]["verdict"] == "fail"


@pytest.mark.parametrize("below", ["", "/home"])
def test_a_home_that_cannot_be_one_is_said_by_doctor_up_and_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out, below: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIERLINE_HOME", f"{tmp_path}/file{below}")
    assert main(["doctor", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["home"]["verdict"] == "fail"
    for argv in (["up"], ["registry", "reload"]):
        assert main(argv) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path}/file{below} cannot be used" in told
        assert "TIERLINE_HOME" in told


def test_a_level_of_the_log_that_does_not_exist_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TIERLINE_LOG_LEVEL", "loud")
    assert main(["doctor"]) == 2
    assert "TIERLINE_LOG_LEVEL is 'loud'" in capsys.readouterr().err


def test_doctor_finds_a_run_folder_that_others_can_enter(home: Path, capsys: Out) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run").chmod(0o755)
    main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["home"]["verdict"] == "fail"
    assert "chmod 700" in checks["home"]["advice"]


def test_doctor_writes_what_it_detects_into_hardware_yaml_and_keeps_the_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", folder)
    monkeypatch.setenv("TIERLINE_REGISTRY", str(folder))
    machine = hardware_command.detect()  # once: a machine that is shared may have another size a moment later
    monkeypatch.setattr(hardware_command, "detect", lambda: machine)
    before = (folder / "hardware.yaml").read_text()
    assert main(["doctor", "--detect"]) == 0
    shown = capsys.readouterr().out
    assert (folder / "hardware.yaml").read_text() == before, "without --write nothing changes"
    assert main(["doctor", "--detect", "--write", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = (folder / "hardware.yaml").read_text()
    assert written == shown
    assert before.splitlines()[0] == written.splitlines()[0], "comments stay"
    hardware = load_registry(folder, tmp_path, check_files=False).hardware
    assert (hardware.cores, hardware.memory_bytes) == (found["cores"], found["memory_bytes"])
    assert [list(node.cores) for node in hardware.nodes] == [node["cores"] for node in found["nodes"]]
    assert main(["doctor", "--write"]) == 2
    assert not list(folder.glob(".detect-*"))


def test_doctor_does_not_write_into_a_hardware_file_that_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", folder)
    monkeypatch.setenv("TIERLINE_REGISTRY", str(folder))
    broken = "hardware:\n  coers: 2\n"
    (folder / "hardware.yaml").write_text(broken)
    assert main(["doctor", "--detect", "--write"]) == 2
    assert "did you mean 'cores'" in capsys.readouterr().err
    assert (folder / "hardware.yaml").read_text() == broken
    (folder / "hardware.yaml").write_bytes(b"hardware: \xff")
    assert main(["doctor", "--detect", "--write"]) == 2
    assert "hardware.yaml is not UTF-8 (byte 10); save it as UTF-8" in capsys.readouterr().err
    monkeypatch.setenv("TIERLINE_REGISTRY", str(folder / "nowhere"))
    assert main(["doctor", "--detect", "--write"]) == 2
    assert "No such file or directory; TIERLINE_REGISTRY names its folder" in capsys.readouterr().err


def test_the_doctor_says_what_a_service_would_refuse_at_its_start(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", folder, ignore=shutil.ignore_patterns("examples", "schema"))
    text = (folder / "models.yaml").read_text()
    (folder / "models.yaml").write_text(text.replace("    slots: 2\n", "    slots: 2\n    experts: 4\n", 1))
    monkeypatch.setenv("TIERLINE_REGISTRY", str(folder))
    monkeypatch.setenv("PATH", "/nowhere")  # so that the embedded engine is the one
    models = home / "cache" / "models"
    models.mkdir(parents=True)
    write_tiny_gguf(models / DEMO_MODEL)
    checks = {check.name: check for check in run_checks(load_home())}
    assert checks["command worker"].verdict == "ok"
    refused = checks["command front"]
    assert refused.verdict == "fail"
    assert "engine embedded cannot do --override-kv (field experts, models.yaml:18)" in refused.message
    assert "(rule: experts-dense)" in refused.message
    assert refused.advice == "tierline models --explain front"
