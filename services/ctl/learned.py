"""How long steps are taken to need in `plan` and `simulate`: what a stack has learned, a given speed, or the prior.

What is learned stands in the scheduler's journal, which is only read, beside a hub that runs or after it. A role that
nobody has run yet has the scheduler's own prior, as it has it there.
"""

from __future__ import annotations

import sqlite3
from argparse import ArgumentParser, Namespace
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.ctl.journal_copy import FILE_NAME
from services.ctl.outcomes import BadInput
from services.kit.config import Home
from services.scheduler.durations import PRIOR_TOKENS_PER_S, Durations, LearnedDurations, TokenSpeed
from services.scheduler.journal import Learned, read_learned
from services.scheduler.journal_file import JournalVersionError, check_version

_FASTEST: Final = 1e6


def add_duration_arguments(parser: ArgumentParser) -> None:
    """Add the options from which `known_durations` reads."""
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="take durations from this scheduler's journal, a file or a folder (default: this stack's)",
    )
    parser.add_argument(
        "--tokens-per-s",
        type=float,
        metavar="N",
        help="instead of learned durations: every step writes all it may at this speed, on every slot",
    )


@dataclass(frozen=True, slots=True)
class KnownDurations:
    """Where expected times come from."""

    tokens_per_s: float | None
    """A given speed; None = learned, or the prior."""
    learned: Learned
    observations: dict[str, int]
    """Role -> observations behind its estimates."""
    journal: Path | None
    """The file they were learned in."""

    def fresh(self) -> Durations:
        """Estimates that start from what is known; each run needs its own, since they learn on."""
        if self.tokens_per_s is not None:
            return TokenSpeed(self.tokens_per_s)
        durations = LearnedDurations()
        durations.restore(self.learned)
        return durations

    @property
    def source(self) -> str:
        """`given`, `learned` or `prior`."""
        return "given" if self.tokens_per_s is not None else "learned" if self.observations else "prior"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": self.source,
            "observations": self.observations,
            "journal": None if self.journal is None else str(self.journal),
            "tokens_per_s": self.tokens_per_s if self.tokens_per_s is not None else PRIOR_TOKENS_PER_S,
        }

    def words(self) -> str:
        """For people."""
        prior = f"{PRIOR_TOKENS_PER_S:g} tokens/s per slot, every step writes all it may"
        if self.tokens_per_s is not None:
            return f"durations: as given, {self.tokens_per_s:g} tokens/s per slot, every step writes all it may"
        if not self.observations:
            return f"durations: prior ({prior}); this stack has not learned any yet"
        roles = ", ".join(f"{role} {count}" for role, count in sorted(self.observations.items()))
        total = sum(self.observations.values())
        return f"durations: learned from {total} observations ({roles}); other roles by the prior ({prior})"


def known_durations(args: Namespace, home: Home) -> KnownDurations:
    """What the options and this stack's journal say. Raises BadInput for a journal that was named and is not there."""
    speed: float | None = args.tokens_per_s
    if speed is not None:
        if not 0 < speed <= _FASTEST:
            raise BadInput(f"--tokens-per-s {speed:g}: expected a number above 0, at most {_FASTEST:g}")
        if args.journal is not None:
            raise BadInput("--tokens-per-s and --journal: give one of them, durations are either given or learned")
        return KnownDurations(speed, [], {}, None)
    path: Path = args.journal or home.journal
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        if args.journal is not None:
            raise BadInput(f"--journal {file}: there is no such file; it is $TIERLINE_HOME/journal/{FILE_NAME}")
        return KnownDurations(None, [], {}, None)
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            check_version(database, file)
            state = read_learned(database)
    except (sqlite3.Error, JournalVersionError) as err:
        raise BadInput(
            f"no durations can be read from {file}: {err}; name another file with --journal, or give --tokens-per-s"
        ) from err
    durations = LearnedDurations()
    durations.restore(state)
    return KnownDurations(None, state, durations.observations(), file)
