"""How long the hub stays awake for the next message before it sleeps: pure, measured waits come in.

To be woken costs a thread a hop between cores, the return of an idle one and cold caches. So while messages follow each
other closely the loop asks for the next one a moment longer. It does that only after a wait that was shorter than this
moment, so that a hub whose steps take their time sleeps at once, as the cores belong to the models; what a wrong guess
costs is one such moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOMENT_S: Final = 0.0004
"""Longer than a worker takes that answers at once, and shorter than anything a model does."""


@dataclass(slots=True)
class Vigil:
    """One loop's waits."""

    awake_s: float = 0.0
    """How long to stay awake in the wait that comes now; 0 = sleep at once."""

    def waited(self, seconds: float) -> None:
        """The last wait took so long, until a message came or the time was over."""
        self.awake_s = MOMENT_S if seconds < MOMENT_S else 0.0
