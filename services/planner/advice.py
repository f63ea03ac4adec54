"""What memory is asked about a plan, in one request, and what its answers mean (pure).

Three kinds of questions: how wide the plan is, which role does each kind of its steps, which persona goes with each
role that could be taken. Steps that the rules give to one role are one question, so a map of forty is not forty draws.
A client's plan runs as it was sent, so only the personas that it leaves open are asked about. The answers are weighed
in memory; `choose` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from protocol.messages.artefact import ArtefactKind
from protocol.messages.memory import Advise, Advised, Option, Question
from protocol.messages.persona import NO_PERSONA
from protocol.messages.task import Plan, Step, TaskIR
from services.kit.identity import work_key
from services.kit.registry import PersonaEntry, Registry
from services.kit.registry.versions import versions
from services.planner.cast import ROLES_FOR, Work, alternatives
from services.planner.width import width_of

WIDTH_KEY: Final = "width"
MAX_QUESTIONS: Final = 64
_MAX_OPTIONS: Final = 16
_MAX_TRIALS: Final = 3
_SHARE_OF_CONTEXT: Final = 0.3
"""Characters of a prompt per token of the model's context, for personas that nobody has named: an eighth of it."""


def role_key(step: Step) -> str:
    """The question about roles that a step belongs to: whom the rules gave it to, and whether it makes code."""
    return f"role:{step.actor}{':code' if _makes_code(step) else ''}"


def role_options(step: Step, registry: Registry) -> list[str]:
    """Roles that could do a step, the rules' first; code is only made by roles that write code."""
    others = alternatives(step.actor, registry.roles)
    if _makes_code(step):
        others = [role for role in others if role in ROLES_FOR[Work.IMPLEMENT]]
    return [step.actor, *others][:_MAX_OPTIONS]


def persona_key(role: str) -> str:
    """The question about personas of a role."""
    return f"persona:{role}"


def fitting(role: str, task: TaskIR, registry: Registry) -> list[PersonaEntry]:
    """Personas whose `fits` allows this role and type of task: those that rules may choose, then the others.

    The most specific comes first, ties as in the file. Specific is what fits few combinations of role and type; an
    empty list means anywhere and is least specific. The others keep their order; one whose prompt would leave a small
    context little room is not among them.
    """
    longest = registry.model_of(role).context_tokens * _SHARE_OF_CONTEXT if role in registry.roles else 0
    fit = [
        persona
        for persona in registry.personas.values()
        if (persona.by_rule or len(persona.prompt) <= longest)
        and (registry.trials.offer or persona.name not in registry.on_trial)
        and (not persona.fits.roles or role in persona.fits.roles)
        and (not persona.fits.task_types or task.task_type in persona.fits.task_types)
    ]
    combinations = {one.name: (len(one.fits.roles) or 100) * (len(one.fits.task_types) or 100) for one in fit}
    return sorted(fit, key=lambda one: (not one.by_rule, combinations[one.name] if one.by_rule else 0))


def first_by_rule(fit: Sequence[PersonaEntry]) -> str:
    """What the rules choose of those that fit."""
    return next((one.name for one in fit if one.by_rule), NO_PERSONA)


def shape_of(template: str) -> str:
    """`doc.map-join/3` -> `doc.map-join`: what is learned of a shape holds for all its widths."""
    return template.partition("/")[0]


def split_cluster(task: TaskIR, plans: Mapping[str, Plan]) -> str:
    """Kind of work that a decomposition is decided for: the rules' shape, how far it could be split, how much to read.

    Numbers are rounded down to powers of two and four, so that tasks that resemble each other share their outcomes.
    """
    shape = shape_of(next(iter(plans))).partition(".")[2]
    widest = max(map(width_of, plans.values()))
    read_chars = sum(len(artefact.text()) for artefact in task.inputs)
    return f"{shape}/{1 << (widest.bit_length() - 1)}/{4 ** ((read_chars.bit_length() - 1) // 2) if read_chars else 0}"


def request(
    task: TaskIR, plans: Mapping[str, Plan], registry: Registry, text: str, *, roles_open: bool = True
) -> Advise | None:
    """All that is open in these plans (template -> plan, the rules' choice first); None if nothing is.

    Whose roles are settled, as in a client's plan, is asked about for its personas only.
    """
    seed = int(work_key("advice", task.task_id or task.objective)[:15], 16)
    shapes = list(dict.fromkeys(map(shape_of, plans)))
    questions: list[Question] = []
    if len(shapes) > 1:
        widths = {shape_of(template): width_of(plan) for template, plan in reversed(list(plans.items()))}
        options = [Option(choice=shape, width=widths[shape]) for shape in shapes]
        questions.append(
            Question(
                key=WIDTH_KEY,
                subject="decomposition",
                cluster=split_cluster(task, plans),
                rules_choice=shapes[0],
                options=options,
            )
        )
    steps = [step for plan in plans.values() for step in plan.steps]
    roles = dict.fromkeys(
        step.actor for plan in plans.values() for step in plan.steps if step.persona is None and plan.persona is None
    )
    for key, step in {role_key(step): step for step in steps}.items() if roles_open else ():
        names = role_options(step, registry)
        roles |= dict.fromkeys(names)
        if len(names) > 1:
            questions.append(_question(key, "role", cluster_of(step), names, registry))
    for role in roles:
        fit = fitting(role, task, registry)
        if fit:
            questions.append(_question(persona_key(role), "persona", role, _options(fit, registry, seed), registry))
    if not questions:
        return None
    return Advise(text=text, task_type=task.task_type.value, questions=questions[:MAX_QUESTIONS], seed=seed)


def _options(fit: Sequence[PersonaEntry], registry: Registry, seed: int) -> list[str]:
    """The rules' choice first, and at most three on trial, by turns: each one more is a share of steps that explore."""
    first = first_by_rule(fit)
    trials = [one.name for one in fit if one.name in registry.on_trial]
    turn = seed % len(trials) if trials else 0
    trials = [*trials[turn:], *trials[:turn]][:_MAX_TRIALS]
    declared = [one.name for one in fit if one.name not in registry.on_trial and one.name != first]
    return list(dict.fromkeys((first, *declared[: _MAX_OPTIONS - 2 - len(trials)], *trials, NO_PERSONA)))


def answers(advice: Sequence[Advised], asked: Advise) -> dict[str, Advised]:
    """Answers by key; one that names no option of its question is left out, as if it had not come."""
    options = {question.key: {option.choice for option in question.options} for question in asked.questions}
    return {one.key: one for one in advice if one.choice in options.get(one.key, ())}


def cluster_of(step: Step) -> str:
    """Kind of work of a step: whom the rules gave it to. Outcomes of one kind speak for each other."""
    return step.actor


def _question(key: str, subject: str, cluster: str, choices: Sequence[str], registry: Registry) -> Question:
    options = []
    for choice in choices:
        model, prompt = versions(subject, choice, registry)
        options.append(Option(choice=choice, model=model, prompt=prompt))
    return Question(key=key, subject=subject, cluster=cluster, rules_choice=choices[0], options=options)


def _makes_code(step: Step) -> bool:
    return any(output.kind is ArtefactKind.CODE for output in step.outputs)
