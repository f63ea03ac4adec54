"""What entries of the registry will take of the memory, by the headers of their files, before anything is loaded.

The figures are those of `tierline registry check`. A service tells the hub its own one, and does not start a hot model
that has no room beside the hot ones that stand before it: files may have come, or have been exchanged, since the check,
and a stack may be started without any. What is measured is `supervisor`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from services.inference.model_file import BadModelFile, ModelFile
from services.kit.model_facts import ModelFacts
from services.kit.registry import Problem, Registry
from services.kit.registry.launch import Launch
from services.kit.registry.memory import memory_needs, placed_before


class MemoryNeeds:
    """The needs of entries of `registry`, as its files are now; the header of an unchanged file is not read again."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._files: dict[Path, ModelFile] = {}

    def file(self, path: Path) -> ModelFile:
        """The one that remembers what was read of this file."""
        return self._files.setdefault(path, ModelFile(path))

    async def of(self, names: Collection[str]) -> dict[str, int]:
        """Memory in bytes of the loaded entries of these names; estimated for a file whose header cannot be read, 0
        for one that is not there."""
        models = self.registry.models
        drafts = {draft for name in names if (draft := models[name].speculation.loaded_draft) is not None}
        facts: dict[str, ModelFacts] = {}
        for name in (*names, *drafts):
            path = models[name].path
            if path is None or not models[name].is_local:
                continue
            try:
                facts[name] = await self.file(path).check()
            except BadModelFile:
                continue  # whoever loads it says so
        needs = memory_needs(models, facts)
        return {name: needs[name] for name in names}

    async def over_committed(self, launch: Launch) -> list[Problem]:
        """Why a hot model cannot be started beside the hot ones that stand before it; empty if it can."""
        entry, budget = launch.entry, self.registry.hardware.memory_bytes
        if entry.residency != "hot":
            return []  # it has got its room from the hub
        names = [name for name, model in self.registry.served.items() if model.residency == "hot"]
        needs = await self.of(names[: names.index(entry.name) + 1])
        before = placed_before(entry.name, needs, budget)
        taken = sum(needs[name] for name in before)
        if taken + needs[entry.name] <= budget:
            return []
        beside = f"beside the {taken:,} of the hot models before it ({', '.join(before)})" if before else "by itself"
        message = (
            f"it needs {needs[entry.name]:,} bytes {beside}, and the machine has {budget:,}: make one of them warm, "
            "take a smaller one, or remove an entry"
        )
        return [launch.problem("residency", "memory", message)]
