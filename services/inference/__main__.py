"""Wiring of one inference process: `python -m services.inference --model NAME`.

Exit status: 0 after a drain, 1 if the service broke, 2 if the registry or the name is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys

from services.inference.app import InferenceService, service_name
from services.kit.clock import SteadyClock
from services.kit.config import load_home
from services.kit.logs import Log, LogEvent
from services.kit.registry import RegistryError, load_registry, past_registries

LAUNCH_REFUSED = LogEvent("launch.refused", "reason", "error")
_SAFE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.inference", description="Serves one model entry.")
    parser.add_argument("--model", required=True, help="name of an entry in models.yaml")
    name = parser.parse_args().model
    if not _SAFE_NAME.fullmatch(name):
        parser.error(f"{name!r} is no name of a model: small letters, digits, '-' and '_'")  # exits with 2
    home = load_home().make()
    try:
        # Files are checked at every launch of the engine: a missing one is DEGRADED, and cured without a restart.
        registry = load_registry(home.registry, home.models, check_files=False)
    except RegistryError as err:
        return _refuse(Log(home.logs, service_name(name), SteadyClock()), f"the registry is refused:\n{err}")
    if name not in registry.models:
        # Removed by a reload, but running tasks may use it still: as it was, until the hub says that none does.
        past = past_registries(home.registry_copies, home.models)
        registry = next((old for old in past if name in old.models), registry)
    if name not in registry.models:
        known = ", ".join(registry.models)
        reason = f"models.yaml has no entry {name!r}; it has: {known}"
        return _refuse(Log(home.logs, service_name(name), SteadyClock()), reason)
    if name not in registry.served:
        where = f"{registry.launch(name).where('tier')}: {name} is of tier D"
        reason = f"{where}: a draft is loaded by the process of the model that it guesses for, and has none of its own"
        return _refuse(Log(home.logs, service_name(name), SteadyClock()), reason)
    return asyncio.run(InferenceService(home, registry, registry.launch(name)).run())


def _refuse(log: Log, reason: str) -> int:
    log.write(LAUNCH_REFUSED, reason=reason)
    sys.stderr.write(f"{reason}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
