"""`models load` and `models unload`: a warm or cold model into memory, or out of it, by name."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from protocol.messages.session import ModelReport
from services.ctl.commands import Context
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.screen import mebibytes
from services.kit.config import Home

_POLL_S: Final = 0.2
_DONE: Final = {"load": "loaded", "unload": "parked"}


def move_model(context: Context, action: str, name: str | None, *, wait_s: float) -> ExitCode:
    """Ask the hub, and wait until it is done. Raises BadInput, Unreachable, CommandError."""
    if name is None:
        raise BadInput(f"models {action}: say which model; `tierline models` lists them")
    if not wait_s >= 0:  # nor is "nan"
        raise BadInput(f"--wait {wait_s:g}: must be 0 or more")
    report = asyncio.run(_move(context.home, action, name, wait_s))
    if context.screen.json:
        context.screen.document(report)
    else:
        held = f", {mebibytes(report.held_bytes)} held" if report.held_bytes else ""
        context.screen.line(f"{name} is {report.state}{held}")
    return ExitCode.OK


async def _move(home: Home, action: str, name: str, wait_s: float) -> ModelReport:
    end = time.monotonic() + wait_s
    async with connect(home) as client:
        report = await (client.load_model(name) if action == "load" else client.unload_model(name))
        while report.state != _DONE[action] and wait_s > 0:
            if time.monotonic() > end:
                why = report.waiting or f"it is {report.state}; see: tierline status"
                raise CommandError(f"{name} is not {_DONE[action]} after {wait_s:g} s: {why}")
            await asyncio.sleep(_POLL_S)
            models = (await client.status(timeout_s=10)).models
            report = next((one for one in models if one.model == name), report)
    return report
