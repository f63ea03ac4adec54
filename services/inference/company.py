"""How many calls come together, known from the last time: pure, time comes with each call.

Calls that a task hands out together arrive within a moment, and llama.cpp reads those together that it finds together.
So the first of them is worth holding back until the others are there, if others came the last time. Who is held back,
and for how long at most, is the business of `slots`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Company:
    """The calls that find an engine idle, group by group."""

    within_s: float
    """A call belongs to the group of the first one if it comes no later than this after it."""
    _began_s: float | None = None
    """When a call last found the engine idle."""
    _came: int = 0
    """Calls of that one's group so far, itself included."""
    _expected: int = 1
    """Calls of the group before."""

    def is_wanting(self, now_s: float, *, idle: bool) -> bool:
        """A call has come; `idle`: it is the only one, with all slots free. Are more to come with it, as many as the
        last time?
        """
        together = self._began_s is not None and now_s - self._began_s <= self.within_s
        if idle and not together:
            self._began_s, self._expected, self._came = now_s, max(1, self._came), 1
        elif together:
            self._came += 1
        else:
            return False
        return self._came < self._expected
