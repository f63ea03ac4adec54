"""Prints how long this Python takes for work like the scheduler's, in microseconds: `deploy/setup` compares by it.

The same version of Python runs our services a fifth slower where it was compiled without profile-guided optimization.
No setting that could be read says so for every build, hence a measurement; the least of many short ones, since others
use the machine as well.
"""

from __future__ import annotations

from timeit import repeat


class Step:
    """A step of a made-up plan."""

    __slots__ = ("after", "name")

    def __init__(self, name: str, after: list[str]) -> None:
        self.name, self.after = name, after

    def rank(self, ranks: dict[str, int]) -> int:
        """One more than the largest before it."""
        return 1 + max([ranks[other] for other in self.after], default=0)


def plan() -> dict[str, int]:
    """Strings, small objects, method calls and dictionaries, as in the hub."""
    ranks: dict[str, int] = {}
    for number in range(100):
        step = Step(f"S{number}", [f"S{other}" for other in range(max(0, number - 3), number)])
        ranks[step.name] = step.rank(ranks)
    return ranks


if __name__ == "__main__":
    print(round(1e6 * min(repeat(plan, number=10, repeat=40))))  # noqa: T201  a command-line tool
