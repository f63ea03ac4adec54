"""Waiting for facts. A test waits until something holds and fails if it never does; it never sleeps and then looks.

The bound says only when to give up: a machine with slow or busy cores may need it, a quick one never waits so long.
How fast something is, is a matter for `tierline bench`. Around a scripted hub, which has to be pumped meanwhile, the
same is `ScriptedHub.until`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

WITHIN_S: Final = 150.0
"""Bound of a wait that has no reason for another one."""


def until(holds: Callable[[], object], what: str, *, within_s: float = WITHIN_S, look_every_s: float = 0.05) -> None:
    """Wait until `holds` gives something true; fails with `what` once `within_s` is over."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"not within {within_s:g} s: {what}"
        time.sleep(look_every_s)
