"""What entries must agree on between each other, with the machine, and with the files on its disk.

Each rule is a function from what was read to problems, and `ERRORS` and `NOTES` list them: an error refuses the launch,
a note is only shown. The rules read sizes and the first bytes of model files; they change nothing. What makes a model
faster, and what the metadata of its file says to that, is checked by `launch_rules`.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final, TypeAlias

from protocol.messages.failure import Category
from services.kit.gguf_header import MAGIC, opened, parts_of
from services.kit.hardware import parse_cores
from services.kit.model_facts import ModelFacts
from services.kit.registry.entries import (
    LISTS,
    PLACEHOLDERS,
    TARGETS,
    FailureCaps,
    FailureRule,
    GateEntry,
    Hardware,
    HardwareEntry,
    ModelEntry,
    PersonaEntry,
    RoleEntry,
)
from services.kit.registry.memory import largest_guest, memory_needs, resident_floor
from services.kit.registry.problems import Problem
from services.kit.registry.remote_rules import remote_entries, remote_sampling
from services.kit.registry.sections import Draft

#: Outcomes that say nothing about a model's answer: learning from them, or asking a stronger model, would be wrong.
NEVER_QUALITY: Final = frozenset({Category.PEER, Category.RESOURCE})


@dataclass(frozen=True, slots=True)
class Scene:
    """All that the rules look at."""

    draft: Draft
    hardware: Hardware
    models_folder: Path
    check_files: bool
    facts: Mapping[str, ModelFacts] = field(default_factory=dict)
    """What is known of each model's file, or declared, by the name of the entry."""

    @property
    def models(self) -> dict[str, ModelEntry]:
        """The valid model entries."""
        return self.draft.valid("models", ModelEntry)

    @property
    def roles(self) -> dict[str, RoleEntry]:
        """The valid role entries."""
        return self.draft.valid("roles", RoleEntry)

    @property
    def gates(self) -> dict[str, GateEntry]:
        """The valid gate entries."""
        return self.draft.valid("gates", GateEntry)


Rule: TypeAlias = Callable[[Scene], Iterator[Problem]]


def resolved_path(model: ModelEntry, models_folder: Path) -> Path | None:
    """Return the absolute path of a model's file, or None for engine noop. The file need not exist."""
    return None if model.path is None else (models_folder / model.path.expanduser()).absolute()


def loaded_models(models: Mapping[str, ModelEntry]) -> dict[str, ModelEntry]:
    """The entries whose files a process here loads; a draft only where somebody guesses with it."""
    drafts = {model.speculation.loaded_draft for model in models.values()}
    return {name: model for name, model in models.items() if model.is_local and (model.tier != "D" or name in drafts)}


def _engine_fields(scene: Scene) -> Iterator[Problem]:
    problem = scene.draft.problem
    for name, model in scene.models.items():
        at = ("models", name)
        if model.engine == "noop" and model.path is not None:
            yield problem((*at, "path"), "engine-fields", "engine noop loads no model; remove path")
        if model.is_local and model.path is None:
            yield problem(at, "engine-fields", f"engine {model.engine} needs path: the GGUF file to load")
        if model.binary is None:
            continue
        if model.engine in ("embedded", "noop", "openai"):
            yield problem((*at, "binary"), "engine-fields", f"engine {model.engine} starts no binary; remove it")
        elif not model.binary.expanduser().is_absolute():
            yield problem((*at, "binary"), "binary-path", f"must be an absolute path, got {str(model.binary)!r}")


def _ports_differ(scene: Scene) -> Iterator[Problem]:
    owner: dict[int, str] = {}
    for name, model in scene.models.items():
        if model.port == 0:
            continue
        other = owner.setdefault(model.port, name)
        if other != name:
            line = scene.draft.line_of("models", other, "port")
            message = f"port {model.port} is taken by model {other!r} in line {line}; change one, or 0 for a free one"
            yield scene.draft.problem(("models", name, "port"), "port-clash", message)


def _threads_fit(scene: Scene) -> Iterator[Problem]:
    cores = scene.hardware.cores
    for name, model in scene.models.items():
        for name_of_field, threads in model.thread_fields():
            if model.is_local and threads > cores:
                message = f"{threads} threads on {cores} cores would slow each other down; at most {cores}"
                yield scene.draft.problem(("models", name, name_of_field), "threads-over-cores", message)


