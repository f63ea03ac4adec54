"""Which role does which kind of work: the one table between the planner's templates and `registry/roles.yaml`.

Templates speak of work (draft, review, join), never of roles, so that a registry with other roles still gets a plan.
The first role of a row that the registry has is taken; where that is not the first, or none of the row exists, a
note says so and ends up in the plan's reason. The other roles of the row are the alternatives a learned routing may
try one day.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.messages.task import TaskType


class Work(StrEnum):
    """Kinds of work that occur in templates."""

    ANSWER = "answer"
    READ = "read"
    EXTRACT = "extract"
    JOIN = "join"
    IMPLEMENT = "implement"
    REVIEW = "review"
    BREAK_DOWN = "break_down"
    PLAN = "plan"


#: Work -> roles that can do it, best first.
ROLES_FOR: Final[Mapping[Work, tuple[str, ...]]] = {
    Work.ANSWER: ("frontdoor", "writer", "worker"),
    Work.READ: ("worker", "extractor", "writer"),
    Work.EXTRACT: ("extractor", "worker"),
    Work.JOIN: ("writer", "frontdoor", "architect"),
    Work.IMPLEMENT: ("coder", "architect", "worker"),
    Work.REVIEW: ("reviewer", "architect"),
    Work.BREAK_DOWN: ("architect", "frontdoor", "writer"),
    Work.PLAN: ("frontdoor",),
}


@dataclass(frozen=True, slots=True)
class Casting:
    """Who does a kind of work, and why not the first choice."""

    role: str
    note: str | None = None
    """Set where the role is a replacement."""


def cast(work: Work, roles: Collection[str]) -> Casting:
    """Choose the role for a kind of work among those of the registry, which has at least one."""
    row = ROLES_FOR[work]
    for role in row:
        if role in roles:
            note = None if role == row[0] else f"the registry has no role {row[0]!r}, {role!r} does its work ({work})"
            return Casting(role, note)
    role = next(iter(roles))
    return Casting(role, f"the registry has none of {', '.join(row)}; {role!r} does the work ({work})")


def crew(task_type: TaskType, roles: Collection[str]) -> list[str]:
    """Roles for the sub-agents of a step that names none: the smallest that can do the work first, then the others."""
    kinds = (Work.READ, Work.IMPLEMENT) if task_type is TaskType.CODE else (Work.READ,)
    return list(dict.fromkeys(cast(work, roles).role for work in kinds))


def alternatives(role: str, roles: Collection[str]) -> list[str]:
    """Other roles of the registry that do the same kinds of work, in the order of the table."""
    others = [other for row in ROLES_FOR.values() if role in row for other in row]
    return [other for other in dict.fromkeys(others) if other != role and other in roles]
