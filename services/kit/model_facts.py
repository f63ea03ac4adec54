"""What the metadata of a model file says that decides how the model may be run, and the memory that follows from it.

The facts come from the header of a GGUF file (`services.kit.gguf_header`) or, on a machine without the file, from what
the registry declares. A fact that nobody knows is None. What is allowed with them is decided by the registry's rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

#: Architectures that keep a state instead of a KV cache in every layer (Mamba, RWKV) or in some (hybrids), as llama.cpp
#: names them. A file of an architecture that is not listed here counts too if it has metadata such as `*.ssm.*`.
RECURRENT_ARCHITECTURES: Final = frozenset(
    {
        *("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"),
        *("jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe"),
        *("qwen3next", "qwen35", "qwen35moe", "qwen4exp", "kimi-linear", "kimi-k3", "glm5-next", "bailingmoe3"),
        *("minimax-01", "deepseek4"),
    }
)

#: Parts of metadata keys by which a file says that it has recurrent layers.
RECURRENT_KEYS: Final = (".ssm.", ".wkv.", ".shortconv.", ".kda.", ".recurrent_layers")

#: Bytes and elements of one block of a type of the KV cache.
KV_BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}

_CELL_STEP: Final = 256
"""llama.cpp rounds the cells of a cache up to a multiple of this."""

_UBATCH_TOKENS: Final = 512
"""llama.cpp's own number of tokens computed at once."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What two models must have in common for one to draft for the other."""

    tokens: int
    tokenizer: str
    """The metadata's tokenizer.ggml.model."""
    digests: tuple[str, ...]
    """sha256 (shortened) over the tokens from number 5 on, up to the whole vocabulary (first) and up to 1, 2, …, 128
    tokens less. llama.cpp compares no more: vocabularies of one family differ in padding and in the first tokens."""
    bos: int | None
    """Tokens that begin and end a text, and whether a prompt gets them: as llama.cpp takes it, also where the file is
    silent."""
    eos: int | None
    adds_bos: bool
    adds_eos: bool


@dataclass(frozen=True, slots=True)
class KvShape:
    """Elements that one token takes in the KV cache: layers that keep all tokens and layers that keep a window."""

    full_k: int
    full_v: int
    window_k: int = 0
    window_v: int = 0
    window_tokens: int = 0
    state_bytes: int = 0
    """Recurrent state of one slot, all layers together."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model, from its file or as declared."""

    architecture: str
    parameters: int
    file_bytes: int
    """All parts of a split model together."""
    context_tokens: int | None
    """Longest context that it was trained for."""
    vocabulary_tokens: int
    kv: KvShape
    experts_trained: int | None = None
    """Experts per token; None = a dense model."""
    experts_total: int | None = None
    recurrent: str | None = None
    """Why it counts as recurrent or hybrid, in words; None = it does not."""
    vocabulary: Vocabulary | None = field(default=None, repr=False)
    """None where the registry declares the model without its file."""

    @property
    def parameters_b(self) -> float:
        """Parameters in billions."""
        return self.parameters / 1e9

    def kv_bytes(
        self, context_tokens: int, slots: int, type_k: str, type_v: str, ubatch_tokens: int | None = None
    ) -> int:
        """Memory of the KV caches of all slots, and of recurrent states, as llama.cpp allocates them.

        Each slot has a cache of its own: `context_tokens` cells rounded up to 256; layers with a sliding window keep
        the window and one computed batch. The source is llama.cpp's llama_kv_cache and llama_kv_cache_iswa.
        """
        cells = _rounded_up(context_tokens)
        window = min(cells, _rounded_up(self.kv.window_tokens + (ubatch_tokens or _UBATCH_TOKENS)))
        k = cells * self.kv.full_k + window * self.kv.window_k
        v = cells * self.kv.full_v + window * self.kv.window_v
        return slots * (_type_bytes(k, type_k) + _type_bytes(v, type_v) + self.kv.state_bytes)


def _rounded_up(cells: int) -> int:
    return -(-cells // _CELL_STEP) * _CELL_STEP


def _type_bytes(elements: int, kv_type: str) -> int:
    block_bytes, block_elements = KV_BLOCKS[kv_type]
    return elements * block_bytes // block_elements


def same_vocabulary(target: Vocabulary, draft: Vocabulary) -> str | None:
    """Return why one model cannot draft for the other, None if it can; llama.cpp asks for the same."""
    if target.tokenizer != draft.tokenizer:
        return f"its tokenizer is {draft.tokenizer}, the target's {target.tokenizer}"
    less = abs(target.tokens - draft.tokens)
    longer, shorter = (target, draft) if target.tokens >= draft.tokens else (draft, target)
    if less >= len(longer.digests):
        return f"its vocabulary has {draft.tokens} tokens, the target's {target.tokens}: more than 128 apart"
    if longer.digests[less] != shorter.digests[0]:
        return f"the tokens differ: digest {draft.digests[0]} of its vocabulary, {target.digests[0]} of the target's"
    for name, adds, ids in (
        ("BOS", (target.adds_bos, draft.adds_bos), (target.bos, draft.bos)),
        ("EOS", (target.adds_eos, draft.adds_eos), (target.eos, draft.eos)),
    ):
        if adds[0] != adds[1]:
            return f"it adds {name}: {_told(adds[1])}, the target: {_told(adds[0])}"
        # A token that nobody adds to a prompt may differ, as the end of a base model and of its chat model do.
        if adds[0] and ids[0] != ids[1]:
            return f"its {name} token is {ids[1]}, the target's {ids[0]}"
    return None


def _told(adds: bool) -> str:
    return "yes" if adds else "no"
