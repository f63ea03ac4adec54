"""Recognises tests among the inputs of a task, and the module they import.

Where tests came along they are the judge of the code, so the planner runs them as a gate; for that the artefact must
be called what the tests import. Sources are parsed, never executed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from typing import Final

from protocol.messages.artefact import Artefact, ArtefactKind
from services.planner.naming import stem

_TEST_NAME: Final = re.compile(r"(?:test_.*|.*_test|tests?)(?:\.py)?", re.IGNORECASE)
_TEST_FUNCTION: Final = re.compile(r"^(?:    )?def test_\w*\(", re.MULTILINE)
_MODULE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_NOT_OURS: Final = frozenset(sys.stdlib_module_names) | {"pytest", "hypothesis", "numpy"}
_MAX_PARSED_CHARS: Final = 64 * 1024


def given_tests(inputs: Sequence[Artefact]) -> list[Artefact]:
    """The inputs that are Python tests: files of Python that are named like tests or define test functions."""
    return [
        artefact
        for artefact in inputs
        if artefact.kind is not ArtefactKind.JSON
        and artefact.file_name().endswith(".py")
        and (_TEST_NAME.fullmatch(artefact.name) or _TEST_FUNCTION.search(artefact.text()))
    ]


def module_under_test(inputs: Sequence[Artefact]) -> str | None:
    """The one module that the tests import and that nobody brought along; None where that is not clear."""
    brought = {stem(artefact.file_name()) for artefact in inputs}
    wanted = {
        module
        for test in given_tests(inputs)
        for module in _imported(test.text())
        if module not in _NOT_OURS and module not in brought and _MODULE_NAME.fullmatch(module)
    }
    return wanted.pop() if len(wanted) == 1 else None


def _imported(source: str) -> set[str]:
    if len(source) > _MAX_PARSED_CHARS:
        return set()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of them are what ast raises for bad sources
        return set()
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
    return modules
