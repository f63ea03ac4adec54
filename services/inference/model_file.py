"""Is the model file whole, and what does it allow? Answered from its GGUF header before a child is started on it.

A truncated download or a wrong file otherwise shows as an engine that dies at once without saying why. The header is
read by `services.kit.gguf_facts` in a process of its own, since a broken file may make the reader hang. What the facts
allow is decided by the registry's constraints.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.inference.probe import ProbeFailed, probe
from services.kit.gguf_facts import READ_TIMEOUT_S, Stamp, command, parsed, stamp
from services.kit.gguf_header import MAGIC, BadHeader, opened
from services.kit.model_facts import ModelFacts


class BadModelFile(Exception):
    """The file cannot be loaded; the message says what to do."""


class ModelFile:
    """One model file; remembers its facts until the file changes, so that a respawn does not read it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[Stamp, ModelFacts] | None = None
        self._reading = asyncio.Lock()

    async def check(self) -> ModelFacts:
        """Raise BadModelFile unless the header is sound and all tensors lie within the file; returns the facts."""
        async with self._reading:
            return await self._check()

    async def _check(self) -> ModelFacts:
        try:
            now = stamp(self.path)
            with opened(self.path) as stream:
                magic = stream.read(len(MAGIC))
        except OSError as err:
            raise BadModelFile(
                f"cannot open the model file {err.filename or self.path}: {err.strerror}; run deploy/fetch-model, "
                "or repair path in models.yaml"
            ) from err
        if self._known is not None and self._known[0] == now:
            return self._known[1]
        if magic != MAGIC:
            raise BadModelFile(f"{self.path} is not a GGUF file (it begins with {magic!r}): fetch it again")
        try:
            probed = await probe(command(self.path), timeout_s=READ_TIMEOUT_S)
        except ProbeFailed as err:
            raise BadModelFile(f"the header of {self.path} cannot be read: {err}; fetch the file again") from err
        try:
            facts = parsed(probed.status, probed.output)
        except BadHeader as err:
            raise BadModelFile(f"{self.path} is damaged: {err}; fetch the file again") from err
        self._known = (now, facts)
        return facts
