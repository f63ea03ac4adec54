"""Writes what was detected into the text of hardware.yaml; everything else in it, comments included, stays.

A field that stands in the file, or stands there commented out, is set in its place; one that does not is added at
the end of the section. It makes text: reading is `sections`, detecting `services.kit.hardware`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from services.kit.hardware import Machine, format_cores

_SECTION: Final = "hardware:"
_EMPTY_FILE: Final = f"{_SECTION}\n"


def with_machine(text: str, machine: Machine) -> str:
    """The text of hardware.yaml with the cores, their threads, memory and nodes of a machine in it."""
    nodes = [
        f'    - {{cores: "{format_cores(node.cores)}", memory_bytes: {node.memory_bytes}}}' for node in machine.nodes
    ]
    fields: Mapping[str, Sequence[str]] = {
        "cores": [f"  cores: {machine.cores}"],
        "threads_per_core": [f"  threads_per_core: {machine.threads_per_core}"],
        "memory_bytes": [f"  memory_bytes: {machine.memory_bytes}"],
        "nodes": ["  nodes:", *nodes],
    }
    lines = (text or _EMPTY_FILE).splitlines()
    if not any(line.split("#")[0].strip() == _SECTION for line in lines):
        lines.append(_SECTION)
    for name, new in fields.items():
        lines = _with_field(lines, name, new)
    return "\n".join(lines) + "\n"


def _with_field(lines: list[str], name: str, new: Sequence[str]) -> list[str]:
    set_here = re.compile(rf" +{name}:(?P<rest>.*)")
    commented = re.compile(rf" *# *{name}:(?P<rest>.*)")
    for pattern in (set_here, commented):
        for number, line in enumerate(lines):
            match = pattern.fullmatch(line)
            if match is None:
                continue
            end = number + 1
            if pattern is set_here:
                indent = len(line) - len(line.lstrip())
                while end < len(lines) and _belongs(lines[end], indent):
                    end += 1
            hash_at = match["rest"].find(" #")
            comment = "" if hash_at < 0 else f" {match['rest'][hash_at:]}"
            return [*lines[:number], new[0] + comment, *new[1:], *lines[end:]]
    begin = next(number for number, line in enumerate(lines) if line.split("#")[0].strip() == _SECTION)
    last = max((n for n, line in enumerate(lines) if n > begin and line.startswith(" ")), default=begin)
    return [*lines[: last + 1], *new, *lines[last + 1 :]]


def _belongs(line: str, indent: int) -> bool:
    """Whether a line is part of the block whose key stands at `indent`: deeper, or an item of its list."""
    inner = len(line) - len(line.lstrip())
    return bool(line.strip()) and (inner > indent or (inner == indent and line.lstrip().startswith("- ")))
