from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Failure
from protocol.messages.task import Submit, TaskIR
from services.ctl.artefact_files import check_folder, write_artefacts
from services.ctl.outcomes import BadInput
from services.ctl.task_file import MAX_TASK_BYTES, checked_task, read_task_fields, refused_task
from services.ctl.task_inputs import read_input
from services.kit.config import CHECKOUT
from services.kit.registry import load_registry
from services.kit.registry.yaml_lines import Document
from services.scheduler.requested import read_task

TASK = """objective: compare
plan:
  steps:
    - id: S1
      actor: worker
      action: do it
      outputs: [{name: a}]
    - id: S2
      actor: worker
      action: join
      inputs: [a]
      outputs: [{name: b}]
"""


def problems_of(folder: Path, text: str, name: str = "task.yaml") -> tuple[str, ...]:
    path = folder / name
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        checked_task(read_task_fields(path))
    return caught.value.details


def test_the_shipped_example_is_a_task_that_can_run() -> None:
    task = checked_task(read_task_fields(CHECKOUT / "deploy" / "example.yaml"))
    assert task.plan is not None
    assert len(task.plan.steps) >= 5


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "    actor: worker\n      action: join",
            "    aktor: worker\n      action: join",
            "task.yaml:9: plan.steps[S2].a",
        ),
        ("objective: compare", "objective: [1]", "task.yaml:1: objective: input should be a valid string, got [1]"),
        ("inputs: [a]", "inputs: [c]", "task.yaml:11: plan.steps[S2].inputs: no step makes 'c'"),
        ("id: S2", "id: S1", "plan.steps[S1].id: the id 'S1' is used by two steps"),
        ("action: do it", "action: do it\n      max_tokens: 0", "task.yaml:7: plan.steps[S1].max_tokens: "),
        ("action: do it", "action: do it\n      depends_on: [S2]", "the steps wait for each other: S"),
        (
            "action: do it",
            "action: do it\n      json_schema: {properties: {n: {type: nubmer}}}",
            "task.yaml:7: plan.steps[S1].json_schema: not a JSON Schema: $.properties.n.type: 'nubmer'",
        ),
        ("objective: compare", "task_type: poem\nobjective: x", "task.yaml:1: task_type: "),
        ("objective: compare", "purpose: x", "task.yaml:1: objective: the field is missing"),
        (
            "objective: compare",
            "objective: x\nobjective: y",
            "task.yaml:2: objective: the key is already set in line 1",
        ),
        ("[{name: a}]", "[{name: ../a}]", "plan.steps[S1].outputs[../a].name: "),
        ("objective: compare", "objective: compare: this", "task.yaml:1: not valid YAML"),
    ],
)
def test_a_problem_names_file_line_and_field(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in TASK
    details = problems_of(tmp_path, TASK.replace(old, new, 1))
    assert any(problem in detail for detail in details), details


STRANGERS = """objective: x
gates: [lintt]
plan:
  persona: nobody
  steps:
    - id: S1
      actor: workr
      action: do it
      spawns:
        roles: [coder, boss]
      outputs: [{name: a}]
    - id: S2
      actor: worker
      action: do it
      inputs: [b]
      outputs: [{name: c}]
"""
WHERE_STRANGERS_ARE = [
    "task.yaml:2: gates: the registry has no 'lintt'",
    "task.yaml:4: plan.persona: the registry has no 'nobody'",
    "task.yaml:7: plan.steps[S1].actor: the registry has no 'workr'; did you mean 'worker'?",
    "task.yaml:10: plan.steps[S1].spawns.roles: the registry has no 'boss'",
    "task.yaml:15: plan.steps[S2].inputs: no step makes 'b'",
]
SHIPPED = load_registry(CHECKOUT / "registry", Path("models"), check_files=False)


def test_names_that_a_registry_lacks_are_found_with_all_other_problems(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(STRANGERS)
    with pytest.raises(BadInput) as caught:
        checked_task(read_task_fields(tmp_path / "task.yaml"), SHIPPED)
    assert_each_is_told_once(caught.value.details)


def test_what_the_hub_finds_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(STRANGERS)
    document = read_task_fields(tmp_path / "task.yaml")
    task = TaskIR.model_validate(document.data)
    with pytest.raises(BadFrame) as refused:
        read_task(pack_body(Submit(task=document.data)), SHIPPED)
    message = pack_body(Failure(code="c", category="POLICY", origin="o", message="m", evidence=refused.value.evidence))
    told = refused_task(document, task, unpack_body(Failure, message))
    assert told is not None
    assert_each_is_told_once(told.details)


def test_the_hub_tells_the_first_of_many_problems_and_their_number(tmp_path: Path) -> None:
    steps = [
        {"id": f"S{n}", "actor": "worker", "action": "a", "inputs": ["x"], "outputs": [{"name": f"o{n}"}]}
        for n in range(50)
    ]
    (tmp_path / "task.json").write_text(json.dumps({"objective": "o", "plan": {"steps": steps}}))
    document = read_task_fields(tmp_path / "task.json")
    with pytest.raises(BadFrame) as refused:
        read_task(pack_body(Submit(task=document.data)), SHIPPED)
    failure = Failure(code="c", category="POLICY", origin="o", message="m", evidence=refused.value.evidence)
    told = refused_task(document, TaskIR.model_validate(document.data), failure)
    assert told is not None
    assert "50 problems" in str(told)
    assert (len(told.details), told.details[-1]) == (21, "and 30 more")


def assert_each_is_told_once(details: tuple[str, ...]) -> None:
    assert len(details) == len(WHERE_STRANGERS_ARE)
    for expected in WHERE_STRANGERS_ARE:
        assert any(detail.startswith(expected) for detail in details), (expected, details)


@pytest.mark.parametrize("evidence", [{}, {"problems": 7}, {"problems": ["x"]}, {"problems": [{"step": 1}]}])
def test_a_failure_for_another_reason_stays_what_it_is(evidence: dict[str, object]) -> None:
    task = TaskIR(objective="x")
    failure = Failure(code="c", category="POLICY", origin="o", message="m", evidence=evidence)
    assert refused_task(Document("task.yaml", {"objective": "x"}, {}), task, failure) is None


def test_an_unknown_field_is_met_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "did you mean 'max_tokens'?" in problems_of(tmp_path, TASK + "budget: {max_token: 5}\n")[0]


def test_many_problems_are_cut_with_their_number(tmp_path: Path) -> None:
    steps = [
        {"id": f"S{n}", "actor": "w", "action": "a", "inputs": ["x"], "outputs": [{"name": f"o{n}"}]} for n in range(50)
    ]
    details = problems_of(tmp_path, json.dumps({"objective": "o", "plan": {"steps": steps}}), "task.json")
    assert len(details) == 21
    assert details[-1] == "and 30 more"


def test_a_json_file_names_the_field(tmp_path: Path) -> None:
    assert problems_of(tmp_path, '{"objective": "o", "deadline_s": -1}', "t.json")[0].startswith("t.json: deadline_s: ")


@pytest.mark.parametrize(
    ("name", "text"), [("t.json", "{"), ("t.json", "[" * 100_000), ("t.yaml", "- a"), ("t.yaml", "")]
)
def test_a_file_that_is_no_task_at_all_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=r"t\.(json|yaml)"):
        read_task_fields(tmp_path / name)


def test_a_huge_file_is_refused_with_the_limit(tmp_path: Path) -> None:
    (tmp_path / "huge.yaml").write_text("#" * (MAX_TASK_BYTES + 1))
    with pytest.raises(BadInput, match=rf"the limit is {MAX_TASK_BYTES}.*--input"):
        read_task_fields(tmp_path / "huge.yaml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadInput, match=r"there is no task file nowhere\.yaml"):
        read_task_fields(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("name", "kind", "content_type"),
    [
        ("a.py", ArtefactKind.CODE, "text/x-python"),
        ("a.sh", ArtefactKind.CODE, "text/x-shellscript"),
        ("a.c", ArtefactKind.CODE, "text/x-c"),
        ("a.js", ArtefactKind.CODE, "text/javascript"),
        ("a.json", ArtefactKind.JSON, None),
        ("a.md", ArtefactKind.TEXT, None),
        ("README", ArtefactKind.TEXT, None),
    ],
)
def test_the_kind_of_an_input_follows_from_its_suffix(
    tmp_path: Path, name: str, kind: ArtefactKind, content_type: str | None
) -> None:
    (tmp_path / name).write_text("[1]")
    artefact = read_input(str(tmp_path / name))
    assert (artefact.name, artefact.kind, artefact.content_type) == (name, kind, content_type)
    assert artefact.value == ([1] if kind is ArtefactKind.JSON else "[1]")


def test_an_input_may_be_given_a_name_and_odd_file_names_are_made_fit(tmp_path: Path) -> None:
    (tmp_path / "two words ü=.md").write_text("x")
    assert read_input(f"notes={tmp_path}/two words ü=.md").name == "notes"
    assert read_input(f"{tmp_path}/two words ü=.md").name == "two_words_.md"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.md", b"\xff\xfe", "not UTF-8"),
        ("a.md", b"x" * (MAX_ARTEFACT_CHARS + 1), "larger than"),
        ("a.md", b"x" * (4 * MAX_ARTEFACT_CHARS + 1), "at most"),
    ],
)
def test_an_input_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"--input .*{name}.*{message}"):
        read_input(str(tmp_path / name))


