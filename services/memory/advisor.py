"""Answers `advise`: the routing's state as a projection of the log, followed outcome by outcome and kept as a snapshot.

It has a thread and a reading connection of its own, so that a plan does not wait for the graph. What the state may not
be lost of is in the log; a snapshot only spares the time to go through it again at the start. Deleting it changes no
answer, since the same outcomes in the same order give the same state (`routing.py`).
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from protocol.messages.memory import Advise, Advised, ArmValue
from services.kit.identity import boot_id
from services.kit.threads import one_thread_each
from services.memory.embedding import Embedder, Unembeddable, Vector
from services.memory.log_reader import LogReader
from services.memory.machine import Found, Recovery, recovery
from services.memory.manifest import Manifest, ProjectionDoubt, replace_file, sha256_of
from services.memory.posterior import Array
from services.memory.routing import Bandit, Observation

_MANIFEST: Final = "routing.manifest.json"
_SNAPSHOT: Final = "routing-"
_SNAPSHOT_EVERY: Final = 2_000
_LARGE_BYTES: Final = 16 * 1024 * 1024
"""A state larger than this is written as much less often: writing it must not cost more than learning it again."""
_NAMES: Final = "names.4"
"""Raised when what a snapshot holds means something else: an older one is then made anew from the log."""
_APART: Final = frozenset({"persona", "decomposition"})
"""Subjects with one bandit per kind of work."""
_WITHIN: Final = "\x1f"

MAX_BANDITS: Final = 128
"""Pairs of subject and task type that are kept, for personas one for each role, for decompositions one for each kind of
work; a further one takes the place of the one longest without an outcome."""

MAX_BYTES: Final = 128 * 1024 * 1024
"""Of all posteriors together; beyond it those longest without an outcome go. A pair with 16 arms has about 10 MB."""


class Advisor:
    """The learned routing over one log; belongs to the thread that made it."""

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        """Opens the snapshot if it can be trusted and catches up with the log; `verdict` says what was found."""
        one_thread_each()
        self._folder = folder
        self._embedder = embedder
        self._reader = LogReader(folder)
        self._log_id = self._reader.log_id
        self._bandits: dict[tuple[str, str], Bandit] = {}
        self._last_seen: dict[tuple[str, str], int] = {}
        self._since_snapshot = 0
        self.applied_seq = 0
        self.verdict, self.reason = self._load()
        self.advance()

    def advance(self) -> None:
        """Learn from the outcomes that the log holds beyond `applied_seq`."""
        upto = self._reader.seq
        for last, observations in self._reader.observations(self.applied_seq, upto):
            for seen in observations:
                self._learn(seen)
            self.applied_seq = last
            self._since_snapshot += len(observations)
        if self._since_snapshot >= _SNAPSHOT_EVERY * max(1.0, self._nbytes / _LARGE_BYTES):
            self.snapshot()

    def advise(self, ask: Advise, vector: Vector | None = None) -> list[Advised]:
        """What to choose, by all outcomes that were acknowledged before. `vector` is that of the text, where known."""
        self.advance()
        if vector is None:
            try:
                vector = self._embedder.embed(ask.text)
            except Unembeddable:  # names of clusters and the arms' own values are left to go by
                vector = None
        nobody = Bandit()
        return [
            self._bandits.get(_place(question.subject, ask.task_type, question.cluster), nobody).advise(
                question, vector, ask.seed + number
            )
            for number, question in enumerate(ask.questions)
        ]

    def bandit(self, subject: str, task_type: str, cluster: str = "") -> Bandit:
        """What is known of one subject in tasks of one type; an empty one where nothing is."""
        return self._bandits.get(_place(subject, task_type, cluster), Bandit())

    def arms(self, subject: str) -> list[ArmValue]:
        """What the choices about a subject have earned since each last changed, by all acknowledged outcomes."""
        self.advance()
        values = [
            value
            for (named, task_type), bandit in self._bandits.items()
            if named.partition(_WITHIN)[0] == subject
            for value in bandit.values(task_type)
        ]
        return sorted(values, key=lambda one: (one.task_type, one.cluster, one.choice))

    def stats(self) -> dict[str, int]:
        """Size of what is known from all acknowledged outcomes, and alarms raised by arms that changed."""
        self.advance()
        arms = [arm for bandit in self._bandits.values() for arm in bandit.arms.values()]
        return {
            "routing_seq": self.applied_seq,
            "routing_arms": len(arms),
            "routing_alarms": sum(arm.alarms for arm in arms),
        }

    def close(self) -> None:
        """Leave a snapshot and close the connection."""
        self.snapshot()
        self._reader.close()

    def renew(self) -> None:
        """Learn everything anew, since rows of the log were forgotten."""
        self._log_id = self._reader.log_id
        self._bandits, self._last_seen = {}, {}
        self.applied_seq = 0
        self.advance()
        self._since_snapshot += 1  # what is on disk still holds what was forgotten
        self.snapshot()

    def snapshot(self) -> None:
        """Write the state and then the manifest that makes it valid. Raises OSError; the old snapshot stays then."""
        if not self._since_snapshot:
            return
        names: list[dict[str, Any]] = []
        arrays: dict[str, Array] = {}
        for number, (key, bandit) in enumerate(self._bandits.items()):
            own, numbers = bandit.state()
            names.append({"key": key, "last_seen": self._last_seen[key], "bandit": own})
            arrays |= {f"{number}/{name}": value for name, value in numbers.items()}
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)
        np.savez(buffer, allow_pickle=False, **{_NAMES: text}, **arrays)
        # A name of its own each time: the manifest of the old file stays true until the new one is in place.
        name = f"{_SNAPSHOT}{self.applied_seq}-{boot_id()}.npz"
        replace_file(self._folder / name, buffer.getvalue())
        Manifest(self._log_id, self.applied_seq, {name: sha256_of(self._folder / name)}).save(self._folder / _MANIFEST)
        self._since_snapshot = 0
        for old in self._folder.glob(f"{_SNAPSHOT}*"):
            if old.name != name:
                old.unlink()

    def _learn(self, seen: Observation) -> None:
        key = _place(seen.subject, seen.task_type, seen.cluster)
        if key not in self._bandits:
            if len(self._bandits) >= MAX_BANDITS:
                oldest = min(self._last_seen, key=lambda each: self._last_seen[each])
                del self._bandits[oldest], self._last_seen[oldest]
            self._bandits[key] = Bandit()
        self._last_seen[key] = seen.seq
        bandit = self._bandits[key]
        before = bandit.nbytes
        bandit.learn(seen)
        if bandit.nbytes > before:
            self._make_room(key)

    def _make_room(self, wanted: tuple[str, str]) -> None:
        """Give up those longest without an outcome until all fit; what goes follows from the outcomes alone."""
        while len(self._bandits) > 1 and self._nbytes > MAX_BYTES:
            oldest = min((key for key in self._bandits if key != wanted), key=lambda each: self._last_seen[each])
            del self._bandits[oldest], self._last_seen[oldest]

    @property
    def _nbytes(self) -> int:
        return sum(bandit.nbytes for bandit in self._bandits.values())

    def _load(self) -> tuple[Recovery, str]:
        try:
            manifest = Manifest.load(self._folder / _MANIFEST)
            verdict, reason = recovery(
                Found(manifest.log_id, manifest.applied_seq), self._reader.log_id, self._reader.seq
            )
            if verdict is Recovery.REBUILD:
                return verdict, reason
            bandits, last_seen = _read(manifest.read(self._folder, next(iter(manifest.files))))
        except FileNotFoundError:
            return Recovery.REBUILD, "there is no snapshot"
        except ProjectionDoubt as err:
            return Recovery.REBUILD, str(err)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, zipfile.BadZipFile) as err:
            return Recovery.REBUILD, f"the snapshot is of another version: {err}"
        self._bandits, self._last_seen, self.applied_seq = bandits, last_seen, manifest.applied_seq
        return verdict, reason


def _place(subject: str, task_type: str, cluster: str) -> tuple[str, str]:
    """Which bandit. Personas of different roles are never weighed against each other, and there are many of them: each
    role has a bandit of its own, so that one role's do not push out another's."""
    return (f"{subject}{_WITHIN}{cluster}" if subject in _APART else subject), task_type


def _read(data: bytes) -> tuple[dict[tuple[str, str], Bandit], dict[tuple[str, str], int]]:
    bandits, last_seen = {}, {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for number, entry in enumerate(json.loads(arrays[_NAMES].tobytes())):
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}
            subject, task_type = entry["key"]
            bandit = Bandit()
            bandit.restore(entry["bandit"], own)
            bandits[subject, task_type] = bandit
            last_seen[subject, task_type] = int(entry["last_seen"])
    return bandits, last_seen
