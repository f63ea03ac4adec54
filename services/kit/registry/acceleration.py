"""What an operator may say about a model to make it faster: speculation, placement, and what the file is known to hold.

The classes here are parts of `ModelEntry`. They check one part by itself; whether it suits the model file is decided by
`constraints`, and which flags come of it by the command line of the inference service.
"""

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from services.kit.hardware import parse_cores
from services.kit.registry.entry import Entry, Name

Lookup: TypeAlias = Literal["ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod"]
"""Ways to draft from the text so far: repeat what followed the same n tokens before. No second model is needed."""

LOOKUPS: Final[frozenset[str]] = frozenset({"ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod"})

KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
"""Types llama.cpp can keep keys and values in."""


def core_list(text: str) -> str:
    """Return a list of cores as it was written. Raises ValueError where it is none."""
    parse_cores(text)
    return text


def _word(value: object) -> object:
    """YAML takes a bare on or off for true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


FlashAttention: TypeAlias = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]
Policy: TypeAlias = Annotated[Literal["auto", "always", "off"], BeforeValidator(_word)]

CoreList: TypeAlias = Annotated[str, StringConstraints(max_length=4_096), AfterValidator(core_list)]


class Speculation(Entry):
    """Tokens that are guessed cheaply and checked by the model in one pass. Helps one stream, hurts full batches."""

    type: Literal["none", "draft", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod"] = "none"
    """none, draft (a small model guesses) or a lookup: ngram-simple, ngram-map-k, ngram-map-k4v, ngram-mod."""
    draft: Name | None = None
    """Entry of tier D that guesses; for type draft. It needs the vocabulary of this model."""
    lookup: Lookup | None = None
    """A lookup beside the draft model; for type draft."""
    n_max: int | None = Field(default=None, ge=1, le=256)
    """Longest guess of the draft model, in tokens; absent = what is known to be good for the model's size."""
    n_min: int | None = Field(default=None, ge=0, le=256)
    """Shortest guess worth checking, in tokens; for draft and ngram-mod. Absent = llama.cpp's own."""
    p_min: float | None = Field(default=None, ge=0, le=1)
    """The draft model stops where its best token is less probable than this; absent = llama.cpp's own."""
    p_split: float | None = Field(default=None, ge=0, le=1)
    """Probability above which a guess branches; absent = llama.cpp's own for dense models, 0 for experts."""
    ngram_n: int | None = Field(default=None, ge=1, le=1_024)
    """Tokens that must be equal for a lookup; absent = llama.cpp's own."""
    ngram_m: int | None = Field(default=None, ge=1, le=1_024)
    """Tokens that a lookup then guesses; absent = llama.cpp's own."""
    policy: Policy = "auto"
    """auto = the process runs with speculation where its load calls for it; always; off = never, the rest stays."""

    @property
    def types(self) -> tuple[str, ...]:
        """What is used at the same time, drafts first; empty without speculation."""
        if self.type == "none":
            return ()
        return (self.type,) if self.lookup is None else (self.type, self.lookup)

    @property
    def loaded_draft(self) -> str | None:
        """The entry that the process loads to guess with; none while the policy is off."""
        return None if self.policy == "off" else self.draft

    @property
    def lookup_type(self) -> str | None:
        """The lookup in use, by itself or beside a draft model."""
        return self.lookup or (self.type if self.type in LOOKUPS else None)


class RecurrentSpeculation(Entry):
    """Leave to speculate with a recurrent or hybrid model, which crashes some builds after a few prompts."""

    allowed_builds: tuple[Annotated[str, StringConstraints(min_length=1, max_length=128)], ...] = ()
    """Builds on which it was tried, as `tierline models --explain NAME` names them; empty = none."""


class Numa(Entry):
    """The cores that a process may run on. Absent = all of the machine."""

    nodes: tuple[Annotated[int, Field(ge=0, le=1_023)], ...] = ()
    """Nodes of hardware.yaml, counted from 0, whose cores it may use."""
    cores: CoreList | None = None
    """Numbers of the cores, as text such as "0-23"; for a part of a node. Instead of nodes."""
    strategy: Literal["distribute", "isolate", "numactl"] | None = None
    """How llama.cpp spreads its threads over nodes; distribute for a model that needs the memory of several."""

    def core_numbers(self) -> tuple[int, ...]:
        """The numbers in `cores`, ascending; empty without."""
        return () if self.cores is None else parse_cores(self.cores)


class Declared(Entry):
    """What the model file holds, said where the file is absent; checked against the file where it is there."""

    architecture: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    """As in the file's general.architecture, such as qwen3moe."""
    parameters_b: float = Field(gt=0, le=100_000)
    """Parameters in billions."""
    file_bytes: int = Field(ge=1)
    """Size of the file, or of all parts together."""
    context_tokens: int = Field(ge=1)
    """Longest context that it was trained for."""
    vocabulary_tokens: int = Field(ge=1)
    """Tokens of its vocabulary."""
    kv_bytes_per_token: int = Field(ge=0)
    """Memory of one token in the KV cache with f16 keys and values, all layers together."""
    experts_trained: int | None = Field(default=None, ge=1)
    """Experts per token as trained; absent = a dense model."""
    experts_total: int | None = Field(default=None, ge=1)
    """Experts of a layer; absent = a dense model."""
    recurrent: bool = False
    """Whether it has recurrent layers, all (as Mamba) or some (a hybrid)."""
