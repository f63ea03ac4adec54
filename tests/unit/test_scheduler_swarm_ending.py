"""How the turns of a planning model come to an end, and what stands for an answer that it does not give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateResult
from protocol.messages.result import StepState, TaskState
from tests.unit.simulation import Answer, final_of, stack, task_of
from tests.unit.test_scheduler_swarm import AFTER, LEADER, Script, assign, create, finished, ran


def test_a_model_that_never_answers_is_made_to() -> None:
    script = Script({"calls": [assign("nobody")]})
    result = ran(script)
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "turn.answer_wanted"
    last = script.asked["L.turn4"]
    assert last.json_schema is None, "it may only answer, and is asked for the text itself"
    assert "Answer with the text itself and nothing else." in last.messages[-1].content


def test_a_leader_of_json_is_made_to_answer_under_its_schema() -> None:
    script = Script(
        {"calls": [assign("nobody")]}, {"calls": [assign("nobody")]}, {"calls": [assign("no")]}, {"answer": {}}
    )
    leader = LEADER | {"outputs": [{"name": "L.out", "kind": "json"}]}
    assert ran(script, steps=[leader, AFTER]).state is TaskState.SUCCEEDED
    last = script.asked["L.turn4"].json_schema
    assert last is not None
    assert last["required"] == ["answer"]
    assert '{"answer": the result}' in script.prompt("L.turn4")


@pytest.mark.parametrize("said", ["Red, green and blue.", json.dumps({"answer": "Red, green and blue."})])
def test_a_turn_that_may_only_answer_may_do_so_with_the_text_itself(said: str) -> None:
    bad = {"calls": [create("ann"), assign("ann"), assign("nobody")]}
    script = Script(bad, said)
    result = ran(script, steps=[LEADER | {"spawns": {"max_turns": 2}}, AFTER])
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert ">\nRed, green and blue.\n<" in script.prompt("E")
    assert "made by L.ann.1" in script.prompt("L.turn2")


def stuck(calls: Sequence[Any], fail: Failure | None = None) -> Script:
    """A leader whose every turn makes the same calls; one that may only answer fails, if so."""

    class Stuck(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            step = header.step or ""
            may_call = "anyOf" in (self.asked[step].json_schema or {})
            return took_ms, fail if fail is not None and step.startswith("L.turn") and not may_call else final

    return Stuck({"calls": list(calls)})


LOOPING = '{ "answer": "red, green and blue and red and blue and red and blue'
LOOPED = Failure(
    code="decoding.repetition",
    category=Category.EARLY_ABORT,
    origin="inference-specialist",
    message="it repeats itself",
    evidence={"answer": LOOPING, "first_char": LOOPING.index(" and red"), "repeated": " and red and blue"},
)
PLAINLY = LOOPED.model_copy(
    update={"evidence": LOOPED.evidence | {"answer": LOOPING[13:], "first_char": LOOPING.index(" and red") - 13}}
)
NO_ANSWER = LOOPED.model_copy(update={"evidence": {"answer": '{ "calls": [', "first_char": 3, "repeated": "x"}})


@pytest.mark.parametrize(
    "calls",
    [[create("ann"), assign("ann")], [assign("nobody")], [{"tool": "run_shell"}]],
    ids=["the same work", "a stranger", "no tool"],
)
def test_a_leader_that_does_nothing_new_for_three_turns_is_told_why_and_may_only_answer(calls: list[Any]) -> None:
    class Led(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            if (header.step or "").startswith("L.turn") and "No further tool call" in self.prompt(header.step or ""):
                final = final_of(json.dumps({"answer": "at last"}))
            return took_ms, final

    script = Led({"calls": calls})
    result = ran(script)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    swarm = result.swarms[0]
    assert swarm.turns == 4 + (calls[-1] == assign("ann"))  # the first time that work is given, it is new
    assert swarm.ending == "3 turns in a row gave no new work"
    last = script.prompt(f"L.turn{swarm.turns}")
    assert "No further tool call is possible: 3 turns in a row gave no new work." in last
    assert "at last" in script.prompt("E")


def test_sub_agents_that_are_made_while_others_have_no_work_are_nothing_new() -> None:
    turns = [{"calls": [create(f"a{number}")]} for number in range(4)] + [{"answer": "fine"}]
    script = Script(*turns)
    assert ran(script).state is TaskState.SUCCEEDED
    assert "only" not in script.prompt("L.turn4")
    assert "3 turns in a row" in script.prompt("L.turn5")


@pytest.mark.parametrize(("most", "turns"), [(None, 32), (4, 4), (1, 1)])
def test_turns_are_bounded_and_what_sub_agents_brought_stands_for_an_answer_that_never_comes(
    most: int | None, turns: int
) -> None:
    class Endless(Script):
        """New work in every turn, and never an answer."""

        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            step = header.step or ""
            if step.startswith("L.turn"):
                new = [create(f"a{step[6:]}"), assign(f"a{step[6:]}", f"count {step}")]
                final = final_of(json.dumps({"calls": new}))
            return took_ms, final

    script = Endless("")
    result = ran(script, steps=[LEADER | {"spawns": {"max_turns": most}}, AFTER])
    assert result.swarms is not None
    assert result.swarms[0].turns == turns
    if turns == 1:
        assert result.failure is not None
        assert result.failure.code == "turn.answer_wanted"
        return
    assert result.state is TaskState.SUCCEEDED, result.failure
    told = f"turn {turns} is the last one; turn {turns} failed (turn.answer_wanted), so what its sub-agents brought"
    assert result.swarms[0].ending == f"{told} stands for its answer"
    brought = [f"made by L.a{number}.1" for number in range(1, turns)]
    assert "\n\n".join(brought) in script.prompt("E")
    assert f"{turns} turns, the one that answers included" in script.prompt("L.turn1")


def test_a_turn_that_fails_for_good_leads_to_the_answer() -> None:
    class Loops(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            return took_ms, NO_ANSWER if header.step == "L.turn2" else final

    script = Loops({"calls": [create("ann"), assign("ann")]}, "", {"answer": "fine"})
    world = stack(script)
    task = world.submit(task_of([LEADER, AFTER]))
    result = finished(world, task)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert {step.id: step.state for step in result.steps}["L.turn2"] is StepState.FAILED
    assert result.swarms is not None
    assert result.swarms[0].ending == "turn 2 failed (decoding.repetition)"
    assert "No further tool call is possible: turn 2 failed (decoding.repetition)." in script.prompt("L.turn3")
    assert "made by L.ann.1" in script.prompt("L.turn3")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (LOOPED, "\nred, green and blue and red and blue\n"),
        (PLAINLY, "\nred, green and blue and red and blue\n"),
        (NO_ANSWER, "\nmade by L.ann.1\n"),
    ],
    ids=["what it had begun to write", "without an object around it", "what its sub-agents brought"],
)
def test_where_the_last_turn_fails_as_well_the_text_there_is_stands_for_the_answer(
    failure: Failure, words: str
) -> None:
    script = stuck([create("ann"), assign("ann")], failure)
    result = ran(script)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert words in script.prompt("E")


@pytest.mark.parametrize(
    "more",
    [{"outputs": [{"name": "L.out", "kind": "json"}]}, {"outputs": [{"name": "L.out", "kind": "code"}]}],
    ids=["json", "code"],
)
def test_no_text_stands_for_json_or_code(more: dict[str, Any]) -> None:
    result = ran(stuck([create("ann"), assign("ann")], LOOPED), steps=[LEADER | more, AFTER])
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "decoding.repetition"


@pytest.mark.parametrize("answers", [True, False], ids=["an answer that its gates refuse", "no answer for them"])
def test_nothing_stands_for_an_answer_that_gates_would_have_judged(answers: bool) -> None:
    def refuse(_header: Header, _body: bytes) -> Answer:
        refused = {"gate": "lint", "verdict": "fail", "category": "CODE", "started_ms": 0, "ended_ms": 1}
        return 10, GateFinal(results=[GateResult.model_validate(refused)])

    again = {"calls": [create("ann"), assign("ann")]}
    script = Script(again, {"answer": "bad"}) if answers else stuck(again["calls"], LOOPED)
    world = stack(script)
    world.peers["gates"].answer = refuse
    result = finished(world, world.submit(task_of([LEADER | {"gates": ["lint"]}, AFTER])))
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == ("gate.lint" if answers else "decoding.repetition")
    assert not answers or "L.turn3" not in script.runs


def test_a_leader_whose_worker_dies_with_it_again_and_again_is_not_asked_further() -> None:
    death = Failure(code="engine.died", category=Category.PEER, origin="inference-specialist", message="gone")

    class Deadly(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            return took_ms, death if header.step == "L.turn2" else final

    script = Deadly({"calls": [create("ann"), assign("ann")]}, "", {"answer": "fine"})
    result = ran(script)
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "step.poisoned"
    assert "L.turn3" not in script.runs


@pytest.mark.parametrize(
    "said", ['{"answer": "red, gre', '{ "answer" :"red, gre\\u00', '{"answer": "red, gre\\ud83d\\ude']
)
def test_of_an_answer_that_was_cut_off_what_is_there_is_taken(said: str) -> None:
    class Cut(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            if header.step == "L.turn1":
                final = final_of(said).model_copy(update={"finish_reason": "length"})
            return took_ms, final

    script = Cut("")
    result = ran(script)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert "red, gre" in script.prompt("E")
    assert script.runs["L.turn1"] == 1
