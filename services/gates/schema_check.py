"""The builtin `schema` gate as a program: `python -I schema_check.py SCHEMA|- FILE…`, its verdict as JSON on stdout.

A process of its own because a pattern in a schema can keep Python's regular expressions busy for years, and nothing
but a kill ends that. It needs no sandbox: data is compared and nothing of it is run, and references to other documents
are never fetched. Prints `{"findings": [{file, path, rule, message}]}`, or `{"schema_error": why}` if the schema itself
cannot be used. It imports nothing of Tierline, so that it starts fast and by path.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from jsonschema import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

_MAX_FINDINGS: Final = 201
"""One more than a result can carry, so that the caller sees that there are more."""
_MAX_CHARS: Final = 400


def findings(file: str, text: str, validator: Any | None) -> Iterator[dict[str, str]]:
    """What is wrong with one file. A string that begins like an object or a list is an answer nobody has parsed."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            value = json.loads(value, parse_constant=_refuse_constant)
    except json.JSONDecodeError as err:
        where = f"line {err.lineno}, column {err.colno}"
        yield {"file": file, "path": "$", "rule": "parse", "message": f"not JSON: {err.msg} at {where}"}
        return
    except ValueError as err:
        yield {"file": file, "path": "$", "rule": "parse", "message": f"not JSON: {err}"}
        return
    for error in [] if validator is None else validator.iter_errors(value):
        yield {
            "file": file,
            "path": error.json_path,
            "rule": str(error.validator),
            "message": error.message if len(error.message) <= _MAX_CHARS else f"{error.message[:_MAX_CHARS]}…",
        }


def check(schema: Path | None, files: Iterable[Path]) -> dict[str, Any]:
    """The whole verdict, as it is printed."""
    try:
        validator = None
        if schema is not None:
            content = json.loads(schema.read_text(encoding="utf-8"))
            kind = validator_for(content, default=Draft202012Validator)
            kind.check_schema(content)
            validator = kind(content, registry=Registry())  # an empty one: nothing is looked up elsewhere
        found: list[dict[str, str]] = []
        for file in files:
            for finding in findings(file.name, file.read_text(encoding="utf-8"), validator):
                found.append(finding)
                if len(found) == _MAX_FINDINGS:
                    return {"findings": found}
    except SchemaError as err:
        return {"schema_error": f"{err.json_path}: {err.message[:_MAX_CHARS]}"}
    except Unresolvable as err:
        return {"schema_error": f"a $ref leads nowhere: {str(err)[:_MAX_CHARS]}"}
    except re.error as err:
        return {"schema_error": f"a pattern is not a regular expression: {err}"}
    except RecursionError:
        return {"schema_error": "it refers to itself without end"}
    return {"findings": found}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


if __name__ == "__main__":
    verdict = check(None if sys.argv[1] == "-" else Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    sys.stdout.write(json.dumps(verdict))
