"""Odd but legal tasks for the planner's property tests, and the registry that ships."""

from pathlib import Path

from hypothesis import strategies as st

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.memory import Advise, Advised
from protocol.messages.task import Budget, TaskIR, TaskType
from services.kit.config import CHECKOUT
from services.kit.registry import Registry, load_registry


def advice_for(asked: Advise, *, last: bool) -> list[Advised]:
    """What a memory would answer that always prefers the last option, or always the rules' choice."""
    return [
        Advised(
            key=question.key,
            subject=question.subject,
            rules_choice=question.rules_choice,
            learned_choice=question.options[-1].choice if last else question.rules_choice,
            choice=question.options[-1].choice if last else question.rules_choice,
            won="learned" if last else "rules",
            propensity=0.9,
            confidence=0.8,
            evidence=12,
            why=f"learned: {question.options[-1].choice}" if last else "rules, and outcomes agree",
        )
        for question in asked.questions
    ]


SHIPPED: Registry = load_registry(CHECKOUT / "registry", Path("models"), check_files=False)

_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}", fullmatch=True) | st.sampled_from(
    [
        "answer",
        "Answer.md",
        "document",
        "solution.py",
        "solution",
        "part_1",
        "notes_a",
        "notes_a.md",
        "step1",
        "draft",
        "S1",
    ]
)
_SEPARATORS = st.sampled_from(["; ", "\n- ", "\n1. ", ", ", " and ", "? ", "、", "\uff1b", " vs "])
_TEXT = st.text(min_size=1, max_size=60)


@st.composite
def objectives(draw: st.DrawFn) -> str:
    pieces = draw(st.lists(_TEXT, min_size=1, max_size=30))
    text = draw(_SEPARATORS).join(pieces)
    return draw(st.sampled_from(["", "compare ", "Tell me about "])) + text


@st.composite
def inputs(draw: st.DrawFn, max_size: int = 8) -> list[Artefact]:
    names = draw(st.lists(_NAMES, max_size=max_size, unique=True))
    return [
        Artefact(
            name=name,
            kind=draw(st.sampled_from(list(ArtefactKind))),
            value=draw(
                st.sampled_from(["", "text", "from calc import add\ndef test_add():\n    assert add(1, 1) == 2\n"])
            ),
        )
        for name in names
    ]


@st.composite
def tasks(draw: st.DrawFn, max_inputs: int = 8) -> TaskIR:
    budget = Budget(
        max_steps=draw(st.sampled_from([1, 2, 3, 4, 5, 9, 1_000])), max_tokens=draw(st.sampled_from([1, 100, 200_000]))
    )
    return TaskIR(
        task_id="t1",
        task_type=draw(st.sampled_from(list(TaskType))),
        objective=draw(objectives()),
        constraints=draw(st.lists(_TEXT, max_size=3)),
        inputs=draw(inputs(max_inputs)),
        budget=budget,
    )


def task(objective: str, task_type: str = "chat", *names: str, **fields: object) -> TaskIR:
    """A task with text inputs of these names (code, where a name ends in .py)."""
    given = [
        Artefact(name=name, kind=ArtefactKind.CODE if name.endswith(".py") else ArtefactKind.TEXT, value="x = 1\n")
        for name in names
    ]
    return TaskIR.model_validate(
        {"task_id": "t1", "task_type": task_type, "objective": objective, "inputs": given, **fields}
    )
