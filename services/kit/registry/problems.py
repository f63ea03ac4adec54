"""What is wrong with a registry, said so that the operator can go straight to the line.

One `Problem` is one fact about one field; `RegistryError` carries all of them, because an operator who repairs a
registry wants the whole list and not the first entry of it. Nothing here decides what is a problem: `yaml_lines`,
`sections` and `rules` do.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One violated rule, at one line of one registry file.

    Attributes:
        file: name of the file inside the registry folder.
        line: 1-based line of the field, or of the closest thing that exists when the field is missing.
        field: dotted path from the top of the file, as `models.front.slots`; empty when the file as a whole is meant.
        rule: stable short name of the rule, for tools and for searching.
        message: what is wrong and what to do about it.
    """

    file: str
    line: int
    field: str
    rule: str
    message: str

    def __str__(self) -> str:
        """Give the one-line form that editors and terminals can jump from."""
        where = f"{self.file}:{self.line}: "
        return f"{where}{self.field + ': ' if self.field else ''}{self.message}  (rule: {self.rule})"


class RegistryError(Exception):
    """The registry cannot be used: repair the lines that are named, then start again."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnknownNameError(LookupError):
    """A role or model was asked for that the registry does not hold: use one of the names listed in the message."""

    def __init__(self, noun: str, name: str, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"unknown {noun} {name!r}; the registry has: {', '.join(sorted(known)) or 'none'}")
