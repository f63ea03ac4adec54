"""What a projection's files were when they were last known to be good: names, sha256, the log they follow, how far.

Neither FAISS nor Kuzu notices a flipped byte (both have returned wrong data after one), so nothing of theirs is opened
before its hash has been compared. Files are replaced whole: temporary file, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


class ProjectionDoubt(Exception):
    """A projection cannot be trusted, and is to be rebuilt from the log. The message says why."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Good files of one projection."""

    log_id: str
    applied_seq: int
    files: dict[str, str]
    """File name inside the folder -> sha256, hexadecimal."""

    def save(self, path: Path) -> None:
        """Write it durably, with a seal over its own content."""
        content = json.dumps(asdict(self), sort_keys=True)
        replace_file(path, json.dumps({"content": content, "seal": _sha256(content.encode())}).encode())

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read it back. Raises FileNotFoundError where there is none, ProjectionDoubt where it was altered."""
        data = path.read_bytes()
        try:
            outer = json.loads(data)
            content = outer["content"]
            if _sha256(content.encode()) != outer["seal"]:
                raise ProjectionDoubt(f"{path.name} has been altered")
            return Manifest(**json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise ProjectionDoubt(f"{path.name} cannot be read: {err}") from err

    def read(self, folder: Path, name: str) -> bytes:
        """Content of one of the files; raises ProjectionDoubt unless it is what the manifest says."""
        try:
            data = (folder / name).read_bytes()
        except OSError as err:
            raise ProjectionDoubt(f"{name} cannot be read: {err}") from err
        if _sha256(data) != self.files[name]:
            raise ProjectionDoubt(f"{name} has been altered: its sha256 is not the one in the manifest")
        return data


def sha256_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that after a crash either the old or the new content is there, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
