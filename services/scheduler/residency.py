"""Which models are in memory, as a pure machine: what is there and what is wanted in; orders to load and unload out.

All models share one budget (`resources.Tokens`). Hot ones hold theirs for ever. A warm one (and a cold one that was
asked for) gets its memory before it is told to load and keeps it until its process has let go of it. Room is made by
unloading whoever is worth least, never under running work. What is held comes from the estimate until the service has
measured it.

Progress. Models that are waited for load in the order in which their wait began; the first one's claim is kept free,
so nobody overtakes it into the room it needs. One that needs more than the budget can ever give it takes its turn
alone, if the machine has the memory; else it stands in nobody's way. An idle model makes way after a minimum
residence, a busy one after a turn: it is closed (gets no new work), runs dry, and is unloaded. Work never waits for
memory while it holds a slot, and the registry's rules say that everything that stays and the largest model that does
not fit together, so the first in line always gets its room. Both times grow with the time that loading takes, so that
no more than a fixed part of the time is spent on loading, whatever is asked for.

Who is told what, and what services say, is `loading`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from services.kit.registry import Registry
from services.kit.registry.memory import memory_needs, placed_before
from services.scheduler.place import MIN_TURN_MS, NONE, Demand, Place, State, waiting_longest, worth
from services.scheduler.resources import Tokens

AHEAD_MS: Final = 1_000
"""How much earlier than its loading time a model is loaded that will be needed."""
FAILED_PAUSE_MS: Final = 10_000
"""After a model was unloaded because it did not come up, it is not tried again for so long."""
REFUSED_PAUSE_MS: Final = 500
"""After a service kept its model because it was still freeing a slot."""
GONE_KEPT_MS: Final = 3_000
SILENT_KEPT_MS: Final = 60_000
"""How long the memory of a process that is gone from the bus stays booked: one whose connection broke is dead or comes
back soon; one that fell silent may have its model in memory still."""
TRUST_MS: Final = 5_000
"""After its start the hub loads nothing for so long if there are services that have not said yet what they hold."""
PRESSURE_EVERY_MS: Final = 2_000
"""Between two models that are unloaded because the machine is short of memory: the effect must be seen first."""
READING_MS: Final = 2_000
"""After memory came free the machine's account shows it within so long: it is read once a second."""
ALONE_PAUSE_MS: Final = 120_000
"""For one that is too large, and found the machine without the memory when all others had made way, nobody makes way
for so long: what a process holds of its file may count as available all the time."""


@dataclass(frozen=True, slots=True)
class Order:
    """Tell the service of this model to load or to unload it."""

    model: str
    loaded: bool
    why: Literal["needed", "asked", "ahead", "idle", "room", "pressure", "asked away"]
    bytes: int


