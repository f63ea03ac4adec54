"""The course of one planning call: what to ask next, how long to wait, what to do without an answer.

    Requested -> AskMemory -> [AskModel] -> [AskAdvice] -> Finish
              -> AskAdvice -> Finish                   a client's plan: memory is asked once, for everything
              -> Refuse                                a plan or a registry reference that cannot run

While the model answers, `hear` takes what it has written so far and says which steps can start: they are part of the
plan from then on, whatever becomes of the rest of the answer. If it breaks off, a step by rule takes over the rest.
For the rest of a running plan (`revision`) the rules of `replan` make the plan, or the model where a result has turned
the plan over.

Pure: time comes in with the events, questions go out as commands, and exactly one command answers each event. Every
question has a bound of its own and an ending without an answer, so a plan comes out in time whoever is down: without
memory there are no earlier tasks and the rules choose, without the front door there is the rules' plan. The deadline of
the call is shared out here; the app only keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.memory import (
    Advise,
    Advised,
    Episode,
    Lesson,
    MemoryFinal,
    Retrieve,
)
from protocol.messages.persona import Persona
from protocol.messages.plan import PlanFinal, PlanSource, Revision, RoutingDecision
from protocol.messages.task import Plan, Step, TaskIR
from protocol.plan_graph import PlanProblem, find_problems
from services.kit.plan_check import as_evidence, plan_problems, schema_problems
from services.kit.registry import Registry, RoleEntry, with_own
from services.planner.advice import WIDTH_KEY, answers, request, shape_of, split_cluster
from services.planner.cast import ROLES_FOR, Work
from services.planner.choose import Decomposition, as_of, choose
from services.planner.digest import Fitted, fit_to_context
from services.planner.discovery import discover
from services.planner.divide import Judge, RuleJudge
from services.planner.made_personas import with_personas
from services.planner.modelmade import Begun, ModelPlanRefused, planning_request, read_plan, worth_asking
from services.planner.replan import renumbered, rest_as_task, rest_by_rules, whole
from services.planner.rules import RulePlan, finishing_step, plans_by_rules
from services.planner.streamed import StreamedPlan
from services.planner.width import told, width_of

MEMORY_S: Final = 1.0
"""Longest wait for memory, for each of its questions, in seconds."""
CLIENT_MEMORY_S: Final = 0.5
"""The same for the one question about a client's plan, which can begin without what earlier tasks taught."""
SCHEMA_CHARS: Final = 64 * 1024
"""JSON Schemas of a task's own plan that are looked at before it begins: half a second at most."""
MODEL_S: Final = 15.0
"""Longest wait for the front door, in seconds: longer than this is better spent on working than on planning."""
MIN_MODEL_S: Final = 1.0
"""A wait shorter than this is not worth a slot."""
_MODEL_SHARE: Final = 0.3
_TASK_SHARE: Final = 0.1
_MEMORY_SHARE: Final = 0.1
_NO_DEADLINE_S: Final = 60.0
_MAX_OBJECTIVE_CHARS: Final = 4_000
_MAX_REPAIRS: Final = 10


@dataclass(frozen=True, slots=True)
class Requested:
    """The call has come in."""

    at_ms: int
    task: TaskIR
    deadline_ms: int | None
    revision: Revision | None = None
    """The rest of the task's plan is to be made anew."""
    begun: tuple[Step, ...] = ()
    """Steps that run already, of a plan that another planner began to tell."""


@dataclass(frozen=True, slots=True)
class MemoryAnswered:
    """The answer to AskMemory or AskAdvice."""

    at_ms: int
    answer: MemoryFinal


