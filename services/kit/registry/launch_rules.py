"""What makes a model faster, checked: speculation, placement on cores, caches, and what the file's metadata allows.

Rules as in `rules`, over all entries. What concerns one process by itself and needs its file is in `constraints`, since
it is checked once more before each start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from services.kit.gguf_facts import read_facts
from services.kit.gguf_header import MAGIC, BadHeader, opened
from services.kit.hardware import format_cores
from services.kit.model_facts import ModelFacts
from services.kit.registry.constraints import good_draft_tokens, violations
from services.kit.registry.entries import ModelEntry
from services.kit.registry.launch import Launch, bound_cores, declared_facts
from services.kit.registry.problems import Problem
from services.kit.registry.rules import Rule, Scene, loaded_models, resolved_path
from services.kit.registry.sections import Draft


def known_facts(
    draft: Draft, models: Mapping[str, ModelEntry], models_folder: Path, *, check_files: bool
) -> tuple[dict[str, ModelFacts], list[Problem]]:
    """Facts by the name of the entry, from the files where they are to be looked at, else as declared.

    The problems are those of files whose header is damaged; a missing or wrong file is found by `rules`.
    """
    facts: dict[str, ModelFacts] = {}
    problems: list[Problem] = []
    for name, model in loaded_models(models).items():
        path = resolved_path(model, models_folder)
        if path is None:
            continue
        if not check_files:
            if model.declared is not None:
                facts[name] = declared_facts(model.declared)
            continue
        try:
            with opened(path) as stream:
                if stream.read(len(MAGIC)) != MAGIC:
                    continue
            facts[name] = read_facts(path)
        except OSError:
            continue
        except BadHeader as err:
            message = f"the header of {path} is damaged: {err}; fetch the file again, or repair the path"
            problems.append(draft.problem(("models", name, "path"), "model-file-damaged", message))
    return facts, problems


def _launches(scene: Scene) -> Iterator[Launch]:
    """Each entry that is served by a process, with the facts that are known."""
    for name, model in scene.models.items():
        if not model.is_local:
            continue
        named = model.speculation.loaded_draft
        draft = scene.models.get(named) if named is not None else None
        if draft is not None and draft.tier != "D":  # has its own problem
            draft = None
        launch = Launch(model, draft, scene.hardware, scene.draft.document("models"))
        facts = scene.facts.get(name)
        if facts is not None:
            launch = launch.with_facts(facts, scene.facts.get(draft.name) if draft is not None else None)
        yield launch


def _metadata(scene: Scene) -> Iterator[Problem]:
    for launch in _launches(scene):
        yield from violations(launch)


def _speculation(scene: Scene) -> Iterator[Problem]:
    """What the fields of `speculation` ask of each other, and of the entry that they name."""
    for name, model in scene.models.items():
        spec, at = model.speculation, ("models", name, "speculation")
        if spec.type == "draft" and spec.draft is None:
            yield scene.draft.problem(
                at, "speculation-fields", "type draft needs draft: the entry of tier D that guesses"
            )
        for field in ("draft", "lookup", "n_max", "p_min", "p_split"):
            if spec.type != "draft" and getattr(spec, field) is not None:
                message = f"belongs to type draft, and the type is {spec.type}; remove it"
                yield scene.draft.problem((*at, field), "speculation-fields", message)
        if spec.n_min is not None and spec.type != "draft" and spec.lookup_type != "ngram-mod":
            message = f"belongs to type draft and to ngram-mod, and the type is {spec.type}; remove it"
            yield scene.draft.problem((*at, "n_min"), "speculation-fields", message)
        for field in ("ngram_n", "ngram_m"):
            if spec.lookup_type is None and getattr(spec, field) is not None:
                message = "belongs to a lookup; set type or lookup to ngram-simple, or remove it"
                yield scene.draft.problem((*at, field), "speculation-fields", message)
        if spec.draft is None:
            continue
        if not scene.draft.declares("models", spec.draft):
            message = f"models.yaml has no {spec.draft!r}; it has: {', '.join(scene.models)}"
            yield scene.draft.problem((*at, "draft"), "unknown-draft", message)
        draft = scene.models.get(spec.draft)
        if draft is not None and draft.tier != "D":
            message = f"{spec.draft!r} is of tier {draft.tier}; a draft is an entry of tier D"
            yield scene.draft.problem((*at, "draft"), "draft-tier", message)


def _draft_fields(scene: Scene) -> Iterator[Problem]:
    """A draft is computed inside its target's process, by that one's settings: what it sets itself goes nowhere."""
    for name, model in scene.models.items():
        if model.tier != "D":
            continue
        for field in _NOT_OF_DRAFTS:
            if field in model.model_fields_set:
                message = "has no effect on a draft, which its target's process computes; remove it, or set it there"
                yield scene.draft.problem(("models", name, field), "draft-fields", message)


def _lookup_lengths(scene: Scene) -> Iterator[Problem]:
    for name, model in scene.models.items():
        spec, at = model.speculation, ("models", name, "speculation")
        if spec.lookup_type == "ngram-mod" and spec.ngram_m is not None:
            shortest = _NGRAM_MOD_N_MIN if spec.n_min is None else spec.n_min
            if spec.ngram_m < shortest:
                of = "llama.cpp's own n_min" if spec.n_min is None else "n_min"
                message = f"{spec.ngram_m} tokens are never guessed while {of} is {shortest}; set n_min to less"
                yield scene.draft.problem((*at, "ngram_m"), "speculation-lengths", message)
        if spec.n_max is not None and spec.n_min is not None and spec.type == "draft" and spec.n_min > spec.n_max:
            yield scene.draft.problem((*at, "n_min"), "speculation-lengths", f"more than n_max ({spec.n_max})")


def _caches(scene: Scene) -> Iterator[Problem]:
    for name, model in scene.models.items():
        if model.kv_type_v not in ("f32", "f16", "bf16") and model.flash_attention == "off":
            line = scene.draft.line_of("models", name, "flash_attention")
            message = f"a value cache of {model.kv_type_v} needs flash attention, which line {line} turns off"
            yield scene.draft.problem(("models", name, "kv_type_v"), "quantised-values", message)
        batch, ubatch = model.batch_tokens, model.ubatch_tokens
        if batch is not None and ubatch is not None and ubatch > batch:
            message = f"more than batch_tokens ({batch}): a batch is computed in pieces of this size; lower it"
            yield scene.draft.problem(("models", name, "ubatch_tokens"), "batch-order", message)


def _experts_need_native(scene: Scene) -> Iterator[Problem]:
    for name, model in scene.models.items():
        if model.experts is not None and model.engine in ("embedded", "noop"):
            message = f"engine {model.engine} has no kv overrides, so it cannot change experts; use llama-server"
            yield scene.draft.problem(("models", name, "experts"), "experts-engine", message)


def _placement(scene: Scene) -> Iterator[Problem]:
    """The cores that an entry names exist, and carry its threads."""
    nodes = scene.hardware.nodes
    physical = scene.hardware.physical_cores()
    existing = physical.keys()
    for name, model in scene.models.items():
        if not model.is_local:
            continue
        at = ("models", name, "numa")
        if model.numa.nodes and model.numa.cores is not None:
            yield scene.draft.problem((*at, "cores"), "numa-fields", "nodes name the cores already; remove one of both")
        for index, number in enumerate(model.numa.nodes):
            if number >= len(nodes):
                message = f"there is no node {number}: the machine has 0 to {len(nodes) - 1}"
                yield scene.draft.problem((*at, "nodes", index), "unknown-node", message)
        missing = set(model.numa.core_numbers()) - existing
        if missing:
            message = f"the machine has no cores {format_cores(missing)}; it has {format_cores(existing)}"
            yield scene.draft.problem((*at, "cores"), "unknown-core", message)
        bound = bound_cores(model, nodes)
        on = {physical[core] for core in bound or existing if core in physical}
        nodes_used = sum(not on.isdisjoint(node.cores) for node in nodes)
        for field, threads in model.thread_fields():
            at_field = ("models", name, field)
            if bound and threads > len(bound):
                message = f"{threads} threads on the {len(bound)} cores it is bound to ({format_cores(bound)})"
                yield scene.draft.problem(at_field, "threads-over-bound", message)
            elif nodes_used > 1 and threads > len(on):
                message = (
                    f"{threads} threads on {len(on)} physical cores of {nodes_used} NUMA nodes: all threads of all "
                    f"nodes cost 46 to 60 % of the speed where it was measured; at most {len(on)}, one for each "
                    "physical core"
                )
                yield scene.draft.problem(at_field, "threads-over-all-nodes", message)


def _draft_threads(scene: Scene) -> Iterator[Problem]:
    """A draft computes on the cores that its target is bound to."""
    for launch in _launches(scene):
        if launch.draft is None or not launch.cores or launch.draft.threads <= len(launch.cores):
            continue
        line = scene.draft.line_of("models", launch.entry.name, "numa")
        message = (
            f"{launch.draft.threads} threads, and {launch.entry.name!r}, which it guesses for, is bound to "
            f"{len(launch.cores)} cores ({launch.core_text}) in line {line}; at most as many"
        )
        yield scene.draft.problem(("models", launch.draft.name, "threads"), "threads-over-bound", message)


def _bound_apart(scene: Scene) -> Iterator[Problem]:
    """Models that are bound to cores do not share one, not even as two threads of it, unless one computes at a time.

    That goes for warm and cold ones too: they may be in memory beside any other, and who waits for cores waits for so
    many, not for these.
    """
    physical = scene.hardware.physical_cores()
    owner: dict[int, tuple[int, ModelEntry]] = {}
    for name, model in _processes(scene):
        for core in bound_cores(model, scene.hardware.nodes):
            taken, other = owner.setdefault(physical.get(core, core), (core, model))
            if other is model or _take_turns(model, other):
                continue
            line = scene.draft.line_of("models", other.name, "numa")
            same = "" if core == taken else f" a thread of the same physical core as {taken}, which is"
            message = (
                f"core {core} is{same} bound by {other.name!r} in line {line} too; give each its own cores, or put "
                "both into one exclusive group"
            )
            yield scene.draft.problem(("models", name, "numa"), "bound-twice", message)
            break


def _unbound_beside_bound(scene: Scene) -> Iterator[Problem]:
    bound = [model for _, model in _processes(scene) if bound_cores(model, scene.hardware.nodes)]
    for name, model in _processes(scene):
        others = ", ".join(other.name for other in bound if not _take_turns(model, other))
        if model.residency == "hot" and model not in bound and others:
            message = (
                f"it is always in memory and bound to no cores, so it will compute on the cores of {others} as well, "
                "which slows down both; bind it with numa"
            )
            yield scene.draft.problem(("models", name), "unbound-beside-bound", message)


def _processes(scene: Scene) -> list[tuple[str, ModelEntry]]:
    """The entries that have a process here."""
    return [(name, model) for name, model in scene.models.items() if model.is_local and model.tier != "D"]


def _take_turns(one: ModelEntry, other: ModelEntry) -> bool:
    return one.exclusive is not None and one.exclusive == other.exclusive


def _draft_lengths(scene: Scene) -> Iterator[Problem]:
    for launch in _launches(scene):
        chosen = launch.entry.speculation.n_max
        if launch.facts is None or chosen is None:
            continue
        good, reason = good_draft_tokens(launch.facts)
        if chosen > good:
            message = (
                f"{chosen} tokens; {good} were best for a model of {launch.facts.parameters_b:.3g}B: {reason}. "
                "Keep it if you measured it"
            )
            yield launch.problem("speculation.n_max", "draft-length", message)


def _every_draft_is_used(scene: Scene) -> Iterator[Problem]:
    used = {model.speculation.draft for model in scene.models.values()}
    for name, model in scene.models.items():
        if model.tier == "D" and name not in used:
            message = "no model guesses with this draft; name it in a speculation, or remove it"
            yield scene.draft.problem(("models", name), "draft-unused", message)


def _near_memory(scene: Scene) -> Iterator[Problem]:
    for launch in _launches(scene):
        near = [
            scene.hardware.nodes[number] for number in launch.entry.numa.nodes if number < len(scene.hardware.nodes)
        ]
        if launch.facts is None or not near:
            continue
        need, have = launch.memory_bytes(), sum(node.memory_bytes for node in near)
        if need is not None and need > have:
            message = f"it needs {need:,} bytes and its nodes have {have:,}: a part will lie in far memory"
            yield launch.problem("numa.nodes", "memory-over-node", message)


_NOT_OF_DRAFTS: Final = (
    *("threads_batch", "batch_tokens", "ubatch_tokens", "experts", "speculation", "speculation_on_recurrent"),
    *("load_mode", "numa", "flash_attention", "cache_reuse", "prefix_disk_bytes"),
    "exclusive",
)
"""Settings of a process, or that llama.cpp has no flag for where a draft is concerned."""
_NGRAM_MOD_N_MIN: Final = 48
"""llama.cpp's own shortest guess of ngram-mod."""

LAUNCH_ERRORS: Final[tuple[Rule, ...]] = (
    _speculation,
    _lookup_lengths,
    _caches,
    _experts_need_native,
    _placement,
    _draft_threads,
    _bound_apart,
    _metadata,
)
LAUNCH_NOTES: Final[tuple[Rule, ...]] = (
    _draft_lengths,
    _draft_fields,
    _every_draft_is_used,
    _near_memory,
    _unbound_beside_bound,
)
