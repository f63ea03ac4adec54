"""What nobody waits for lets others go first."""

from __future__ import annotations

import os
import threading
from typing import Final

BACKGROUND_NICE: Final = 5
"""A third of the weight of others: enough to follow beside busy models, too little to delay the next step."""


def step_back() -> None:
    """Let the bus go first: projections are made when a task has ended and the next one is about to run its steps."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)  # Linux keeps it per thread
