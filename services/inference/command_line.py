"""Registry entry → arguments of llama.cpp: a table of rules, one row for each flag, and nothing else makes a flag.

A row says which field of the registry a flag comes from, how its value is made and why it is there. Both engines read
the same flags: the native binary by itself, the embedded one through `embedded`. Flags differ between builds, so a row
may have several spellings, the current one first; which of them a build knows is found out by `engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from services.kit.registry.constraints import good_draft_tokens
from services.kit.registry.launch import Launch

HOST: Final = "127.0.0.1"

CACHE_RAM_MIB: Final = 256
"""Prompts of idle slots kept in memory. llama-server would take 8 GiB per process, more than small machines have."""

LOG_VERBOSITY: Final = 2
"""Warnings and errors. At the next level every request writes lines, and the file would grow without bound."""


class Mode(StrEnum):
    """Whether a process guesses ahead. llama.cpp decides that at its start, not per request."""

    PLAIN = "plain"
    SPECULATING = "speculating"


def modes_of(launch: Launch) -> tuple[Mode, ...]:
    """The modes in which an entry may run, the one to start with first."""
    speculation = launch.entry.speculation
    if not speculation.types or speculation.policy == "off":
        return (Mode.PLAIN,)
    if speculation.policy == "always":
        return (Mode.SPECULATING,)
    return (Mode.SPECULATING, Mode.PLAIN)


@dataclass(frozen=True, slots=True)
class Argument:
    """One flag of one command line."""

    ways: tuple[tuple[str, ...], ...]
    """Spellings, each a flag and perhaps its value; the first is that of current builds. An empty one: a build that
    does not know the others does so unasked."""
    field: str
    """Field of models.yaml that it comes from, `speculation.n_max`; empty = it is the same for every model."""
    rule: str
    """Why it is there."""
    of_draft: bool = False
    """Whether the field is one of the draft's entry."""


_Older: TypeAlias = Callable[[Launch, str], tuple[tuple[str, ...], ...]]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A row of the table: `value` gives the flag's value, "" for a flag without one, None where it is left out."""

    flag: str
    field: str
    value: Callable[[Launch], str | None]
    why: str
    speculating: bool = False
    """Only where the process guesses ahead."""
    older: _Older = lambda _launch, _value: ()
    """Spellings of older builds for a value."""
    of_draft: bool = False

    def argument(self, launch: Launch) -> Argument | None:
        value = self.value(launch)
        if value is None:
            return None
        now = (self.flag, value) if value else (self.flag,)
        return Argument((now, *self.older(launch, value)), self.field, self.why, self.of_draft)


def _fixed(value: str) -> Callable[[Launch], str | None]:
    return lambda _launch: value