def _nodes_agree(scene: Scene) -> Iterator[Problem]:
    entry = scene.draft.single("hardware", HardwareEntry)
    owner: dict[int, int] = {}
    for index, node in enumerate(entry.nodes):
        for core in parse_cores(node.cores):
            other = owner.setdefault(core, index)
            if other != index:
                line = scene.draft.line_of("hardware", "nodes", other, "cores")
                message = f"core {core} belongs to the node in line {line} already; a core has one node"
                yield scene.draft.problem(("hardware", "nodes", index, "cores"), "node-cores-twice", message)
                break
    if entry.nodes and entry.cores is not None and entry.cores > len(owner):
        line = scene.draft.line_of("hardware", "nodes")
        message = f"more than the {len(owner)} cores of the nodes in line {line}; lower it, or add the missing cores"
        yield scene.draft.problem(("hardware", "cores"), "cores-over-nodes", message)


def _first_parts(scene: Scene) -> Iterator[Problem]:
    """llama.cpp opens the other parts of a split model by itself, and takes no other than the first."""
    for name, model in scene.models.items():
        if model.path is not None and model.is_local and (first := parts_of(model.path)[0]) != model.path:
            message = f"names a later part of a split model; name its first one, {first.name}"
            yield scene.draft.problem(("models", name, "path"), "split-model-part", message)


def _model_files(scene: Scene) -> Iterator[Problem]:
    if not scene.check_files:
        return
    loaded = loaded_models(scene.models)
    for name, model in scene.models.items():
        at = ("models", name)
        binary = model.binary.expanduser() if model.binary is not None else None
        if binary is not None and binary.is_absolute() and not (binary.is_file() and os.access(binary, os.X_OK)):
            message = f"{model.binary} is no executable file; repair the path, or remove it to use the one on PATH"
            yield scene.draft.problem((*at, "binary"), "binary-missing", message)
        path = resolved_path(model, scene.models_folder)
        if path is None or name not in loaded:
            continue
        for part in parts_of(path):
            try:
                with opened(part) as stream:
                    magic = stream.read(len(MAGIC))
            except OSError as error:
                message = f"cannot open {part}: {error.strerror}; run deploy/fetch-model, or repair the path"
                yield scene.draft.problem((*at, "path"), "model-file-missing", message)
                break
            if magic != MAGIC:
                message = f"{part} is not a GGUF file (an unfinished download?); fetch it again, or repair the path"
                yield scene.draft.problem((*at, "path"), "model-file-format", message)
                break


def _memory(scene: Scene) -> Iterator[Problem]:
    """Everything that stays in memory, and the largest model that comes and goes, must fit at once.

    Each process counts: weights that are repacked for the CPU at load are not shared, even of one file.
    """
    budget = scene.hardware.memory_bytes
    models = {name: _at_home(model, scene) for name, model in scene.models.items()}
    needs = memory_needs(models, scene.facts)
    staying = resident_floor(models.values(), needs)
    if staying > budget:
        stays = [name for name, model in models.items() if model.residency == "hot" or model.pinned]
        largest = max(stays, key=lambda name: needs[name])
        message = (
            f"the models that stay in memory (hot, pinned) need {staying:,} bytes and {_budget(scene)}; this is the "
            f"largest ({needs[largest]:,}): make it warm, take a smaller one, or remove an entry"
        )
        yield scene.draft.problem(("models", largest, _memory_field(models[largest])), "memory", message)
        return
    guest = largest_guest(models.values(), needs)
    if guest is not None and staying + needs[guest] > budget:
        message = (
            f"it needs {needs[guest]:,} bytes beside the {staying:,} of the models that stay in memory (hot, pinned), "
            f"and {_budget(scene)}: it could never be loaded; take a smaller one, or make another one warm"
        )
        yield scene.draft.problem(("models", guest, "residency"), "memory-warm", message)


def _budget(scene: Scene) -> str:
    entry = scene.draft.single("hardware", HardwareEntry)
    where = f" (line {scene.draft.line_of('hardware', 'memory_bytes')})" if entry.memory_bytes is not None else ""
    return f"hardware.yaml{where} has {scene.hardware.memory_bytes:,}"


def _memory_field(model: ModelEntry) -> str:
    return "path" if model.memory_bytes is None else "memory_bytes"


