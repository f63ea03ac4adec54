"""Work that is done a part at a time, as a generator: at each `yield` others can be served; it returns the result.

Who does the next part, and when, is said where such work is begun (`showing.py`, `lookups.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

R = TypeVar("R")

Parts = Generator[None, None, R]


def finished(parts: Parts[R]) -> R:
    """Do all that is left without a pause."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: R = end.value
            return result
