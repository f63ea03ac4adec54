"""What the metadata of a model file allows: the rules that keep an operator from the known traps.

Each rule is a function from one launch with its facts to problems; `CONSTRAINTS` lists them. They are applied when the
registry is checked and again before each start, since the files may have changed in between. The figures in the tables
are measurements on a two-socket server; `tierline bench` shows what holds on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from services.kit.model_facts import ModelFacts, same_vocabulary
from services.kit.registry.launch import Launch
from services.kit.registry.problems import Problem


@dataclass(frozen=True, slots=True)
class SizeClass:
    """A value that is good for models of at most so many billion parameters."""

    up_to_b: float
    value: int
    reason: str


#: Fewest experts per token that gave useful answers. The largest class comes last.
EXPERT_FLOORS: Final = (
    SizeClass(400, 4, "with fewer than 4 experts the answers of models such as 30B-A3B and 235B-A22B fell apart"),
    SizeClass(float("inf"), 3, "models of the 480B class were still good with 3"),
)

#: Longest guess of a draft model that paid, by the size of its target.
DRAFT_TOKENS: Final = (
    SizeClass(20, 8, "small targets check a guess so fast that long ones are wasted (measured on 7B)"),
    SizeClass(50, 24, "the best length for a dense target of 32B"),
    SizeClass(float("inf"), 16, "the best length for a target of 72B"),
)

_SPECULATION: Final = "guessing ahead cannot be undone in a recurrent state and has crashed builds after a few prompts"


def expert_floor(facts: ModelFacts) -> tuple[int, str]:
    """Fewest experts per token for a model, and why; never more than it was trained with."""
    row = next(row for row in EXPERT_FLOORS if facts.parameters_b <= row.up_to_b)
    return min(row.value, facts.experts_trained or row.value), row.reason


def good_draft_tokens(facts: ModelFacts) -> tuple[int, str]:
    """Longest useful guess of a draft model for this target, in tokens, and why."""
    row = next(row for row in DRAFT_TOKENS if facts.parameters_b <= row.up_to_b)
    return row.value, row.reason


Constraint: TypeAlias = Callable[[Launch, ModelFacts], Iterator[Problem]]


def violations(launch: Launch, build: frozenset[str] | None = None) -> list[Problem]:
    """Every rule that a launch with known facts breaks; none where the facts are not known.

    `build` holds the names of the llama.cpp build that would run, None where it is not known: then a build that an
    entry allows is taken to be the one.
    """
    if launch.facts is None:
        return []
    found = [problem for rule in CONSTRAINTS for problem in rule(launch, launch.facts)]
    return [*found, *_recurrent(launch, launch.facts, build)]


def _recurrent(launch: Launch, facts: ModelFacts, build: frozenset[str] | None) -> Iterator[Problem]:
    speculation = launch.entry.speculation
    if facts.recurrent is None or not speculation.types or speculation.policy == "off":
        return
    allowed = launch.entry.speculation_on_recurrent.allowed_builds
    if allowed and (build is None or build.intersection(allowed)):
        return
    kind = f"type {speculation.type}" + (f" with {speculation.lookup}" if speculation.lookup else "")
    if not allowed:
        cure = "remove speculation, or allow the builds on which you tried it in speculation_on_recurrent"
    else:
        named = " = ".join(sorted(build or ()))
        cure = f"this build ({named}) is not among those in {launch.where('speculation_on_recurrent.allowed_builds')}"
    message = f"{kind} on a model that {facts.recurrent}: {_SPECULATION}; {cure}"
    yield launch.problem("speculation.type", "recurrent-speculation", message)


def _experts(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    wanted = launch.entry.experts
    if wanted is None:
        return
    if facts.experts_trained is None:
        message = f"{facts.architecture} is a dense model without experts; remove the field"
        yield launch.problem("experts", "experts-dense", message)
        return
    floor, reason = expert_floor(facts)
    if not floor <= wanted <= facts.experts_trained:
        side = "below" if wanted < floor else "above"
        message = (
            f"{wanted} is {side} the range {floor} to {facts.experts_trained}: this model of {facts.parameters_b:.3g}B "
            f"was trained with {facts.experts_trained} experts per token, and {reason}"
        )
        yield launch.problem("experts", f"experts-{side}-range", message)


def _draft_vocabulary(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    draft, draft_facts = launch.draft, launch.draft_facts
    if draft is None or draft_facts is None:
        return
    why = None
    if facts.vocabulary is not None and draft_facts.vocabulary is not None:
        why = same_vocabulary(facts.vocabulary, draft_facts.vocabulary)
    elif abs(facts.vocabulary_tokens - draft_facts.vocabulary_tokens) > _VOCABULARY_DIFFERENCE:
        why = (
            f"its vocabulary has {draft_facts.vocabulary_tokens} tokens, the target's {facts.vocabulary_tokens}: more "
            f"than {_VOCABULARY_DIFFERENCE} apart"
        )
    if why is not None:
        message = (
            f"{draft.name!r} ({launch.where('path', draft.name)}) cannot guess for this model: {why}; take a draft of "
            "the same family"
        )
        yield launch.problem("speculation.draft", "draft-vocabulary", message)


_VOCABULARY_DIFFERENCE: Final = 128
"""Tokens by which the vocabularies of a pair may differ in llama.cpp: padding."""


def _draft_is_smaller(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    if launch.draft is None or launch.draft_facts is None:
        return
    if launch.draft_facts.recurrent is not None:
        message = f"{launch.draft.name!r} {launch.draft_facts.recurrent}: {_SPECULATION}; take another draft"
        yield launch.problem("speculation.draft", "draft-recurrent", message)
    if launch.draft_facts.parameters > facts.parameters:
        message = (
            f"{launch.draft.name!r} has {launch.draft_facts.parameters_b:.3g}B parameters, this model "
            f"{facts.parameters_b:.3g}B: a guess would cost more than an answer; exchange the two"
        )
        yield launch.problem("speculation.draft", "draft-size", message)


def _branching(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    if launch.draft is not None and facts.experts_total and (launch.entry.speculation.p_split or 0) > 0:
        message = (
            f"branching guesses help dense models only, and this one has {facts.experts_total} experts a layer; "
            "set 0, or remove the field"
        )
        yield launch.problem("speculation.p_split", "split-with-experts", message)


def _context(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    trained = facts.context_tokens
    if trained is not None and launch.entry.context_tokens > trained:
        message = f"{launch.entry.context_tokens} tokens a slot; the model was trained for {trained} at most"
        yield launch.problem("context_tokens", "context-over-trained", message)


def _shifted_cache(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    if launch.entry.cache_reuse and facts.recurrent is not None:
        message = f"the model {facts.recurrent}: such a state cannot be moved; set 0"
        yield launch.problem("cache_reuse", "recurrent-cache-reuse", message)


def _memory(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    need = launch.memory_bytes()
    if launch.hardware is None or need is None or need <= launch.hardware.memory_bytes:
        return
    entry = launch.entry
    caches = facts.kv_bytes(entry.context_tokens, entry.slots, entry.kv_type_k, entry.kv_type_v, entry.ubatch_tokens)
    message = (
        f"{entry.slots} slots of {entry.context_tokens} tokens take {caches:,} bytes of KV cache, {need:,} with the "
        f"weights, and the machine has {launch.hardware.memory_bytes:,}; lower this or slots, or set kv_type_k: q8_0"
    )
    yield launch.problem("context_tokens", "kv-over-memory", message)


def _as_declared(launch: Launch, facts: ModelFacts) -> Iterator[Problem]:
    declared = launch.entry.declared
    if declared is None:
        return
    kv = 2 * (facts.kv.full_k + facts.kv.full_v + facts.kv.window_k + facts.kv.window_v)
    found: tuple[tuple[str, object, object, float], ...] = (
        ("architecture", declared.architecture, facts.architecture, 0),
        ("parameters_b", declared.parameters_b, facts.parameters_b, 0.05),
        ("file_bytes", declared.file_bytes, facts.file_bytes, 0.02),
        ("context_tokens", declared.context_tokens, facts.context_tokens, 0),
        ("vocabulary_tokens", declared.vocabulary_tokens, facts.vocabulary_tokens, 0),
        ("kv_bytes_per_token", declared.kv_bytes_per_token, kv, 0.02),
        ("experts_trained", declared.experts_trained, facts.experts_trained, 0),
        ("experts_total", declared.experts_total, facts.experts_total, 0),
        ("recurrent", declared.recurrent, facts.recurrent is not None, 0),
    )
    for name, said, is_so, tolerance in found:
        if said == is_so or _close(said, is_so, tolerance):
            continue
        message = f"{said} is declared, and the file has {is_so}: another file, or a wrong line; repair one of them"
        yield launch.problem(f"declared.{name}", "declared-differs", message)


def _close(said: object, is_so: object, tolerance: float) -> bool:
    """Whether two numbers agree as far as a person rounds them."""
    if not isinstance(said, int | float) or not isinstance(is_so, int | float):
        return False
    return abs(said - is_so) <= tolerance * abs(is_so)


CONSTRAINTS: Final[tuple[Constraint, ...]] = (
    _as_declared,
    _experts,
    _draft_vocabulary,
    _draft_is_smaller,
    _branching,
    _context,
    _memory,
    _shifted_cache,
)
