"""What a new registry means for the hub: what has changed, and what running tasks still need of the old one.

A task keeps what it was planned with as long as it runs: a role, persona, gate or model that left the registry stays in
force for the tasks that use it, and for nobody else, until the last of them has ended; so does the model of a batch,
which has the rest of its registry itself. An entry that was *changed* is
taken up with the next attempt; attempts under way have their request already. Pure: reading files is `app`'s, telling
services `machine`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.persona import NO_PERSONA, Persona
from protocol.messages.registry import EntryChange, RegistryChanged, Reloaded
from protocol.messages.result import StepState
from services.kit.registry import Problem, Registry, with_trials
from services.scheduler.peers import Peer
from services.scheduler.tasks import TaskRecord

TELL_EVERY_MS: Final = 5_000
"""Pause before a service that lags is told again: it reads all files each time."""
MAX_FINDINGS: Final = 200
_LOOK_EVERY_MS: Final = 1_000
"""Pause between two looks at all running tasks for what they use."""
_INFER: Final = "infer."
_NAMED: Final = ("models", "roles", "personas", "gates")


@dataclass(slots=True)
class Used:
    """Names that running tasks rest on."""

    roles: set[str] = field(default_factory=set)
    personas: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    """Models of attempts that wait or run; those of roles follow from the roles."""

    def missing(self, registry: Registry) -> dict[str, set[str]]:
        """Section -> used names that a registry does not have, sections without any left out."""
        found = {section: getattr(self, section) - getattr(registry, section).keys() for section in _NAMED}
        return {section: names for section, names in found.items() if names}


def used_by(tasks: Iterable[TaskRecord]) -> Used:
    """What the unfinished steps of unfinished tasks name."""
    used = Used()
    for task in tasks:
        if task.state.final:
            continue
        used.gates.update(task.ir.gates)
        if not task.steps and task.ir.plan is not None:  # submitted with its plan, which the planner has in hand
            steps = task.ir.plan.steps
        else:
            open_steps = [step for step in task.steps.values() if not step.state.final]
            steps = [step.spec for step in open_steps]
            for step in open_steps:
                used.roles.add(step.role)
                if step.state in (StepState.READY, StepState.INFERRING):
                    used.models.add(step.attempt.model)
        for spec in steps:
            used.roles.add(spec.actor)
            used.gates.update(spec.gates or ())
            if spec.spawns is not None:
                used.roles.update(spec.spawns.roles)
            if spec.persona and spec.persona != NO_PERSONA and spec.persona not in task.personas:
                used.personas.add(spec.persona)
    return used


def with_kept(declared: Registry, past: Registry, used: Used) -> Registry:
    """The declared registry, and of the past one whatever is used and not declared any more.

    A kept gate keeps the role that judges for it, a kept role the roles it escalates to and the models of all of them,
    a kept model its draft.
    """
    gates = dict(_taken(past.gates, used.gates - declared.gates.keys()))
    judges = {gate.role for gate in gates.values() if gate.role is not None}
    roles = dict(_taken(past.roles, (used.roles | judges) - declared.roles.keys()))
    for name in list(roles):
        roles |= {one.name: one for one in past.escalation_chain(name) if one.name not in declared.roles}
    wanted = {name for role in roles.values() for name in (role.model, role.lateral) if name} | used.models
    wanted |= {draft for name in wanted if name in past.models and (draft := past.models[name].speculation.draft)}
    kept: dict[str, dict[str, Any]] = {
        "roles": roles,
        "models": dict(_taken(past.models, wanted - declared.models.keys())),
        "personas": dict(_taken(past.personas, used.personas - declared.personas.keys())),
        "gates": gates,
    }
    if not any(kept.values()):
        return declared
    return _over(declared, kept)


def kept_names(declared: Registry, in_force: Registry) -> list[str]:
    """Entries that are in force without being declared, as `roles.translator`."""
    return [
        f"{section}.{name}"
        for section in _NAMED
        for name in getattr(in_force, section)
        if name not in getattr(declared, section)
    ]


def changes(old: Registry, new: Registry) -> tuple[list[EntryChange], int]:
    """What differs, section by section, and the number of entries that do not."""
    found: list[EntryChange] = []
    same = 0
    for section, before, after in _sections(old, new):
        for name in sorted({*before, *after}):
            if name not in before:
                found.append(EntryChange(section=section, name=name, change="added"))
            elif name not in after:
                found.append(EntryChange(section=section, name=name, change="removed"))
            elif before[name] != after[name]:
                found.append(EntryChange(section=section, name=name, change="changed"))
            else:
                same += 1
    return found, same


def refusal(reason: str, problems: Sequence[Problem]) -> Failure:
    """Why a registry is not taken up, for whoever asked: every problem with file and line, 200 at most."""
    findings = [
        Finding(
            gate="registry",
            category=Category.POLICY,
            message=(f"{one.field}: " if one.field else "") + one.message[:3_000],
            file=one.file,
            line=one.line,
            rule=one.rule,
        )
        for one in problems[:MAX_FINDINGS]
    ]
    return Failure(
        code="registry.invalid",
        category=Category.POLICY,
        origin="scheduler",
        message=f"{reason}; the hub goes on with the registry it has"[:8_000],
        findings=findings,
    )


def removed(lacking: Mapping[str, set[str]]) -> Failure:
    """Why a task that was running ends: what it uses left the registry, and no copy that has it is left."""
    names = ", ".join(f"{section}.{name}" for section in sorted(lacking) for name in sorted(lacking[section]))
    message = (
        f"a reload of the registry has removed {names[:1_000]}, which this task still uses, and no copy of the "
        "registry that had it is left: declare it again and submit the task anew"
    )
    return Failure(code="registry.removed", category=Category.POLICY, origin="scheduler", message=message)


def _sections(old: Registry, new: Registry) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    old, new = with_trials(old, ()), with_trials(new, ())
    for section in _NAMED:
        yield section, getattr(old, section), getattr(new, section)
    before, after = old.failures.rules, new.failures.rules
    yield (
        "failures",
        {key.value: rule for key, rule in before.items()},
        {key.value: rule for key, rule in after.items()},
    )
    clients = ({entry.name: entry for entry in one.clients} for one in (old, new))
    yield "clients", next(clients), next(clients)
    yield "caps", {"caps": old.failures.caps}, {"caps": new.failures.caps}
    yield "hardware", {"hardware": old.hardware}, {"hardware": new.hardware}
    yield "policy", {"policy": old.gate_policy}, {"policy": new.gate_policy}
    yield "learning", {"learning": old.learning}, {"learning": new.learning}
    yield "trials", {"trials": old.trials}, {"trials": new.trials}


def _over(base: Registry, more: Mapping[str, Mapping[str, Any]]) -> Registry:
    """A registry with further entries; those of `more` win."""
    return replace(
        base,
        models=MappingProxyType({**base.models, **more["models"]}),
        roles=MappingProxyType({**base.roles, **more["roles"]}),
        personas=MappingProxyType({**base.personas, **more["personas"]}),
        gates=MappingProxyType({**base.gates, **more["gates"]}),
    )


def _taken(entries: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((name, entries[name]) for name in sorted(names) if name in entries)


@dataclass(slots=True)
class Registries:
    """The registry as declared, the one in force, and which services have been told."""

    declared: Registry
    """For new tasks."""
    in_force: Registry
    """`declared`, and what running tasks still use of earlier ones."""
    _trials: Sequence[Persona] = ()
    """Laid over both, see `services.kit.registry.trials`."""
    _told_ms: dict[bytes, int] = field(default_factory=dict)
    """Identity -> when it was last told."""
    _looked_ms: int = 0

    def try_out(self, personas: Sequence[Persona]) -> None:
        """Others are on trial."""
        self._trials = personas
        self.declared, self.in_force = (with_trials(one, personas) for one in (self.declared, self.in_force))

    def take_up(self, declared: Registry, tasks: Iterable[TaskRecord], models: Iterable[str] = ()) -> Reloaded:
        """A new declared registry; says what is different. `models` are needed whatever the tasks use."""
        previous, past = self.declared, self.in_force
        declared = with_trials(declared, self._trials)
        found, same = changes(previous, declared)
        self.declared = declared
        used = used_by(tasks)
        used.models.update(models)
        self.in_force = with_kept(declared, past, used)
        self._told_ms.clear()
        return Reloaded(
            digest=declared.digest,
            previous=previous.digest,
            changes=found,
            unchanged=same,
            draining=[one.name for one in found if one.section == "models" and one.change != "added"],
            kept=kept_names(declared, self.in_force),
        )

    def bring_back(self, past: Registry, tasks: Iterable[TaskRecord]) -> None:
        """Have in force what these tasks use of an earlier registry, beside what is already."""
        more = with_kept(self.declared, past, used_by(tasks))
        if more is not self.declared:
            self.in_force = _over(more, {name: getattr(self.in_force, name) for name in _NAMED})

    def let_go(self, tasks: Iterable[TaskRecord], at_ms: int, models: Iterable[str] = ()) -> bool:
        """Drop what was kept and is used no more; True if the registry in force is another now."""
        if self.in_force is self.declared or at_ms - self._looked_ms < _LOOK_EVERY_MS:
            return False
        self._looked_ms = at_ms
        used = used_by(tasks)
        used.models.update(models)
        less = with_kept(self.declared, self.in_force, used)
        if kept_names(self.declared, less) == kept_names(self.declared, self.in_force):
            return False
        self.in_force = less
        return True

    def lagging(self, peers: Iterable[Peer], at_ms: int) -> list[tuple[Peer, RegistryChanged]]:
        """Services that work with another registry and have not been told for a while, with what to tell them."""
        peers = list(peers)
        told = {peer.identity: self._told_ms.get(peer.identity) for peer in peers}
        self._told_ms = {identity: at for identity, at in told.items() if at is not None}
        due = []
        for peer in peers:
            told_ms = self._told_ms.get(peer.identity)
            # Before its first pong nothing is known of it; it has the digest from its welcome.
            if peer.registry in (None, self.declared.digest):
                continue
            if told_ms is not None and at_ms - told_ms < TELL_EVERY_MS:
                continue
            self._told_ms[peer.identity] = at_ms
            due.append((peer, RegistryChanged(digest=self.declared.digest, needed=self._needs(peer))))
        return due

    def _needs(self, peer: Peer) -> bool:
        """Whether the model that this peer serves, if it serves one, is in force."""
        models = [name.removeprefix(_INFER) for name in peer.capabilities if name.startswith(_INFER)]
        return not models or any(name in self.in_force.models for name in models)
