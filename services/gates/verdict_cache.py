"""Results of gates by the content of what they looked at: the same files are not checked twice by the same gate.

The key covers everything a verdict can depend on: the gate's entry, the version of its tool, every file of the
workspace by name and content, and what else the request says. Only verdicts about the artefact are kept, never errors,
timeouts or other ends that a busy machine may have caused. One small file per verdict, written beside and renamed; a
file that cannot be read, or whose checksum is wrong, is a miss and is removed. Several processes may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from protocol.messages.gate import GateResult, Verdict

KILLED_RULES: Final = frozenset({"timed-out", "flooded", "grew"})
_KEPT: Final = (Verdict.PASS, Verdict.FAIL)
_DIGEST_BYTES: Final = 64
_FULL: Final = 0.8
"""Of the bound: down to this much the oldest are removed at once, so that it does not happen at every verdict."""


def key_of(parts: Iterable[bytes]) -> str:
    """A name for all these parts, in order; no two different lists of parts have one name."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class VerdictCache:
    """Verdicts in a folder of at most `limit_bytes`; with 0 nothing is kept."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.hits = 0
        self.misses = 0
        self._folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> GateResult | None:
        """What was found before, None for a miss."""
        path = self._folder / key
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.misses += 1
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        try:
            if hashlib.sha256(key.encode() + content).hexdigest().encode() != digest:
                raise ValueError("the content has changed")
            result = GateResult.model_validate_json(content)
        except (ValidationError, ValueError):
            self.misses += 1
            self._remove(path, len(data))
            return None
        self.hits += 1
        with contextlib.suppress(FileNotFoundError):  # another process has just made room
            os.utime(path)
        return result

    def put(self, key: str, result: GateResult) -> None:
        """Keep a verdict, if it is one that will be the same next time."""
        if result.verdict not in _KEPT or any(finding.rule in KILLED_RULES for finding in result.findings):
            return
        content = result.model_dump_json(exclude_none=True).encode()
        data = hashlib.sha256(key.encode() + content).hexdigest().encode() + content
        if len(data) > self.limit_bytes:
            return
        beside = self._folder / f".{key}.{os.getpid()}"
        try:
            beside.write_bytes(data)
            beside.replace(self._folder / key)
        except OSError:  # a full disk: the verdict is only computed again
            beside.unlink(missing_ok=True)
            return
        self.bytes += len(data)
        if self.bytes > self.limit_bytes:
            self._make_room()

    def _make_room(self) -> None:
        files = sorted(self._files())
        self.bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self.bytes <= self.limit_bytes * _FULL:
                return
            self._remove(path, size)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of every file."""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path

    def _remove(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        self.bytes -= size
