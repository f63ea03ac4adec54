"""Personas made at run time: who may make one, what it is called, and what becomes of it. Pure.

Made for a task, a persona is the task's own (`facts.PersonasMade`): its steps keep it, whatever happens here. By name
it is known to all others while it is on trial: planners offer it to the learned policy as one more choice. When tasks
that used one have been settled, memory is asked what all personas have earned (`persona_verdicts.py`): what has proved
better is written into the registry's files by the driver, what has proved worse, or was idle where there is no room, is
dropped. Every change is a row of the journal before anybody is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from pydantic import ValidationError

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.messages.memory import Arms, ArmValue, MemoryFinal, MemoryRequest
from protocol.messages.persona import NO_PERSONA, Persona, PersonaMade, PersonaState, PersonaView
from protocol.messages.reply import ErrorReply
from services.kit.identity import work_key
from services.kit.registry import Registry, free_name
from services.scheduler.calls import Call
from services.scheduler.effects import Ask, Drop
from services.scheduler.persona_verdicts import standing_of, verdict
from services.scheduler.resources import NOTHING

SUBJECT: Final = "persona"
_MEMORY: Final = "memory"
_LOOK_EVERY_MS: Final = 2_000
"""Between two questions to memory, of all trials together."""
_AGAIN_MS: Final = 60_000
"""Until the files of a registry that could not be written are tried again."""
_TIMEOUT_MS: Final = 30_000
_TASKS_SHARE: Final = 4
"""One task has at most the fourth part of the places on trial."""
_KEPT: Final = 256
"""Rows of what was adopted or dropped; the oldest go."""


class KeepPersona(msgspec.Struct, frozen=True):
    """Write this row of the journal; without `data`, remove it."""

    name: str
    data: bytes | None


class AdoptPersona(msgspec.Struct, frozen=True):
    """Write this persona into personas.yaml and come back with PersonaWritten."""

    persona: Persona
    note: str
    """For a comment beside it."""


class Trial(msgspec.Struct):
    """One persona that was made at run time, as its row holds it."""

    persona: dict[str, Any]
    state: PersonaState
    why: str
    made_by: str
    task: str | None
    made_ms: int
    changed_ms: int
    used_ms: int
    """When a task last took it up."""
    waiting: bool = False
    """Adopted, but the files it stands in have not been taken up: so it is still ours to know."""

    @property
    def made(self) -> Persona:
        """The persona itself."""
        return Persona.model_validate(self.persona)


Effect = Ask | Drop | KeepPersona | AdoptPersona


@dataclass(slots=True)
class Personas:
    """All of them. `registry` gives the declared one, without trials or with."""

    registry: Callable[[], Registry]
    trials: dict[str, Trial] = field(default_factory=dict)
    changed: bool = False
    """Others are on trial than when this was last set to False: registries and planners have to be told."""
    _effects: list[Effect] = field(default_factory=list)
    _look: bool = True
    """Outcomes may have come since memory was asked; True at first, for those that came while no hub was there."""
    _asked: str | None = None
    """Key of the question that is under way."""
    _next_look_ms: int = 0
    _writing: str | None = None
    """Name that is being written into the files."""
    _not_before_ms: int = 0

    def take(self) -> list[Effect]:
        """Effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def restore(self, rows: Iterable[bytes]) -> None:
        """Take up what the journal holds; rows that cannot be read are left out."""
        found = []
        for data in rows:
            try:
                trial = _decode(data)
                found.append((trial.made_ms, trial.made.name, trial))
            except (msgspec.MsgspecError, ValidationError):
                continue  # of another version: the tasks that use it have it
        self.trials = {name: trial for _, name, trial in sorted(found, key=lambda row: row[:2])}
        self.changed = True

    # Making

    def make(
        self,
        persona: Persona,
        *,
        made_by: str,
        at_ms: int,
        task: str | None = None,
        own: Mapping[str, Persona] | None = None,
        rename: bool = False,
    ) -> tuple[Persona, PersonaMade]:
        """Have a persona; returns it under the name it has from now on, and what whoever asked is told.

        `own` are those that the task has already; the engine adds it to them. Raises BadFrame where its roles do not
        exist, or its name is taken by another prompt and may not be changed.
        """
        self._check_roles(persona)
        named = self._named(persona, own or {}, rename=rename)
        known = self.trials.get(named.name)
        if known is not None and known.state != "dropped":
            return named, PersonaMade(name=named.name, state=known.state, duplicate=True)
        if named.name in self._declared():
            return named, PersonaMade(name=named.name, state="registered", duplicate=True)
        no_room = self._has_its_share(task) or self._make_room(at_ms)
        if no_room and task is None:
            raise BadFrame("persona.full", f"{no_room}; make it for a task, or ask again when one of them was decided")
        if no_room:
            return named, PersonaMade(name=named.name, state="dropped", why=f"only this task knows it: {no_room}")
        self._enter(named, made_by, task, at_ms)
        return named, PersonaMade(name=named.name, state="trial")

    def used(self, names: Iterable[str], at_ms: int) -> None:
        """A task has taken these up."""
        for name in names:
            if name in self.trials:
                self.trials[name].used_ms = max(at_ms, self.trials[name].used_ms)

    def on_trial(self) -> list[Persona]:
        """What may be chosen beside the registry's; the one that was made first comes first."""
        declared = self._declared()
        return [
            trial.made
            for name, trial in self.trials.items()
            if (trial.state == "trial" or trial.waiting) and name not in declared
        ]

    def listing(self) -> list[PersonaView]:
        """Everything known, the declared ones first."""
        views = []
        for name in self._declared():
            entry = self.registry().personas[name]
            trial = self.trials.get(name)
            came = trial is not None and trial.state == "adopted"
            views.append(
                PersonaView(
                    name=name,
                    description=entry.description,
                    prompt=entry.prompt,
                    roles=list(entry.fits.roles),
                    task_types=[each.value for each in entry.fits.task_types],
                    state="adopted" if came else "registered",
                    **(_history(trial) if trial is not None and came else {}),
                )
            )
        for name, trial in self.trials.items():
            if any(view.name == name for view in views):
                continue
            fields = trial.made.model_dump(mode="json")
            views.append(PersonaView(**fields, state=trial.state, **_history(trial)))
        return views

    # Outcomes

    def settled(self) -> None:
        """A task that had one of these has its outcomes in memory."""
        self._look = True

    def on_tick(self, at_ms: int) -> None:
        """Ask memory what has been earned, if something may have been."""
        wants = self._look and self._asked is None and at_ms >= self._next_look_ms and self.on_trial()
        if not wants:
            return
        self._look, self._next_look_ms = False, at_ms + _LOOK_EVERY_MS
        key = work_key("personas", at_ms)
        self._asked = key
        self._effects.append(
            Ask(
                Call(
                    key=key,
                    kind="memory.request",
                    target=_MEMORY,
                    queued_ms=at_ms,
                    interactive=False,
                    client="scheduler",
                    needs=NOTHING,
                    outer_ms=at_ms + _TIMEOUT_MS,
                    timeout_ms=_TIMEOUT_MS,
                )
            )
        )

    def owns(self, key: str) -> bool:
        """Whether a call is the question to memory."""
        return key == self._asked

    def body_of(self, call: Call, at_ms: int) -> bytes:
        """The question."""
        return pack_body(MemoryRequest(ask=Arms(subject=SUBJECT)))

    def on_started(self, call: Call, worker: str, at_ms: int, **_: object) -> None:
        """Memory has the question: nothing follows."""

    def on_lost(self, call: Call, worker: str, at_ms: int) -> None:
        """Memory died with the question; its ending follows."""

    def on_ended(self, call: Call, kind: str, body: bytes, worker: str, at_ms: int) -> None:
        """Memory has answered, or has not: then it is asked again later."""
        self._asked = None
        try:
            if kind == "error":
                unpack_body(ErrorReply, body)
                self._look = True
            else:
                self.judge(unpack_body(MemoryFinal, body).arms, at_ms)
        except BadFrame:
            self._look = True

    def judge(self, arms: Iterable[ArmValue], at_ms: int) -> None:
        """Apply the policy to every trial. One at a time is written into the files; the others' turn comes."""
        arms = list(arms)
        policy = self.registry().trials
        declared = {*self._declared(), NO_PERSONA}
        for persona in self.on_trial():
            trial = self.trials[persona.name]
            if trial.waiting:
                continue
            decided = verdict(standing_of(persona, arms, declared), policy)
            match decided.kind:
                case "drop":
                    self._change(trial, "dropped", decided.why, at_ms)
                case "adopt" if not policy.adopt:
                    self._change(trial, "trial", f"has earned it, but `adopt` is off: {decided.why}", at_ms)
                case "adopt" if self._writing is None and at_ms >= self._not_before_ms:
                    self._writing = persona.name
                    self._change(trial, "trial", f"is being adopted: {decided.why}", at_ms)
                    self._effects.append(AdoptPersona(persona, decided.why))
                case "adopt":
                    self._look = True
                case _:
                    self._change(trial, "trial", decided.why, at_ms)

    def on_written(self, name: str, problem: str | None, at_ms: int, *, taken: bool) -> None:
        """What became of writing it into the files; `taken` if they have been taken up."""
        self._writing = None
        trial = self.trials.get(name)
        if trial is None:
            return
        if problem is None:
            why = trial.why.replace("is being adopted: ", "", 1)
            trial.waiting = not taken
            if trial.waiting:
                why += "; the files have other changes too, so it waits there for `tierline registry reload`"
            self._change(trial, "adopted", why, at_ms)
        else:
            self._not_before_ms, self._look = at_ms + _AGAIN_MS, True
            self._change(trial, "trial", f"has earned it, but {problem}", at_ms)

    def on_registry(self, at_ms: int, *, reloaded: bool) -> None:
        """The declared registry is another one: what it declares is on trial no more.

        `reloaded` if it is what the operator's files say now.
        """
        declared = self._declared()
        for name, trial in self.trials.items():
            trial.waiting = trial.waiting and not reloaded and name not in declared
            if name == self._writing:
                continue  # what became of it follows, with the reason why it has earned its place
            if trial.state == "trial" and name in declared:
                same = self.registry().personas[name].prompt == trial.made.prompt
                state: PersonaState = "adopted" if same else "dropped"
                self._change(trial, state, "the registry's files declare it" + ("" if same else " differently"), at_ms)
            elif trial.state == "adopted" and name not in declared and not trial.waiting:
                self._change(trial, "dropped", "it was adopted, and is in the registry's files no more", at_ms)

    # Inside

    def _declared(self) -> list[str]:
        registry = self.registry()
        return [name for name in registry.personas if name not in registry.on_trial]

    def _check_roles(self, persona: Persona) -> None:
        registry = self.registry()
        unknown = [role for role in persona.roles if role not in registry.roles]
        if unknown:
            known = ", ".join(registry.roles)
            raise BadFrame("persona.invalid", f"persona.roles: the registry has no {unknown[0]!r}; it has: {known}")

    def _named(self, persona: Persona, own: Mapping[str, Persona], *, rename: bool) -> Persona:
        """Under a name that no other prompt has."""
        named = free_name(persona, lambda name: self._prompt_of(name, own))
        if named is None or (named.name != persona.name and not rename):
            raise BadFrame(
                "persona.taken",
                f"persona.name: {persona.name!r} has another prompt already; take another name, or set `rename`",
            )
        return named

    def _prompt_of(self, name: str, own: Mapping[str, Persona]) -> str | None:
        if name in own:
            return own[name].prompt
        entry = self.registry().personas.get(name)
        if entry is not None:
            return entry.prompt
        trial = self.trials.get(name)
        return None if trial is None or trial.state == "dropped" else trial.made.prompt

    def _has_its_share(self, task: str | None) -> str:
        """Why a task gets no further place; empty if it does. A swarm of a hundred leaves places for others."""
        if task is None:
            return ""
        share = self.registry().trials.at_once // _TASKS_SHARE
        running = sum(1 for trial in self.trials.values() if trial.state == "trial" and trial.task == task)
        return f"{share} personas of this task are on trial already" if running >= max(1, share) else ""

    def _make_room(self, at_ms: int) -> str:
        """Why there is no place for one more; empty if there is, perhaps since one that was idle has gone."""
        policy = self.registry().trials
        running = [trial for trial in self.trials.values() if trial.state == "trial"]
        if len(running) < policy.at_once:
            return ""
        idlest = min(running, key=lambda trial: trial.used_ms, default=None)
        if idlest is None or at_ms - idlest.used_ms < policy.idle_s * 1000 or idlest.made.name == self._writing:
            return f"{policy.at_once} personas are on trial already, all of them made or used lately"
        self._change(idlest, "dropped", "it was idle for longest when another one needed the place", at_ms)
        return ""

    def _enter(self, persona: Persona, made_by: str, task: str | None, at_ms: int) -> None:
        trial = Trial(
            persona=persona.model_dump(mode="json"),
            state="trial",
            why="no outcomes yet",
            made_by=made_by,
            task=task,
            made_ms=at_ms,
            changed_ms=at_ms,
            used_ms=at_ms,
        )
        self.trials.pop(persona.name, None)  # a dropped one of that name: the new one is the youngest
        self.trials[persona.name] = trial
        self._keep(trial)
        self.changed = True
        over = [name for name, one in self.trials.items() if one.state != "trial"]
        for name in over[: max(0, len(over) - _KEPT)]:
            del self.trials[name]
            self._effects.append(KeepPersona(name, None))

    def _change(self, trial: Trial, state: PersonaState, why: str, at_ms: int) -> None:
        if (trial.state, trial.why) == (state, why):
            return
        if trial.state != state:
            trial.changed_ms = at_ms
            self.changed = True
        trial.state, trial.why = state, why[:2_000]
        self._keep(trial)

    def _keep(self, trial: Trial) -> None:
        self._effects.append(KeepPersona(trial.persona["name"], _encode(trial)))


def _history(trial: Trial) -> dict[str, Any]:
    return {
        "why": trial.why,
        "made_by": trial.made_by,
        "task_id": trial.task,
        "made_ms": trial.made_ms,
        "changed_ms": trial.changed_ms,
    }


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Trial).decode
