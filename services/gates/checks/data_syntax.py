"""The `data` gate: `data_syntax.py FILE…` parses JSON, YAML and TOML files and prints `file:line:column: message`.

Which format a file has is said by its suffix. A mapping with one key twice is an error in all three: the parsers of
JSON and YAML would take the last one without a word. Exit status 0 = all files are good, 1 = findings. YAML is only
composed: no tag makes an object, and an alias costs no copy. Runs inside the sandbox; imports nothing of Tierline.
"""

import json
import re
import sys
import tomllib
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

_AT = re.compile(r"\(at line (\d+), column (\d+)\)$")


def problems(file: Path) -> Iterator[str]:
    """What is wrong with one file, each as `line:column: message`."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as err:
        yield f"1:1: not UTF-8: {err.reason} at byte {err.start}"
        return
    if file.suffix == ".json":
        yield from _json(text)
    elif file.suffix == ".toml":
        yield from _toml(text)
    else:
        yield from _yaml(text)


def _json(text: str) -> Iterator[str]:
    doubles: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        doubles.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(found)

    try:
        json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as err:
        yield f"{err.lineno}:{err.colno}: {err.msg}"
    except RecursionError:
        yield "1:1: nested too deeply"
    for name in doubles:
        yield f"1:1: the key {name!r} stands twice in one object"


def _toml(text: str) -> Iterator[str]:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        place = _AT.search(str(err))
        yield f"{place[1]}:{place[2]}: {err}" if place else f"1:1: {err}"
    except RecursionError:
        yield "1:1: nested too deeply"


def _yaml(text: str) -> Iterator[str]:
    try:
        for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
            yield from _doubles(document, set())
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        yield f"{place}: {err.problem or err.context}"
    except yaml.YAMLError as err:
        yield f"1:1: {err}"
    except RecursionError:
        yield "1:1: nested too deeply"


def _doubles(node: yaml.Node | None, seen: set[int]) -> Iterator[str]:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _doubles(item, seen)
    elif isinstance(node, yaml.MappingNode):
        known: set[Hashable] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in known:
                    mark = key.start_mark
                    yield f"{mark.line + 1}:{mark.column + 1}: the key {key.value!r} stands twice in one mapping"
                known.add((key.tag, key.value))
            yield from _doubles(value, seen)


def main(arguments: list[str]) -> int:
    """Check the files, or print the versions of the parsers for `--version`."""
    if arguments == ["--version"]:
        sys.stdout.write(f"python {sys.version} yaml {yaml.__version__}\n")
        return 0
    found = 0
    for name in arguments:
        for problem in problems(Path(name)):
            sys.stdout.write(f"{name}:{problem}\n")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