def _at_home(model: ModelEntry, scene: Scene) -> ModelEntry:
    """The entry with the file it will really load; none where files are not to be looked at."""
    path = resolved_path(model, scene.models_folder) if scene.check_files else None
    return model.model_copy(update={"path": path})


def _residency_fields(scene: Scene) -> Iterator[Problem]:
    for name, model in scene.models.items():
        at = ("models", name)
        if model.residency == "hot":
            for field in ("idle_unload_s", "pinned"):
                if getattr(model, field):
                    message = "a hot model is never unloaded; remove it, or set residency to warm or cold"
                    yield scene.draft.problem((*at, field), "residency-fields", message)
            continue
        if model.engine in ("noop", "openai"):
            message = f"engine {model.engine} loads no model here, so it cannot be {model.residency}; remove residency"
            yield scene.draft.problem((*at, "residency"), "residency-fields", message)
        if model.tier == "D":
            message = "a draft is loaded together with its target and by no work of its own; remove residency"
            yield scene.draft.problem((*at, "residency"), "residency-fields", message)


def _role_models(scene: Scene) -> Iterator[Problem]:
    problem = scene.draft.problem
    for name, role in scene.roles.items():
        at = ("roles", name, "model")
        if not scene.draft.declares("models", role.model):
            yield problem(at, "unknown-model", f"models.yaml has no {role.model!r}; it has: {_names(scene.models)}")
        model = scene.models.get(role.model)
        if model is None:
            continue
        if model.tier == "D":
            message = (
                f"{role.model!r} is of tier D (draft), which never answers by itself; choose a model of tier A to C"
            )
            yield problem(at, "draft-tier-role", message)
        if role.max_tokens >= model.context_tokens:
            line = scene.draft.line_of("models", role.model, "context_tokens")
            message = (
                f"{role.max_tokens} tokens of answer leave no room for a prompt in the {model.context_tokens} context "
                f"tokens of {role.model!r} (models.yaml:{line}); lower this or raise those"
            )
            yield problem(("roles", name, "max_tokens"), "answer-over-context", message)


def _role_references(scene: Scene) -> Iterator[Problem]:
    targets = {name: role.escalates_to for name, role in scene.roles.items() if role.escalates_to is not None}
    for name, target in targets.items():
        if not scene.draft.declares("roles", target):
            message = f"roles.yaml has no {target!r}; it has: {_names(scene.roles)}"
            yield scene.draft.problem(("roles", name, "escalates_to"), "unknown-role", message)
    for cycle in _cycles({name: (target,) for name, target in targets.items()}):
        message = f"the roles escalate in a circle: {' -> '.join(cycle)}; the last of a chain has no escalates_to"
        yield scene.draft.problem(("roles", cycle[0], "escalates_to"), "escalation-cycle", message)
    for name, persona in scene.draft.valid("personas", PersonaEntry).items():
        for index, target in enumerate(persona.fits.roles):
            if not scene.draft.declares("roles", target):
                message = f"roles.yaml has no {target!r}; it has: {_names(scene.roles)}"
                yield scene.draft.problem(("personas", name, "fits", "roles", index), "unknown-role", message)


def _lateral_models(scene: Scene) -> Iterator[Problem]:
    """A lateral model stands in for an equal one: another one of the same tier, with room for the role's answers."""
    for name, role in scene.roles.items():
        if role.lateral is None:
            continue
        at = ("roles", name, "lateral")
        if not scene.draft.declares("models", role.lateral):
            message = f"models.yaml has no {role.lateral!r}; it has: {_names(scene.models)}"
            yield scene.draft.problem(at, "unknown-model", message)
        own, other = scene.models.get(role.model), scene.models.get(role.lateral)
        if own is None or other is None:
            continue
        if role.lateral == role.model:
            yield scene.draft.problem(at, "lateral-self", "is the role's own model: name another one, or remove it")
        elif other.tier != own.tier:
            message = (
                f"{role.lateral!r} is of tier {other.tier} and {role.model!r} of tier {own.tier}: another tier is what "
                "escalates_to is for; name a model of the same tier"
            )
            yield scene.draft.problem(at, "lateral-tier", message)
        elif role.max_tokens >= other.context_tokens:
            message = f"max_tokens {role.max_tokens} leave no room for a prompt in its {other.context_tokens} tokens"
            yield scene.draft.problem(at, "answer-over-context", message)


