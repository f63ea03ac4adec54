"""`tierline bench …`: every figure in a README comes from one of these commands.

A benchmark is a module of this folder with a function that adds its command to the group; list that function in
`BENCHMARKS` and the command exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.ctl.bench import (
    barrier,
    gates,
    inference,
    lookup,
    makespan,
    memory,
    overhead,
    planning,
    prefix,
    routing,
    soak,
    warm_load,
)
from services.ctl.commands import Commands

#: Adds one benchmark's command to the group.
BENCHMARKS: Final[tuple[Callable[[Commands], None], ...]] = (
    overhead.add,
    barrier.add,
    makespan.add,
    soak.add,
    prefix.add,
    lookup.add,
    warm_load.add,
    inference.add,
    planning.add,
    gates.add,
    memory.add,
    routing.add,
)


def add(commands: Commands) -> None:
    """Add `bench` with all its benchmarks."""
    group = commands.group("bench", "measure this installation; every documented figure comes from here")
    for add_benchmark in BENCHMARKS:
        add_benchmark(group)
