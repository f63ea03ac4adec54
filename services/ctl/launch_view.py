"""`models --explain NAME`: the command that serves a model, where each flag comes from, and what would forbid it.

The command, the rules and the check of the binary are those of the inference service itself; nothing is started but
`--help` of the binary. Neither the files nor a binary need be there: what is declared counts then, and a note says so.
"""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from services.ctl.commands import Context
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.prefix_room import room_notes
from services.ctl.screen import Screen, mebibytes
from services.inference.command_line import Argument, Mode, arguments, modes_of
from services.inference.engines import Engine, EngineUnusable, NativeEngine, NoLlamaServer, choose_engine
from services.kit.config import Home
from services.kit.gguf_facts import read_facts
from services.kit.gguf_header import BadHeader
from services.kit.model_facts import ModelFacts
from services.kit.registry import ModelEntry, Registry
from services.kit.registry.constraints import violations
from services.kit.registry.launch import Launch, declared_facts

_NOT_HERE: Final = Path("llama-server")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag for people and programs."""

    flag: str
    value: str | None
    modes: tuple[str, ...]
    """Processes that get it: plain, speculating."""
    field: str | None
    """Field of models.yaml; None = the same for every model."""
    where: str | None
    """File and line, of the entry where the field is left to its default."""
    default: bool
    rule: str


def explain_launch(name: str, registry: Registry, context: Context) -> ExitCode:
    """Print how one model is started. FAILED where it would be refused; raises BadInput for an unknown name."""
    if name not in registry.served:
        raise BadInput(f"there is no served model {name!r}, but {', '.join(registry.served)}")
    entry = registry.models[name]
    if entry.path is None:
        raise BadInput(f"{name} has engine {entry.engine}, which starts no llama.cpp")
    served = replace(registry.launch(name), prefix_folder=context.home.prefixes(name))
    launch, engine, refusals, absent = _looked_at(served, context.home)
    notes = [] if absent is None else [f"the flags were not checked against a binary: {absent}"]
    notes += room_notes([launch], context.home)
    modes = modes_of(launch)
    commands = {mode.value: engine.command(launch, launch.entry.port, mode) for mode in modes}
    flags = _flags(launch, modes, engine)
    if context.screen.json:
        context.screen.document(
            {
                "model": name,
                "engine": engine.name,
                "build": sorted(engine.build),
                "commands": commands,
                "flags": [asdict(flag) for flag in flags],
                "facts": _facts(launch),
                "notes": notes,
                "refusals": refusals,
            }
        )
    else:
        _print(context.screen, launch, engine, commands, flags, notes, refusals)
    return ExitCode.FAILED if refusals else ExitCode.OK


def looked_at(launch: Launch, home: Home) -> tuple[Launch, Engine, list[str]]:
    """The launch with the facts of its files, the engine that would serve it, and every reason why it would not."""
    launch, engine, refusals, absent = _looked_at(launch, home)
    return launch, engine, refusals if absent is None else [absent, *refusals]


def _looked_at(launch: Launch, home: Home) -> tuple[Launch, Engine, list[str], str | None]:
    """As `looked_at`, with what is to be done where no llama-server is installed as a part of its own."""
    launch, refusals = _with_facts(launch)
    absent = None
    try:
        engine = choose_engine(launch.entry, home)
        asyncio.run(engine.check(launch))
    except NoLlamaServer as err:
        engine, absent = NativeEngine(_NOT_HERE), str(err)  # which takes every flag
    except EngineUnusable as err:
        refusals.append(str(err))
    refusals += [str(problem) for problem in violations(launch, engine.build or None)]
    return launch, engine, refusals, absent


def _with_facts(launch: Launch) -> tuple[Launch, list[str]]:
    refusals: list[str] = []
    found = [None if entry is None else _entry_facts(entry, refusals) for entry in (launch.entry, launch.draft)]
    return (launch if found[0] is None else launch.with_facts(found[0], found[1])), refusals


def _entry_facts(entry: ModelEntry, refusals: list[str]) -> ModelFacts | None:
    """From the file, else as declared: a command can be looked at on a machine that does not have the model."""
    if entry.path is None:
        return None
    try:
        return read_facts(entry.path)
    except BadHeader as err:
        refusals.append(f"{entry.path} is damaged: {err}; fetch the file again")
        return None
    except OSError as err:
        if entry.declared is not None:
            return declared_facts(entry.declared)
        refusals.append(f"cannot open the model file {entry.path}: {err.strerror}")
        return None


def _flags(launch: Launch, modes: tuple[Mode, ...], engine: Engine) -> list[Flag]:
    wanted: dict[Argument, list[str]] = {}
    for mode in modes:
        for argument in arguments(launch, launch.entry.port, mode):
            wanted.setdefault(argument, []).append(mode.value)
    told = {argument: found for argument, found in wanted.items() if engine.spelling(argument)}
    flags = [_flag(launch, argument, tuple(found), engine) for argument, found in told.items()]
    if launch.core_text is not None:
        field = "numa.cores" if launch.entry.numa.cores is not None else "numa.nodes"
        where, words = launch.where(field), tuple(mode.value for mode in modes)
        rule = "bound to these cores: memory near to them, and none that may compute meanwhile is bound there too"
        flags.insert(0, Flag("taskset --cpu-list", launch.core_text, words, field, where, False, rule))
    return flags


def _flag(launch: Launch, argument: Argument, modes: tuple[str, ...], engine: Engine) -> Flag:
    way = engine.spelling(argument)
    value = " ".join(way[1:]) or None
    if not argument.field:
        return Flag(way[0], value, modes, None, None, False, argument.rule)
    owner = launch.draft if argument.of_draft and launch.draft is not None else launch.entry
    path = ("models", owner.name, *argument.field.split("."))
    default = path not in launch.document.lines
    field = f"{owner.name}.{argument.field}"
    return Flag(way[0], value, modes, field, launch.where(argument.field, owner.name), default, argument.rule)


def _facts(launch: Launch) -> dict[str, Any] | None:
    facts, entry = launch.facts, launch.entry
    if facts is None:
        return None
    caches = facts.kv_bytes(entry.context_tokens, entry.slots, entry.kv_type_k, entry.kv_type_v, entry.ubatch_tokens)
    return {
        "architecture": facts.architecture,
        "parameters_b": round(facts.parameters_b, 3),
        "context_tokens": facts.context_tokens,
        "vocabulary_tokens": facts.vocabulary_tokens,
        "experts_trained": facts.experts_trained,
        "experts_total": facts.experts_total,
        "recurrent": facts.recurrent,
        "file_bytes": facts.file_bytes,
        "kv_bytes": caches,
        "memory_bytes": launch.memory_bytes(),
    }


def _print(
    screen: Screen,
    launch: Launch,
    engine: Engine,
    commands: dict[str, list[str]],
    flags: list[Flag],
    notes: list[str],
    refusals: list[str],
) -> None:
    build = f", build {' = '.join(sorted(engine.build))}" if engine.build else ""
    screen.line(f"{launch.entry.name}: engine {engine.name}{build}")
    facts = _facts(launch)
    if facts is not None:
        kind = f"{facts['experts_trained']} of {facts['experts_total']} experts" if facts["experts_total"] else "dense"
        screen.line(
            f"{facts['architecture']}, {facts['parameters_b']}B, {kind}; "
            f"memory {mebibytes(facts['memory_bytes'])}: file {mebibytes(facts['file_bytes'])}, "
            f"KV cache {mebibytes(facts['kv_bytes'])}" + (", and its draft" if launch.draft else "")
        )
    for mode, command in commands.items():
        screen.heading(mode)
        screen.line(shlex.join(command))
    screen.heading("flags")
    screen.table(
        ("flag", "value", "from", "mode", "rule"),
        [
            (
                flag.flag,
                flag.value or "",
                f"{flag.where} {flag.field}{' (default)' if flag.default else ''}" if flag.where else "",
                "" if len(flag.modes) == len(commands) else ", ".join(flag.modes),
                flag.rule,
            )
            for flag in flags
        ],
    )
    for note in notes:
        screen.line(f"note: {note}", style="yellow")
    for refusal in refusals:
        screen.line(f"refused: {refusal}", style="red")