@dataclass(frozen=True, slots=True)
class ModelAnswered:
    """The answer to AskModel."""

    at_ms: int
    answer: InferFinal


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The question has ended without an answer."""

    at_ms: int
    why: str
    """Code of the failure, or `deadline`."""


@dataclass(frozen=True, slots=True)
class AskMemory:
    """Ask which finished tasks resemble this one."""

    retrieve: Retrieve
    timeout_s: float


@dataclass(frozen=True, slots=True)
class AskAdvice:
    """Ask memory what it would choose where the plan leaves a choice."""

    request: Advise
    timeout_s: float


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask the front door for a plan."""

    model: str
    """Entry of models.yaml."""
    request: InferRequest
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Finish:
    """Answer the call with a plan."""

    final: PlanFinal


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the call with a failure."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """What is decided of a plan before memory is asked."""

    source: PlanSource
    plans: Mapping[str, Plan]
    """Template -> plan, the rules' choice first."""
    choice: Decomposition


Event: TypeAlias = Requested | MemoryAnswered | ModelAnswered | Unanswered
Command: TypeAlias = AskMemory | AskModel | AskAdvice | Finish | Refuse


class Phase(StrEnum):
    """What the call waits for."""

    NEW = "new"
    REMEMBERING = "remembering"
    MODELLING = "modelling"
    ADVISING = "advising"
    DONE = "done"


class ModelOutcome(StrEnum):
    """What became of asking the model, for figures and logs."""

    NOT_ASKED = "not_asked"
    UNANSWERED = "unanswered"
    REFUSED = "refused"
    NARROW = "narrow"
    """Fewer steps side by side than the objective names independent parts."""
    USED = "used"


class OutOfTurn(Exception):
    """An event that this phase does not wait for: a bug of the caller; nothing was changed."""


