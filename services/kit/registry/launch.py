"""One model entry with everything that its command line depends on: the draft, the cores, the facts of the files.

Made by `Registry.launch`; the rules of `constraints` look at it at the check of the registry and again before each
start, when the files may have changed. It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from services.kit.hardware import Node, format_cores
from services.kit.model_facts import ModelFacts
from services.kit.registry.entries import ModelEntry
from services.kit.registry.problems import Problem
from services.kit.registry.yaml_lines import Document

FIRST_LINE = Document("models.yaml", None, {})
"""For an entry that stands in no file, as in tests and measurements."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What one process is started from."""

    entry: ModelEntry
    draft: ModelEntry | None = None
    """The entry that `speculation.draft` names."""
    nodes: tuple[Node, ...] = ()
    """NUMA nodes of the machine."""
    document: Document = FIRST_LINE
    """Where the entry stands."""
    facts: ModelFacts | None = None
    """Of the entry's file, or as declared; None = not known yet."""
    draft_facts: ModelFacts | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores it is bound to, ascending; empty = all."""
        return bound_cores(self.entry, self.nodes)

    @property
    def core_text(self) -> str | None:
        """The cores it is bound to, as taskset reads them; None = all."""
        return format_cores(self.cores) or None

    def with_facts(self, facts: ModelFacts, draft_facts: ModelFacts | None) -> Launch:
        """The same launch, with the files read."""
        return replace(self, facts=facts, draft_facts=draft_facts)

    def paths(self) -> list[Path]:
        """The files it loads, the model's first."""
        entries = [self.entry] if self.draft is None else [self.entry, self.draft]
        return [entry.path for entry in entries if entry.path is not None]

    def where(self, field: str, name: str | None = None) -> str:
        """File and line of a field of this entry, or of another one, as `models.yaml:12`."""
        line = self.document.line_of(("models", name or self.entry.name, *field.split(".")))
        return f"{self.document.file}:{line}"

    def problem(self, field: str, rule: str, message: str) -> Problem:
        """Make a problem about a field of this entry, given as `speculation.draft`."""
        path = ("models", self.entry.name, *(field.split(".") if field else ()))
        return self.document.problem(path, rule, message)


def bound_cores(entry: ModelEntry, nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """Cores that an entry is bound to, ascending; empty = it may run anywhere. Unknown nodes are left out."""
    if entry.numa.cores is not None:
        return entry.numa.core_numbers()
    return tuple(sorted({core for number in entry.numa.nodes if number < len(nodes) for core in nodes[number].cores}))
