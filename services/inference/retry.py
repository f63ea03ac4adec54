"""How long to wait before a remote server is asked once more, and when to stop. Pure: chance comes as an argument.

Only what cannot have begun is tried again: a connection that was not made, and a server that said it has no room
(429, 503). What the server says about its own time (Retry-After) counts more than our doubling pause, up to the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_PAUSE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of one call."""

    attempts: int
    """Tries altogether."""
    pause_max_s: float
    """Longest pause between two tries; a server that asks for more is not waited for."""


def pause_s(policy: RetryPolicy, tried: int, retry_after_s: float | None, dice: float) -> float | None:
    """Seconds before the next try, None = give up.

    `tried` counts the tries so far, from 1; `dice` in [0, 1) is the jitter: who failed together comes back apart.
    """
    if tried >= policy.attempts:
        return None
    own_s = min(policy.pause_max_s, FIRST_PAUSE_S * 2.0 ** min(tried - 1, 30)) * (0.5 + dice / 2)
    if retry_after_s is None:
        return own_s
    # Jitter goes on top here: before the time it names the server would only say no again.
    if retry_after_s > policy.pause_max_s:
        return None
    return min(policy.pause_max_s, max(own_s, retry_after_s * (1 + dice / 10)))


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None where it says nothing readable."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) <= 12:
        return float(text)
    try:
        then = parsedate_to_datetime(text)
        if then.tzinfo is None:
            then = then.replace(tzinfo=UTC)
        return max(0.0, (then - now).total_seconds())
    except (ValueError, OverflowError):  # no date, or one that no calendar has
        return None
