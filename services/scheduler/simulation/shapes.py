"""Made-up tasks of a few shapes, for the question what a stack would do with many of them.

The same arguments and the same generator state give the same tasks. Steps pass on data, so nothing about them is
dropped by the discovery of parallelism; roles and lengths are drawn evenly from what the registry offers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

from protocol.messages.task import Budget, Output, Plan, Step, TaskIR
from services.kit.registry import Registry

_MOST_NEEDS: Final = 3
_WINDOW: Final = 8
"""A step of a random graph needs some of so many steps before it."""
_LEAST_TOKENS: Final = 16


def _chain(count: int, _: random.Random) -> list[list[int]]:
    return [[index - 1] if index else [] for index in range(count)]


def _fanout(count: int, _: random.Random) -> list[list[int]]:
    return [[] for _ in range(count)]


def _diamond(count: int, _: random.Random) -> list[list[int]]:
    last = count - 1
    return [[] if index == 0 else [0] if index < last or last == 1 else list(range(1, last)) for index in range(count)]


def _random(count: int, draw: random.Random) -> list[list[int]]:
    needs = []
    for index in range(count):
        near = range(max(0, index - _WINDOW), index)
        needs.append(sorted(draw.sample(near, min(len(near), draw.randint(0, _MOST_NEEDS)))))
    return needs


SHAPES: Final[Mapping[str, Callable[[int, random.Random], list[list[int]]]]] = {
    "chain": _chain,
    "fanout": _fanout,
    "diamond": _diamond,
    "random": _random,
}
"""Name -> which of its earlier steps each step needs, for a number of steps."""


def made_up_task(shape: str, steps: int, registry: Registry, draw: random.Random) -> TaskIR:
    """One task of this shape; raises KeyError for a shape that is not in SHAPES."""
    roles = [role for role in registry.roles.values() if role.max_tokens >= _LEAST_TOKENS]
    made = []
    for index, needs in enumerate(SHAPES[shape](steps, draw)):
        role = draw.choice(roles)
        made.append(
            Step(
                id=f"S{index + 1}",
                actor=role.name,
                action="simulated work",
                inputs=[f"o{other + 1}" for other in needs],
                outputs=[Output(name=f"o{index + 1}")],
                max_tokens=draw.randint(_LEAST_TOKENS, role.max_tokens),
                gates=[],
            )
        )
    return TaskIR(objective=f"a {shape} of {steps} steps", plan=Plan(steps=made), budget=Budget(max_steps=steps))
