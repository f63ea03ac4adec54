"""Where the time of one attempt went: queueing, loading, backoff, inference, gates, and runs that came to nothing.

Part of the state that is folded from facts, hence plain values. Only the moment at which each stretch begins is
kept and a stretch ends where the next one begins, so that stretches can neither leave a gap nor overlap, whatever
order a lost worker, a restart of the hub or a clock that was set back brings the facts in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

What = Literal["queueing", "loading", "backoff", "inference", "gates", "retry"]
Stretch = tuple[What, int, int]
"""What, and from when until when (unix ms)."""


@dataclass(slots=True)
class Timeline:
    """Beginnings of stretches in rising order. Methods are named after what happened to the attempt."""

    marks: list[tuple[What, int]] = field(default_factory=list)

    def queued(self, at_ms: int, delay_ms: int) -> None:
        """It waits for a slot, after a pause of `delay_ms` that the failure table asks for."""
        if delay_ms:
            self._enter("backoff", at_ms)
        self._enter("queueing", at_ms + delay_ms)

    def started(self, at_ms: int, unserved_ms: tuple[int, int] | None) -> None:
        """A worker has it. `unserved_ms` is a stretch of the wait during which no worker of the model was READY."""
        if not self.marks:
            return
        what, since_ms = self.marks[-1]
        if what == "inference":  # it is begun again: the worker was replaced, or never came back after a restart
            self.marks[-1] = ("retry", since_ms)
        elif what == "queueing" and unserved_ms is not None:
            begin = max(since_ms, unserved_ms[0])
            end = min(at_ms, unserved_ms[1])
            if begin < end:
                self._enter("loading", begin)
                self._enter("queueing", end)
        self._enter("inference", at_ms)

    def lost(self, at_ms: int, delay_ms: int) -> None:
        """That run came to nothing: it waits again, after a pause of `delay_ms` where one is asked for."""
        if self.marks and self.marks[-1][0] in ("inference", "gates"):
            self.marks[-1] = ("retry", self.marks[-1][1])
        if delay_ms:
            self._enter("backoff", at_ms)
        self._enter("queueing", at_ms + delay_ms)

    def reattached(self, at_ms: int, *, same_worker: bool) -> None:
        """A worker brought it back. One that was only silent has worked on it all the time."""
        if self.marks and self.marks[-1][0] == "inference":
            return
        if same_worker and [what for what, _ in self.marks[-2:]] == ["retry", "queueing"]:
            self.marks.pop()
            self.marks[-1] = ("inference", self.marks[-1][1])
        else:
            self._enter("inference", at_ms)

    def answered(self, at_ms: int) -> None:
        """Its answer goes to the gates, where it has any."""
        self._enter("gates", at_ms)

    def checked(self, at_ms: int, begun_ms: int) -> None:
        """The gates are done; the first of them began at `begun_ms`, by the clock of their own process."""
        since_ms = self.marks[-1][1] if self.marks else at_ms
        self._enter("queueing", since_ms)
        self._enter("gates", begun_ms if since_ms <= begun_ms < at_ms else since_ms)

    def stretches(self, end_ms: int | None, *, failed: bool) -> list[Stretch]:
        """All stretches that took time; without `end_ms` the open one is left out. Work that failed is `retry`."""
        ends = [begin for _, begin in self.marks[1:]]
        if end_ms is not None:
            ends.append(end_ms)
        found: list[Stretch] = []
        for (what, begin), end in zip(self.marks, ends, strict=False):
            limit = end if end_ms is None else min(end, end_ms)
            if limit > begin:
                found.append(("retry" if failed and what in ("inference", "gates") else what, begin, limit))
        return found

    def _enter(self, what: What, at_ms: int) -> None:
        """Whatever was to begin at this time or later does not: a pause cut short, a stretch without length."""
        while self.marks and self.marks[-1][1] >= at_ms:
            self.marks.pop()
        self.marks.append((what, at_ms))
