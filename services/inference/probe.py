"""Short-lived child programs with bounds: for what may hang, crash or hold memory and must not do so in the service.

Used for `--help` of a binary, for reading a model file's header and for checking an answer against a schema with
regular expressions. The engine itself is started with `services.kit.children`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_OUTPUT_BYTES: Final = 1024 * 1024
"""`--help` of llama-server has 60 kB; more than this is no answer to any question asked here."""


class ProbeFailed(Exception):
    """The program could not be started, took too long or said too much."""


@dataclass(frozen=True, slots=True)
class Probed:
    """How the program ended."""

    status: int
    output: bytes
    """stdout and stderr."""

    @property
    def last_line(self) -> str:
        """Of its output: what an installation says at the start of every Python program stands before it."""
        return self.output.decode("utf-8", "replace").strip().rpartition("\n")[2]


async def probe(argv: Sequence[str], *, timeout_s: float, data: bytes = b"") -> Probed:
    """Run a program to its end with `data` on stdin. Raises ProbeFailed; the program is killed then."""
    try:
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as err:
        raise ProbeFailed(f"{argv[0]} cannot be started: {err.strerror}") from err
    try:
        async with asyncio.timeout(timeout_s):
            output = await _converse(child, data)
            return Probed(await child.wait(), output)
    except TimeoutError as err:
        raise ProbeFailed(f"{argv[0]} did not end within {timeout_s:g} s") from err
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _converse(child: asyncio.subprocess.Process, data: bytes) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise ProbeFailed("the pipes of the program are missing")

    async def write(sink: asyncio.StreamWriter) -> None:
        try:
            sink.write(data)
            await sink.drain()
            sink.close()
        except (BrokenPipeError, ConnectionResetError):
            return  # it needed no input; its exit status says whether that was right

    writing = asyncio.create_task(write(child.stdin))
    try:
        output = bytearray()
        while piece := await child.stdout.read(65_536):
            output += piece
            if len(output) > MAX_OUTPUT_BYTES:
                raise ProbeFailed(f"the program wrote more than {MAX_OUTPUT_BYTES} bytes")
        return bytes(output)
    finally:
        writing.cancel()
