"""Since when calls wait for a capability while none of its workers is READY: what a report shows as `loading`.

A stretch begins when a call first finds no worker that is READY, and ends when one is; where the model is loaded on the
hub's word it begins anew with that word, since until then the calls waited for memory and not for the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Unserved:
    """Stretches by capability; those that are over are kept one each."""

    _since: dict[str, int] = field(default_factory=dict)
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __contains__(self, target: str) -> bool:
        """True while such a stretch goes on."""
        return target in self._since

    def longer_than(self, after_ms: int, at_ms: int) -> list[str]:
        """Capabilities for which one has gone on for so long."""
        return [target for target, since_ms in self._since.items() if at_ms - since_ms >= after_ms]

    def since(self, target: str) -> int | None:
        """When the stretch that goes on began; None while a worker is READY or nobody waits."""
        return self._since.get(target)

    def begin(self, target: str, at_ms: int) -> None:
        """A call waits, and no worker is READY; the first one counts."""
        self._since.setdefault(target, at_ms)

    def end(self, target: str, at_ms: int) -> None:
        """A worker is READY."""
        if target in self._since:
            self._last[target] = (self._since.pop(target), at_ms)

    def begin_anew(self, target: str, at_ms: int) -> None:
        """The model was told to load."""
        if target in self._since:
            self._since[target] = at_ms

    def forget(self, target: str) -> None:
        """Nobody waits any more, so nobody will look when a worker comes."""
        self._since.pop(target, None)

    def last(self, target: str, after_ms: int) -> tuple[int, int] | None:
        """The newest stretch that is over, if it ended after this time."""
        last = self._last.get(target)
        return last if last is not None and last[1] > after_ms else None
