"""Child process that opens a graph after an unclean stop, since Kuzu may crash on a damaged file and take us along.

`python -m services.memory.graph_check FOLDER` prints one JSON line {log_id, applied_seq, digest}; the parent compares
the digest with the log's. Any other end (crash, hang, exception) is a doubt, and the graph is rebuilt.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.kit.children import end, spawn
from services.memory.graph import LineageGraph
from services.memory.machine import Found, lineage_digest
from services.memory.manifest import ProjectionDoubt

_OUTPUT: Final = "graph-check.json"
_PATIENCE_S: Final = 60.0
"""A graph of 4,000 decisions is read in 0.02 s; one that takes longer than this is rebuilt instead."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the child read in the graph."""

    found: Found
    digest: str
    """See `machine.lineage_digest`."""


async def check_in_child(folder: Path) -> Checked:
    """Open the graph in a child and report its content. Raises ProjectionDoubt. To be called in the main thread."""
    output = folder / _OUTPUT
    output.unlink(missing_ok=True)
    child = await spawn([sys.executable, "-m", "services.memory.graph_check", str(folder)], output=output)
    try:
        status = await asyncio.wait_for(child.wait(), _PATIENCE_S)
    except TimeoutError as err:
        raise ProjectionDoubt(f"opening the graph took longer than {_PATIENCE_S:g} s") from err
    finally:
        await end(child, grace_s=0)
    text = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    if status != 0:
        raise ProjectionDoubt(f"opening the graph ended with status {status}: {text[-300:].strip()}")
    try:
        report = json.loads(text)
        return Checked(Found(report["log_id"], report["applied_seq"]), report["digest"])
    except (ValueError, KeyError, TypeError) as err:
        raise ProjectionDoubt(f"the check of the graph printed {text[:300]!r}") from err


def main() -> None:
    """Read the graph in the folder given and print what it is."""
    graph = LineageGraph(Path(sys.argv[1]))
    report = {
        "log_id": graph.found.log_id,
        "applied_seq": graph.found.applied_seq,
        "digest": lineage_digest(graph.lineage()),
    }
    graph.abandon()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
