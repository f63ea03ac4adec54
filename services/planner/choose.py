"""Chooses what a plan leaves open (gates, personas, token shares) and writes every choice down as a decision.

Works the same on a client's, a rules' and a model's plan, and never overrides what a step says itself. Roles are
chosen where plans are made; here they are only recorded, with the roles that could have done the same work. Today all
choices are rules, so every propensity is 1; what is learned from their outcomes is the memory's business.

Ids are derived from task, step, subject and choice. Same choice, same id: a plan that is made again after a crash
records nothing twice. Another choice (the model answers differently the second time), another id: the outcome of the
plan that ran is never booked on a choice that did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from protocol.messages.artefact import ArtefactKind
from protocol.messages.memory import DecisionRecord
from protocol.messages.plan import RoutingDecision
from protocol.messages.task import Output, Plan, Step, TaskIR
from services.kit.identity import work_key
from services.kit.registry import GateEntry, PersonaEntry, Registry
from services.planner.cast import alternatives
from services.planner.tests_given import given_tests, module_under_test

#: Kind of output -> gates that judge it by default, where the registry has them and they know the language.
#: `format` is left out on purpose: its failures never escalate, a model that is bad at layout stays bad at it, and a
#: step would spend all its retries on blank lines that one run of a formatter puts right. A step can ask for it.
DEFAULT_GATES: Final[Mapping[ArtefactKind, tuple[str, ...]]] = {
    ArtefactKind.CODE: ("lint", "shellcheck"),
    ArtefactKind.JSON: ("schema",),
    ArtefactKind.TEXT: (),
}
TEST_GATE: Final = "unit"
"""Added for code that the tests among the inputs are about."""

_LANGUAGES: Final[Mapping[str | None, str]] = {
    None: "python",
    "text/x-python": "python",
    "text/x-shellscript": "shell",
    "text/x-c": "c",
    "text/javascript": "javascript",
}
Source: TypeAlias = Literal["client", "rules", "model"]
"""Who made the steps, as in PlanFinal."""

_ROLE_RULES: Final[Mapping[Source, str]] = {
    "client": "the client's plan names it",
    "rules": "the table of roles per kind of work",
    "model": "the model's plan names it",
}
NO_PERSONA: Final = "none"
MAX_DECISIONS: Final = 2_000
"""Of a larger plan the first ones are recorded: what they teach repeats itself, and messages stay bounded."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """How the plan was divided, as a choice."""

    choice: str
    alternatives: tuple[str, ...]
    rule: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan without open questions, and what was decided about it."""

    plan: Plan
    decisions: tuple[RoutingDecision, ...]


def choose(task: TaskIR, plan: Plan, decomposition: Decomposition, registry: Registry, source: Source) -> Chosen:
    """Fill in gates and personas where a step has none, and token shares where the plan is not a client's."""
    task_id = task.task_id or "dry-run"
    task_type = task.task_type.value
    tests = {artefact.name for artefact in given_tests(task.inputs)}
    module = module_under_test(task.inputs)
    sizes = {artefact.name: float(len(artefact.text())) for artefact in task.inputs}
    share = _token_share(task, plan, registry) if source != "client" else None
    width = float(len(plan.steps))
    decisions = [
        RoutingDecision(
            decision_id=_decision_id(task_id, None, "decomposition", decomposition.choice),
            subject="decomposition",
            choice=decomposition.choice,
            alternatives=list(decomposition.alternatives),
            propensity=1.0,
            rule=decomposition.rule[:1_000],
            task_type=task_type,
            features={"steps": width, "inputs": float(len(task.inputs)), "objective_chars": float(len(task.objective))},
        )
    ]
    by_role: dict[str, list[PersonaEntry]] = {}
    steps: list[Step] = []
    for step in plan.steps:
        features = {
            "steps": width,
            "inputs": float(len(step.inputs)),
            "given_chars": sum(sizes.get(name, 0.0) for name in step.inputs),
        }
        if step.actor not in by_role:
            by_role[step.actor] = fitting(step.actor, task, registry.personas.values())
        persona, persona_rule = _persona(step, by_role[step.actor])
        changes: dict[str, object] = {}
        if step.gates is None:
            changes["gates"] = gates_for(step, tests, module, registry.gates)
        if persona != step.persona:
            changes["persona"] = persona
        if share is not None and step.max_tokens is None:
            changes["max_tokens"] = min(share, registry.roles[step.actor].max_tokens)
        steps.append(step.model_copy(update=changes) if changes else step)
        if len(decisions) + 2 > MAX_DECISIONS:
            continue
        decisions.append(
            RoutingDecision(
                decision_id=_decision_id(task_id, step.id, "role", step.actor),
                subject="role",
                step=step.id,
                choice=step.actor,
                alternatives=alternatives(step.actor, registry.roles),
                propensity=1.0,
                rule=_ROLE_RULES[source],
                task_type=task_type,
                features=features,
            )
        )
        if persona is not None:
            others = [entry.name for entry in by_role[step.actor] if entry.name != persona]
            decisions.append(
                RoutingDecision(
                    decision_id=_decision_id(task_id, step.id, "persona", persona),
                    subject="persona",
                    step=step.id,
                    choice=persona,
                    alternatives=[*others[:62], NO_PERSONA],
                    propensity=1.0,
                    rule=persona_rule,
                    task_type=task_type,
                    features=features,
                )
            )
    return Chosen(plan.model_copy(update={"steps": steps}), tuple(decisions))


