"""The page of a task: complete, self-contained, and harmless whatever the models wrote into the task."""

from __future__ import annotations

import os
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from protocol.header import Header
from protocol.messages.artefact import Artefact
from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.gate import GateResult, Verdict
from protocol.messages.plan import RemovedEdge
from protocol.messages.result import TaskView
from services.ctl.chart import chart
from services.ctl.outcomes import BadInput
from services.ctl.page import page
from services.ctl.page_style import SCRIPT, STYLE
from services.ctl.tasks import _write_page
from tests.unit.simulation import Answer, final_of, say, stack, task_of

VOID = {"meta", "br"}
PAGE = {"html", "head", "title", "style", "body", "main", "script", "p", "h1", "h2", "div", "span", "b", "code", "pre"}
PARTS = {"ul", "li", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
DRAWN = {"svg", "g", "text", "rect", "line", "circle"}
TAGS = VOID | PAGE | PARTS | DRAWN


class Read(HTMLParser):
    """What a browser would make of the page: elements with attributes, and the text inside each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        """Attributes of all elements of a kind, of those with a class if `name` is given."""
        found = [attributes for one, attributes in self.elements if one == tag]
        return [one for one in found if not name or name in (one.get("class") or "").split()]

    def text(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.texts if not tags or tag in tags)


def diamond() -> TaskView:
    took = {"A": 1_000, "B": 3_000, "C": 500, "D": 200}
    failures = {"C": 1}

    def infer(header: Header, body: bytes) -> Answer:
        if failures.pop(header.step or "", None):
            return 300, Failure(code="answer.bad", category=Category.CODE, origin="test", message="the first try")
        return took[header.step or ""], final_of("fine")

    world = stack(infer)
    steps: list[dict[str, object]] = [
        {"id": "A"},
        {"id": "B", "inputs": ["A.out"], "gates": ["lint"]},
        {"id": "C", "inputs": ["A.out"]},
        {"id": "D", "inputs": ["B.out", "C.out"]},
    ]
    return world.finish(world.submit(task_of(steps, gates=["lint"], objective="Make a diamond")))


def test_a_finished_task_is_told_whole() -> None:
    view = diamond()
    read = Read(page(view, 0))
    said = read.text()
    for expected in (
        "Make a diamond",
        "succeeded",
        "wall clock",
        "CriticalSteps, of all steps",
        "lower bound: the longest chain",
        "predicted",
        "achieved",
        "needs B, C",
        "CODE answer.bad (test)",
        "the first try",
        "CODE: retry 1 of 2 in the same role)",
        "lint pass",
        "5 attempts",
        "inference-worker",
        "fine",
    ):
        assert expected in said
    steps = [text for tag, text in read.texts if tag == "span" and len(text) == 1 and text in "ABCD"]
    assert steps[-3:] == ["A", "B", "D"], "the achieved path, after the predicted one"
    assert len(read.all("tr")) == 1 + 5, "a row per attempt"


def test_the_chart_has_a_row_per_step_its_stretches_slack_and_dependencies() -> None:
    read = Read(chart(diamond(), 0))
    assert [one["class"] for one in read.all("g", "row")] == ["row", "row", "row aside", "row"], "C is not on the path"
    assert len(read.all("g", "edge")) == 4
    assert len(read.all("g", "critical")) == 2
    assert len(read.all("line", "slack")) == 1 + 1, "of C, and the legend's"
    tips = read.text("title")
    assert "C#1: failed or lost run, 0.30 s" in tips
    assert "C#2: inference, 0.50 s" in tips
    assert "C: could have ended" in tips
    assert "B: inference, 3.00 s, 71 % of the wall clock" in tips
    legend = read.text("span")
    assert "inference" in legend
    assert "no worker ready" not in legend


def test_bars_stand_where_the_time_was_spent() -> None:
    view = diamond()
    read = Read(chart(view, 0))
    wall = view.ended_ms - view.created_ms if view.ended_ms else 0
    drawn = [
        (float((one["x"] or "")[:-1]), float((one["width"] or "")[:-1]))
        for one in read.all("rect", "inference")
        if "%" in (one.get("width") or "")
    ]
    expected = [
        (100 * (one.start_ms - view.created_ms) / wall, 100 * (one.end_ms - one.start_ms) / wall)
        for step in view.steps
        for attempt in step.attempts
        for one in attempt.segments
        if one.what == "inference"
    ]
    for x, width in expected:
        assert any(abs(x - at) < 0.01 and abs(width - wide) < 0.01 for at, wide in drawn)
    assert all(0 <= x <= 100 and x + width <= 100.2 for x, width in drawn)


HOSTILE = (
    "</title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover='alert(3)' "
    "<svg onload=alert(4)>&lt;script&gt;]]><!-- \u202e\x1b[31m\x00 javascript:alert(5)"
)


def poisoned() -> TaskView:
    """A task in which everything that a model, a peer or a client may have written is an attack."""
    view = diamond()
    finding = Finding(gate="unit", category=Category.CODE, message=HOSTILE).model_copy(
        update={"file": HOSTILE, "rule": HOSTILE}
    )
    failure = Failure(code="x", category=Category.CODE, origin="x", message=HOSTILE).model_copy(
        update={"code": HOSTILE, "origin": HOSTILE, "findings": [finding]}
    )
    gate = GateResult(
        gate="lint", verdict=Verdict.FAIL, category=Category.CODE, message=HOSTILE, started_ms=0, ended_ms=1
    ).model_copy(update={"gate": HOSTILE})
    assert view.critical_path is not None
    assert view.critical_path.predicted is not None
    assert view.plan is not None
    steps = []
    for step in view.steps:
        attempts = [
            one.model_copy(
                update={
                    "role": HOSTILE,
                    "model": HOSTILE,
                    "worker": HOSTILE,
                    "gates": [gate],
                    "failure": failure,
                    "action": HOSTILE,
                }
            )
            for one in step.attempts
        ]
        update = {"id": f"{step.id}{HOSTILE}", "needs": [f"{one}{HOSTILE}" for one in step.needs], "attempts": attempts}
        steps.append(step.model_copy(update={"action": HOSTILE, "actor": HOSTILE, "failure": failure, **update}))
    steps.append(steps[0].model_copy(update={"id": f"E{HOSTILE}", "attempts": [], "ready_ms": None}))
    path = [  # short enough to be written into its stretch
        one if one.step is None else one.model_copy(update={"step": f"<i>{one.step}"})
        for one in view.critical_path.path
    ]
    critical = view.critical_path.model_copy(
        update={
            "path": path,
            "bound_by": HOSTILE,
            "slack_ms": {f"{name}{HOSTILE}": 10 for name in view.critical_path.slack_ms},
            "predicted": view.critical_path.predicted.model_copy(update={"steps": [HOSTILE, HOSTILE]}),
        }
    )
    plan = view.plan.model_copy(
        update={
            "source": HOSTILE,
            "reason": HOSTILE,
            "removed_edges": [RemovedEdge(step="A", depends_on="B", reason="x").model_copy(update={"reason": HOSTILE})],
        }
    )
    artefact = Artefact(name="a", value="").model_copy(update={"name": HOSTILE, "value": HOSTILE})
    return view.model_copy(
        update={
            "task_id": HOSTILE,
            "objective": HOSTILE,
            "task_type": HOSTILE,
            "priority": HOSTILE,
            "steps": steps,
            "critical_path": critical,
            "plan": plan,
            "failure": failure,
            "gates": [gate],
            "artefacts": [artefact, artefact],
        }
    )


def test_nothing_that_a_model_wrote_becomes_an_element_an_attribute_or_a_script() -> None:
    text = page(poisoned(), 0)
    read = Read(text)
    assert {tag for tag, _ in read.elements} <= TAGS
    assert [data for tag, data in read.texts if tag == "script"] == [SCRIPT]
    assert [data for tag, data in read.texts if tag == "style"] == [STYLE]
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            assert name not in ("src", "href", "style", "srcdoc", "xlink:href", "action"), f"<{tag} {name}>"
            if name not in ("title", "content", "aria-label"):
                assert "alert" not in (value or ""), f"<{tag} {name}={value}>"
    assert "alert(1)" in read.text("h1"), "the words are shown, as words"
    assert not set(text) & {"\u202e", "\x1b", "\x00"}


def test_a_plain_task_and_a_poisoned_one_have_the_same_elements() -> None:
    plain, poison = (Read(chart(view, 0)) for view in (diamond(), poisoned()))
    assert len(poison.all("li")) == len(plain.all("li")) + 1, "one step more"
    assert len(poison.all("g", "edge")) == len(plain.all("g", "edge"))
    assert "<i>B" in poison.text("text")


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    read = Read(page(diamond(), 0))
    policy = next(one["content"] for one in read.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        (written,) = [data for at, data in read.texts if at == tag]
        assert rules[name] == f"'sha256-{b64encode(sha256(written.encode()).digest()).decode()}'"
    assert "http" not in STYLE + SCRIPT
    assert "url(" not in STYLE


def test_a_running_task_and_one_that_was_never_planned_have_pages_too() -> None:
    world = stack(say("fine", 2_000), slots=1)
    task = world.submit(task_of([{"id": "A"}, {"id": "B"}, {"id": "C", "inputs": ["A.out"]}]))
    world.run_for(1_000)
    read = Read(page(world.view(task), world.now))
    assert "A: inference, 0.9" in read.text("title")
    assert "B: waiting for a slot, 0.9" in read.text("title")
    assert "waiting" in read.text("span")
    world.peers["planner"].kill()
    unplanned = world.submit(task_of([{"id": "A"}]))
    assert "planning" in Read(page(world.view(unplanned), world.now)).text()


@pytest.mark.parametrize("count", [31, 151])
def test_many_steps_make_lower_rows_and_hide_all_but_the_lines_that_matter(count: int) -> None:
    world = stack(say("fine", 100))
    steps: list[dict[str, object]] = [{"id": "A"}]
    steps += [{"id": f"B{n}", "inputs": ["A.out"]} for n in range(count - 1)]
    read = Read(chart(world.finish(world.submit(task_of(steps))), 0))
    (grid,) = [one["class"] for one in read.all("div", "chart")]
    assert grid == ("chart dense" if count == 31 else "chart packed many")
    assert len(read.all("g", "edge")) == count - 1


def test_a_page_is_written_whole_or_the_reason_is_said(tmp_path: Path) -> None:
    file = tmp_path / "task.html"
    _write_page(file, "old")
    _write_page(file, "new")
    assert file.read_text("utf-8") == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["task.html"]
    with pytest.raises(BadInput, match=r"--html .*nowhere.*: No such file or directory"):
        _write_page(tmp_path / "nowhere" / "task.html", "text")
    with pytest.raises(BadInput, match="Is a directory"):
        _write_page(tmp_path, "text")
    assert not list(tmp_path.parent.glob(".*draft")), "what could not be put in place is not left behind"


def test_a_page_goes_into_a_pipe_and_through_a_link_and_takes_neither_away(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    link.symlink_to(file)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        _write_page(pipe, "page")
        assert read.result(timeout=10) == "page"
    assert pipe.is_fifo()
    file.write_text("old")
    _write_page(link, "page")
    assert link.is_symlink()
    assert file.read_text() == "page"


def test_an_assignment_names_its_sub_agent() -> None:
    view = diamond()
    first = view.steps[0].model_copy(update={"agent": "<b>ann"})
    assert "sub-agent &lt;b&gt;ann" in page(view.model_copy(update={"steps": [first, *view.steps[1:]]}), 0)