@dataclass(slots=True)
class Residency:
    """All places and the budget they share. `guests` are the ones that come and go."""

    tokens: Tokens
    places: dict[str, Place] = field(default_factory=dict)
    guests: dict[str, Place] = field(default_factory=dict)
    leaving: dict[str, Place] = field(default_factory=dict)
    """Models of no registry any more, whose process may have them in memory still."""
    low: bool = False
    """The machine is short of memory by its own account."""
    available_bytes: int | None = None
    trust_ms: int = 0
    """Until then it matters whether a guest's service was never heard of."""
    counters: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("loads", "loads_ahead", "unloads", "unloads_pressure"), 0)
    )
    due_ms: int | None = None
    """When `decide` will next come to something new if nothing happens; None = never."""
    wants_core: bool = False
    """A model has its room and waits for a core to load with, so whatever ends may matter."""
    _pressure_ms: int = 0
    _freed_ms: int = 0
    """When memory came free last."""
    _over_ms: int | None = None
    """Since when more is held than there is."""

    def declare(self, registry: Registry) -> None:
        """Take over the models of a registry, at the start or when it has changed; what is known of them stays.

        Of an entry that has changed nothing is known but what its old process holds until it is gone.
        """
        known = self.leaving | self.places
        self.tokens.memory_bytes = registry.hardware.memory_bytes
        self.places = {}
        needs = memory_needs(registry.models)
        for name, entry in registry.served.items():
            if not entry.is_local:
                continue
            place = self.places[name] = known.pop(name) if name in known else Place(name)
            if name in self.leaving and place.state is not State.ABSENT:
                place.kept_until_ms = None
            place.declare(registry.launch(name), needs[name])
        for place in self.places.values():
            if place.residency == "hot":
                self._book_hot(place)
        self.leaving = {name: place for name, place in known.items() if self._outlives_its_entry(place)}
        for name in known.keys() - self.leaving.keys():
            self.tokens.release_memory(name)
        self.guests = {name: place for name, place in self.places.items() if place.residency != "hot"}

    def _book_hot(self, place: Place) -> None:
        """A hot model holds its memory for ever, unless its service does not start it for want of room beside those
        that stand before it in the registry."""
        needs = {
            one.model: one.told_bytes or one.estimate_bytes for one in self.places.values() if one.residency == "hot"
        }
        budget = self.tokens.memory_bytes
        before = sum(needs[name] for name in placed_before(place.model, needs, budget))
        if place.state is State.DEGRADED and before + needs[place.model] > budget:
            self.tokens.release_memory(place.model)
            return
        held = self.tokens.held_by(place.model) if place.outdated else 0
        self.tokens.book_memory(place.model, max(held, place.need_bytes))

    def _outlives_its_entry(self, place: Place) -> bool:
        """Whether the process of a model that has left the registry may have it in memory; nothing is asked of it."""
        self.tokens.end_load(place.model)
        place.wish, place.closing, place.asked_ms, place.wait_ms = None, False, None, None
        gone = place.state is State.PARKED or (place.state is State.ABSENT and place.kept_until_ms is None)
        return not gone and self.tokens.held_by(place.model) > 0

    # What services say

    def heard(self, model: str, state: State, measured_bytes: int, at_ms: int, *, settled: bool) -> None:
        """What the service of a model says of itself; `settled` if it has heard the newest order."""
        if model in self.leaving:
            self._hear_of_leaving(self.leaving[model], state, at_ms)
        place = self.places.get(model)
        if place is None:
            return
        if place.residency == "hot":
            if state is not place.state:
                self._enter(place, state, at_ms)
                self._book_hot(place)
        elif settled:
            self._settle(place, state, at_ms)
        if not measured_bytes or place.state is not State.LOADED:
            return
        if place.outdated:
            self.tokens.book_memory(model, max(self.tokens.held_by(model), measured_bytes))
        else:
            place.measured_bytes = measured_bytes if place.fresh else max(place.measured_bytes, measured_bytes)
            place.fresh = False
            self.tokens.book_memory(model, place.need_bytes)

    def foretold(self, model: str, needs_bytes: int) -> None:
        """What the service of a model says it will take, from the entry that is declared; 0 = it does not know."""
        place = self.places.get(model)
        if place is None or place.outdated or needs_bytes in (0, place.told_bytes):
            return
        place.told_bytes = needs_bytes
        if place.residency == "hot":
            self._book_hot(place)
        elif not place.measured_bytes and self.tokens.held_by(model):
            self.tokens.book_memory(model, place.need_bytes)

    def _hear_of_leaving(self, place: Place, state: State, at_ms: int) -> None:
        if place.state is State.ABSENT:
            place.kept_until_ms = None  # its connection was broken only
        self._enter(place, state, at_ms)
        if state is State.PARKED:
            self._forget(place, at_ms)

    def _settle(self, place: Place, state: State, at_ms: int) -> None:
        """The service of a warm or cold model has done, or refused, what it was told."""
        place.kept_until_ms = None
        if place.state is State.UNLOADING and state is State.LOADED:
            # A slot is still being freed: it keeps its model, and is asked again a little later.
            place.wish, place.pause_ms = None, at_ms + REFUSED_PAUSE_MS
        if state is not place.state and state is not State.LOADING:
            self.tokens.end_load(place.model)
        found = place.state is State.ABSENT
        self._enter(place, state, at_ms)
        if state is State.PARKED:
            self._release(place, at_ms)
            place.wish, place.closing, place.outdated = None, False, False
        elif not self.tokens.held_by(place.model) and (found or state is not State.UNLOADING):
            self.tokens.book_memory(place.model, place.need_bytes)  # found, not granted: an earlier hub gave it
        if state is State.LOADED:
            place.asked_ms = None

    def _enter(self, place: Place, state: State, at_ms: int) -> None:
        if state is place.state:
            return
        if state is State.LOADED and not place.resident:
            if place.state is State.LOADING and place.wish:
                place.load_ms = max(1, at_ms - place.since_ms)
            place.loaded_ms, place.fresh, place.resident = at_ms, True, True
        elif state in (State.ABSENT, State.PARKED, State.DEGRADED):
            place.resident = False
        place.state, place.since_ms = state, at_ms

    def joined(self, model: str) -> None:
        """A fresh session, the only one of its model: its word counts, whatever an earlier one was told."""
        place = self.places.get(model)
        if place is None:
            return
        place.wish, place.closing = None, False
        if place.outdated:
            place.outdated = False
            if place.residency == "hot":
                self._book_hot(place)

    def gone(self, model: str, at_ms: int, *, silent: bool) -> None:
        """The last process of this model is gone from the bus."""
        place = self.places.get(model) or self.leaving.get(model)
        if place is None:
            return
        self._enter(place, State.ABSENT, at_ms)
        self.tokens.end_load(model)
        place.wish, place.closing = None, False
        if (place.residency != "hot" or model in self.leaving) and self.tokens.held_by(model):
            place.kept_until_ms = at_ms + (SILENT_KEPT_MS if silent else GONE_KEPT_MS)

    def machine_memory(self, available_bytes: int, low_bytes: int) -> None:
        """What the machine has left; below `low_bytes` idle models are unloaded and none is loaded ahead of need."""
        self.available_bytes = available_bytes
        # Once low, it takes a little more to count as well again: else every reading could change its mind.
        self.low = available_bytes < (low_bytes * 5 // 4 if self.low else low_bytes)

    def ask(self, model: str, at_ms: int) -> None:
        """Somebody asks for a warm or cold model by name: it loads as soon as there is room, as if work waited."""
        place = self.guests[model]
        if place.state is not State.LOADED:
            place.asked_ms = at_ms if place.asked_ms is None else place.asked_ms

    def ask_away(self, model: str) -> None:
        """Somebody wants a warm or cold model out of memory, be it pinned; no work needs it now."""
        self.guests[model].asked_ms, self.guests[model].asked_away = None, True

    # Decisions

    def decide(self, demand: Mapping[str, Demand], at_ms: int) -> list[Order]:
        """Orders that follow from what is there and what is wanted. The same again orders nothing again."""
        self.due_ms, self.wants_core = None, False
        orders: list[Order] = []
        for place in self.guests.values():
            self._look_at(place, demand.get(place.model, NONE), at_ms)
        for place in list(self.leaving.values()):
            self._see_off(place, demand.get(place.model, NONE), at_ms)
        orders += self._send_away(at_ms)
        orders += self._relieve(demand, at_ms)
        first = self._serve_waiting(demand, orders, at_ms)
        orders += self._run_dry(demand, at_ms, needed=first)
        orders += self._unload_idle(demand, at_ms)
        if first is None and not self.low:
            orders += self._load_ahead(demand, at_ms)
        return orders

    def hopeless(self, model: str) -> bool:
        """True for a cold model that is neither in memory nor on its way there: work for it would wait for ever."""
        place = self.guests.get(model)
        return (
            place is not None
            and place.residency == "cold"
            and place.asked_ms is None
            and place.state in (State.PARKED, State.UNLOADING)
        )

    def too_large(self, place: Place) -> bool:
        """True if it needs more than all that come and go could ever free for it: it was measured, or has changed."""
        return place.need_bytes > self._most_bytes(place)

    def _most_bytes(self, place: Place) -> int:
        """What is free for it when all the others that come and go are gone."""
        staying = (
            other.model
            for other in self.places.values()
            if other is not place and (other.residency == "hot" or (other.pinned and other.state is State.LOADED))
        )
        return self.tokens.memory_bytes - sum(map(self.tokens.held_by, staying))

    def _look_at(self, place: Place, demand: Demand, at_ms: int) -> None:
        if place.kept_until_ms is not None:
            if place.kept_until_ms <= at_ms:
                self._release(place, at_ms)
                place.kept_until_ms = None
            else:
                self._due(place.kept_until_ms)
        if demand.running or demand.waiting:
            place.used_ms = at_ms
        wanted = demand.waiting or place.asked_ms is not None
        if not wanted or place.state in (State.LOADED, State.LOADING, State.DEGRADED):
            if place.wait_ms is not None and place.state is State.PARKED:
                self.tokens.end_load(place.model)  # it may have closed the door for its core
            place.wait_ms = None
        elif place.wait_ms is None:
            place.wait_ms = at_ms if place.asked_ms is None or demand.waiting else place.asked_ms

    def _see_off(self, place: Place, demand: Demand, at_ms: int) -> None:
        """Give back what a model of no registry holds, once nothing has run on it for as long as its end may take."""
        if demand.running:
            place.kept_until_ms = None
            return
        until_ms = at_ms + (GONE_KEPT_MS if place.state is State.UNLOADING else SILENT_KEPT_MS)
        place.kept_until_ms = min(place.kept_until_ms or until_ms, until_ms)
        if place.kept_until_ms <= at_ms:
            self._forget(place, at_ms)
        else:
            self._due(place.kept_until_ms)

    def _forget(self, place: Place, at_ms: int) -> None:
        del self.leaving[place.model]
        self._release(place, at_ms)

    def _release(self, place: Place, at_ms: int) -> None:
        if self.tokens.held_by(place.model):
            self._freed_ms = at_ms
        self.tokens.release_memory(place.model)

    def _coming_bytes(self) -> int:
        """Memory that comes free without any order: of closed models, and of those that have left the registry."""
        closed = (place.model for place in self.guests.values() if place.closed)
        return sum(map(self.tokens.held_by, (*closed, *self.leaving)))

    def _serve_waiting(self, demand: Mapping[str, Demand], orders: list[Order], at_ms: int) -> Place | None:
        """Load what is waited for, the longest waiting first. Returns the first one that has to wait on."""
        line = [p for p in self.guests.values() if p.wait_ms is not None and p.state is State.PARKED]
        line = [p for p in line if p.residency == "warm" or p.asked_ms is not None]
        if not line:
            return None
        unknown = any(place.state is State.ABSENT and place.since_ms == 0 for place in self.guests.values())
        if unknown and at_ms < self.trust_ms:
            self._due(self.trust_ms)
            return min(line, key=waiting_longest)
        first: Place | None = None
        claimed = 0
        for place in sorted(line, key=waiting_longest):
            if place.pause_ms > at_ms:
                self._due(place.pause_ms)
                continue
            why: Literal["asked", "needed"] = "needed" if demand.get(place.model, NONE).waiting else "asked"
            too_large = self.too_large(place)
            overdraw = too_large and first is None and self._may_overdraw(place)
            if overdraw or place.need_bytes <= self.tokens.free_bytes - claimed:
                if self._begin(place, at_ms, overdraw=overdraw):
                    orders.append(self._load(place, why, at_ms))
                    continue
                self.wants_core = True
            elif too_large and (first is not None or not self._has_a_turn(place, at_ms)):
                # No room is made or kept for it: it can have none now, and those behind it would wait for ever.
                self.tokens.end_load(place.model)  # it may have closed the door for its core
                continue
            else:
                self.tokens.end_load(place.model)  # it waits for memory now, which closes no door
                if first is None:
                    orders += self._make_room(place, demand, at_ms)
            first = first or place
            claimed += place.need_bytes
        return first

    def _begin(self, place: Place, at_ms: int, *, overdraw: bool = False) -> bool:
        return self.tokens.begin_load(place.model, place.need_bytes, at_ms, overdraw=overdraw)

    def _has_a_turn(self, place: Place, at_ms: int) -> bool:
        """Whether what is too large may wait in the line: the machine has the memory, or should have it when all that
        come and go are gone."""
        if self.available_bytes is None or self.available_bytes >= place.need_bytes:
            return True
        if place.alone_pause_ms > at_ms:
            return False
        others_bytes = self._most_bytes(place) - self.tokens.free_bytes
        if others_bytes > 0:
            return self.available_bytes + others_bytes >= place.need_bytes
        if at_ms < self._freed_ms + READING_MS:
            self._due(self._freed_ms + READING_MS)
            return True
        place.alone_pause_ms = at_ms + ALONE_PAUSE_MS
        return False

    def _may_overdraw(self, place: Place) -> bool:
        """Whether what is too large may load all the same: nobody is left who could make way, and the machine has the
        memory."""
        return self._is_alone(place) and (self.available_bytes is None or self.available_bytes >= place.need_bytes)

    def _is_alone(self, place: Place) -> bool:
        others = (other for other in self.guests.values() if other is not place)
        holders = [other for other in others if self.tokens.held_by(other.model)]
        return not self.leaving and all(other.pinned and other.state is State.LOADED for other in holders)

    def _make_room(self, place: Place, demand: Mapping[str, Demand], at_ms: int) -> list[Order]:
        """Unload idle models, and close busy ones that have had their turn, if that gives `place` its room; all of them
        where it is too large."""
        missing = min(place.need_bytes, self._most_bytes(place)) - self.tokens.free_bytes - self._coming_bytes()
        missing -= sum(
            self.tokens.held_by(p.model)
            for p in self.guests.values()
            if p.kept_until_ms is not None and p.kept_until_ms <= at_ms + GONE_KEPT_MS
        )
        if missing <= 0:
            return []
        idle: list[Place] = []
        busy: list[Place] = []
        for other in self.guests.values():
            if other is place or other.closed or other.pinned or other.pause_ms > at_ms:
                continue
            wanted = demand.get(other.model, NONE)
            if other.state is State.DEGRADED:
                (busy if wanted.running else idle).append(other)
            elif other.state is State.LOADED:
                resident_ms = at_ms - other.loaded_ms
                soon = wanted.soon_ms is not None and wanted.soon_ms <= other.load_ms + AHEAD_MS
                if resident_ms >= other.turn_ms:
                    (busy if wanted.running or wanted.waiting else idle).append(other)
                    continue
                self._due(other.loaded_ms + other.turn_ms)
                if wanted.running or wanted.waiting or soon:
                    continue
                if resident_ms >= other.residence_ms:
                    idle.append(other)
                else:
                    self._due(other.loaded_ms + other.residence_ms)
        chosen: list[Place] = []
        for other in [*sorted(idle, key=lambda p: worth(p, demand)), *sorted(busy, key=lambda p: worth(p, demand))]:
            if missing <= 0:
                break
            chosen.append(other)
            missing -= self.tokens.held_by(other.model)
        if missing > 0:
            return []  # all of it or nothing: half a room is no use to anybody
        for other in chosen[::-1]:  # the most valuable one first: perhaps the others do without it
            spare = self.tokens.held_by(other.model)
            if missing + spare <= 0:
                chosen.remove(other)
                missing += spare
        orders = []
        for other in chosen:
            if demand.get(other.model, NONE).running:
                other.closing = True
            else:
                orders.append(self._unload(other, "room", at_ms))
        return orders

    def _run_dry(self, demand: Mapping[str, Demand], at_ms: int, *, needed: Place | None) -> list[Order]:
        """Unload closed models whose last call has ended; open them again if nobody needs their room any more."""
        orders = []
        for place in self.guests.values():
            if not place.closing:
                continue
            if needed is None and self.tokens.free_bytes >= 0:
                place.closing = False
            elif not demand.get(place.model, NONE).running and place.state in (State.LOADED, State.DEGRADED):
                orders.append(self._unload(place, "room", at_ms))
        return orders

    def _send_away(self, at_ms: int) -> list[Order]:
        """Unload what somebody wants out of memory."""
        orders = []
        for place in self.guests.values():
            if place.asked_away and place.state in (State.LOADED, State.LOADING, State.DEGRADED):
                orders.append(self._unload(place, "asked away", at_ms))
            place.asked_away = False
        return orders

    def _relieve(self, demand: Mapping[str, Demand], at_ms: int) -> list[Order]:
        """Unload idle models, whatever they are worth, while more memory is held than there is: models were measured to
        take more than was thought, or a reload has changed the sums. Busy ones make way if that lasts."""
        over = -self.tokens.free_bytes
        if over <= 0:
            self._over_ms = None
        elif self._over_ms is None:
            self._over_ms = at_ms
        if over <= 0 and not (self.low and at_ms - self._pressure_ms >= PRESSURE_EVERY_MS):
            return []
        over -= self._coming_bytes()
        if over <= 0 and not self.low:
            return []
        orders = []
        for place in sorted(self.guests.values(), key=lambda p: worth(p, demand)):
            wanted = demand.get(place.model, NONE)
            busy = wanted.running or wanted.waiting or place.pinned or place.asked_ms is not None
            if place.state is not State.LOADED or place.closed or busy or place.pause_ms > at_ms:
                continue
            stays_ms = max(place.loaded_ms, place.used_ms or 0) + place.residence_ms
            if not self.low and at_ms < stays_ms and self.too_large(place) and self._is_alone(place):
                self._due(stays_ms)  # gone, it would only be loaded anew with the next step
                continue
            over -= self.tokens.held_by(place.model)
            orders.append(self._unload(place, "pressure", at_ms))
            self.counters["unloads_pressure"] += 1
            self._pressure_ms = at_ms
            if over <= 0:
                break
        if over > 0 and self._over_ms is not None:
            self._close_busy(over, demand, self._over_ms + MIN_TURN_MS, at_ms)
        return orders

    def _close_busy(self, over: int, demand: Mapping[str, Demand], from_ms: int, at_ms: int) -> None:
        """Close busy models, least valuable first, so that they run dry."""
        if at_ms < from_ms:
            self._due(from_ms)
            return
        staying = [p for p in self.guests.values() if self.tokens.held_by(p.model) and not (p.closed or p.pinned)]
        for place in sorted(staying, key=lambda p: worth(p, demand)):
            last = len(staying) == 1 and self.too_large(place)  # it would only be loaded anew
            if over <= 0 or last:
                return
            if place.state in (State.LOADED, State.DEGRADED):
                place.closing = True
                over -= self.tokens.held_by(place.model)
                staying.remove(place)

    def _unload_idle(self, demand: Mapping[str, Demand], at_ms: int) -> list[Order]:
        orders = []
        for place in self.guests.values():
            if place.state is not State.LOADED or place.closed or place.pinned:
                continue
            if demand.get(place.model, NONE) != NONE:
                continue
            end_ms = max(place.loaded_ms, place.used_ms or 0, place.pause_ms) + place.idle_ms
            if end_ms <= at_ms:
                orders.append(self._unload(place, "idle", at_ms))
            else:
                self._due(end_ms)
        return orders

    def _load_ahead(self, demand: Mapping[str, Demand], at_ms: int) -> list[Order]:
        """Load what will be needed by the time it is loaded, into room that is free or that nobody in sight needs."""
        orders = []
        for place in self.guests.values():
            soon_ms = demand.get(place.model, NONE).soon_ms
            if soon_ms is None or place.state is not State.PARKED or place.residency != "warm":
                continue
            begin_ms = at_ms + soon_ms - place.load_ms - AHEAD_MS
            if max(begin_ms, place.pause_ms, self.trust_ms) > at_ms:
                self._due(max(begin_ms, place.pause_ms, self.trust_ms))
            elif place.need_bytes > self.tokens.free_bytes:
                unseen = {name: one for name, one in demand.items() if one != NONE}
                orders += self._make_room_ahead(place, unseen, at_ms)
            elif self._begin(place, at_ms):
                self.counters["loads_ahead"] += 1
                orders.append(self._load(place, "ahead", at_ms))
            else:
                self.tokens.end_load(place.model)  # no core now: it must not close the door for others
        return orders

    def _make_room_ahead(self, place: Place, wanted: Mapping[str, Demand], at_ms: int) -> list[Order]:
        others = [
            other
            for other in self.guests.values()
            if other.state is State.LOADED and not (other.closed or other.pinned) and other.model not in wanted
        ]
        ripe = [one for one in others if at_ms - one.loaded_ms >= one.residence_ms and one.pause_ms <= at_ms]
        missing = place.need_bytes - self.tokens.free_bytes - self._coming_bytes()
        if missing <= 0 or sum(self.tokens.held_by(one.model) for one in ripe) < missing:
            return []
        orders = []
        for one in sorted(ripe, key=lambda p: worth(p, wanted)):
            if missing > 0:
                missing -= self.tokens.held_by(one.model)
                orders.append(self._unload(one, "room", at_ms))
        return orders

    def _load(self, place: Place, why: Literal["needed", "asked", "ahead"], at_ms: int) -> Order:
        self._enter(place, State.LOADING, at_ms)
        place.wish, place.wait_ms = True, None
        place.order += 1
        place.loads += 1
        self.counters["loads"] += 1
        return Order(place.model, True, why, place.need_bytes)

    def _unload(self, place: Place, why: Literal["idle", "room", "pressure", "asked away"], at_ms: int) -> Order:
        if place.state is State.DEGRADED:
            place.pause_ms = at_ms + FAILED_PAUSE_MS
        self._enter(place, State.UNLOADING, at_ms)
        place.wish, place.closing = False, False
        place.order += 1
        self.counters["unloads"] += 1
        return Order(place.model, False, why, self.tokens.held_by(place.model))

    def _due(self, at_ms: int) -> None:
        self.due_ms = at_ms if self.due_ms is None else min(self.due_ms, at_ms)
