"""One model entry with everything that its command line depends on: the draft, the cores, the facts of the files.

Made by `Registry.launch`; the rules of `constraints` look at it at the check of the registry and again before each
start, when the files may have changed. It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from services.kit.hardware import Node, format_cores
from services.kit.model_facts import KvShape, ModelFacts
from services.kit.registry.acceleration import Declared
from services.kit.registry.entries import Hardware, ModelEntry
from services.kit.registry.problems import Problem
from services.kit.registry.yaml_lines import Document

FIRST_LINE = Document("models.yaml", None, {})
"""For an entry that stands in no file, as in tests and measurements."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What one process is started from."""

    entry: ModelEntry
    draft: ModelEntry | None = None
    """The entry that `speculation.draft` names; None where the policy is off."""
    hardware: Hardware | None = None
    """The machine; None = not looked at, as in tests and measurements."""
    document: Document = FIRST_LINE
    """Where the entry stands."""
    facts: ModelFacts | None = None
    """Of the entry's file, or as declared; None = not known yet."""
    draft_facts: ModelFacts | None = None
    prefix_folder: Path | None = None
    """Where slots are saved if it `takes_copies`; None = they are not."""

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores it is bound to, ascending; empty = all."""
        return bound_cores(self.entry, self.hardware.nodes if self.hardware is not None else ())

    @property
    def core_text(self) -> str | None:
        """The cores it is bound to, as taskset reads them; None = all."""
        return format_cores(self.cores) or None

    @property
    def takes_copies(self) -> bool:
        """Whether one slot may take over what another one has read. A draft model has a cache of its own that is not
        saved, and a recurrent model cannot go back to where its prompts part."""
        if not self.entry.prefix_disk_bytes:
            return False
        return self.draft is None and self.facts is not None and self.facts.recurrent is None

    @property
    def token_bytes(self) -> int:
        """What one token takes in the KV cache of a slot, in bytes; 0 where facts are missing."""
        if self.facts is None:
            return 0
        entry = self.entry
        cells = entry.context_tokens
        return self.facts.kv_bytes(cells, 1, entry.kv_type_k, entry.kv_type_v, entry.ubatch_tokens) // cells

    def memory_bytes(self) -> int | None:
        """Memory of the process in bytes: files, KV caches and states of all slots; None where facts are missing."""
        if self.facts is None:
            return None
        return loaded_bytes(self.entry, self.entry, self.facts) + (
            loaded_bytes(self.draft, self.entry, self.draft_facts) if self.draft and self.draft_facts else 0
        )

    def with_facts(self, facts: ModelFacts, draft_facts: ModelFacts | None) -> Launch:
        """Return the same launch with the files read."""
        return replace(self, facts=facts, draft_facts=draft_facts)

    def same_as(self, other: Launch) -> bool:
        """True if both start the same process: what stands elsewhere in the files does not matter."""
        return (self.entry, self.draft, self.cores) == (other.entry, other.draft, other.cores)

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


def loaded_bytes(model: ModelEntry, served: ModelEntry, facts: ModelFacts) -> int:
    """Weights of one model and its caches for the context and the slots of the entry that it serves."""
    context, slots = served.context_tokens, served.slots
    caches = facts.kv_bytes(context, slots, model.kv_type_k, model.kv_type_v, served.ubatch_tokens)
    return facts.file_bytes + caches


def declared_facts(declared: Declared) -> ModelFacts:
    """What an entry says of its file, as if it had been read; its vocabulary is known by its size only."""
    elements = declared.kv_bytes_per_token // 4  # keys and values alike, two bytes each
    return ModelFacts(
        architecture=declared.architecture,
        parameters=round(declared.parameters_b * 1e9),
        file_bytes=declared.file_bytes,
        context_tokens=declared.context_tokens,
        vocabulary_tokens=declared.vocabulary_tokens,
        kv=KvShape(elements, elements),
        experts_trained=declared.experts_trained,
        experts_total=declared.experts_total,
        recurrent="is declared to have recurrent layers" if declared.recurrent else None,
    )


def bound_cores(entry: ModelEntry, nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """Cores that an entry is bound to, ascending; empty = it may run anywhere. Unknown nodes are left out."""
    if entry.numa.cores is not None:
        return entry.numa.core_numbers()
    return tuple(sorted({core for number in entry.numa.nodes if number < len(nodes) for core in nodes[number].cores}))
