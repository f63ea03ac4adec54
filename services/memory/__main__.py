"""`python -m services.memory`: wiring only."""

from __future__ import annotations

import asyncio
import sys

from services.kit.command_line import takes_no_arguments
from services.kit.config import load_home
from services.memory.app import FolderTaken, MemoryService
from services.memory.log import LogTooNew
from services.memory.log_rows import LogDamaged


def main() -> int:
    takes_no_arguments("memory", "Keeps episodes, decisions and their outcomes, and says what is known about them.")
    try:
        return asyncio.run(_serve())
    except (LogDamaged, LogTooNew, FolderTaken) as err:
        sys.stderr.write(f"memory: {err}\n")
        return 1


async def _serve() -> int:
    return await MemoryService(load_home().make()).run()


if __name__ == "__main__":
    sys.exit(main())
