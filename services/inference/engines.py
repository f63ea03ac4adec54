"""Engines: which program serves a registry entry, and whether it can.

What the flags are is `command_line`'s business. They differ between versions of llama-server, so the ones used are
looked up in `--help` of the binary at hand before it is started, values of lists included. The life of the child is
`machine`'s business, its HTTP API `llama_http`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

from services.inference.command_line import Argument, Mode, arguments, modes_of, pinned, spelled
from services.inference.embedded import API_KEY_VARIABLE, SETTINGS
from services.inference.probe import ProbeFailed, probe
from services.kit.config import Home
from services.kit.registry import ModelEntry
from services.kit.registry.launch import Launch

_PROBE_TIMEOUT_S: Final = 20.0
_FLAG: Final = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
_REMOVED: Final = "argument has been removed"
_SECRET: Final = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?$", re.IGNORECASE)
_VERSION: Final = re.compile(r"version: (?:\S+ \(build )?(\d+)(?:, commit| \() ?(\w+)\)")
"""As in `version: 4567 (0a1b2c3)` and `version: 0.5.0-dev (build 4567, commit 0a1b2c3)`."""
_WORD: Final = re.compile(r"[\w+-]+")
_LISTED: Final = frozenset({"--spec-type", "--load-mode", "--numa", "--flash-attn", "--cache-type-k", "--cache-type-v"})
"""Flags whose help lists the values that a build takes."""


class EngineUnusable(Exception):
    """No engine can be started for this entry; the message says what to do."""


class NoLlamaServer(EngineUnusable):
    """None is installed here, and the entry asks for one."""


class Engine(Protocol):
    """What the life cycle needs to know about an engine."""

    name: str
    """As in models.yaml, for status and answers."""
    build: frozenset[str]
    """Names of the llama.cpp build, by which an entry may allow it what others are refused; known after `check`."""

    async def check(self, launch: Launch) -> None:
        """Raise EngineUnusable if the engine cannot serve this entry on this machine, in any mode it may run in."""
        ...

    def spelling(self, argument: Argument) -> tuple[str, ...]:
        """Flag and value of one argument, in the first spelling that this build knows."""
        ...

    def command(self, launch: Launch, port: int, mode: Mode) -> list[str]:
        """Program and arguments that serve this entry on `port` of 127.0.0.1, as `check` found it known."""
        ...


class NativeEngine:
    """A llama-server binary."""

    name = "llama-server"

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._help: Mapping[str, str] = {}
        self.build: frozenset[str] = frozenset()

    async def check(self, launch: Launch) -> None:
        """See Engine. Asks the binary for its flags."""
        if not os.access(self._binary, os.X_OK) or not self._binary.is_file():
            raise EngineUnusable(f"{self._binary} is no executable file: repair binary in models.yaml")
        try:
            probed = await probe([str(self._binary), "--help"], timeout_s=_PROBE_TIMEOUT_S)
            version = await probe([str(self._binary), "--version"], timeout_s=_PROBE_TIMEOUT_S)
        except ProbeFailed as err:
            raise EngineUnusable(f"{self._binary} does not run: {err}") from err
        self._help = sections_of_help(probed.output.decode("utf-8", "replace"))
        self.build = await asyncio.to_thread(build_names, self._binary, version.output.decode("utf-8", "replace"))
        unknown = list(unknown_arguments(launch, self._knows))
        if unknown:
            raise EngineUnusable(
                f"{self._binary} does not know {'; '.join(unknown)} (its --help ended with {probed.status}): "
                "build a version that does with deploy/build-native, or set engine: embedded"
            )

    def command(self, launch: Launch, port: int, mode: Mode) -> list[str]:
        """See Engine. Flags and values are separate arguments: llama-server does not take `--flag=value`."""
        return [*pinned(launch), str(self._binary), *spelled(arguments(launch, port, mode), self._knows)]

    def spelling(self, argument: Argument) -> tuple[str, ...]:
        """See Engine."""
        return tuple(spelled([argument], self._knows))

    def _knows(self, way: tuple[str, ...]) -> bool:
        if not way:  # left out: only a build whose help was read can be known to need nothing
            return bool(self._help)
        for part, value in zip(way, (*way[1:], ""), strict=True):
            if not part.startswith("--"):
                continue
            text = self._help.get(part)
            if text is None or (part in _LISTED and not _lists(text, part, value)):
                return False
        return True


def _lists(text: str, flag: str, value: str) -> bool:
    """Whether a flag's part of the help names all these values; for none, whether it takes none."""
    # A value stands one blank behind the flag or its last other name, the description at least two.
    takes_value = re.search(rf"{flag}(?:, *--?[\w-]+)* (?! )", text.partition("\n")[0]) is not None
    if not value or not takes_value:
        return not value and not takes_value
    return all(choice in _WORD.findall(text) for choice in value.split(","))


