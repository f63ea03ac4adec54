"""Start the gates service: `python -m services.gates`. Stops with status 2 if the registry has an error."""

from __future__ import annotations

import asyncio
import sys

from services.gates.app import GateService
from services.kit.command_line import takes_no_arguments
from services.kit.config import load_home
from services.kit.registry import RegistryError, load_registry


def main() -> int:
    takes_no_arguments("gates", "Runs checks on artefacts in a sandbox.")
    home = load_home().make()
    try:
        registry = load_registry(home.registry, home.models, check_files=False)
    except RegistryError as err:
        sys.stderr.write(f"{err}\n")
        return 2
    return asyncio.run(_serve(GateService(home, registry)))


async def _serve(gates: GateService) -> int:
    try:
        return await gates.service.run(gates.load)
    finally:
        gates.close()


if __name__ == "__main__":
    sys.exit(main())
