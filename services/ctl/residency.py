"""`models load` and `models unload`: a warm or cold model into memory, or out of it, by name.

A model that cannot be loaded is tried again by its service, for as long as it is wanted. Its reason is shown here as
soon as there is one, and it is waited for only until it must have been tried again in vain.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from protocol.messages.session import ModelReport, StatusReport
from services.ctl.commands import Context
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.screen import mebibytes
from services.inference.machine import BACKOFF_MS

GRACE_S: Final = BACKOFF_MS[-1] / 1000 + 10.0
"""How long a degraded model is waited for: longer than the longest pause before its service tries again, so that a file
that was repaired just before the command is not judged by what was wrong with it."""
_POLL_S: Final = 0.2
_DONE: Final = {"load": "loaded", "unload": "parked"}


def move_model(context: Context, action: str, name: str | None, *, wait_s: float) -> ExitCode:
    """Ask the hub, and wait until it is done. Raises BadInput, Unreachable, CommandError."""
    if name is None:
        raise BadInput(f"models {action}: say which model; `tierline models` lists them")
    if not wait_s >= 0:  # nor is "nan"
        raise BadInput(f"--wait {wait_s:g}: must be 0 or more")
    report = asyncio.run(_move(context, action, name, wait_s))
    if context.screen.json:
        context.screen.document(report)
    else:
        held = f", {mebibytes(report.held_bytes)} held" if report.held_bytes else ""
        context.screen.line(f"{name} is {report.state}{held}")
    return ExitCode.OK


async def _move(context: Context, action: str, name: str, wait_s: float) -> ModelReport:
    end = time.monotonic() + wait_s
    degraded_s: float | None = None
    why: str | None = None
    async with connect(context.home) as client:
        report = await (client.load_model(name) if action == "load" else client.unload_model(name))
        while report.state != _DONE[action] and wait_s > 0:
            if time.monotonic() > end:
                now_it_is = report.waiting or f"it is {report.state}; see: tierline status"
                said = now_it_is if why is None else f"{why} (now {report.state})"
                raise CommandError(f"{name} is not {_DONE[action]} after {wait_s:g} s: {said}")
            await asyncio.sleep(_POLL_S)
            status = await client.status(timeout_s=10)
            report = next((one for one in status.models if one.model == name), report)
            if action != "load" or report.state != "degraded":
                continue
            if why != (now := _reason(status, name)):
                why = now
                context.screen.note(f"{name} is degraded: {why}")
            degraded_s = degraded_s or time.monotonic()
            if time.monotonic() - degraded_s > GRACE_S:
                raise CommandError(
                    f"{name} was not loaded within {GRACE_S:g} s of its first failure: {why}. Repair what it names; it "
                    "is tried again by itself"
                )
    return report


def _reason(status: StatusReport, name: str) -> str:
    """What the service of a model says about it."""
    service = f"inference-{name}"
    said = next((peer.reason for peer in status.peers if peer.service == service), None)
    return said or f"it does not say why; see: tierline tail {service}"
