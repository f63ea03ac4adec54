"""What the kernel shows of a process, for tests."""

from __future__ import annotations

import re
from pathlib import Path


def slice_ms(sched: str | Path) -> float | None:
    """How long a thread keeps a core while others wait, of `/proc/.../sched` or its text; None where it is not shown,
    as with Linux older than 6.12."""
    try:
        text = sched.read_text(encoding="ascii") if isinstance(sched, Path) else sched
    except OSError:
        return None
    found = re.search(r"^se\.slice\s*:\s*(\d+)$", text, re.MULTILINE)
    return int(found[1]) / 1_000_000 if found else None