def _optional(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value


def _experts(launch: Launch) -> str | None:
    if launch.entry.experts is None or launch.facts is None:
        return None
    return f"{launch.facts.architecture}.expert_used_count=int:{launch.entry.experts}"


def _types(launch: Launch) -> str | None:
    return ",".join("draft-simple" if kind == "draft" else kind for kind in launch.entry.speculation.types)


def _types_before(launch: Launch, _value: str) -> tuple[tuple[str, ...], ...]:
    """Builds in which a draft has no type take --model-draft for it, and beside that one lookup."""
    if launch.draft is None:
        return ()
    lookup = launch.entry.speculation.lookup_type
    return ((),) if lookup is None else (("--spec-type", lookup),)


def _drafts(value: Callable[[Launch], str | None]) -> Callable[[Launch], str | None]:
    """A value for processes with a draft model only."""
    return lambda launch: None if launch.draft is None else value(launch)


def _draft_length(launch: Launch) -> str | None:
    chosen = launch.entry.speculation.n_max
    if chosen is None and launch.facts is not None:
        chosen = good_draft_tokens(launch.facts)[0]
    return _optional(chosen)


def _split(launch: Launch) -> str | None:
    chosen = launch.entry.speculation.p_split
    if chosen is None and launch.facts is not None and launch.facts.experts_total:
        chosen = 0.0
    return _optional(chosen)


def _lookup_size(kind: str, field: str) -> Callable[[Launch], str | None]:
    def value(launch: Launch) -> str | None:
        if launch.entry.speculation.lookup_type != kind:
            return None
        return _optional(getattr(launch.entry.speculation, field))

    return value


def _load_mode_before(_launch: Launch, mode: str) -> tuple[tuple[str, ...], ...]:
    """Flags by which builds before --load-mode were told the same."""
    older: Mapping[str, tuple[tuple[str, ...], ...]] = {
        "none": (("--no-mmap",),),
        "mlock": (("--mlock", "--no-mmap"),),
        "mmap+mlock": (("--mlock",),),
    }
    return older.get(mode, ())


def _flash_attention_before(_launch: Launch, mode: str) -> tuple[tuple[str, ...], ...]:
    """It was off, and the flag without a value turned it on."""
    return (("--flash-attn",),) if mode == "on" else ((),)


def _renamed(flag: str) -> _Older:
    return lambda _launch, value: ((flag, value),)


def _renamed_without_draft(flag: str) -> _Older:
    """For a name that the draft model's own length had too."""
    return lambda launch, value: ((flag, value),) if launch.draft is None else ()


_LOOKUP_WHY: Final = "tokens that must be equal, and tokens that are then guessed: longer ones suit copying"

RULES: Final[tuple[_Rule, ...]] = (
    _Rule("--model", "path", lambda at: str(at.entry.path), "the file; of a split model the first part"),
    _Rule("--alias", "", lambda at: at.entry.name, "the name in answers is that of the entry"),
    _Rule("--host", "", _fixed(HOST), "nobody but this machine may connect"),
    _Rule(
        "--ctx-size",
        "context_tokens",
        lambda at: str(at.entry.context_tokens * at.entry.slots),
        "llama.cpp divides it by the slots: context_tokens is that of one",
    ),
    _Rule("--parallel", "slots", lambda at: str(at.entry.slots), "one slot is one credit: no more are ever admitted"),
    _Rule("--no-kv-unified", "", _fixed(""), "each slot has its own context: a long prompt cannot take another slot's"),
    _Rule("--threads", "threads", lambda at: str(at.entry.threads), "cores to decode with"),
    _Rule(
        "--threads-batch",
        "threads_batch",
        lambda at: _optional(at.entry.threads_batch),
        "reading prompts uses cores better than decoding does",
    ),
    _Rule("--batch-size", "batch_tokens", lambda at: _optional(at.entry.batch_tokens), "tokens of one batch"),
    _Rule("--ubatch-size", "ubatch_tokens", lambda at: _optional(at.entry.ubatch_tokens), "tokens computed at once"),
    _Rule(
        "--override-kv",
        "experts",
        _experts,
        "fewer experts per token than trained: faster, good down to a floor that the registry's rules know",
    ),
    _Rule(
        "--load-mode",
        "load_mode",
        lambda at: _unless(at.entry.load_mode, "auto"),
        "mlock keeps the weights in memory under pressure",
        older=_load_mode_before,
    ),
    _Rule("--numa", "numa.strategy", lambda at: at.entry.numa.strategy, "how threads are spread over NUMA nodes"),
    _Rule(
        "--flash-attn",
        "flash_attention",
        lambda at: _unless(at.entry.flash_attention, "auto"),
        "attention in blocks",
        older=_flash_attention_before,
    ),
    _Rule("--cache-type-k", "kv_type_k", lambda at: _unless(at.entry.kv_type_k, "f16"), "type of the cached keys"),
    _Rule("--cache-type-v", "kv_type_v", lambda at: _unless(at.entry.kv_type_v, "f16"), "type of the cached values"),
    _Rule(
        "--cache-reuse",
        "cache_reuse",
        lambda at: _optional(at.entry.cache_reuse or None),
        "pieces of a prompt that have moved are taken from the cache",
    ),
    _Rule(
        "--spec-type",
        "speculation.type",
        _types,
        "what guesses ahead; helps single streams and hurts full batches",
        speculating=True,
        older=_types_before,
    ),
    _Rule(
        "--spec-draft-model",
        "speculation.draft",
        _drafts(lambda at: str(at.draft.path) if at.draft else None),
        "the model that guesses; it has the vocabulary of this one",
        speculating=True,
        older=_renamed("--model-draft"),
    ),
    _Rule(
        "--spec-draft-n-max",
        "speculation.n_max",
        _drafts(_draft_length),
        "longest guess; what is known to be good for the size of the model where nothing is set",
        speculating=True,
        older=_renamed("--draft-max"),
    ),
    _Rule(
        "--spec-draft-n-min",
        "speculation.n_min",
        _drafts(lambda at: _optional(at.entry.speculation.n_min)),
        "shorter guesses are not worth a check",
        speculating=True,
        older=_renamed("--draft-min"),
    ),
    _Rule(
        "--spec-draft-p-min",
        "speculation.p_min",
        _drafts(lambda at: _optional(at.entry.speculation.p_min)),
        "the draft stops where it is unsure",
        speculating=True,
        older=_renamed("--draft-p-min"),
    ),
    _Rule(
        "--spec-draft-p-split",
        "speculation.p_split",
        _drafts(_split),
        "branching guesses help dense models only, and are on by default",
        speculating=True,
        older=_renamed("--draft-p-split"),
    ),
    _Rule(
        "--spec-draft-threads",
        "threads",
        _drafts(lambda at: str(at.draft.threads) if at.draft else None),
        "cores of the draft model",
        speculating=True,
        older=_renamed("--threads-draft"),
        of_draft=True,
    ),
    _Rule(
        "--spec-draft-type-k",
        "kv_type_k",
        _drafts(lambda at: _unless(at.draft.kv_type_k, "f16") if at.draft else None),
        "type of the draft's cached keys",
        speculating=True,
        older=_renamed("--cache-type-k-draft"),
        of_draft=True,
    ),
    _Rule(
        "--spec-draft-type-v",
        "kv_type_v",
        _drafts(lambda at: _unless(at.draft.kv_type_v, "f16") if at.draft else None),
        "type of the draft's cached values",
        speculating=True,
        older=_renamed("--cache-type-v-draft"),
        of_draft=True,
    ),
    *(
        _Rule(
            f"--spec-{kind}-size-{letter}",
            f"speculation.{field}",
            _lookup_size(kind, field),
            _LOOKUP_WHY,
            speculating=True,
            older=_renamed(f"--spec-ngram-size-{letter}"),
        )
        for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v")
        for letter, field in (("n", "ngram_n"), ("m", "ngram_m"))
    ),
    *(
        _Rule(
            f"--spec-ngram-mod-{name}",
            f"speculation.{field}",
            _lookup_size("ngram-mod", field),
            _LOOKUP_WHY,
            speculating=True,
            older=older,
        )
        for name, field, older in (
            ("n-match", "ngram_n", _renamed("--spec-ngram-size-n")),
            ("n-max", "ngram_m", _renamed_without_draft("--draft-max")),
            ("n-min", "n_min", _renamed("--draft-min")),
        )
    ),
    _Rule("--cache-ram", "", _fixed(str(CACHE_RAM_MIB)), "MiB for prompts of idle slots; llama.cpp would take 8 GiB"),
    _Rule(
        "--no-cache-idle-slots",
        "",
        _fixed(""),
        "what a slot holds is copied when it is overwritten, not when any other slot is given a prompt",
        older=lambda _launch, _value: ((),),
    ),
    _Rule(
        "--slot-save-path",
        "prefix_disk_bytes",
        lambda at: f"{at.prefix_folder}/" if at.prefix_folder is not None and at.takes_copies else None,
        "a beginning that several prompts share is read once and copied from slot to slot, a context that makes way "
        "is kept: in files of so many bytes together",
    ),
    _Rule("--log-verbosity", "", _fixed(str(LOG_VERBOSITY)), "warnings and errors; more would grow without bound"),
    _Rule("--metrics", "", _fixed(""), "speed and totals for status"),
    _Rule("--slots", "", _fixed(""), "whether a slot is free after a cancel"),
    _Rule("--offline", "", _fixed(""), "models are files; nothing is fetched at run time"),
)


def arguments(launch: Launch, port: int, mode: Mode) -> Iterator[Argument]:
    """Every flag with which this entry is served on `port` of this machine, in the order of the table."""
    for rule in RULES:
        if rule.speculating and mode is Mode.PLAIN:
            continue
        argument = rule.argument(launch)
        if argument is not None:
            yield argument
        if rule.flag == "--host":
            yield Argument((("--port", str(port)),), "port", "0 in the registry = a free one at each launch")


def pinned(launch: Launch) -> list[str]:
    """What stands before the program: taskset with the cores it is bound to, or nothing."""
    return [] if launch.core_text is None else ["taskset", "--cpu-list", launch.core_text]


def spelled(wanted: Iterable[Argument], knows: Callable[[tuple[str, ...]], bool]) -> list[str]:
    """The arguments in the first spelling that is known, else in that of current builds."""
    return [
        part for argument in wanted for part in next((way for way in argument.ways if knows(way)), argument.ways[0])
    ]