class Planning:
    """One planning call, from Requested to Finish or Refuse."""

    def __init__(self, registry: Registry, judge: Judge | None = None) -> None:
        """`judge` says whether an answer divides; without one the rules that ship do."""
        self.phase = Phase.NEW
        self._judge = judge or RuleJudge()
        self.model_outcome = ModelOutcome.NOT_ASKED
        self._registry = registry
        self._deadline_ms = 0
        self._task: TaskIR
        self._by_rules: list[RulePlan]
        self._rules: RulePlan
        self._similar: list[Episode] = []
        self._lessons: list[Lesson] = []
        self._reasons: list[str] = []
        self._generated_tokens = 0
        self._memory_away = False
        self._open: OpenPlan
        self._revision: Revision | None = None
        self._whole_task: TaskIR
        self._streamed: StreamedPlan | None = None
        self._offered: list[Step] = []
        self._broke_off: str | None = None
        self._asked: Advise
        self._personas: Sequence[Persona] = ()
        self._draft: PlanFinal
        self._decisions: list[RoutingDecision] = []

    def handle(self, event: Event) -> Command:
        """Take one event, return what to do next. Raises OutOfTurn."""
        match self.phase, event:
            case Phase.NEW, Requested():
                return self._on_requested(event)
            case Phase.REMEMBERING, MemoryAnswered(answer=answer):
                self._similar, self._lessons = answer.episodes[:16], answer.lessons
                return self._remembered(event.at_ms)
            case Phase.REMEMBERING, Unanswered():
                self._memory_away = True
                self._reasons.append(f"memory did not answer ({event.why}), so no earlier task informed the plan")
                return self._remembered(event.at_ms)
            case Phase.MODELLING, ModelAnswered():
                return self._on_model_answered(event)
            case Phase.MODELLING, Unanswered():
                self.model_outcome = ModelOutcome.UNANSWERED
                self._reasons.append(f"the model gave no answer ({event.why})")
                return self._break_off(event.at_ms, event.why) if self._offered else self._use_rules(event.at_ms)
            case Phase.ADVISING, MemoryAnswered(answer=answer):
                if self._asked.retrieve is not None:
                    self._similar, self._lessons = answer.episodes[:16], answer.lessons
                return self._fill_in(answers(answer.advice, self._asked))
            case Phase.ADVISING, Unanswered():
                self._reasons.append(f"memory gave no advice ({event.why}), so the rules choose")
                return self._fill_in({})
            case _:
                raise OutOfTurn(f"{type(event).__name__} while {self.phase}; so far: {'; '.join(self._reasons)}")

    def _on_requested(self, event: Requested) -> Command:
        task = self._task = event.task
        left_ms = int(_NO_DEADLINE_S * 1000)
        self._deadline_ms = event.at_ms + left_ms if event.deadline_ms is None else event.deadline_ms
        if event.revision is not None:
            return self._on_revision(event.at_ms, task, event.revision)
        if task.plan is not None:
            problems = plan_problems(task, self._registry) or schema_problems(task, SCHEMA_CHARS)
            if problems:
                return self._refuse(problems)
            self._reasons.append("the task brought its plan")
            choice = Decomposition(f"client/{len(task.plan.steps)}", (), "the client's plan")
            self._open = OpenPlan("client", {choice.choice: task.plan}, choice)
            return self._ask_once(min(CLIENT_MEMORY_S, self._memory_s(event.at_ms)))
        self._by_rules = plans_by_rules(task, self._registry.roles, self._judge)
        self._rules = self._by_rules[0]
        problems = plan_problems(task.model_copy(update={"plan": self._rules.plan}), self._registry)
        if problems:  # what templates cannot mend: inputs named twice, gates of the task that do not exist
            return self._refuse(problems)
        if event.begun:
            self._offered = list(event.begun)
            self._reasons.append("the planner that began this plan is gone")
            return self._break_off(event.at_ms, "peer.lost")
        return self._remember(self._memory_s(event.at_ms))

    def _remember(self, timeout_s: float) -> Command:
        self.phase = Phase.REMEMBERING
        return AskMemory(self._similar_to_this(), timeout_s)

    def _similar_to_this(self) -> Retrieve:
        return Retrieve(text=self._task.objective[:_MAX_OBJECTIVE_CHARS], task_type=self._task.task_type.value)

    def _ask_once(self, timeout_s: float) -> Command:
        """All that memory can say of a client's plan, in one question: it is there, and could run without."""
        asked = self._what_is_open()
        if asked is None:
            return self._remember(timeout_s)
        self._asked = asked.model_copy(update={"retrieve": self._similar_to_this()})
        self.phase = Phase.ADVISING
        return AskAdvice(self._asked, timeout_s)

    def _what_is_open(self) -> Advise | None:
        """What memory is asked to choose; None where learning is off, or nothing is open."""
        if not self._registry.learning.enabled or self._memory_away:
            return None
        text = self._task.objective[:_MAX_OBJECTIVE_CHARS]
        roles_open = self._open.source != "client"
        return request(self._task, self._open.plans, self._registry, text, roles_open=roles_open)

    def _remembered(self, at_ms: int) -> Command:
        """What similar tasks have taught is there, or will not come."""
        return self._model_or_rules(at_ms) if self._task.plan is None else self._fill_in({})

    def _model_or_rules(self, at_ms: int) -> Command:
        worth = worth_asking(self._task, len(self._rules.plan.steps))
        planner = self._planner()
        timeout_s = self._model_s(at_ms)
        if not worth.ask:
            self._reasons.append(f"the model was not asked: {worth.because}")
        elif planner is None:
            wanted = ", ".join(ROLES_FOR[Work.PLAN])
            self._reasons.append(f"the model was not asked: the registry has no role {wanted} and no model of tier A")
        elif timeout_s < MIN_MODEL_S:
            self._reasons.append(f"the model was not asked: {timeout_s:.1f} s is all the time there is for it")
        else:
            self._reasons.append(f"the model was asked: {worth.because}")
            self.phase = Phase.MODELLING
            request = planning_request(self._task, self._registry.roles, planner, self._similar, self._rules.parts)
            if self._task.task_id is not None and self._revision is None:  # else nothing of it could start early
                self._streamed = StreamedPlan(self._task, self._registry.roles)
                request = request.model_copy(update={"stream": True})
            return AskModel(planner.model, request, timeout_s)
        return self._use_rules(at_ms)

    def hear(self, text: str, start_chars: int | None) -> list[Step]:
        """A piece of the model's answer, which begins after so many characters.

        Returns all steps that can start by now if there are new ones, else nothing. A text that is too long for its
        reader is read in pieces first, and that shows in the whole plan only: then nothing starts early.
        """
        if self.phase is not Phase.MODELLING or self._streamed is None:
            return []
        able = self._streamed.feed(text, start_chars)
        if len(able.steps) <= len(self._offered):
            return []
        known = {step.id: step for step in self._offered}
        wishes = {name: wish for name, wish in able.wishes.items() if name not in known}
        plan = Plan(steps=[known.get(step.id, step) for step in able.steps])
        made = with_personas(plan, wishes, self._task, self._registry.personas, self._personas)
        registry = with_own(self._registry, made.personas)
        checked = self._task.model_copy(update={"plan": made.plan})
        if plan_problems(checked, registry) or fit_to_context(self._task, made.plan, registry).plan != made.plan:
            return []
        chosen = choose(self._task, made.plan, Decomposition("", (), ""), registry, "model", settled=known.keys())
        self._personas, self._registry = made.personas, registry
        self._offered += [step for step in chosen.plan.steps if step.id not in known]
        return list(self._offered)

    @property
    def personas(self) -> list[Persona]:
        """Those that were made for what is offered."""
        return _named_in(self._offered, self._personas)

    def _on_model_answered(self, event: ModelAnswered) -> Command:
        answer = event.answer
        self._generated_tokens = answer.generated_tokens
        try:
            registry, begun = self._registry, Begun({step.id for step in self._offered}, self._personas)
            made = read_plan(answer.text, answer.finish_reason, self._task, registry.roles, registry.personas, begun)
        except ModelPlanRefused as err:
            self.model_outcome = ModelOutcome.REFUSED
            self._reasons.append(f"its plan was refused: {err}")
            return self._break_off(event.at_ms, "plan.refused") if self._offered else self._use_rules(event.at_ms)
        plan = made.plan
        if self._offered:
            written = {step.id: step for step in plan.steps}
            offered = {step.id: step for step in self._offered}
            same = all(name in written and _alike(step, written[name]) for name, step in offered.items())
            rest = [step for step in plan.steps if step.id not in offered]
            plan = plan.model_copy(update={"steps": [*self._offered, *rest]})
            if not same or find_problems(self._task.model_copy(update={"plan": plan})):
                self.model_outcome = ModelOutcome.REFUSED
                self._reasons.append("its plan ended otherwise than it began")
                return self._break_off(event.at_ms, "plan.changed")
            self._reasons.append(f"{len(self._offered)} of its steps began while it was written")
        elif (narrow := self._too_narrow(plan)) is not None:
            self.model_outcome = ModelOutcome.NARROW
            self._reasons.append(narrow)
            return self._use_rules(event.at_ms)
        if self._revision is not None:
            plan = renumbered(self._whole_task, self._revision, plan)
        self.model_outcome = ModelOutcome.USED
        self._reasons.append(f"its plan of {len(plan.steps)} steps is valid, acyclic and within budget")
        choice = Decomposition(
            f"{self._task.task_type.value}.model/{len(plan.steps)}", (self._rules.template,), self._reasons[-1]
        )
        if made.repairs:
            self._reasons.append(f"it was repaired: {'; '.join(made.repairs[:_MAX_REPAIRS])}")
        self._personas, self._registry = made.personas, with_own(self._registry, made.personas)
        return self._settle(event.at_ms, OpenPlan("model", {choice.choice: plan}, choice))

    def _too_narrow(self, plan: Plan) -> str | None:
        """Why a model's plan is not used where the objective itself names parts that do not need each other.

        A plan that does more side by side may know better; one that chains what could run at once, or leaves a part
        out, does not.
        """
        parts = self._rules.parts
        if len(parts) < 2 or self._task.inputs or self._revision is not None:
            return None
        wide, by_rules = width_of(plan), width_of(self._rules.plan)
        if wide >= by_rules:
            return None
        return f"its plan does {wide} steps side by side, although the objective names {len(parts)} independent parts"

    def _break_off(self, at_ms: int, code: str) -> Command:
        """Steps of the model's plan run, and there will be no more of it: one step by rule makes the result of them."""
        self._broke_off = code[:128]
        last = finishing_step(self._task, self._registry.roles, self._offered)
        plan = Plan(steps=[*self._offered, last])
        self._reasons.append(f"{len(self._offered)} of its steps run already and stay, {last.id} by rule does the rest")
        choice = Decomposition(
            f"{self._task.task_type.value}.model/{len(plan.steps)}", (self._rules.template,), self._reasons[-1]
        )
        return self._settle(at_ms, OpenPlan("model", {choice.choice: plan}, choice))

    def _on_revision(self, at_ms: int, task: TaskIR, revision: Revision) -> Command:
        """The rest of a running plan: by rule, or by the model where a result says that the plan is wrong."""
        self._revision, self._whole_task = revision, task
        rules = rest_by_rules(task, revision, self._registry.roles)
        self._by_rules, self._rules = [rules], rules
        self._task = rest_as_task(task, revision)
        problems = plan_problems(whole(task, revision, rules.plan), self._registry)
        if problems:
            return self._refuse(problems)
        self._reasons.append(f"version {revision.version}: {revision.trigger}")
        self._memory_away = True  # the choices that memory advises on were made with the first version
        if revision.trigger == "contradicted" and rules.template == "replan.contradicted/1":
            return self._model_or_rules(at_ms)
        return self._use_rules(at_ms)

    def _use_rules(self, at_ms: int) -> Command:
        rules = self._rules
        self._reasons += [f"rules: {rules.template}, because {rules.because}", *rules.notes]
        plans = {plan.template: plan.plan for plan in self._by_rules}
        choice = Decomposition(rules.template, tuple(plans)[1:], rules.because)
        return self._settle(at_ms, OpenPlan("rules", plans, choice))

    def _settle(self, at_ms: int, open_plan: OpenPlan) -> Command:
        """There is a plan, or several to choose from: ask memory about what is open."""
        self._open = open_plan
        asked = self._what_is_open()
        if asked is None:
            return self._fill_in({})
        self._asked = asked
        self.phase = Phase.ADVISING
        return AskAdvice(asked, self._memory_s(at_ms))

    def _fill_in(self, advice: Mapping[str, Advised]) -> Command:
        """Choose, by advice or by rule, discover the plan's parallelism, have the decisions recorded."""
        opened = self._open
        template, width = opened.choice.choice, advice.get(WIDTH_KEY)
        choice = replace(opened.choice, advice=width)
        if width is not None:
            template = next(name for name in opened.plans if shape_of(name) == width.choice)
            others = tuple(name for name in opened.plans if name != template)
            choice = replace(opened.choice, choice=template, alternatives=others, rule=width.why, advice=width)
        if self._revision is not None:
            return self._fill_in_rest(self._revision, opened.plans[template], choice)
        if opened.source != "client":
            offered = {plan.template: plan.plan for plan in self._by_rules}
            widest = max(map(width_of, [*offered.values(), *opened.plans.values()]))
            ruled = width_of(self._rules.plan)
            choice = replace(choice, cluster=split_cluster(self._task, offered), rules_width=ruled, widest=widest)
            self._reasons.append(told(opened.plans[template]))
        found = discover(opened.plans[template], self._task.inputs)
        self._reasons += found.notes[:_MAX_REPAIRS]
        fitted = Fitted(self._task, found.plan, ())
        if opened.source != "client":
            fitted = fit_to_context(self._task, found.plan, self._registry)
            self._reasons += fitted.notes
        runs = {step.id for step in self._offered}
        chosen = choose(fitted.task, fitted.plan, choice, self._registry, opened.source, advice, runs)
        self._decisions = list(chosen.decisions)
        self._draft = PlanFinal(
            task=fitted.task.model_copy(update={"plan": chosen.plan}),
            source=opened.source,
            reason="",
            removed_edges=list(found.removed),
            added_edges=list(found.added),
            broke_off=self._broke_off,
            similar=self._similar,
            lessons=self._lessons,
            personas=_named_in(chosen.plan.steps, self._personas),
            generated_tokens=self._generated_tokens,
        )
        return self._finish()

    def _fill_in_rest(self, revision: Revision, plan: Plan, choice: Decomposition) -> Command:
        """Choose for the new steps; those that stay have everything, and how a rest is made is no width to learn."""
        stay = set(revision.open)
        persona = self._whole_task.plan.persona if self._whole_task.plan is not None else None
        new = Plan(steps=[step for step in plan.steps if step.id not in stay], persona=persona)
        chosen = choose(self._task, new, choice, self._registry, self._open.source)
        self._decisions = [one for one in chosen.decisions if one.subject != "decomposition"]
        kept = [step for step in plan.steps if step.id in stay]
        rest = Plan(steps=[*chosen.plan.steps, *kept], persona=persona)
        self._draft = PlanFinal(
            task=self._whole_task.model_copy(update={"plan": rest}),
            source=self._open.source,
            reason="",
            personas=_named_in(rest.steps, self._personas),
            generated_tokens=self._generated_tokens,
        )
        return self._finish()

    def _finish(self) -> Command:
        """The decisions go with the plan; who runs it tells memory of them together with what came of them."""
        self.phase = Phase.DONE
        if self._task.task_id is None:
            self._reasons.append("dry run: the decisions are not recorded")
        decisions = as_of(self._registry, self._decisions)
        return Finish(self._draft.model_copy(update={"reason": "; ".join(self._reasons), "decisions": decisions}))

    def _refuse(self, problems: list[PlanProblem]) -> Command:
        self.phase = Phase.DONE
        shown = [str(problem)[:400] for problem in problems[:10]]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        message = f"the task cannot run as written, change it and submit it again: {'; '.join(shown)}{more}"
        return Refuse(
            Failure(
                code="plan.invalid",
                category=Category.POLICY,
                origin="planner",
                message=message,
                evidence=as_evidence(problems),
            )
        )

    def _planner(self) -> RoleEntry | None:
        """The role that plans: the front door, else any role on a model of tier A."""
        roles = self._registry.roles
        for name in ROLES_FOR[Work.PLAN]:
            if name in roles:
                return roles[name]
        return next((role for role in roles.values() if self._registry.model_of(role.name).tier == "A"), None)

    def _left_s(self, at_ms: int) -> float:
        return max(0.0, (self._deadline_ms - at_ms) / 1000)

    def _memory_s(self, at_ms: int) -> float:
        return min(MEMORY_S, self._left_s(at_ms) * _MEMORY_SHARE)

    def _model_s(self, at_ms: int) -> float:
        bounds = [MODEL_S, self._left_s(at_ms) * _MODEL_SHARE]
        if self._task.deadline_s is not None:
            bounds.append(self._task.deadline_s * _TASK_SHARE)
        return min(bounds)


def _alike(offered: Step, written: Step) -> bool:
    """Whether a step of the whole plan is the one that began early; gates and persona were chosen since."""
    return (offered.action, offered.inputs, offered.outputs) == (written.action, written.inputs, written.outputs)


def _named_in(steps: Sequence[Step], personas: Sequence[Persona]) -> list[Persona]:
    """Those that these steps name."""
    names = {step.persona for step in steps}
    return [one for one in personas if one.name in names]
