"""Families of made-up tasks: how good their results are at each width, and what it takes to get there (pure).

A family says what is true of its tasks; nothing about it is told to the policy. The quality of a width is what a
result is worth on average once that way of working is mastered. Until then it is lower: every shape of a plan takes
practice (roles, personas and lessons of its steps are learned by using it), so what a policy leaves out early stays
bad, and a policy can lock itself in. Of the steps of a split as many find something to do as the work has parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.codec import describe
from services.ctl.outcomes import BadInput

Quality = Annotated[float, Field(ge=0, le=1)]
_MAX_FAMILIES: Final = 16


class Family(BaseModel):
    """One line of a file of families."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=40)
    quality: dict[int, Quality] = Field(min_length=2, max_length=8)
    """Width -> mean raw reward of a task, once mastered."""
    unpractised: dict[int, Quality] = Field(default_factory=dict)
    """Width -> how much lower it is at first; 0 where absent."""
    practice: int = Field(default=0, ge=0, le=100_000)
    """Tasks at a width after which it is mastered; the way there is even."""
    parts: int = Field(default=8, ge=0, le=64)
    """Steps of a split that find something to do; the others do not finish."""
    rules: int = Field(default=1, ge=1)
    """Width that the rules choose."""
    inputs: int = Field(default=8, ge=2, le=64)
    """Inputs of a task: what the planner can divide."""
    noise: float = Field(default=0.1, ge=0, le=1)
    """Standard deviation of the raw reward of one task; it stays within 0 and 1."""
    step_s: float = Field(default=2.0, gt=0, le=3_600)
    """Seconds of every step."""
    input_s: float = Field(default=2.0, ge=0, le=3_600)
    """Seconds for every input that it reads, on top."""

    @model_validator(mode="after")
    def _widths_are_known(self) -> Family:
        unknown = sorted({self.rules, *self.unpractised} - set(self.quality))
        if unknown:
            raise ValueError(f"quality: has no entry for width {unknown[0]}")
        return self

    @property
    def best(self) -> float:
        """Mean raw reward at the best width, mastered."""
        return max(self.quality.values())

    @property
    def best_width(self) -> int:
        """The narrowest of the best widths."""
        return min(width for width, quality in self.quality.items() if quality == self.best)

    def expected(self, width: int, practised: Mapping[int, int]) -> float:
        """Mean raw reward of the next task at this width, after so many tasks at each."""
        missing = 1.0 - min(1.0, practised.get(width, 0) / self.practice) if self.practice else 0.0
        return max(0.0, self.quality[width] - missing * self.unpractised.get(width, 0.0))


SHIPPED: Final = (
    # Splitting pays much, but not at first: what nobody asks to try stays bad.
    Family(
        name="many",
        quality={1: 0.60, 2: 0.74, 4: 0.88, 8: 0.92},
        unpractised={2: 0.43, 4: 0.43, 8: 0.43},
        practice=200,
        rules=1,
    ),
    # Cannot be divided: no step of a split comes to an end, and the one that should join them does it all, worse.
    Family(
        name="whole",
        quality={1: 0.85, 2: 0.72, 4: 0.70, 8: 0.69},
        unpractised={1: 0.31, 2: 0.10, 4: 0.10, 8: 0.10},
        practice=150,
        parts=0,
        rules=1,
        step_s=1,
        input_s=1,
    ),
    # Divides and every step finishes, yet the join loses a little: it is wrong to be paid for splitting for ever.
    Family(
        name="tight",
        quality={1: 0.50, 2: 0.47, 4: 0.45, 8: 0.44},
        rules=1,
        step_s=6,
        input_s=0.5,
    ),
    # Two widths between: a step manages some inputs well, and a join some results.
    Family(name="pairs", quality={1: 0.66, 2: 0.78, 4: 0.86, 8: 0.76}, rules=8),
    Family(name="halves", quality={1: 0.74, 2: 0.86, 4: 0.76, 8: 0.66}, rules=1),
)
"""Five families with four different best widths."""


def read_families(path: Path) -> list[Family]:
    """Families as JSON lines. Raises BadInput with file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"{path}: {err}; give a file of families, one JSON object a line") from err
    families: list[Family] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            family = Family.model_validate(json.loads(line))
        except ValidationError as err:
            raise BadInput(f"{path}:{number}: {describe(err)}") from err
        except (ValueError, RecursionError) as err:
            raise BadInput(f"{path}:{number}: not JSON: {err}") from err
        if any(family.name == other.name for other in families):
            raise BadInput(f"{path}:{number}: name: {family.name!r} occurs twice")
        families.append(family)
    if not 1 <= len(families) <= _MAX_FAMILIES:
        raise BadInput(f"{path}: {len(families)} families, expected 1 to {_MAX_FAMILIES}")
    return families
