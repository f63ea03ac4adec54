"""Tokens of the machine: cores, exclusive groups and memory, shared by inference, gates, and models that load.

A call takes everything it needs at once or nothing, so nobody ever holds one token while waiting for another and no
deadlock is possible. A call made by a worker during another call (a gate that asks a judge) may use what that one
holds, since its worker waits for it. A model's process computes with its threads however many of its slots are busy:
all its running calls share one holding, which is given back with the last of them.

Memory is held by models, not by calls: from before they are told to load until their process has let go of it. A model
that loads takes its memory and a core together or neither, and gives the core back when it is loaded. Which models
hold memory is decided in `residency`; nothing that runs ever waits for memory, so it cannot be part of a deadlock.

Progress: a call that has waited `PATIENCE_MS` for tokens closes the door behind it. Until it has them nobody else may
start, running work drains, and since every call has a deadline the tokens come free. Slots are the broker's credit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import msgspec

from services.kit.registry import Registry
from services.scheduler.stages import depths

PATIENCE_MS: Final = 1_000
_INFER: Final = "infer."


class Needs(msgspec.Struct, frozen=True):
    """What a call takes while it runs."""

    cores: int = 0
    more_cores: int = 0
    """Taken as well, as far as they are free at that moment; never waited for."""
    shared_by: str | None = None
    """Calls with the same name here share one holding; None = the call holds for itself."""
    group: str | None = None
    """Exclusive group: one holding at a time."""


_LOADING: Final = Needs(cores=1)
"""Reading and repacking a file keeps about one core busy."""

NOTHING: Final = Needs()


@lru_cache(maxsize=256)
def inference_needs(registry: Registry, target: str) -> Needs:
    """Needs of a call for `infer.<model>`: the threads of that model's process; nothing for other targets.

    A model on a server elsewhere takes no core here, and its group only if it has one.
    """
    model = registry.models.get(target.removeprefix(_INFER)) if target.startswith(_INFER) else None
    if model is None or (model.engine == "openai" and model.exclusive is None):
        return NOTHING
    if model.engine == "openai":
        return Needs(shared_by=target, group=model.exclusive)
    return Needs(cores=min(model.threads, registry.hardware.cores), shared_by=target, group=model.exclusive)


def gate_needs(registry: Registry, gates: list[str]) -> Needs:
    """Needs of a gate run: the cores of its widest gate, and more for those that can run beside it.

    Gates whose cores are not counted (linters, for the most part) need nothing: they wait behind no model.
    """
    known = [registry.gates[name] for name in dict.fromkeys(gates) if name in registry.gates]
    widest = max((gate.cores for gate in known), default=0)
    waits = {gate.name: gate.depends_on for gate in known}
    depth = depths({name: [other for other in others if other in waits] for name, others in waits.items()})
    at_depth: Counter[int] = Counter()
    for gate in known:
        at_depth[depth[gate.name]] += gate.cores
    return asked_cores(registry, widest, max(at_depth.values(), default=0))


def asked_cores(registry: Registry, least: int, useful: int) -> Needs:
    """Needs of a call that cannot do with fewer cores than `least` and can use `useful`, within what there is."""
    cores = min(least, registry.hardware.cores)
    return Needs(cores, more_cores=max(0, min(useful, registry.hardware.cores) - cores)) if cores else NOTHING


@dataclass(slots=True)
class _Holding:
    cores: int
    group: str | None
    keys: set[str]


@dataclass(slots=True)
class Tokens:
    """What is free and who holds the rest."""

    cores: int
    """Cores there are."""
    memory_bytes: int = 0
    """Memory for all models together."""
    _memory: dict[str, int] = field(default_factory=dict)
    """Model -> bytes booked for it."""
    _measured: set[str] = field(default_factory=set)
    """Models whose booking is a measurement, or was found rather than granted: it may exceed what is there."""
    _holdings: dict[str, _Holding] = field(default_factory=dict)
    _holder_of: dict[str, str] = field(default_factory=dict)
    _overdrawn: set[str] = field(default_factory=set)
    """Holders that came back with running work which did not fit any more, or use what another one lent them."""
    _blocked: dict[str, int] = field(default_factory=dict)
    """Target -> since when (unix ms) its first call waits for tokens, oldest first."""
    _shut_out: dict[str, str] = field(default_factory=dict)
    """Target that found the door closed -> who had closed it."""

    @property
    def free_cores(self) -> int:
        """Cores nobody holds."""
        return self.cores - sum(holding.cores for holding in self._holdings.values())

    def resize(self, cores: int) -> None:
        """The machine has so many cores from now on; what runs already keeps what it holds."""
        self.cores = cores
        if self.free_cores < 0:
            self._overdrawn |= self._holdings.keys()

    def take(self, key: str, target: str, needs: Needs, at_ms: int, parent: str | None = None) -> bool:
        """Take all that `needs` says for this call, or nothing; False = it has to wait.

        `parent` is the call whose worker waits for this one: its cores are lent, and no door is closed to it, or the
        two would wait for each other.
        """
        lent = self.held(parent) if parent is not None else 0
        if needs is not NOTHING and not lent and self._door_is_closed(target, at_ms):
            self._shut_out[target] = next(iter(self._blocked))
            return False
        if not self._fits(key, needs, lent):
            self._blocked.setdefault(target, at_ms)
            return False
        self._blocked.pop(target, None)
        if needs is not NOTHING:
            self._hold(key, needs)
            if self.free_cores < 0:
                self._overdrawn.add(self._holder_of[key])
        return True

    def held(self, key: str) -> int:
        """Cores that are reserved for this call, shared ones included."""
        holder = self._holder_of.get(key)
        return 0 if holder is None else self._holdings[holder].cores

    def book(self, key: str, needs: Needs) -> None:
        """A call that runs already came back with its worker: book what it holds, even where that overdraws."""
        if needs is NOTHING:
            return
        overdraws = not self._fits(key, needs)
        self._hold(key, needs)
        if overdraws:
            self._overdrawn.add(self._holder_of[key])

    def give_back(self, key: str) -> bool:
        """The call is over; True if tokens came free, so that others should be tried."""
        holder = self._holder_of.pop(key, None)
        if holder is None:
            return False
        holding = self._holdings[holder]
        holding.keys.discard(key)
        if holding.keys:
            return False
        del self._holdings[holder]
        self._overdrawn.discard(holder)
        return True

    @property
    def held_bytes(self) -> int:
        """Memory booked for models."""
        return sum(self._memory.values())

    @property
    def free_bytes(self) -> int:
        """Memory that no model holds; below zero where models turned out to need more than was granted."""
        return self.memory_bytes - self.held_bytes

    def held_by(self, model: str) -> int:
        """Memory booked for this model."""
        return self._memory.get(model, 0)

    def begin_load(self, model: str, need_bytes: int, at_ms: int, *, overdraw: bool = False) -> bool:
        """Take the memory of a model and a core to load it with, or nothing; False = it has to wait.

        `overdraw` is for the last resort: nobody is left who could make way, and the machine has the memory.
        """
        key = _load(model)
        if need_bytes > self.free_bytes and not overdraw:
            self.unblock(key)  # it waits for memory, which shuts no door to anybody
            return False
        if not self.take(key, key, _LOADING, at_ms):
            return False
        self.book_memory(model, need_bytes)
        if not overdraw:
            self._measured.discard(model)
        return True

    def end_load(self, model: str) -> bool:
        """The model is loaded, or will not be: its core is free. True if that may let others go on."""
        self.unblock(_load(model))
        return self.give_back(_load(model))

    def book_memory(self, model: str, held_bytes: int) -> None:
        """A model holds this, by measurement or by its own word: book it even where that overdraws."""
        self._memory[model] = held_bytes
        self._measured.add(model)

    def release_memory(self, model: str) -> None:
        """The model's process has let go of its memory."""
        self._memory.pop(model, None)
        self._measured.discard(model)

    def unblock(self, target: str) -> None:
        """Nobody waits for this target any more."""
        self._blocked.pop(target, None)

    def let_in(self) -> list[str]:
        """Targets that found a door closed which is open by now, each once: they should be tried."""
        if not self._shut_out:
            return []
        closer = next(iter(self._blocked), None)
        opened = [target for target, by in self._shut_out.items() if by != closer]
        for target in opened:
            del self._shut_out[target]
        return opened

    def blocked(self) -> list[str]:
        """Targets whose first call waits for tokens, the longest waiting first."""
        return list(self._blocked)

    def check_invariants(self) -> None:
        """Raise AssertionError if tokens were made or lost."""
        if self.free_cores < 0 and not self._overdrawn:
            raise AssertionError(f"{-self.free_cores} cores are held twice")
        granted = sum(held for model, held in self._memory.items() if model not in self._measured)
        if granted > self.memory_bytes:
            raise AssertionError(f"{granted - self.memory_bytes} bytes of memory were granted twice")
        groups = [holding.group for holding in self._holdings.values() if holding.group is not None]
        if len(groups) != len(set(groups)) and not self._overdrawn:
            raise AssertionError("an exclusive group is held twice")
        if any(not holding.keys for holding in self._holdings.values()):
            raise AssertionError("a holding without a call")

    def _hold(self, key: str, needs: Needs) -> None:
        holder = needs.shared_by or key
        self._holder_of[key] = holder
        if holder in self._holdings:
            self._holdings[holder].keys.add(key)
            return
        more = max(0, min(needs.more_cores, self.free_cores - needs.cores)) if needs.more_cores else 0
        self._holdings[holder] = _Holding(needs.cores + more, needs.group, {key})

    def _fits(self, key: str, needs: Needs, lent: int = 0) -> bool:
        if needs is NOTHING or (needs.shared_by or key) in self._holdings:
            return True
        taken = {holding.group for holding in self._holdings.values()}
        return needs.cores <= max(0, self.free_cores) + lent and (needs.group is None or needs.group not in taken)

    def _door_is_closed(self, target: str, at_ms: int) -> bool:
        """True while another target has been waiting for too long: then only that one may start."""
        first = next(iter(self._blocked), None)
        return first is not None and first != target and at_ms - self._blocked[first] >= PATIENCE_MS


def _load(model: str) -> str:
    return f"load.{model}"
