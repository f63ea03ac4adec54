"""`personas`, `roles`: which there are, and what each has turned out to be worth, by the outcomes that memory has.

The hub says which personas exist and what has become of those that were made at run time; memory says what every
choice has earned in each kind of work. Without memory the lists come without values, and a note says so. Roles are
listed without a stack, too.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Final

from protocol.client import AsyncClient
from protocol.errors import BusError
from protocol.messages.memory import Arms, ArmValue, MemoryRequest
from protocol.messages.persona import NO_PERSONA, PersonaView
from protocol.messages.session import StatusReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import connect, try_status
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import Screen, one_line
from services.ctl.stack_files import checked_registry
from services.kit.expectation import Expectation, expected

_MEMORY_TIMEOUT_S: Final = 5.0


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "personas",
        _personas,
        "list personas, what they are worth, and what has become of those made at run time",
        epilog=(
            "states: registered = declared in personas.yaml; trial = made at run time, its outcomes are counted;\n"
            "adopted = it has earned a place in personas.yaml; dropped = it has not. The policy: learning.yaml, trials."
        ),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="this one only, with its prompt and every kind of work")
    commands.add("roles", _roles, "list the roles with model, state, and what each has turned out to be worth")


def _personas(args: Namespace, context: Context) -> ExitCode:
    screen = context.screen
    views, arms, why_not = asyncio.run(_ask_personas(context))
    if args.name is not None:
        views = [view for view in views if view.name == args.name]
        if not views:
            raise BadInput(f"there is no persona {args.name!r}; `tierline personas` lists them")
    if screen.json:
        screen.document(
            [view.model_dump(mode="json") | {"values": _values_of(view.name, arms)} for view in views]
            + ([] if args.name else [{"name": NO_PERSONA, "values": _values_of(NO_PERSONA, arms)}])
        )
    elif args.name is not None:
        _one_persona(screen, views[0], arms)
    else:
        rows: list[tuple[str, ...]] = [(v.name, v.state, *_worth(v.name, arms), _said(v)) for v in views]
        rows.append((NO_PERSONA, "", *_worth(NO_PERSONA, arms), "steps without any persona"))
        screen.table(("persona", "state", "outcomes", "reward", "best in", "why"), rows)
    _note(screen, why_not)
    return ExitCode.OK


def _roles(_args: Namespace, context: Context) -> ExitCode:
    screen, registry = context.screen, checked_registry(context.home, check_files=False)
    report, arms, why_not = asyncio.run(_ask_roles(context))
    peers = {} if report is None else {peer.service: peer.state for peer in report.peers}
    states = {name: peers.get(f"inference-{name}", "not running") for name in registry.models}
    chains = {name: [above.name for above in registry.escalation_chain(name)] for name in registry.roles}
    if screen.json:
        screen.document(
            {
                "digest": registry.digest,
                "roles": [
                    {
                        **role.model_dump(mode="json"),
                        "state": states[role.model],
                        "escalation": chains[role.name],
                        "values": _values_of(role.name, arms),
                    }
                    for role in registry.roles.values()
                ],
            }
        )
    else:
        screen.table(
            ("role", "model", "state", "outcomes", "reward", "best in", "max tokens", "timeout", "escalates to", "for"),
            [
                (
                    role.name,
                    role.model,
                    states[role.model],
                    *_worth(role.name, arms),
                    str(role.max_tokens),
                    f"{role.timeout_s:g} s",
                    " -> ".join(chains[role.name]),
                    one_line(role.description, 80),
                )
                for role in registry.roles.values()
            ],
        )
    _note(screen, why_not)
    return ExitCode.OK


def _one_persona(screen: Screen, view: PersonaView, arms: Sequence[ArmValue]) -> None:
    screen.line(f"{view.name}: {view.state}")
    screen.line(view.description)
    if view.why:
        screen.line(f"why: {view.why}")
    if view.made_by:
        screen.line(f"made by {view.made_by}{f' for task {view.task_id}' if view.task_id else ''}")
    screen.line(f"roles: {', '.join(view.roles) or 'any'}; types of task: {', '.join(view.task_types) or 'any'}")
    screen.heading("prompt")
    screen.line(view.prompt)
    screen.heading("what it has earned")
    own = [arm for arm in arms if arm.choice == view.name]
    if not own:
        screen.line("no outcome yet")
        return
    others = {
        (arm.task_type, arm.cluster): [
            one for one in arms if _place(one) == _place(arm) and one.choice != view.name and one.outcomes
        ]
        for arm in own
    }
    screen.table(
        ("kind of work", "outcomes", "reward", "seconds", "others there"),
        [
            (
                _place(arm),
                *_figures(_of(arm)),
                f"{arm.mean_seconds:.1f}",
                ", ".join(f"{one.choice} {_of(one).mean:.2f}" for one in others[arm.task_type, arm.cluster]),
            )
            for arm in own
        ],
    )


async def _ask_personas(context: Context) -> tuple[list[PersonaView], list[ArmValue], str | None]:
    async with connect(context.home) as client:
        views = await client.personas()
        return views, *await _arms(client, "persona")


async def _ask_roles(context: Context) -> tuple[StatusReport | None, list[ArmValue], str | None]:
    """The hub's report and what memory knows; neither is needed to list roles."""
    report = await try_status(context.home, timeout_s=3.0)
    if report is None:
        return None, [], None
    async with connect(context.home) as client:
        return report, *await _arms(client, "role")


async def _arms(client: AsyncClient, subject: str) -> tuple[list[ArmValue], str | None]:
    """What memory knows, and why it knows nothing."""
    try:
        answer = await client.memory(MemoryRequest(ask=Arms(subject=subject)), timeout_s=_MEMORY_TIMEOUT_S)
    except BusError as err:
        return [], str(err)
    return answer.arms, None


def _note(screen: Screen, why_not: str | None) -> None:
    if why_not is not None:
        screen.note(f"memory does not answer, so there are no values: {why_not}")


def _said(view: PersonaView) -> str:
    return one_line(view.why or view.description, 160)


def _worth(name: str, arms: Sequence[ArmValue]) -> tuple[str, str, str]:
    """Outcomes, reward, and the kind of work in which it does best."""
    own = [arm for arm in arms if arm.choice == name and arm.outcomes]
    if not own:
        return "0", "", ""
    together = expected(sum(arm.outcomes for arm in own), sum(arm.outcomes * arm.mean_reward for arm in own))
    best = max(own, key=lambda arm: _of(arm).bounds(1)[0])
    return *_figures(together), f"{_place(best)} {_of(best).mean:.2f}"


def _figures(expectation: Expectation) -> tuple[str, str]:
    return str(expectation.outcomes), f"{expectation.mean:.2f} ± {expectation.deviation:.2f}"


def _of(arm: ArmValue) -> Expectation:
    return expected(arm.outcomes, arm.outcomes * arm.mean_reward)


def _place(arm: ArmValue) -> str:
    return f"{arm.task_type}/{arm.cluster or 'any'}"


def _values_of(name: str, arms: Sequence[ArmValue]) -> list[dict[str, Any]]:
    return [arm.model_dump(mode="json", exclude={"choice", "prompt"}) for arm in arms if arm.choice == name]
