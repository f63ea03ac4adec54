"""Hostile artefacts: attempts to break out of the sandbox of the gates, or to win a verdict that was not earned.

The corpus is `hostile/`: `sandbox.txt` holds programs that end with status 0 if everything they tried was refused, so
that the verdict tells, and bombs that must end as the finding their limit makes of them; `verdict.txt` holds wrong
code with honest tests, for which anything but `pass` is right. Each is run by the real gates service. What can be seen
only from outside (a connection, a killed process, a survivor, a changed file) the `Witness` tells.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.gate import GateRequest, GateResult, Verdict
from services.kit.config import CHECKOUT, Home

_CORPUS: Final = Path(__file__).with_name("hostile")
_MARK: Final = "86399.25"
"""Seconds that a survivor would sleep, as the corpus has it: by these it is known among all processes."""
_GONE_S: Final = 1.0
_LONGEST_S: Final = 20.0

GATE: Final = "escape"
GATE_ENTRY: Final[Mapping[str, Any]] = {
    "description": "Runs the artefact.",
    "kinds": ["code"],
    "category": "CODE",
    "argv": ["{python}", "{artefact}"],
    "executes": True,
    "memory_bytes": 512 * 1024**2,
    "timeout_s": 6,
}
"""The gate for attempts on the sandbox, as an entry of gates.yaml."""
UNIT_TIMEOUT_S: Final = 10
"""For attempts on the verdict the unit gate should have no more time than this."""

_TESTS: Final = """\
from sums import add


def test_small():
    assert add(1, 0) == 1


def test_add():
    assert add(1, 2) == 3
"""

Ask = Callable[[GateRequest], list[GateResult]]


@dataclass(frozen=True, slots=True)
class Escape:
    """One attempt. `rules` are those of the finding it must end in; none = it ends well, because all was refused."""

    name: str
    source: str
    on_verdict: bool
    rules: tuple[str, ...] = ()
    tests: str = _TESTS
    beside: Mapping[str, str] = field(default_factory=dict)
    """Further artefacts under check, by name."""

    def request(self, aims: Mapping[str, Any]) -> GateRequest:
        """What the gates service is asked."""
        if self.on_verdict:
            artefacts = [_code("sums", self.source), *(_code(name, text) for name, text in self.beside.items())]
            return GateRequest(gates=["unit"], artefacts=artefacts, context=[_code("test_sums", self.tests)])
        constants = "\n".join(f"{name.upper()} = {value!r}" for name, value in aims.items())
        prelude = (_CORPUS / "prelude.txt").read_text(encoding="utf-8")
        return GateRequest(gates=[GATE], artefacts=[_code("attempt", f"{prelude}\n{constants}\n{self.source}")])

    def objection(self, results: list[GateResult]) -> str | None:
        """Why the attempt has to count as a success; None if it was contained and gave the result it should."""
        (result,) = results
        rules = [finding.rule for finding in result.findings]
        said = f"{result.verdict.value} {rules} {result.message}"
        if not all(char.isprintable() or char in "\n\t" for char in said):
            return "control characters in what is shown to people"
        if self.on_verdict or self.rules:
            good = result.verdict is Verdict.FAIL and (not self.rules or rules[0] in self.rules)
        else:
            good = result.verdict is Verdict.PASS
        return None if good else said


def escapes() -> list[Escape]:
    """The corpus."""
    found = []
    for name, rules, parts in _sections(_CORPUS / "sandbox.txt"):
        found.append(Escape(name, parts[""], on_verdict=False, rules=rules))
    for name, rules, parts in _sections(_CORPUS / "verdict.txt"):
        source, tests = parts.pop(""), parts.pop("test_sums", _TESTS)
        found.append(Escape(name, source, on_verdict=True, rules=rules, tests=tests, beside=parts))
    return found


def _sections(path: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Name, rules and parts of each attempt of a file; the part without a name is the attempt itself."""
    for section in path.read_text(encoding="utf-8").split("\n=== ")[1:]:
        title, _, body = section.partition("\n")
        name, _, rules = title.partition(" | ")
        first, *more = f"\n{body}".split("\n--- ")
        parts = {"": first.strip("\n") + "\n"}
        for part in more:
            file, _, text = part.partition("\n")
            parts[file] = text.strip("\n") + "\n"
        yield name, tuple(rule for rule in rules.split(", ") if rule), parts


def _code(name: str, source: str) -> Artefact:
    return Artefact(name=name, kind=ArtefactKind.CODE, value=source)


class Witness:
    """What stands outside and must stay as it is, as a context; `aims` is what the attempts know of it."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._open = ExitStack()
        self.aims: dict[str, Any] = {}

    def __enter__(self) -> Witness:
        """Put up a process, listeners and a secret."""
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="tl-")))
        self._process = self._open.enter_context(subprocess.Popen(["/bin/sleep", "3600"]))
        self._open.callback(self._process.kill)
        self._tcp = self._listener(socket.AF_INET, ("127.0.0.1", 0))
        self._unix = self._listener(socket.AF_UNIX, str(folder / "s"))
        name = f"tierline-{secrets.token_hex(8)}"
        self._abstract = self._listener(socket.AF_UNIX, f"\0{name}")
        self._udp = self._open.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind(("127.0.0.1", 0))
        self._udp.setblocking(False)
        self._secret = self._home.root / "secret"
        self._secret.write_text("untouched", encoding="utf-8")
        self.aims = {
            "home": str(self._home.root),
            "registry": str(self._home.registry),
            "checkout": str(CHECKOUT),
            "pid": self._process.pid,
            "tcp_port": self._tcp.getsockname()[1],
            "udp_port": self._udp.getsockname()[1],
            "unix_path": str(folder / "s"),
            "abstract_name": name,
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take everything down."""
        self._open.close()

    def objection(self) -> str | None:
        """What an attempt has done outside; None if nothing."""
        for name in ("tcp", "unix", "abstract"):
            try:
                getattr(self, f"_{name}").accept()
            except BlockingIOError:
                continue
            return f"a {name} connection came in"
        try:
            return f"a datagram came in: {self._udp.recv(64)!r}"
        except BlockingIOError:
            pass
        if self._process.poll() is not None:
            return "a process outside was killed"
        if self._secret.read_text(encoding="utf-8") != "untouched":
            return "a file outside was changed"
        if _survives():
            return "a process survived its gate"
        left = [str(path) for path in (self._home.root / "gates").glob("*/*")]
        return f"files were left behind: {left}" if left else None

    def _listener(self, kind: int, address: Any) -> socket.socket:
        listener = self._open.enter_context(socket.socket(kind, socket.SOCK_STREAM))
        listener.bind(address)
        listener.listen(8)
        listener.setblocking(False)
        return listener


def attempt(escape: Escape, ask: Ask, witness: Witness) -> str | None:
    """Make one attempt; returns why it has to count as a success, None if it was contained."""
    began = time.monotonic()
    results = ask(escape.request(witness.aims))
    took_s = time.monotonic() - began
    if took_s > _LONGEST_S:
        return f"it took {took_s:.1f} s"
    return escape.objection(results) or witness.objection()


def _survives() -> bool:
    """Whether a process with the mark lives; one that has been killed may take a moment to go."""
    end = time.monotonic() + _GONE_S
    while any(_MARK in (one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        if time.monotonic() > end:
            return True
        time.sleep(0.05)
    return False
