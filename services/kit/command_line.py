"""The command line of a service that takes no arguments: --help explains it, anything else is refused."""

from __future__ import annotations

import argparse


def takes_no_arguments(service: str, description: str) -> None:
    """Parse the command line of `python -m services.<service>`; ends the process with 0 after --help, 2 on an error."""
    argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=description,
        epilog="It takes no arguments: TIERLINE_HOME says where its stack lives, TIERLINE_REGISTRY its configuration.",
    ).parse_args()
