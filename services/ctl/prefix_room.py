"""Whether the disk has the room that entries ask for their saved contexts; looked at by the commands, before a start.

The service looks again at each start, and at each context that it is to keep: a disk fills up meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from services.inference.slots import SPARE
from services.kit.config import Home
from services.kit.registry.launch import Launch


def room_notes(launches: Iterable[Launch], home: Home) -> list[str]:
    """One sentence for each entry whose service will save nothing for want of room, of those that have their files
    here: what is said of another machine's disk would be wrong."""
    folder = next(path for path in (home.run, *home.run.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    notes = []
    for launch in launches:
        wanted = SPARE * launch.entry.prefix_disk_bytes
        path, saves = launch.entry.path, launch.draft is None and (launch.facts is None or launch.takes_copies)
        if path is not None and path.is_file() and saves and wanted > free:
            message = (
                f"no beginnings and contexts of its slots are saved: that takes {wanted:,} free bytes ({SPARE} times "
                f"this), and {folder} has {free:,}; lower it, or make room"
            )
            notes.append(str(launch.problem("prefix_disk_bytes", "prefix-disk", message)))
    return notes