def _gate_commands(scene: Scene) -> Iterator[Problem]:
    for name, gate in scene.gates.items():
        at = ("gates", name)
        if (bool(gate.argv), gate.builtin is not None, gate.role is not None).count(True) != 1:
            message = "needs one of argv (a command), builtin (schema, taskir) and role (a judge), and not two of them"
            yield scene.draft.problem(at, "gate-command", message)
        yield from _placeholders(scene, name, gate)
        yield from _pattern(scene, name, gate)
        if gate.role is not None and not scene.draft.declares("roles", gate.role):
            message = f"roles.yaml has no {gate.role!r}; it has: {_names(scene.roles)}"
            yield scene.draft.problem((*at, "role"), "unknown-role", message)
        if gate.cores > scene.hardware.cores:
            message = f"{gate.cores} cores on a machine of {scene.hardware.cores}: the gate could never start"
            yield scene.draft.problem((*at, "cores"), "gate-cores", message)
        if gate.memory_bytes > scene.hardware.memory_bytes and "memory_bytes" in gate.model_fields_set:
            message = f"{gate.memory_bytes:,} bytes on a machine with {scene.hardware.memory_bytes:,}; lower it"
            yield scene.draft.problem((*at, "memory_bytes"), "gate-memory", message)


def _placeholders(scene: Scene, name: str, gate: GateEntry) -> Iterator[Problem]:
    at = ("gates", name, "argv")
    words = gate.placeholders()
    for word in words:
        if word not in PLACEHOLDERS:
            there = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            yield scene.draft.problem(at, "unknown-placeholder", f"{{{word}}} is no placeholder; there are {there}")
        elif word in LISTS and f"{{{word}}}" not in gate.argv:
            message = f"{{{word}}} stands for several arguments: it must be an argument of its own"
            yield scene.draft.problem(at, "placeholder-list", message)
    if sum(word in TARGETS for word in words) > 1:
        some = ", ".join(f"{{{word}}}" for word in TARGETS)
        yield scene.draft.problem(at, "placeholder-target", f"only one of {some}: it says how often the command runs")


def _pattern(scene: Scene, name: str, gate: GateEntry) -> Iterator[Problem]:
    at = ("gates", name, "pattern" if gate.pattern is not None else "parser")
    if (gate.parser == "pattern") != (gate.pattern is not None):
        yield scene.draft.problem(at, "gate-pattern", "parser: pattern and the field pattern belong together")
    if gate.pattern is None:
        return
    try:
        groups = set(re.compile(gate.pattern).groupindex)
    except re.error as error:
        yield scene.draft.problem(at, "gate-pattern", f"no regular expression: {error}")
        return
    unknown = groups - {"message", "file", "line", "column", "rule"}
    if "message" not in groups or unknown:
        message = "needs the named group (?P<message>…), and may have file, line, column and rule"
        yield scene.draft.problem(at, "gate-pattern", message)


def _gate_order(scene: Scene) -> Iterator[Problem]:
    for name, gate in scene.gates.items():
        for index, target in enumerate(gate.depends_on):
            if not scene.draft.declares("gates", target):
                message = f"gates.yaml has no {target!r}; it has: {_names(scene.gates)}"
                yield scene.draft.problem(("gates", name, "depends_on", index), "unknown-gate", message)
    for cycle in _cycles({name: gate.depends_on for name, gate in scene.gates.items()}):
        message = f"the gates wait for each other: {' -> '.join(cycle)}; remove one of the dependencies"
        yield scene.draft.problem(("gates", cycle[0], "depends_on"), "gate-cycle", message)


