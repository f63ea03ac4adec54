"""The memory's parts opened as its service opens them, without the bus; as a program, a start that can be timed.

`python -m services.ctl.bench.memory_process FOLDER [write]` prints a line when it could answer, and waits for a signal:
SIGTERM closes everything cleanly. With `write` it then adds a task and prints a second line, so that kill -9 leaves an
unclean stop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from protocol.messages.failure import Failure
from protocol.messages.memory import DecisionRecord, RecordDecisions
from services.memory.advisor import Advisor
from services.memory.embedding import Embedder
from services.memory.graph import files, vouched
from services.memory.graph_check import Checked, check_in_child
from services.memory.log import Entry
from services.memory.log_restore import open_log
from services.memory.machine import Found
from services.memory.manifest import ProjectionDoubt
from services.memory.projector import Projector
from services.memory.telling import tell_nobody


class OpenedMemory:
    """Log, embedder, projections and routing of one folder, in this thread."""

    def __init__(self, folder: Path) -> None:
        """Open everything; what cannot be trusted is rebuilt."""
        self.embedder = Embedder()
        self._log = open_log(folder, self.embedder, tell_nobody)
        self._log.adopt_embedder(self.embedder.name, self.embedder.embed)
        self.projector = Projector(folder, self.embedder, tell_nobody)
        self.projector.start(*_judged(folder))
        self.advisor = Advisor(folder, self.embedder)

    def commit(self, entries: Sequence[Entry]) -> None:
        """Store a group of entries; raises RuntimeError unless all are taken."""
        for answer in self._log.commit(entries):
            if isinstance(answer, Failure):
                raise RuntimeError(answer.message)

    def follow(self) -> None:
        """Let everything that is derived catch up with the log."""
        self.projector.advance()
        self.advisor.advance()

    def close(self) -> None:
        """A clean stop."""
        self.advisor.close()
        self.projector.close()
        self._log.close()


def _judged(folder: Path) -> tuple[Found | None, Checked | None, str | None]:
    try:
        return vouched(folder), None, None
    except FileNotFoundError:
        if not files(folder):
            return None, None, "there is no graph"
    except ProjectionDoubt as err:
        return None, None, str(err)
    try:
        return None, asyncio.run(check_in_child(folder)), None
    except ProjectionDoubt as err:
        return None, None, str(err)


def _say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> None:
    """Open, say so, wait, close."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    memory = OpenedMemory(Path(sys.argv[1]))
    _say("open")
    if sys.argv[2:] == ["write"]:
        decision = DecisionRecord(
            decision_id="unclean", task_id="unclean", subject="role", choice="worker", propensity=1.0, task_type="doc"
        )
        memory.commit([Entry(RecordDecisions(decisions=[decision]))])
        memory.follow()
        _say("written")
    signal.sigwait({signal.SIGTERM})
    memory.close()


if __name__ == "__main__":
    main()
