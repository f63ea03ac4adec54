"""Repairs a plan that a model made: what is wrong is fixed or dropped, with a note for each, and never executed.

Small models give the right steps with the wrong links: a role that does not exist, a result that nobody reads, a step
twice, a circle. Those have one sensible cure each and are cured here; what is left open by them (too few steps, too
many) is for `modelmade` to refuse. Pure; the steps come in and go out in the model's own words and labels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from protocol.plan_graph import find_cycle

_SHOWN_CHARS: Final = 40
#: A last step that begins so is meant to join what came before, even if it names none of it.
_JOINS: Final = re.compile(
    r"\W*(?:then |finally,? )?(?:join|combine|merge|compare|compute|calculate|determine|decide|summari[sz]e|sum up"
    r"|find out|write (?:the|a) (?:final|report|summary)|answer|conclude|aggregate|rank)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Draft:
    """One step as the model wrote it; `label` is how others call its result."""

    label: str
    role: str
    action: str
    reads: tuple[str, ...]


def repaired(
    steps: Sequence[Draft],
    given: Collection[str],
    roles: Collection[str],
    *,
    worker: str,
    joiner: str,
    free_label: str | None,
) -> tuple[list[Draft], list[str]]:
    """The steps with one result, known roles, readable inputs and no circle, and what was done to them.

    `worker` replaces unknown roles, `joiner` does a join that is added where results are left over and `free_label`
    has a name for its result (None = there is no room for another step).
    """
    notes: list[str] = []
    kept = _roles_known(_without_repeats(steps, notes), roles, worker, notes)
    kept = _reads_known(kept, given, notes)
    kept = _without_circles(kept, notes)
    kept = _one_result(kept, joiner, free_label, notes)
    return _inputs_read(kept, given, notes), notes


def first_repaired(
    steps: Sequence[Draft], given: Collection[str], roles: Collection[str], *, worker: str
) -> tuple[list[Draft], set[str]]:
    """The first steps of a plan, repaired as they will be in the whole one, and the labels of those that need something
    of what follows.
    """
    notes: list[str] = []
    kept = _roles_known(_without_repeats(steps, notes), roles, worker, notes)
    known, waiting = set(given), set[str]()
    for step in kept:
        (known if known.issuperset(step.reads) else waiting).add(step.label)
    return [replace(step, reads=tuple(dict.fromkeys(step.reads))) for step in kept], waiting


def result_of(steps: Sequence[Draft]) -> int:
    """Number of the step whose result nobody reads; of several the last."""
    read = {name for step in steps for name in step.reads}
    return max(number for number, step in enumerate(steps) if step.label not in read)


def _without_repeats(steps: Sequence[Draft], notes: list[str]) -> list[Draft]:
    first: dict[tuple[str, frozenset[str]], str] = {}
    instead: dict[str, str] = {}
    kept = []
    for step in steps:
        same = (" ".join(step.action.casefold().split()), frozenset(step.reads))
        if same in first:
            instead[step.label] = first[same]
            notes.append(f"{step.label} repeats {first[same]} word for word, so it was dropped")
        else:
            first[same] = step.label
            kept.append(step)
    return [_renamed(step, instead) for step in kept]


def _renamed(step: Draft, instead: Mapping[str, str]) -> Draft:
    return replace(step, reads=tuple(dict.fromkeys(instead.get(name, name) for name in step.reads)))


def _roles_known(steps: Sequence[Draft], roles: Collection[str], worker: str, notes: list[str]) -> list[Draft]:
    notes += [f"{step.label}: {worker!r} for the role {_shown(step.role)}" for step in steps if step.role not in roles]
    return [step if step.role in roles else replace(step, role=worker) for step in steps]


def _reads_known(steps: Sequence[Draft], given: Collection[str], notes: list[str]) -> list[Draft]:
    known = {*given, *(step.label for step in steps)}
    kept = []
    for step in steps:
        wrong = [name for name in step.reads if name not in known or name == step.label]
        notes += [f"{step.label} cannot read {_shown(name)}, so it does not" for name in wrong]
        kept.append(replace(step, reads=tuple(name for name in dict.fromkeys(step.reads) if name not in wrong)))
    return kept


def _without_circles(steps: Sequence[Draft], notes: list[str]) -> list[Draft]:
    """In a circle what was written first does not wait for what was written later."""
    place = {step.label: number for number, step in enumerate(steps)}
    waits = {step.label: frozenset(name for name in step.reads if name in place) for step in steps}
    if not find_cycle(waits):
        return list(steps)
    kept = []
    for number, step in enumerate(steps):
        later = [name for name in step.reads if place.get(name, -1) >= number]
        notes += [f"{step.label} does not wait for {name}, which closes a circle" for name in later]
        kept.append(replace(step, reads=tuple(name for name in step.reads if name not in later)))
    return kept


def _one_result(steps: list[Draft], joiner: str, free_label: str | None, notes: list[str]) -> list[Draft]:
    read = {name for step in steps for name in step.reads}
    results = [step.label for step in steps if step.label not in read]
    if len(results) < 2:
        return steps
    labels = {step.label for step in steps}
    last = steps[-1]
    if last.label == results[-1] and (free_label is None or labels & set(last.reads) or _JOINS.match(last.action)):
        others = tuple(results[:-1])
        notes.append(f"{last.label} reads {', '.join(others)} too, which nobody read")
        return [*steps[:-1], replace(last, reads=(*last.reads, *others))]
    if free_label is None:
        return steps
    notes.append(f"a join of {', '.join(results)} was added")
    action = "Join the results into one that fulfils the objective; compute what it asks for from them."
    return [*steps, Draft(free_label, joiner, action, tuple(results))]


def _inputs_read(steps: list[Draft], given: Collection[str], notes: list[str]) -> list[Draft]:
    read = {name for step in steps for name in step.reads}
    unread = [name for name in given if name not in read]
    if not unread or not steps:
        return steps
    end = result_of(steps)
    notes.append(f"{steps[end].label} reads {', '.join(map(_shown, unread))} too, which nobody read")
    steps[end] = replace(steps[end], reads=(*steps[end].reads, *unread))
    return steps


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")
