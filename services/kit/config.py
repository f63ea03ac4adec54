"""Where this stack lives: the only place that reads the environment.

Two stacks with two homes run side by side; nothing outside the home and the checkout is written.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.kit.logs import LEVELS, Level

CHECKOUT: Final = Path(__file__).resolve().parents[2]
"""The project's own folder: registry/, deploy/."""


_SECRET: Final = re.compile(r"[\x21-\x7e]{1,4096}")
"""What fits into an HTTP header and is no accident: no blanks, no line ends."""


class SecretUnusableError(Exception):
    """A secret is missing, open to others or no secret. The message names it and says what to do, never its value."""


@dataclass(frozen=True, slots=True)
class Home:
    """Folders of one stack."""

    root: Path
    registry: Path
    """The files that services read: in a supervised stack the copy that `up` or a reload took up last."""
    cache: Path
    models: Path
    log_level: Level
    """Least level that is written."""
    supervised: bool
    """True when supervisord started this process: it then dies with its supervisor."""
    registry_source: Path
    """The files that the operator edits; those that services read, where no copy is between them."""
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
    def labelled_requests(self) -> Path:
        """Requests that the operator has labelled: where the file exists, the planner learns from it at start."""
        return self.root / "planner" / "divides.jsonl"

    @property
    def conf_d(self) -> Path:
        """Generated supervisord programs, one per model entry."""
        return self.root / "conf.d"

    @property
    def started_registry(self) -> Path:
        """Digest of the registry that the running services have or are told of: `up` need not restart them."""
        return self.conf_d / "registry.digest"

    @property
    def stack_lock(self) -> Path:
        """Held by whoever changes which registry and which programs the stack has."""
        return self.run / "stack.lock"

    def prefixes(self, model: str) -> Path:
        """What the slots of one model have read, saved for its other slots; it does not outlive the service."""
        return self.run / "prefixes" / model

    @property
    def registry_copies(self) -> Path:
        """Registries that were taken up, one folder each, named by digest."""
        return self.root / "registry"

    @property
    def current_registry(self) -> Path:
        """Link to the copy that the services of a supervised stack read: what `up` or a reload took up last."""
        return self.registry_copies / "current"

    @property
    def secrets(self) -> Path:
        """Keys of servers elsewhere, one file each with mode 0600, written by the operator."""
        return self.root / "secrets"

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
    """Read TIERLINE_HOME, TIERLINE_REGISTRY, TIERLINE_REGISTRY_SOURCE, TIERLINE_CACHE, TIERLINE_MODELS and
    TIERLINE_LOG_LEVEL.

    Defaults: `$XDG_STATE_HOME/tierline`, the checkout's registry, the registry itself, `<home>/cache`,
    `<cache>/models`, info. Raises ValueError for a level that does not exist.
    """
    env = os.environ if environ is None else environ
    state = Path(env.get("XDG_STATE_HOME") or Path(env.get("HOME", "/")) / ".local" / "state")
    root = Path(env.get("TIERLINE_HOME") or state / "tierline").absolute()
    cache = Path(env.get("TIERLINE_CACHE") or root / "cache").absolute()
    level = next((known for known in LEVELS if known == env.get("TIERLINE_LOG_LEVEL", "info")), None)
    if level is None:
        raise ValueError(f"TIERLINE_LOG_LEVEL is {env['TIERLINE_LOG_LEVEL']!r}, expected one of {', '.join(LEVELS)}")
    registry = Path(env.get("TIERLINE_REGISTRY") or CHECKOUT / "registry").absolute()
    return Home(
        root=root,
        registry=registry,
        registry_source=Path(env.get("TIERLINE_REGISTRY_SOURCE") or registry).absolute(),
        cache=cache,
        models=Path(env.get("TIERLINE_MODELS") or cache / "models").absolute(),
        log_level=level,
        supervised="SUPERVISOR_ENABLED" in env,
    )


def load_secret(home: Home, name: str, environ: Mapping[str, str] | None = None) -> str:
    """The secret `name`: the environment variable, else the file `<home>/secrets/<name>`. Raises SecretUnusableError.

    A file must belong to this user and be closed to all others. It may be changed while services run.
    """
    env = os.environ if environ is None else environ
    path = home.secrets / name
    where = f"the environment variable {name}"
    value = env.get(name)
    if not value:
        where = str(path)
        try:
            with path.open(encoding="ascii") as stream:
                status = os.fstat(stream.fileno())
                value = stream.read(8_192).strip()
        except FileNotFoundError as err:
            raise SecretUnusableError(
                f"there is no environment variable {name} and no file {path}: write the key into that file, chmod 600"
            ) from err
        except (OSError, UnicodeDecodeError) as err:
            raise SecretUnusableError(f"{path} cannot be read as one line of ASCII ({type(err).__name__})") from None
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise SecretUnusableError(f"others can read {path}: chmod 600 {path}")
        if status.st_uid != os.geteuid():
            raise SecretUnusableError(f"{path} belongs to uid {status.st_uid}, this process is uid {os.geteuid()}")
    if not _SECRET.fullmatch(value):
        raise SecretUnusableError(f"{where} holds no key: it must be one word of printable ASCII")
    return value
