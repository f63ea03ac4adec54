"""Makes long inputs fit: what is too long for the context of a step is read in pieces first, by workers side by side.

Without this a long input would be shortened in the prompt, visibly, but its end would be lost. Each piece begins with a
mark, `[report.md, characters 1-4000]`, and whoever reads it puts the mark before its notes, so that the step that reads
all the notes can say where something stands. The pieces are an input of the task (a list), the reading is one step that
is mapped over it, and the notes take the place of the input in every step that named it.

Pure. Only text is read in pieces: code and JSON mean something as a whole. What cannot be helped (no room in the
budget, a context too small for any piece) stays as it is, with a note. A client's own plan is never changed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Plan, Step, TaskIR
from services.kit.registry import Registry
from services.planner.cast import Work, cast
from services.planner.naming import Names, stem

CHARS_PER_TOKEN: Final = 2.5
"""As the prompt is composed with: low on purpose, English prose has about four."""
_FRAME_CHARS: Final = 1_200
"""Of a prompt that is neither input nor action nor objective: titles, fences, the persona."""
_MIN_PIECE_CHARS: Final = 600
_NOTE_TOKENS: Final = (32, 192)
"""Fewest and most tokens of the notes on one piece."""
_ACTION: Final = (
    "Note what matters for the objective in this piece of a longer text, and nothing else. Begin with the mark in "
    "square brackets that stands at its head, word for word."
)
_MAX_ADDED_CHARS: Final = 2_000_000
_MAX_PIECES: Final = 900
"""A mapped step may have 1,000 sub-steps."""
_BREAK: Final = re.compile(r"\n\s*\n|(?<=[.?!])\s|\n")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A task and its plan in which every text fits where it is read, and what was done for that."""

    task: TaskIR
    plan: Plan
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a text; `start` is the place of its first character, counted from 0."""

    start: int
    text: str

    def marked(self, name: str) -> str:
        """The piece behind a mark that says where it stands, counted from 1 as people do."""
        return f"[{name}, characters {self.start + 1}-{self.start + len(self.text)}]\n{self.text}"


def pieces(text: str, most_chars: int) -> list[Piece]:
    """Cut a text into pieces of at most so many characters, at the end of a paragraph or sentence where there is one
    in the second half of the piece. Together they are the text, without a gap or an overlap.
    """
    found: list[Piece] = []
    start = 0
    while start < len(text):
        end = start + most_chars
        if end < len(text):
            window = text[start + most_chars // 2 : end]
            breaks = [match.end() for match in _BREAK.finditer(window)]
            if breaks:
                end = start + most_chars // 2 + breaks[-1]
        found.append(Piece(start, text[start:end]))
        start = end
    return found


def fit_to_context(task: TaskIR, plan: Plan, registry: Registry) -> Fitted:
    """Have every text that is too long for one of its readers read in pieces. The plan has no problems."""
    long = _too_long(task, plan, registry)
    if not long:
        return Fitted(task, plan, ())
    notes: list[str] = []
    role = registry.roles[cast(Work.READ, registry.roles).role]
    context = registry.model_of(role.name).context_tokens
    most_tokens = min(_NOTE_TOKENS[1], role.max_tokens)
    piece_chars = int((context - most_tokens) * CHARS_PER_TOKEN) - _around(task, role.prompt, 600)
    names = Names([*task.inputs, *_outputs_as_artefacts(plan)])
    ids = {step.id for step in plan.steps}
    added: list[Artefact] = []
    readers: list[Step] = []
    instead: dict[str, str] = {}
    room = task.budget.max_steps - len(plan.steps)
    for artefact in task.inputs:
        if artefact.name not in long:
            continue
        text = artefact.text()
        cut = pieces(text, piece_chars) if piece_chars >= _MIN_PIECE_CHARS else []
        size = sum(len(one.text()) for one in added) + len(text)
        if not cut or len(cut) > min(_MAX_PIECES, room - 1) or size > _MAX_ADDED_CHARS:
            why = "the context is too small for a piece" if not cut else f"{len(cut)} pieces are too many"
            notes.append(f"{artefact.name} is longer than what reads it takes, and is shortened there: {why}")
            continue
        room -= len(cut) + 1
        base = stem(artefact.name)
        listed = names.new(f"{base}_pieces"[:44], ArtefactKind.JSON)
        made = names.new(f"{base}_notes"[:44])
        ident = next(f"D{n}" for n in range(1, len(ids) + 2) if f"D{n}" not in ids)
        ids.add(ident)
        added.append(
            Artefact(name=listed.name, kind=ArtefactKind.JSON, value=[one.marked(artefact.name) for one in cut])
        )
        most = int(long[artefact.name] / len(cut) / CHARS_PER_TOKEN)
        readers.append(
            Step(
                id=ident,
                actor=role.name,
                action=_ACTION,
                outputs=[made],
                map_over=listed.name,
                max_tokens=max(_NOTE_TOKENS[0], min(most_tokens, most)),
            )
        )
        instead[artefact.name] = made.name
        notes.append(
            f"{artefact.name} ({len(text)} characters) is read in {len(cut)} pieces, whose notes say where they stand"
        )
    if not readers:
        return Fitted(task, plan, tuple(notes))
    steps = [
        step.model_copy(update={"inputs": [instead.get(name, name) for name in step.inputs]})
        if set(step.inputs) & instead.keys()
        else step
        for step in plan.steps
    ]
    fitted = task.model_copy(update={"inputs": [*task.inputs, *added]})
    return Fitted(fitted, plan.model_copy(update={"steps": [*readers, *steps]}), tuple(notes))


def _too_long(task: TaskIR, plan: Plan, registry: Registry) -> dict[str, int]:
    """Texts among the inputs that do not fit into a step that reads them -> characters they may have at most."""
    sizes = {artefact.name: len(artefact.text()) for artefact in task.inputs}
    texts = {artefact.name for artefact in task.inputs if artefact.kind is ArtefactKind.TEXT}
    allowed: dict[str, int] = {}
    for step in plan.steps:
        role = registry.roles[step.actor]
        context = registry.model_of(step.actor).context_tokens
        own = [name for name in step.inputs if name in sizes]
        made = len(step.inputs) - len(own)
        room = int((context - (step.max_tokens or role.max_tokens)) * CHARS_PER_TOKEN)
        room = max(0, room - _around(task, role.prompt, len(step.action)) - made * _FRAME_CHARS)
        if sum(sizes[name] for name in own) <= room:
            continue
        share = room // len(own)
        for name in own:
            if name in texts and sizes[name] > share:
                allowed[name] = min(share, allowed.get(name, share))
    return allowed


def _around(task: TaskIR, prompt: str, action_chars: int) -> int:
    """Characters of a prompt besides its inputs."""
    told = [task.objective, task.context, *task.constraints, *task.assumptions, *task.definition_of_done]
    return _FRAME_CHARS + len(prompt) + action_chars + sum(map(len, told))


def _outputs_as_artefacts(plan: Plan) -> list[Artefact]:
    """The results of a plan as if they existed, for finding names that are free."""
    return [
        Artefact(
            name=output.name,
            kind=output.kind,
            value=None if output.kind is ArtefactKind.JSON else "",
            content_type=output.content_type,
        )
        for step in plan.steps
        for output in step.outputs
    ]