class EmbeddedEngine:
    """llama.cpp from the xllamacpp wheel, in a Python child (`services.inference.embedded`)."""

    name = "embedded"

    def __init__(self) -> None:
        self.build = frozenset({f"xllamacpp-{version('xllamacpp')}"} if find_spec("xllamacpp") else ())

    async def check(self, launch: Launch) -> None:
        """See Engine. The wheel is a dependency of the project; without it the child says so."""
        unknown = list(unknown_arguments(launch, self._knows))
        if unknown:
            raise EngineUnusable(
                f"engine embedded cannot do {'; '.join(unknown)}: set engine: llama-server, or remove the field"
            )

    def command(self, launch: Launch, port: int, mode: Mode) -> list[str]:
        """See Engine."""
        program = [sys.executable, "-m", "services.inference.embedded"]
        return [*pinned(launch), *program, *spelled(arguments(launch, port, mode), self._knows)]

    def spelling(self, argument: Argument) -> tuple[str, ...]:
        """See Engine."""
        return tuple(spelled([argument], self._knows))

    def _knows(self, way: tuple[str, ...]) -> bool:
        return way[0] in SETTINGS


def choose_engine(entry: ModelEntry, home: Home) -> Engine:
    """The engine that serves an entry: the registry's binary, then the one built into the cache, then PATH.

    Raises NoLlamaServer where llama-server is asked for and none is found; `auto` is embedded then.
    """
    if entry.engine == "embedded":
        return EmbeddedEngine()
    binary = entry.binary or find_native(home)
    if binary is not None:
        return NativeEngine(binary)
    if entry.engine == "llama-server":
        raise NoLlamaServer("no llama-server found: run deploy/build-native, or set binary in models.yaml")
    return EmbeddedEngine()


def find_native(home: Home) -> Path | None:
    """The llama-server built by deploy/build-native, else the one on PATH, else None."""
    built = home.cache / "native" / "current" / "bin" / "llama-server"
    if built.is_file():
        return built
    found = shutil.which("llama-server")
    return None if found is None else Path(found)


def environment(own: Mapping[str, str], api_key: str) -> dict[str, str]:
    """Environment of the child: ours without LLAMA_* (they would override the command line) and without what is named
    like a secret, such as the keys of remote models; and the key."""
    kept = {name: text for name, text in own.items() if not name.startswith("LLAMA_") and not _SECRET.search(name)}
    return {**kept, API_KEY_VARIABLE: api_key}


def unknown_arguments(launch: Launch, knows: Callable[[tuple[str, ...]], bool]) -> Iterator[str]:
    """What no spelling of is known, for people: the flag, and the field that it comes from."""
    every = {argument.ways: argument for mode in modes_of(launch) for argument in arguments(launch, 0, mode)}
    for argument in every.values():
        if any(knows(way) for way in argument.ways):
            continue
        text = " ".join(argument.ways[0][: 2 if argument.ways[0][0] in _LISTED else 1])
        if argument.field:
            owner = launch.draft.name if argument.of_draft and launch.draft is not None else launch.entry.name
            text += f" (field {argument.field}, {launch.where(argument.field, owner)})"
        yield text


def build_names(binary: Path, version_text: str) -> frozenset[str]:
    """Names of a build: its number and commit where it has them, and in any case the digest of the binary.

    Source archives are built without number and commit; two such builds differ by their digests only.
    """
    names = {f"sha256:{file_digest(binary)[:12]}"}
    match = _VERSION.search(version_text)
    if match is not None and match[1] != "0":
        names |= {f"b{match[1]}", match[2]}
    return frozenset(names)


def file_digest(path: Path) -> str:
    """sha256 of a file in hex. Raises EngineUnusable where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as err:
        raise EngineUnusable(f"{path} cannot be read: {err.strerror}") from err


def sections_of_help(text: str) -> Mapping[str, str]:
    """Flags that a `--help` page lists, each with all that the page says about it; removed ones are left out."""
    sections: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("---"):
            # Flags stand before the description, which begins after two blanks in column 40 or on the next line.
            sections.append((_FLAG.findall(re.split(r"(?<=\S) {2,}(?=[^\s-])", line, maxsplit=1)[0]), []))
        if sections:
            sections[-1][1].append(line)
    told = ((flags, "\n".join(lines)) for flags, lines in sections)
    return {flag: words for flags, words in told if _REMOVED not in words for flag in flags}
