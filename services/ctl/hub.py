"""Opens the client to this home's hub and turns its errors into the command's: unreachable, bad input, failed.

A connect over ZeroMQ to an address where nobody listens waits without a word, so the socket is tried first: a stopped
stack is reported at once, with the command that starts it.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from protocol.client import AsyncClient
from protocol.errors import BusError, CallFailed, CallRefused, DeadlineExceeded
from protocol.messages.failure import Category
from protocol.messages.session import StatusReport
from services.ctl.outcomes import BadInput, CommandError, Unreachable
from services.kit.config import Home

CLIENT: Final = "tierline"


def listening(home: Home) -> bool:
    """True when some process holds the hub's socket open; it may still be starting, or stuck."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(home.hub_address.removeprefix("ipc://"))
        except OSError:
            return False
    return True


@asynccontextmanager
async def connect(home: Home) -> AsyncIterator[AsyncClient]:
    """The client of a running stack. Raises Unreachable, and CommandError for what the hub answers instead."""
    if not listening(home):
        raise Unreachable(f"no hub answers at {home.hub_address}; start the stack with: tierline up")
    try:
        async with AsyncClient(home.hub_address, name=CLIENT) as client:
            yield client
    except CallFailed as err:
        failure = err.failure
        details = tuple(
            f"{item.file or item.artefact or ''}:{f'{item.line}:' if item.line else ''} {item.message}"
            for item in failure.findings
        )
        kind = BadInput if failure.category in (Category.POLICY, Category.SCHEMA) else CommandError
        raise kind(f"{failure.message} ({failure.code})", details=details) from err
    except CallRefused as err:
        raise Unreachable(str(err)) from err
    except DeadlineExceeded as err:
        raise Unreachable(f"the hub at {home.hub_address} does not answer: {err}; see: tierline status") from err
    except BusError as err:
        raise Unreachable(f"the connection to the hub failed: {err}; see: tierline status") from err


async def try_status(home: Home, *, timeout_s: float) -> StatusReport | None:
    """The hub's report, or None where it does not answer in time."""
    if not listening(home):
        return None
    try:
        async with AsyncClient(home.hub_address, name=CLIENT) as client:
            return await client.status(timeout_s=timeout_s)
    except BusError:
        return None
