"""The `unit` gate: `run_tests.py FILE` runs pytest on one file of tests and tells the service what came of each test.

Tests and the code under test share this process, and that code is hostile. What it can be kept from, it is:

* Records go through an inherited pipe, signed with a key that was read from another pipe, which was closed before
  anything of the workspace was imported. A forged report file, forged output, or bytes written into the pipe prove
  nothing; a record that is missing, repeated, out of order or wrongly signed is a failure.
* Before anything is imported, the functions of tests are read from the file's source. Each must be told of.
* Behind the tests runs one that must fail. Where it passes, is skipped or does not run, pytest has been tampered with.
* No configuration, plugin or conftest.py of the workspace is loaded, except a conftest.py that came as context.
* A skip or an expected failure that was decided while the code under test ran is told as such.

What remains is said in the README of the gates. Runs inside the sandbox; imports nothing of Tierline. Without the
two pipes (`TIERLINE_REPORT_FD`, `TIERLINE_KEY_FD`) it is plain pytest with the same options.
"""

import ast
import hmac
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeGuard

import pytest

_OPTIONS: Final = (
    *("-q", "--tb=short", "--no-header", "--color=no", "-rfE", "-p", "no:cacheprovider", "-c", os.devnull),
    *("--import-mode=prepend", "--rootdir"),
)
_MAX_CHARS: Final = 4_000
_CANARY: Final = "def {name}():\n    assert {left} == {right}\n"
_Send = Callable[[dict[str, Any]], None]


def main(arguments: list[str]) -> int:
    """Run the tests of one file; the status is pytest's."""
    if arguments == ["--version"]:
        sys.stdout.write(f"python {sys.version} pytest {pytest.__version__}\n")
        return 0
    (file,) = (Path(name).resolve() for name in arguments)
    options = [*_OPTIONS, str(file.parent)]
    if not _conftest_is_trusted():
        options.append("--noconftest")
    send = _sender()
    if send is None:
        return int(pytest.main([*options, str(file)]))
    send({"event": "expected", "tests": sorted(_declared(file))})
    with tempfile.TemporaryDirectory() as folder:
        canary = _canary(Path(folder))
        reporter = _Reporter(send, file.parent, canary)
        # The tests before it: it comes last, when the code under test has had its chance to change pytest.
        status = int(pytest.main([*options, str(file), str(canary)], plugins=[reporter]))
    send({"event": "finished", "status": status})
    return status


def _conftest_is_trusted() -> bool:
    """TIERLINE_UNDER_CHECK names the files that are under check: a conftest.py among them must not judge itself."""
    return "conftest.py" not in os.environ.pop("TIERLINE_UNDER_CHECK", "").split("/")


def _sender() -> _Send | None:
    """Return the function that signs and sends a record, or None where nobody listens."""
    report, key = os.environ.pop("TIERLINE_REPORT_FD", None), os.environ.pop("TIERLINE_KEY_FD", None)
    if report is None or key is None:
        return None
    with os.fdopen(int(key), "rb") as stream:
        # An object of C that signs and does not show its key.
        signer = hmac.new(stream.read(), digestmod="sha256")
    pipe = int(report)
    os.set_inheritable(pipe, False)  # what the tests start has no business with it
    owner, dumps, write, number = os.getpid(), json.dumps, os.write, iter(range(sys.maxsize))

    def send(record: dict[str, Any]) -> None:
        if os.getpid() != owner:
            return  # a test has forked, and its child tells nothing
        data = dumps({"number": next(number), **record}).encode()
        signature = signer.copy()
        signature.update(data)
        line = signature.hexdigest().encode() + b" " + data + b"\n"
        while line:
            line = line[write(pipe, line) :]

    return send


def _declared(file: Path) -> Iterator[str]:
    """Names of the functions that pytest collects from this source by its defaults, methods as `Class::method`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # collecting it will say so
    for node in tree.body:
        if _is_test(node):
            yield node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            # pytest collects no class that has a constructor, or that says __test__ = False
            left_out = any(getattr(one, "name", "") == "__init__" or "__test__" in ast.dump(one) for one in node.body)
            yield from [] if left_out else (f"{node.name}::{one.name}" for one in node.body if _is_test(one))


def _is_test(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Whether pytest takes it for a test. One that is decorated may have become something else, such as a fixture."""
    return (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test")
        and all("mark" in ast.dump(decorator) for decorator in node.decorator_list)
    )


def _canary(folder: Path) -> Path:
    """A test that must fail, in a file whose name nobody knows in advance."""
    path = folder / f"test_{secrets.token_hex(4)}.py"
    left = secrets.randbelow(900) + 100
    path.write_text(_CANARY.format(name=f"test_{secrets.token_hex(4)}", left=left, right=left + 1))
    return path


class _Reporter:
    """The plugin: sends every phase of every test as it ends."""

    def __init__(self, send: _Send, workspace: Path, canary: Path) -> None:
        self._send = send
        self._workspace = f"{workspace}/"
        self._canary = canary

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._send(
                {"event": "collect", "outcome": report.outcome, "node": report.nodeid[:500], **self._why(report)}
            )

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=self._is_canary)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = [self._name(item) for item in session.items if not self._is_canary(item)]
        self._send({"event": "collected", "count": len(names), "tests": sorted(set(names))})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        raised = call.excinfo  # before other plugins put another one in its place
        report = yield
        expected = hasattr(report, "wasxfail")
        # What was raised counts, not what other plugins made of it.
        swallowed = raised is not None and report.outcome == "passed" and not expected
        self._send(
            {
                "event": "canary" if self._is_canary(item) else "test",
                "test": self._name(item),
                "node": item.nodeid[:500],
                "when": call.when,
                "outcome": "failed" if swallowed else report.outcome,
                "expected_failure": expected,
                "assertion": raised is not None and type(raised.value) is AssertionError,
                "passed_through": self._files(raised),
                **self._why(report),
            }
        )
        return report

    def _files(self, raised: pytest.ExceptionInfo[BaseException] | None) -> list[str]:
        """Files of the workspace through which an exception came, outermost first."""
        paths = [] if raised is None else [str(entry.path) for entry in raised.traceback]
        inside = [path.removeprefix(self._workspace) for path in paths if path.startswith(self._workspace)]
        return list(dict.fromkeys(inside))[:64]

    def _is_canary(self, item: pytest.Item) -> bool:
        return item.path == self._canary

    def _name(self, item: pytest.Item) -> str:
        """`function` or `Class::method`, without the parameters of one case."""
        parts = item.nodeid.split("[")[0].split("::")
        return "::".join(parts[1:])[:500]

    def _why(self, report: pytest.CollectReport | pytest.TestReport) -> dict[str, Any]:
        text = report.longreprtext if report.outcome == "failed" else ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            return {"text": str(report.longrepr[2])[:500]}
        return {"text": text[-_MAX_CHARS:]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
