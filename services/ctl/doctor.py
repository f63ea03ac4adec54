"""`doctor`: whether this machine and this home can run a stack, one line per check with what to do about it.

Checks look and change nothing. `fail` means that `tierline up` or a task would not work, `warn` that it would, but
worse than it could. Each check is a function that yields results, so that one of them may report on several models.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import psutil

from services.ctl.commands import Commands, Context
from services.ctl.hardware import show_hardware
from services.ctl.hub import listening
from services.ctl.launch_view import looked_at
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import mebibytes
from services.ctl.stack import stray_processes
from services.ctl.supervisor import CONFIG, Supervisor, SupervisorGone, SupervisorStuck
from services.gates.sandbox import Sandbox
from services.kit.config import Home, SecretUnusableError, load_secret
from services.kit.hardware import detect
from services.kit.registry import ModelEntry, Registry, RegistryError, load_registry
from services.kit.registry.memory import largest_guest, memory_needs, resident_floor

MAX_SOCKET_PATH_BYTES: Final = 107
"""Linux keeps a unix socket's path in 108 bytes, the last of them zero."""
LONGEST_SOCKET: Final = "supervisor.sock.4194304"
"""supervisord binds this name first (its pid appended) and links it afterwards."""

_MIN_DISK_BYTES: Final = 200 * 1024**2
_GOOD_DISK_BYTES: Final = 2 * 1024**3

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One result."""

    name: str
    verdict: Verdict
    message: str
    advice: str = ""
    """What to do; empty for `ok`."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the checks look at; no registry where it could not be read."""

    home: Home
    registry: Registry | None
    registry_problems: tuple[str, ...]


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "doctor", _doctor, "check this machine: tools, engine, models, memory, sandbox, folders, leftovers"
    )
    parser.add_argument(
        "--detect", action="store_true", help="print registry/hardware.yaml as this machine would fill it"
    )
    parser.add_argument("--write", action="store_true", help="with --detect: write it; comments stay")