def test_artefacts_land_in_the_folder_under_their_own_names(tmp_path: Path) -> None:
    given = [
        Artefact(name="facts", kind=ArtefactKind.JSON, value={"a": 1}),
        Artefact(name="facts.json", value="text"),
        Artefact(name="solution", kind=ArtefactKind.CODE, value="x = 1", content_type="text/x-python"),
    ]
    assert [path.name for path in write_artefacts(tmp_path, given)] == ["facts.json", "2-facts.json", "solution.py"]
    assert json.loads((tmp_path / "facts.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-facts.json", "facts.json", "solution.py"]


def test_a_link_in_the_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.write_text("precious")
    folder.mkdir()
    (folder / "notes.md").symlink_to(outside)
    write_artefacts(folder, [Artefact(name="notes", value="new")])
    assert outside.read_text() == "precious"
    assert (folder / "notes.md").read_text() == "new\n"


@pytest.mark.parametrize("name", ["../evil.md", "/etc/evil.md", ".profile.sh", "a/b.md"])
def test_a_name_that_leaves_the_folder_is_refused_even_if_the_protocol_let_it_pass(tmp_path: Path, name: str) -> None:
    hostile = Artefact.model_construct(name=name, kind=ArtefactKind.TEXT, value="x", content_type=None)
    with pytest.raises(BadInput, match="no usable file name"):
        write_artefacts(tmp_path, [hostile])
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_known_before_the_task_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="--output"):
        check_folder(tmp_path / "file" / "out")
