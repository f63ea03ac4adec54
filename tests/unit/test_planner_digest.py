"""A text that is too long for its reader is read in pieces whose places are known."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import TaskIR
from protocol.plan_graph import needs
from services.kit.plan_check import plan_problems
from services.planner.digest import Fitted, fit_to_context, pieces
from services.planner.rules import plan_by_rules
from tests.unit.planner_tasks import SHIPPED, task

LONG = "The ship sails at dawn. " * 1_500


def fitted(given: list[Artefact], objective: str = "Sum up the reports", **fields: object) -> Fitted:
    ir = task(objective, "doc", **fields).model_copy(update={"inputs": given})
    done = fit_to_context(ir, plan_by_rules(ir, SHIPPED.roles).plan, SHIPPED)
    assert plan_problems(done.task.model_copy(update={"plan": done.plan}), SHIPPED) == []
    TaskIR.model_validate(done.task.model_dump())
    return done


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .\n", max_size=400), st.integers(1, 50))
def test_the_pieces_of_a_text_are_the_text_and_say_where_they_stand(text: str, most: int) -> None:
    cut = pieces(text, most)
    assert "".join(piece.text for piece in cut) == text
    for piece in cut:
        assert 0 < len(piece.text) <= most
        assert text[piece.start : piece.start + len(piece.text)] == piece.text


def test_pieces_end_where_a_sentence_ends() -> None:
    assert [piece.text for piece in pieces("One two. Three four. Five.", 22)] == ["One two. Three four. ", "Five."]
    assert pieces("One.", 22)[0].marked("a.md") == "[a.md, characters 1-4]\nOne."


def test_a_long_input_is_read_by_a_mapped_step_whose_notes_take_its_place() -> None:
    done = fitted([Artefact(name="a.md", value=LONG), Artefact(name="b.md", value="short")])
    reader = done.plan.steps[0]
    listed = {artefact.name: artefact for artefact in done.task.inputs}[reader.map_over or ""]
    assert "".join(one.partition("\n")[2] for one in listed.value) == LONG
    assert listed.value[0].startswith("[a.md, characters 1-")
    by_id = {step.id: step for step in done.plan.steps}
    assert by_id["S1"].inputs == [reader.outputs[0].name]
    assert by_id["S2"].inputs == ["b.md"]
    assert needs(done.plan)["S1"] == {reader.id}
    assert "is read in" in done.notes[0]


def test_what_fits_and_what_is_no_text_stays_as_it_is() -> None:
    assert fitted([Artefact(name="a.md", value="short")]).notes == ()
    code = Artefact(name="a.py", kind=ArtefactKind.CODE, value="x = 1\n" * 9_000)
    assert fitted([code]).task.inputs == [code]


def test_where_the_budget_has_no_room_for_the_pieces_the_note_says_so() -> None:
    done = fitted([Artefact(name="a.md", value=LONG)], budget={"max_steps": 4})
    assert len(done.plan.steps) == 1
    assert "too many" in done.notes[0]


def test_names_of_pieces_and_notes_are_free() -> None:
    done = fitted(
        [Artefact(name="a.md", value=LONG), Artefact(name="a_notes", value="x"), Artefact(name="a.txt", value=LONG)]
    )
    names = [artefact.name for artefact in done.task.inputs]
    assert len(set(names)) == len(names)