def _doctor(args: Namespace, context: Context) -> ExitCode:
    if args.write and not args.detect:
        raise BadInput("--write belongs to --detect: it writes what is detected")
    if args.detect:
        return show_hardware(context, write=args.write)
    checks = run_checks(context.home)
    failed = any(check.verdict == "fail" for check in checks)
    if context.screen.json:
        context.screen.document({"healthy": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(c.verdict, c.name, c.message + (f"; {c.advice}" if c.advice else "")) for c in checks]
        context.screen.table(("verdict", "check", "what was found, and what to do"), rows)
    return ExitCode.FAILED if failed else ExitCode.OK


def run_checks(home: Home) -> list[Check]:
    """All checks, in the order of the list below."""
    registry: Registry | None = None
    problems: tuple[str, ...] = ()
    try:
        registry = load_registry(home.registry, home.models, check_files=False)
    except RegistryError as err:
        problems = tuple(str(problem) for problem in err.problems)
    scene = Scene(home, registry, problems)
    return [result for check in CHECKS for result in check(scene)]


def _python(_scene: Scene) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  started with another Python than the one it was installed for
        yield Check("python", "fail", f"{version}", "install Python 3.11 or newer and call deploy/setup")
    else:
        yield Check("python", "ok", f"{version} at {sys.executable}")


def _user(_scene: Scene) -> Iterator[Check]:
    if os.geteuid() == 0:
        advice = "see 'Running as a service user' in deploy/README.md"
        yield Check("user", "warn", "you are root, and so will be the services", advice)
    else:
        yield Check("user", "ok", f"uid {os.geteuid()}")


def _registry(scene: Scene) -> Iterator[Check]:
    if scene.registry is None:
        count = len(scene.registry_problems)
        yield Check("registry", "fail", f"{count} problems, the first: {scene.registry_problems[0]}", "repair it")
        return
    yield Check("registry", "ok", f"{scene.home.registry}: {len(scene.registry.models)} models")
    for note in scene.registry.notes:
        yield Check("registry", "warn", str(note), "worth a look, it stops nothing")


def _models(scene: Scene) -> Iterator[Check]:
    for model in _entries(scene):
        if model.path is None:
            continue
        if not model.path.is_file():
            yield Check(f"model {model.name}", "fail", f"{model.path} is missing", "call deploy/fetch-model")
        else:
            yield Check(f"model {model.name}", "ok", f"{model.path.name}, {mebibytes(model.path.stat().st_size)}")


def _engines(scene: Scene) -> Iterator[Check]:
    embedded = find_spec("xllamacpp") is not None
    for model in _entries(scene):
        if model.tier == "D":
            continue  # loaded by the engine of the model that it guesses for
        name, binary = f"engine {model.name}", _native_binary(model, scene.home)
        if model.engine == "noop":
            yield Check(name, "ok", "noop: answers at once, without a model")
        elif model.engine == "openai":
            yield _remote(name, model, scene.home)
        elif binary is not None and model.engine in ("auto", "llama-server"):
            yield Check(name, "ok", f"llama-server at {binary}")
        elif embedded and model.engine in ("auto", "embedded"):
            yield Check(name, "ok", "embedded llama.cpp (xllamacpp)")
        elif model.engine == "llama-server":
            yield Check(name, "fail", "no llama-server is found", "call deploy/build-native, or use engine: auto")
        else:
            yield Check(name, "fail", "no llama.cpp is found", "call deploy/setup; it installs xllamacpp")


def _remote(name: str, model: ModelEntry, home: Home) -> Check:
    """Whether its key is there; whether the server answers shows in `tierline status`."""
    if model.api_key_env is not None:
        try:
            load_secret(home, model.api_key_env)
        except SecretUnusableError as err:
            return Check(name, "fail", str(err), "its calls would be refused")
    return Check(name, "ok", f"{model.remote_model} at {model.base_url}")


def _commands(scene: Scene) -> Iterator[Check]:
    """What a service would refuse at its start: flags that the binary lacks, and what the file does not allow."""
    if scene.registry is None:
        return
    for name, model in scene.registry.served.items():
        if model.path is None or not model.path.is_file():
            continue
        launch, engine, refusals = looked_at(scene.registry.launch(name), scene.home)
        if refusals:
            yield Check(f"command {name}", "fail", "; ".join(refusals), f"tierline models --explain {name}")
        else:
            need = launch.memory_bytes()
            memory = "" if need is None else f"; it needs {mebibytes(need)} with its KV cache"
            yield Check(f"command {name}", "ok", f"{engine.name} knows its flags, its file allows them{memory}")


def _native_binary(model: ModelEntry, home: Home) -> Path | None:
    if model.binary is not None:
        return model.binary if os.access(model.binary, os.X_OK) else None
    built = home.cache / "native" / "current" / "bin" / "llama-server"
    if os.access(built, os.X_OK):
        return built
    found = shutil.which("llama-server")
    return Path(found) if found else None


def _cores(scene: Scene) -> Iterator[Check]:
    machine = detect()
    threads = sum(model.threads for model in _entries(scene) if model.is_local)
    message = f"{machine.cores} usable in {len(machine.nodes)} NUMA node(s), the models want {threads} threads together"
    if scene.registry is not None and scene.registry.hardware.cores > machine.cores:
        wanted = f"hardware.yaml counts on {scene.registry.hardware.cores}; {message} ({machine.cores_bound})"
        yield Check("cores", "warn", wanted, "tierline doctor --detect --write")
    elif machine.cores < 2:
        yield Check("cores", "warn", message, "services and models share one core: expect long waits")
    else:
        yield Check("cores", "ok", message)


def _memory(scene: Scene) -> Iterator[Check]:
    memory = psutil.virtual_memory()
    models = _entries(scene)
    needs = memory_needs({model.name: model for model in models})
    guest = largest_guest(models, needs)
    staying = resident_floor(models, needs)
    needed = staying + (needs[guest] if guest is not None else 0)
    beside = f" and the largest that comes and goes ({guest})" if guest is not None else ""
    message = (
        f"{mebibytes(memory.available)} available of {mebibytes(memory.total)}; models that stay{beside} need about "
        f"{mebibytes(needed)}"
    )
    budget = scene.registry.hardware.memory_bytes if scene.registry is not None else memory.total
    if needed > budget:
        advice = "raise memory_bytes in hardware.yaml, make a hot model warm, or take a smaller one"
        yield Check("memory", "fail", f"{message}, the budget is {mebibytes(budget)}", advice)
    elif budget > memory.total:
        advice = "lower memory_bytes in hardware.yaml to what the machine has"
        yield Check("memory", "warn", f"{message}; the budget of {mebibytes(budget)} is more than there is", advice)
    elif needed > memory.total:
        yield Check("memory", "fail", message, "take smaller models, or fewer entries in models.yaml")
    elif needed > memory.available and not listening(scene.home):
        yield Check("memory", "warn", message, "end other programs, or the models will be slow to load")
    else:
        yield Check("memory", "ok", message)


def _disk(scene: Scene) -> Iterator[Check]:
    folder = next(path for path in [scene.home.root, *scene.home.root.parents] if path.exists())
    free = shutil.disk_usage(folder).free
    message = f"{mebibytes(free)} free at {folder}"
    if free < _MIN_DISK_BYTES:
        yield Check("disk", "fail", message, "the journal needs room: free some, or set TIERLINE_HOME elsewhere")
    elif free < _GOOD_DISK_BYTES:
        yield Check("disk", "warn", message, "a model or a native build may not fit")
    else:
        yield Check("disk", "ok", message)


def _home(scene: Scene) -> Iterator[Check]:
    root, run = scene.home.root, scene.home.run
    if not root.exists():
        above = next(path for path in root.parents if path.exists())
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
            yield Check("home", "ok", f"{root} does not exist yet; 'tierline up' makes it")
        else:
            yield Check("home", "fail", f"{root} cannot be made in {above}", "set TIERLINE_HOME to another folder")
        return
    if not root.is_dir():
        yield Check("home", "fail", f"{root} is no folder", "set TIERLINE_HOME to another one")
        return
    status = root.stat()
    if status.st_uid != os.geteuid():
        yield Check("home", "fail", f"{root} belongs to uid {status.st_uid}", "use the user that owns it")
    elif not os.access(root, os.W_OK | os.X_OK):
        yield Check("home", "fail", f"{root} cannot be written", f"chmod u+rwx {root}")
    elif run.exists() and stat.S_IMODE(run.stat().st_mode) & 0o077:
        yield Check("home", "fail", f"others can enter {run} and reach the bus", f"chmod 700 {run}")
    else:
        yield Check("home", "ok", str(root))


def _socket_path(scene: Scene) -> Iterator[Check]:
    length = len(os.fsencode(scene.home.run / LONGEST_SOCKET))
    message = f"{length} of {MAX_SOCKET_PATH_BYTES} bytes for the longest socket path"
    if length > MAX_SOCKET_PATH_BYTES:
        yield Check("socket path", "fail", message, "set TIERLINE_HOME to a shorter path")
    else:
        yield Check("socket path", "ok", message)


def _sandbox(scene: Scene) -> Iterator[Check]:
    reason = asyncio.run(Sandbox([scene.home.root]).probe())
    if reason is None:
        yield Check("sandbox", "ok", "bubblewrap works here")
    else:
        advice = "gates that run code will refuse; install bubblewrap, or allow user namespaces"
        yield Check("sandbox", "fail", reason, advice)


def _gate_tools(scene: Scene) -> Iterator[Check]:
    """A gate whose tool is not here never passes, so it is better known before a step asks for it."""
    if scene.registry is None:
        return
    sandbox = Sandbox([scene.home.root])
    programs = {gate.name: gate.argv[0] for gate in scene.registry.gates.values() if gate.argv}
    named = {name: program for name, program in programs.items() if not program.startswith("{")}
    missing = [f"{name} ({program})" for name, program in named.items() if sandbox.find(program) is None]
    if missing:
        advice = "install them, or take these gates out of registry/gates.yaml"
        yield Check("gate tools", "warn", f"gates without their tool: {', '.join(missing)}", advice)
    else:
        yield Check("gate tools", "ok", f"the tools of {len(programs)} gates are here")


def _tools(_scene: Scene) -> Iterator[Check]:
    missing = [name for name in ("ruff", "pytest", "supervisor") if find_spec(name) is None]
    if missing:
        yield Check("tools", "fail", f"not installed: {', '.join(missing)}", "call deploy/setup")
    elif not CONFIG.is_file():
        yield Check("tools", "fail", f"{CONFIG} is missing", "'tierline up' works from a checkout of the project")
    else:
        yield Check("tools", "ok", "ruff, pytest, supervisor")


def _leftovers(scene: Scene) -> Iterator[Check]:
    """A lock or socket file without its process is removed at the next start; a process without supervisor is not."""
    try:
        pid = Supervisor(scene.home).pid()
    except SupervisorStuck as err:
        yield Check("leftovers", "fail", str(err), "tierline down")
        return
    except SupervisorGone:
        left = stray_processes(scene.home)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            yield Check("leftovers", "fail", f"processes of this home without supervisord: {pids}", "tierline down")
            return
        run = scene.home.run
        stale = [name for name in ("supervisord.pid", "supervisor.sock") if (run / name).exists()]
        if stale and not listening(scene.home):
            advice = "no harm: the next 'tierline up' replaces them"
            yield Check("leftovers", "warn", f"stale in {run}: {', '.join(stale)}", advice)
            return
        yield Check("leftovers", "ok", "none; the stack is stopped")
        return
    if listening(scene.home):
        yield Check("leftovers", "ok", f"none; the stack runs under supervisord {pid}")
    else:
        advice = "tierline tail scheduler; tierline status"
        yield Check("leftovers", "warn", f"supervisord {pid} runs, but no hub listens", advice)


def _entries(scene: Scene) -> list[ModelEntry]:
    return list(scene.registry.models.values()) if scene.registry is not None else []


CHECKS: Final[tuple[Callable[[Scene], Iterator[Check]], ...]] = (
    _python,
    _user,
    _tools,
    _home,
    _socket_path,
    _disk,
    _memory,
    _cores,
    _registry,
    _models,
    _engines,
    _commands,
    _sandbox,
    _gate_tools,
    _leftovers,
)
