"""Child process that builds a second graph from the log, while the first one goes on answering in the service.

A child, since two open Kuzu databases in one process have lost rows. `python -m services.memory.graph_build FOLDER`
reads FOLDER/log.sqlite and leaves a cleanly closed graph with its manifest in FOLDER/renewed; the projector takes it
over.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Final

from services.kit.children import end, spawn
from services.memory.graph import LineageGraph
from services.memory.log_reader import LogReader
from services.memory.manifest import ProjectionDoubt

RENEWED: Final = "renewed"
"""Folder inside the memory's one; whatever is found there at a start is a leftover."""

_OUTPUT: Final = "graph-build.txt"
_PATIENCE_S: Final = 900.0


def clear(folder: Path) -> None:
    """Remove what an earlier build has left."""
    shutil.rmtree(folder / RENEWED, ignore_errors=True)


async def build_in_child(folder: Path) -> None:
    """Build FOLDER/renewed. Raises ProjectionDoubt. To be called in the main thread."""
    clear(folder)
    output = folder / _OUTPUT
    output.unlink(missing_ok=True)
    child = await spawn([sys.executable, "-m", "services.memory.graph_build", str(folder)], output=output)
    try:
        status = await asyncio.wait_for(child.wait(), _PATIENCE_S)
    except TimeoutError as err:
        raise ProjectionDoubt(f"building the graph took longer than {_PATIENCE_S:g} s") from err
    finally:
        await end(child, grace_s=0)
    text = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    if status != 0:
        raise ProjectionDoubt(f"building the graph ended with status {status}: {text[-300:].strip()}")


def build(folder: Path) -> None:
    """What the child does."""
    target = folder / RENEWED
    target.mkdir()
    reader = LogReader(folder)
    graph = LineageGraph(target, new_for=reader.log_id)
    upto = reader.seq
    for last, changes in reader.changes(0, upto, (0, upto)):  # needs no vectors
        graph.apply(last, changes)
    graph.close()
    reader.close()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
