"""Chooses what a plan leaves open (gates, personas, token shares) and writes every choice down as a decision.

Works the same on a client's, a rules' and a model's plan, and never overrides what a client's step says itself. The
rules always have a choice; memory's advice, where it came, takes its place together with its propensity. Without
advice every propensity is 1. What is learned from the outcomes, and when it is strong enough, is memory's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from protocol.messages.artefact import ArtefactKind
from protocol.messages.memory import Advised
from protocol.messages.persona import NO_PERSONA
from protocol.messages.plan import PlanSource, RoutingDecision
from protocol.messages.task import Output, Plan, Step, TaskIR
from services.kit.registry import GateEntry, PersonaEntry, Registry
from services.kit.registry.versions import versions
from services.planner.advice import (
    cluster_of,
    first_by_rule,
    fitting,
    persona_key,
    role_key,
    role_options,
)
from services.planner.cast import crew
from services.planner.ledger import Ledger
from services.planner.tests_given import given_tests, module_under_test
from services.planner.width import width_of

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
_ROLE_RULES: Final[Mapping[PlanSource, str]] = {
    "client": "the client's plan names it",
    "rules": "the table of roles per kind of work",
    "model": "the model's plan names it",
}


@dataclass(frozen=True, slots=True)
class Decomposition:
    """How the plan was divided, as a choice."""

    choice: str
    alternatives: tuple[str, ...]
    rule: str
    advice: Advised | None = None
    cluster: str = ""
    """See `advice.split_cluster`."""
    rules_width: int = 1
    """Width of the rules' plan."""
    widest: int = 1
    """Width of the widest plan that there was to choose from."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan without open questions, and what was decided about it."""

    plan: Plan
    decisions: tuple[RoutingDecision, ...]


def choose(
    task: TaskIR,
    plan: Plan,
    decomposition: Decomposition,
    registry: Registry,
    source: PlanSource,
    advice: Mapping[str, Advised] = MappingProxyType({}),
    settled: Set[str] = frozenset(),
) -> Chosen:
    """Fill in gates and personas where a step has none, and token shares where the plan is not a client's.

    `advice` holds memory's answers to `advice.request`, by key. Steps in `settled` run already: they stay as they are,
    and what is written down of them is what runs.
    """
    by_rules, plan = plan.steps, _cast_by(advice, plan, settled)
    task_id = task.task_id or "dry-run"
    tests = {artefact.name for artefact in given_tests(task.inputs)}
    module = module_under_test(task.inputs)
    sizes = {artefact.name: float(len(artefact.text())) for artefact in task.inputs}
    share = _token_share(task, plan, registry) if source != "client" else None
    width = float(len(plan.steps))
    ledger = Ledger(task_id, task.task_type.value)
    ledger.take(
        "decomposition",
        decomposition.choice,
        None,
        rule=decomposition.rule,
        cluster=decomposition.cluster,
        features={
            "steps": width,
            "width": float(width_of(plan)),
            "rules_width": float(decomposition.rules_width),
            "widest": float(decomposition.widest),
            "inputs": float(len(task.inputs)),
            "objective_chars": float(len(task.objective)),
            "read_chars": sum(sizes.values()),
        },
        advice=decomposition.advice,
        options=lambda: decomposition.alternatives,
    )
    by_role: dict[str, list[PersonaEntry]] = {}
    steps: list[Step] = []
    for step, ruled in zip(plan.steps, by_rules, strict=True):
        features = {
            "steps": width,
            "inputs": float(len(step.inputs)),
            "given_chars": sum(sizes.get(name, 0.0) for name in step.inputs),
        }
        if step.actor not in by_role:
            by_role[step.actor] = fitting(step.actor, task, registry)
        runs = step.id in settled
        open_persona = step.persona is None and plan.persona is None and not runs
        persona_advice = advice.get(persona_key(step.actor)) if open_persona else None
        persona, persona_rule = _persona(step, plan, by_role[step.actor], persona_advice)
        if runs:
            persona, persona_rule = step.persona, "chosen when the step began"
        changes: dict[str, object] = {}
        if step.gates is None:
            changes["gates"] = gates_for(step, tests, module, registry.gates)
        if persona != step.persona:
            changes["persona"] = persona
        if step.spawns is not None and not step.spawns.roles:
            changes["spawns"] = step.spawns.model_copy(update={"roles": crew(task.task_type, registry.roles)})
        if share is not None and step.max_tokens is None:
            changes["max_tokens"] = min(share, registry.roles[step.actor].max_tokens)
        steps.append(step.model_copy(update=changes) if changes else step)
        if ledger.full:
            continue
        ledger.take(
            "role",
            step.actor,
            step.id,
            rule=_ROLE_RULES[source],
            cluster=cluster_of(ruled),
            features=features,
            advice=None if runs else advice.get(role_key(ruled)),
            options=partial(role_options, ruled, registry),
        )
        if persona is not None or persona_advice is not None:
            names = [entry.name for entry in by_role[step.actor]][:62]
            ledger.take(
                "persona",
                persona or NO_PERSONA,
                step.id,
                rule=persona_rule,
                cluster=step.actor,
                features=features,
                advice=persona_advice,
                options=partial(list, (*names, NO_PERSONA)),
            )
    return Chosen(plan.model_copy(update={"steps": steps}), ledger.decisions)


def as_of(registry: Registry, decisions: Sequence[RoutingDecision]) -> list[RoutingDecision]:
    """The decisions with what stands behind their choices in this registry."""
    digests = {key: versions(*key, registry) for key in {(decision.subject, decision.choice) for decision in decisions}}
    return [
        decision.model_copy(
            update={
                "registry_digest": registry.digest,
                "model": digests[decision.subject, decision.choice][0],
                "prompt": digests[decision.subject, decision.choice][1],
            }
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


def _applies(gate: GateEntry, output: Output) -> bool:
    if output.kind not in gate.kinds:
        return False
    return not gate.languages or _LANGUAGES.get(output.content_type) in gate.languages


def _cast_by(advice: Mapping[str, Advised], plan: Plan, settled: Set[str]) -> Plan:
    """The plan with the advised roles."""
    steps = []
    for step in plan.steps:
        advised = None if step.id in settled else advice.get(role_key(step))
        recast = advised is not None and advised.choice != step.actor
        steps.append(step.model_copy(update={"actor": advised.choice}) if advised is not None and recast else step)
    return plan.model_copy(update={"steps": steps})


def _persona(step: Step, plan: Plan, fit: Sequence[PersonaEntry], advice: Advised | None) -> tuple[str | None, str]:
    """Step before plan before what was learned, which begins with the rules; None = nobody chose any."""
    if step.persona is not None:
        return step.persona, "the step names it"
    if plan.persona is not None:
        return plan.persona, "the plan names it for all its steps"
    if advice is not None:
        return None if advice.choice == NO_PERSONA else advice.choice, advice.why
    first = first_by_rule(fit)
    if first == NO_PERSONA:
        return None, "none fits"
    return first, "the most specific persona that fits role and type of task"


def _token_share(task: TaskIR, plan: Plan, registry: Registry) -> int | None:
    """Generated tokens each step may spend, where the roles' own limits together would break the budget."""
    wished = sum(step.max_tokens or registry.roles[step.actor].max_tokens for step in plan.steps)
    return None if wished <= task.budget.max_tokens else max(1, task.budget.max_tokens // len(plan.steps))
