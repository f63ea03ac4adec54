"""Starts the hub: `python -m services.scheduler`. Exit 2 = the registry or the address cannot be used."""

import sys

from protocol.errors import AddressTaken
from protocol.zmq_transport import ZmqRouter
from services.kit.command_line import takes_no_arguments
from services.kit.config import load_home
from services.kit.registry import RegistryError, load_registry
from services.scheduler.app import HubApp
from services.scheduler.journal_file import JournalVersionError


def main() -> int:
    takes_no_arguments("scheduler", "The hub of the bus: routes every call, owns every task, runs the graphs.")
    home = load_home().make()
    try:
        # Whether model files exist concerns the inference services, not the hub.
        registry = load_registry(home.registry, home.models, check_files=False)
        app = HubApp(home, registry, ZmqRouter(home.hub_address))
    except (RegistryError, AddressTaken, JournalVersionError, ValueError) as err:
        sys.stderr.write(f"scheduler: {err}\n")
        return 2
    return app.run()


if __name__ == "__main__":
    sys.exit(main())
