"""How many calls to expect when one comes to an engine that does nothing: pure, arrivals and their time in.

llama.cpp begins to read with what it has, and a pass has its price even where it reads little: on two cores eight
prompts of twenty tokens took 520 ms at once, 600 by fours, 700 by twos, 810 one by one. Calls of a burst that come a
little apart are read in two passes or three where one would do. So the first of a burst waits a moment, until as many
have come as the last time. Whoever comes alone waits once at most: the burst before has then been the last one. On an
engine that is busy nobody waits, since it collects by itself what comes during a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

BURST_S: Final = 0.007
"""Eight calls that a client makes at once reach the service within five to eight milliseconds."""


@dataclass(slots=True)
class Company:
    """What one engine's calls have done so far. Times are seconds of any clock that does not go back."""

    _expected: int = 1
    """Calls of the burst before the present one."""
    _came: int = 0
    _began_s: float = -math.inf

    def wait_s(self, now_s: float, *, idle: bool) -> float:
        """A call has come; `idle`: nobody else is here, so a burst may begin with it. Returns how long it should wait
        for others, in seconds; 0 where nobody is missing.
        """
        if idle:
            self._expected, self._came, self._began_s = max(1, self._came), 0, now_s
        left_s = self._began_s + BURST_S - now_s
        if left_s <= 0:
            return 0.0
        self._came += 1
        return left_s if self._came < self._expected else 0.0
