"""The builtin `taskir` gate as a program: `python -m services.gates.taskir_check - FILE…`, its verdict as JSON.

A process of its own, as for `schema_check`: a hostile value costs time and memory, and nothing but a kill ends that.
Prints `{"findings": [{file, path, rule, message}]}`. Whether roles and gates exist is a matter of the registry in
which the task is to run, and is asked there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from protocol.messages.task import TaskIR
from protocol.plan_graph import find_problems

_MAX_FINDINGS = 201
_MAX_CHARS = 400


def findings(file: str, text: str) -> Iterator[dict[str, str]]:
    """What keeps one file from being a task."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value = json.loads(value)  # an answer that nobody has parsed
        task = TaskIR.model_validate(value)
    except ValidationError as err:
        for problem in err.errors(include_url=False, include_context=False):
            path = ".".join(("$", *(str(part) for part in problem["loc"])))
            yield {"file": file, "path": path, "rule": problem["type"], "message": problem["msg"][:_MAX_CHARS]}
        return
    except (ValueError, RecursionError) as err:
        yield {"file": file, "path": "$", "rule": "parse", "message": f"not JSON: {err}"[:_MAX_CHARS]}
        return
    for found in find_problems(task):
        path = f"$.plan.steps[{found.step}].{found.field}" if found.step else f"$.{found.field}"
        yield {"file": file, "path": path, "rule": "plan", "message": found.message[:_MAX_CHARS]}


def main(arguments: list[str]) -> int:
    """Check every file behind the placeholder of the schema."""
    found = [one for name in arguments[1:] for one in findings(Path(name).name, Path(name).read_text(encoding="utf-8"))]
    sys.stdout.write(json.dumps({"findings": found[:_MAX_FINDINGS]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
