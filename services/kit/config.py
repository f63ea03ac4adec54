"""Where this stack lives: the only place that reads the environment.

Two stacks with two homes run side by side; nothing outside the home and the checkout is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.kit.logs import LEVELS, Level

CHECKOUT: Final = Path(__file__).resolve().parents[2]
"""The project's own folder: registry/, deploy/."""


@dataclass(frozen=True, slots=True)
class Home:
    """Folders of one stack."""

    root: Path
    registry: Path
    cache: Path
    models: Path
    log_level: Level
    """Least level that is written."""
    supervised: bool
    """True when supervisord started this process: it then dies with its supervisor."""
    hardware: Path | None = None
    """A hardware.yaml instead of the registry's, for commands that ask what another machine would do."""

    @property
    def run(self) -> Path:
        """Sockets and locks; private to the user (0700)."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """One JSON-lines file per process."""
        return self.root / "logs"

    @property
    def journal(self) -> Path:
        """The scheduler's SQLite journal."""
        return self.root / "journal"

    @property
    def memory(self) -> Path:
        """The memory service's log and projections."""
        return self.root / "memory"

    @property
    def conf_d(self) -> Path:
        """Generated supervisord programs, one per model entry."""
        return self.root / "conf.d"

    def prefixes(self, model: str) -> Path:
        """What the slots of one model have read, saved for its other slots; it does not outlive the service."""
        return self.run / "prefixes" / model

    @property
    def hub_address(self) -> str:
        """The one address every process knows."""
        return f"ipc://{self.run}/hub.sock"

    def make(self) -> Home:
        """Create the folders, private to the user; returns itself."""
        for folder in (self.root, self.run, self.logs, self.journal, self.memory, self.conf_d):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.run.chmod(0o700)
        return self


def load_home(environ: Mapping[str, str] | None = None) -> Home:
    """Read TIERLINE_HOME, TIERLINE_REGISTRY, TIERLINE_CACHE, TIERLINE_MODELS and TIERLINE_LOG_LEVEL.

    Defaults: `$XDG_STATE_HOME/tierline`, the checkout's registry, `<home>/cache`, `<cache>/models`, info. Raises
    ValueError for a level that does not exist.
    """
    env = os.environ if environ is None else environ
    state = Path(env.get("XDG_STATE_HOME") or Path(env.get("HOME", "/")) / ".local" / "state")
    root = Path(env.get("TIERLINE_HOME") or state / "tierline").absolute()
    cache = Path(env.get("TIERLINE_CACHE") or root / "cache").absolute()
    level = next((known for known in LEVELS if known == env.get("TIERLINE_LOG_LEVEL", "info")), None)
    if level is None:
        raise ValueError(f"TIERLINE_LOG_LEVEL is {env['TIERLINE_LOG_LEVEL']!r}, expected one of {', '.join(LEVELS)}")
    return Home(
        root=root,
        registry=Path(env.get("TIERLINE_REGISTRY") or CHECKOUT / "registry").absolute(),
        cache=cache,
        models=Path(env.get("TIERLINE_MODELS") or cache / "models").absolute(),
        log_level=level,
        supervised="SUPERVISOR_ENABLED" in env,
    )
