"""Wiring of the planner: `python -m services.planner`."""

from __future__ import annotations

import asyncio
import sys

from services.kit.command_line import takes_no_arguments
from services.kit.config import load_home
from services.kit.registry import RegistryError, load_registry
from services.kit.service import Service
from services.planner.app import PlannerApp
from services.planner.labelled import BadRow, judge_of

SLOTS = 4  # planning mostly waits for other services


async def serve() -> int:
    home = load_home().make()
    try:
        # Model files are the business of those who load them.
        registry = load_registry(home.registry, home.models, check_files=False)
        judge = judge_of(home.labelled_requests)
    except (RegistryError, BadRow) as err:
        sys.stderr.write(f"planner: {err}\n")
        return 1
    service = Service(home, "planner", ("planner",), slots=SLOTS)
    PlannerApp(service, registry, judge)
    return await service.run()


def main() -> int:
    takes_no_arguments("planner", "Makes a plan of every objective, and new plans where one fails.")
    return asyncio.run(serve())


if __name__ == "__main__":
    sys.exit(main())