def records(task: TaskIR, decisions: Sequence[RoutingDecision], registry_digest: str) -> list[DecisionRecord]:
    """The decisions as the memory stores them."""
    return [
        DecisionRecord(
            decision_id=decision.decision_id,
            task_id=task.task_id or "dry-run",
            step=decision.step,
            subject=decision.subject,
            choice=decision.choice,
            alternatives=decision.alternatives,
            propensity=decision.propensity,
            rule=decision.rule,
            task_type=decision.task_type,
            features=decision.features,
            registry_digest=registry_digest,
        )
        for decision in decisions
    ]


def gates_for(step: Step, tests: Set[str], module: str | None, gates: Mapping[str, GateEntry]) -> list[str]:
    """Default gates of a step's outputs, in the order of the registry.

    `tests` names the inputs that are tests, `module` what they import: code is judged by the tests that its step has
    read, or that import it.
    """
    wanted: set[str] = set()
    for output in step.outputs:
        names = list(DEFAULT_GATES[output.kind])
        if output.kind is ArtefactKind.CODE and tests and (tests & set(step.inputs) or output.name == module):
            names.append(TEST_GATE)
        wanted |= {name for name in names if name in gates and _applies(gates[name], output)}
    return [name for name in gates if name in wanted]


def fitting(role: str, task: TaskIR, personas: Iterable[PersonaEntry]) -> list[PersonaEntry]:
    """Personas whose `fits` allows this role and type of task, the most specific first, ties as in the file.

    Specific is what fits few combinations of role and type; an empty list means anywhere and is least specific.
    """
    fit = [
        persona
        for persona in personas
        if (not persona.fits.roles or role in persona.fits.roles)
        and (not persona.fits.task_types or task.task_type in persona.fits.task_types)
    ]
    return sorted(fit, key=lambda persona: (len(persona.fits.roles) or 100) * (len(persona.fits.task_types) or 100))


def _applies(gate: GateEntry, output: Output) -> bool:
    if output.kind not in gate.kinds:
        return False
    return not gate.languages or _LANGUAGES.get(output.content_type) in gate.languages


def _persona(step: Step, fit: Sequence[PersonaEntry]) -> tuple[str | None, str]:
    if step.persona is not None:
        return step.persona, "the step names it"
    if not fit:
        return None, "none fits"
    return fit[0].name, "the most specific persona that fits role and type of task"


def _token_share(task: TaskIR, plan: Plan, registry: Registry) -> int | None:
    """Generated tokens each step may spend, where the roles' own limits together would break the budget."""
    wished = sum(step.max_tokens or registry.roles[step.actor].max_tokens for step in plan.steps)
    return None if wished <= task.budget.max_tokens else max(1, task.budget.max_tokens // len(plan.steps))


def _decision_id(task_id: str, step: str | None, subject: str, choice: str) -> str:
    return work_key("decision", task_id, step, subject, choice)
