"""Is the model file whole? Answered from its GGUF header before a child is started on it.

A truncated download or a wrong file otherwise shows as an engine that dies at once without saying why. The header is
read by `python -m services.inference.model_file PATH` in a process of its own, since the reader keeps every token of
the vocabulary in memory and a broken file may make it hang. Which accelerations a model allows is not decided here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from services.inference.probe import ProbeFailed, probe

_READ_TIMEOUT_S: Final = 120.0
"""A vocabulary of 250,000 tokens takes about ten seconds on a busy core."""

_GGUF_MAGIC: Final = b"GGUF"


class BadModelFile(Exception):
    """The file cannot be loaded; the message says what to do."""


class ModelFile:
    """One model file; remembers the verdict until the file changes, so that a respawn does not read it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked: tuple[int, int] | None = None

    async def check(self) -> None:
        """Raise BadModelFile unless the header is sound and all tensors lie within the file."""
        try:
            stat = self.path.stat()
            with self.path.open("rb") as stream:
                magic = stream.read(4)
        except OSError as err:
            raise BadModelFile(
                f"cannot open the model file {self.path}: {err.strerror}; run deploy/fetch-model, "
                "or repair path in models.yaml"
            ) from err
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp == self._checked:
            return
        if magic != _GGUF_MAGIC:
            raise BadModelFile(f"{self.path} is not a GGUF file (it begins with {magic!r}): fetch it again")
        try:
            probed = await probe([sys.executable, "-m", __name__, str(self.path)], timeout_s=_READ_TIMEOUT_S)
        except ProbeFailed as err:
            raise BadModelFile(f"the header of {self.path} cannot be read: {err}; fetch the file again") from err
        if probed.status != 0:
            last = probed.output.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise BadModelFile(f"{self.path} is damaged: {last[:300]}; fetch the file again")
        self._checked = stamp


def read_header(path: Path) -> dict[str, object]:
    """Architecture and number of tensors of a GGUF file. Raises BadModelFile saying what is damaged."""
    from gguf import GGUFReader  # only the child that reads a header pays for numpy

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except KeyError as err:
        raise BadModelFile(f"the header has no field {err}") from err
    except Exception as err:  # the reader meets garbage with whatever error comes up
        raise BadModelFile(f"the header ends or breaks off ({type(err).__name__}: {err})"[:300]) from err
    if not reader.tensors:
        raise BadModelFile("the header lists no tensors")
    size = path.stat().st_size
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise BadModelFile(f"tensor {tensor.name} ends at byte {end}, the file has {size}")
    return {"architecture": str(architecture), "tensors": len(reader.tensors)}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(read_header(Path(sys.argv[1]))) + "\n")
    except BadModelFile as refusal:
        sys.exit(str(refusal))
