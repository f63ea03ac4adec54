"""`personas`, `roles`: which there are, and what each has turned out to be worth, by the outcomes that memory has.

The hub says which personas exist and what has become of those that were made at run time; memory says what every
choice has earned in each kind of work. Without memory the lists come without values, and a note says so.
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
from services.ctl.commands import Commands, Context
from services.ctl.hub import connect
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
    parser = commands.add("roles", _roles, "list roles, their models, and what they are worth in each kind of work")
    parser.add_argument("name", nargs="?", metavar="NAME", help="this one only")


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


def _roles(args: Namespace, context: Context) -> ExitCode:
    screen, registry = context.screen, checked_registry(context.home, check_files=False)
    arms, why_not = asyncio.run(_ask_memory(context, "role"))
    names = [name for name in registry.roles if args.name in (None, name)]
    if not names:
        raise BadInput(f"the registry has no role {args.name!r}; it has: {', '.join(registry.roles)}")
    if screen.json:
        screen.document(
            [
                {
                    "name": name,
                    "model": registry.roles[name].model,
                    "description": registry.roles[name].description,
                    "escalates_to": registry.roles[name].escalates_to,
                    "values": _values_of(name, arms),
                }
                for name in names
            ]
        )
    else:
        rows = []
        for name in names:
            role = registry.roles[name]
            places = [arm for arm in arms if arm.choice == name]
            rows.append((name, role.model, "", *_worth(name, arms)[:2], one_line(role.description, 80)))
            rows += [("", "", _place(arm), *_figures(_of(arm)), f"{arm.mean_seconds:.1f} s") for arm in places]
        screen.table(("role", "model", "kind of work", "outcomes", "reward", ""), rows)
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


async def _ask_memory(context: Context, subject: str) -> tuple[list[ArmValue], str | None]:
    async with connect(context.home) as client:
        return await _arms(client, subject)


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