def _failure_rules(scene: Scene) -> Iterator[Problem]:
    problem = scene.draft.problem
    caps = scene.draft.single("caps", FailureCaps)
    missing = [category for category in Category if not scene.draft.declares("failures", category)]
    if missing:
        yield problem(("failures",), "missing-category", f"no rule for {', '.join(missing)}; add a row for each")
    for key, rule in scene.draft.valid("failures", FailureRule).items():
        at = ("failures", key)
        repeats = rule.action in ("retry", "backoff")
        if repeats and rule.same_role == 0:
            yield problem((*at, "same_role"), "failure-shape", f"{rule.action} needs same_role of at least 1")
        if not repeats and (rule.same_role or "then" in rule.model_fields_set):
            message = f"same_role and then belong to retry and backoff; {rule.action} acts at once: remove them"
            yield problem((*at, "same_role" if rule.same_role else "then"), "failure-shape", message)
        if rule.constrained and rule.action != "retry":
            yield problem((*at, "constrained"), "failure-shape", f"only retry can be constrained, not {rule.action}")
        if rule.action == "retry" and rule.same_role > caps.retries_per_step:
            line = scene.draft.line_of("caps", "retries_per_step")
            message = f"more than caps.retries_per_step ({caps.retries_per_step}, line {line}) can never be used"
            yield problem((*at, "same_role"), "failure-over-cap", message)
        if Category(key) in NEVER_QUALITY:
            if rule.quality_signal:
                message = f"{key} says nothing about an answer's quality; set it to false"
                yield problem((*at, "quality_signal"), "never-quality", message)
            if rule.action == "escalate" or rule.then == "escalate":
                message = f"a stronger role is no cure for {key}; use rerun, backoff or fail"
                yield problem((*at, "action" if rule.action == "escalate" else "then"), "never-escalate", message)
            if rule.replan:
                message = f"another plan is no cure for {key}; set it to false"
                yield problem((*at, "replan"), "never-replan", message)
    if caps.backoff_max_ms < max(caps.peer_backoff_ms, caps.resource_backoff_ms):
        message = "is less than the first pause (peer_backoff_ms or resource_backoff_ms); raise it"
        yield problem(("caps", "backoff_max_ms"), "backoff-order", message)
    if caps.circuit_pause_max_ms < caps.circuit_pause_ms:
        message = f"is less than circuit_pause_ms ({caps.circuit_pause_ms}), the first pause; raise it"
        yield problem(("caps", "circuit_pause_max_ms"), "circuit-order", message)


def _cores_are_shared(scene: Scene) -> Iterator[Problem]:
    groups: dict[str, int] = {}
    for name, model in scene.models.items():
        # A draft computes in turn with its target, and a model that comes and goes waits for free cores.
        if model.is_local and model.tier != "D" and model.residency == "hot":
            group = f"group {model.exclusive}" if model.exclusive is not None else name
            groups[group] = max(groups.get(group, 0), model.threads)
    threads = sum(groups.values())
    if threads > scene.hardware.cores:
        message = (
            f"the hot models together use {threads} threads on {scene.hardware.cores} cores; they slow each other down"
        )
        yield scene.draft.problem(("models",), "cores-shared", message)


def _threads_fit_a_node(scene: Scene) -> Iterator[Problem]:
    if len(scene.hardware.nodes) < 2:
        return
    largest = max(len(node.cores) for node in scene.hardware.nodes)
    for name, model in scene.models.items():
        if model.is_local and model.threads > largest:
            message = (
                f"{model.threads} threads, and the largest NUMA node has {largest} cores: some of them will work "
                f"on far memory; {largest} or fewer are often faster"
            )
            yield scene.draft.problem(("models", name, "threads"), "threads-over-node", message)


def _every_model_is_used(scene: Scene) -> Iterator[Problem]:
    used = {role.model for role in scene.roles.values()} | {role.lateral for role in scene.roles.values()}
    for name, model in scene.models.items():
        if name not in used and model.tier != "D":
            message = "no role uses this model, so its process would only take memory"
            yield scene.draft.problem(("models", name), "model-unused", message)


ERRORS: Final[tuple[Rule, ...]] = (
    _engine_fields,
    remote_entries,
    _ports_differ,
    _threads_fit,
    _nodes_agree,
    _first_parts,
    _model_files,
    _residency_fields,
    _memory,
    _role_models,
    _role_references,
    _lateral_models,
    _gate_commands,
    _gate_order,
    _failure_rules,
)
NOTES: Final[tuple[Rule, ...]] = (_cores_are_shared, _threads_fit_a_node, _every_model_is_used, remote_sampling)


def _names(entries: Mapping[str, object]) -> str:
    return ", ".join(entries) or "none"


def _cycles(successors: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Yield each circle as the names along it, first name repeated at the end, beginning with the first in the file."""
    graph = {name: set(after) for name, after in successors.items()}
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = list(reversed(error.args[1]))[:-1]
        else:
            return
        start = min(range(len(circle)), key=lambda index: list(successors).index(circle[index]))
        circle = circle[start:] + circle[:start]
        yield [*circle, circle[0]]
        graph[circle[-1]].discard(circle[0])  # said once; look for the next
