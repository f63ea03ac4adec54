"""From a GGUF file to the facts that decide how its model may be run; read in a short-lived process of its own.

`python -m services.kit.gguf_facts PATH` prints the facts as JSON, bounded in time and memory, since the file may be
damaged or hostile. `read_facts` calls it and waits; the inference service calls it through its own probe instead, so
that its loop goes on. Both remember what they read until size or time of the file change.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from services.kit.gguf_header import BadHeader, Header, Tokens, Value, parts_of, read_header
from services.kit.model_facts import RECURRENT_ARCHITECTURES, RECURRENT_KEYS, KvShape, ModelFacts, Vocabulary

READ_TIMEOUT_S: Final = 60.0
"""A vocabulary of 250,000 tokens takes about half a second of an idle core."""

_MEMORY_BYTES: Final = 2 * 1024**3
_MAX_LAYERS: Final = 4_096
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

#: Elements and bytes of one block of each type of tensor, by its number; the package `gguf` has the same table. Asking
#: it took longer than reading a header, since numpy comes along.
BLOCK_SIZES: Final[Mapping[int, tuple[int, int]]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 40),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}

#: Every how many layers one keeps all tokens, in architectures whose files do not say so. A layer pattern in the file
#: comes first; for any other architecture all layers are counted as full, which is never too little.
_WINDOW_PERIODS: Final[Mapping[str, int]] = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}

#: Every how many layers one has attention, in hybrids whose files do not say so.
_ATTENTION_PERIODS: Final[Mapping[str, int]] = {
    "qwen3next": 4,
    "qwen35": 4,
    "qwen35moe": 4,
    "qwen4exp": 4,
    "minimax-01": 8,
}

#: Hybrids with attention and a state in every layer; the others have one of both.
_BOTH_IN_EVERY_LAYER: Final = frozenset({"falcon-h1"})

#: Hybrids whose feed-forward parts are layers of their own, with neither. The source is their load_arch_hparams
#: in llama.cpp: a layer has a state if it has no heads for keys and no feed-forward width.
_FEED_FORWARD_APART: Final = frozenset({"nemotron_h", "nemotron_h_moe"})


@dataclass(frozen=True, slots=True)
class _Unsaid:
    """What llama.cpp takes where a file is silent about the tokens that begin and end a text."""

    bos: int | None = None
    eos: int | None = None
    adds_bos: bool = False
    adds_eos: bool = False


#: By tokenizer.ggml.model. The source is llama.cpp's llama_vocab::impl::load, as is that of the two sets below.
_UNSAID: Final[Mapping[str, _Unsaid]] = {
    "llama": _Unsaid(bos=1, eos=2, adds_bos=True),
    "bert": _Unsaid(bos=101, adds_bos=True),
    "gpt2": _Unsaid(bos=11, eos=11),
    "hybriddna": _Unsaid(bos=11, eos=11),
    "whitespace": _Unsaid(bos=11, eos=11),
    "t5": _Unsaid(eos=1, adds_eos=True),
    "plamo2": _Unsaid(bos=1, eos=2),
}
_SPLIT_BEFORE: Final = frozenset({"gpt2", "hybriddna", "whitespace", "gemma4"})
"""Tokenizers for which tokenizer.ggml.pre counts."""
_PRE_ADDS_BOS: Final = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon"),
    }
)
_PRE_ALWAYS_ADDS_BOS: Final = frozenset({"gemma4", "granite-embed-multi-311m"})
"""Whatever the file says."""

Stamp: TypeAlias = tuple[tuple[int, int, int, int], ...]


def stamp(path: Path) -> Stamp:
    """What changes when one of a model's files is replaced. Raises OSError where one is missing."""
    stats = (part.stat() for part in parts_of(path))
    return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def command(path: Path) -> list[str]:
    """The program that prints the facts of a file."""
    return [sys.executable, "-m", __name__ if __name__ != "__main__" else "services.kit.gguf_facts", str(path)]


def parsed(status: int, output: bytes) -> ModelFacts:
    """The facts that the program printed. Raises BadHeader with what it said instead.

    They are its last line: whatever an installation says at the start of each Python program stands before it.
    """
    said = output.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if status != 0:
        raise BadHeader(said[:300] or f"its header made the reader end with status {status}")
    try:
        data: dict[str, Any] = json.loads(said)
    except ValueError as err:
        raise BadHeader(f"its reader said {said[:300]!r} instead of the facts") from err
    words = data.pop("vocabulary")
    if words is not None:
        words = Vocabulary(**{**words, "digests": tuple(words["digests"])})
    return ModelFacts(**{**data, "kv": KvShape(**data["kv"]), "vocabulary": words})


_KNOWN: dict[Stamp, ModelFacts] = {}
"""Bounded by the models of a registry: only the commands of an operator, which end soon, read through it."""


def read_facts(path: Path) -> ModelFacts:
    """The facts of a model file, with all its parts. Raises BadHeader, and OSError where a part cannot be opened."""
    now = stamp(path)
    if now in _KNOWN:
        return _KNOWN[now]
    try:
        done = subprocess.run(
            command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=READ_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise BadHeader(f"its header could not be read within {READ_TIMEOUT_S:g} s") from err
    facts = parsed(done.returncode, done.stdout)
    _KNOWN[now] = facts
    return facts


def facts_of(headers: list[Header]) -> ModelFacts:
    """Facts of a model from the headers of its parts, in their order. Raises BadHeader where one is no model."""
    first = headers[0]
    values = first.values
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise BadHeader("the header has no field general.architecture")
    if not _ARCHITECTURE.fullmatch(architecture):  # it becomes part of a command line and of messages
        raise BadHeader(f"general.architecture is {architecture[:64]!r}, which is no name")
    if not any(header.tensors for header in headers):
        raise BadHeader("the header lists no tensors")
    recurrent = _recurrent(architecture, values)
    words = first.tokens
    return ModelFacts(
        architecture=architecture,
        parameters=sum(header.parameters for header in headers),
        file_bytes=sum(header.file_bytes for header in headers),
        context_tokens=_number(values, f"{architecture}.context_length"),
        vocabulary_tokens=words.count if words is not None else 0,
        kv=_kv_shape(architecture, values, hybrid=recurrent is not None),
        experts_trained=_number(values, f"{architecture}.expert_used_count") or None,
        experts_total=_number(values, f"{architecture}.expert_count") or None,
        recurrent=recurrent,
        vocabulary=None if words is None else _vocabulary(words, values),
    )


def _vocabulary(words: Tokens, values: Mapping[str, Value]) -> Vocabulary:
    tokenizer = str(values.get("tokenizer.ggml.model", "none"))
    pre = values.get("tokenizer.ggml.pre") if tokenizer in _SPLIT_BEFORE else None
    if tokenizer == "gemma4":
        pre = "gemma4"
    unsaid = _UNSAID.get(tokenizer, _Unsaid())
    adds_bos, adds_eos = _flag(values, "tokenizer.ggml.add_bos_token"), _flag(values, "tokenizer.ggml.add_eos_token")
    if adds_bos is None:
        adds_bos = unsaid.adds_bos or pre in _PRE_ADDS_BOS
    return Vocabulary(
        tokens=words.count,
        tokenizer=tokenizer,
        digests=words.digests,
        bos=_token(words, _number(values, "tokenizer.ggml.bos_token_id"), unsaid.bos),
        eos=_token(words, _number(values, "tokenizer.ggml.eos_token_id"), unsaid.eos),
        adds_bos=adds_bos or pre in _PRE_ALWAYS_ADDS_BOS,
        adds_eos=unsaid.adds_eos if adds_eos is None else adds_eos,
    )


def _token(words: Tokens, said: int | None, unsaid: int | None) -> int | None:
    """The first of both that the vocabulary has."""
    return next((token for token in (said, unsaid) if token is not None and token < words.count), None)


def _recurrent(architecture: str, values: Mapping[str, Value]) -> str | None:
    if architecture in RECURRENT_ARCHITECTURES:
        return f"is of the recurrent or hybrid architecture {architecture}"
    key = next((key for key in values if any(part in key for part in RECURRENT_KEYS)), None)
    return None if key is None else f"has recurrent layers (its metadata has {key})"


def _kv_shape(architecture: str, values: Mapping[str, Value], *, hybrid: bool) -> KvShape:
    def number(name: str) -> int:
        return _number(values, f"{architecture}.{name}") or 0

    layers = min(number("block_count"), _MAX_LAYERS)
    heads = max(_per_layer(values, f"{architecture}.attention.head_count", layers, 0), default=0)
    kv_heads = _per_layer(values, f"{architecture}.attention.head_count_kv", layers, heads)
    size = number("embedding_length") // heads if heads else 0
    key, value = number("attention.key_length") or size, number("attention.value_length") or size
    window = number("attention.sliding_window")
    windowed = list(_windowed(architecture, values, layers)) if window else [False] * layers
    attends = _attends(architecture, values, layers)
    attention = [count if own else 0 for count, own in zip(kv_heads, attends, strict=True)]
    full = sum(count for count, short in zip(attention, windowed, strict=True) if not short)
    short = sum(attention) - full
    state = 0
    if hybrid:
        with_state = layers if architecture in _BOTH_IN_EVERY_LAYER else attention.count(0)
        if architecture in _FEED_FORWARD_APART:
            widths = _per_layer(values, f"{architecture}.feed_forward_length", layers, 0)
            with_state = sum(1 for count, width in zip(attention, widths, strict=True) if count == width == 0)
        state = 4 * with_state * _state_elements(architecture, number, heads, key)  # in f32, whatever kv_type says
    return KvShape(full * key, full * value, short * key, short * value, window if short else 0, state)


def _state_elements(architecture: str, number: Callable[[str], int], heads: int, key: int) -> int:
    """Elements of the state of one slot in one layer: what moves along (a convolution or shifted tokens), and the
    state proper. The source is llama.cpp's llama_hparams::n_embd_r and n_embd_s.
    """
    width, kernel = number("embedding_length"), number("ssm.conv_kernel")
    if head := number("wkv.head_size"):
        return width * ((number("token_shift_count") or 2) + head)
    if cached := number("shortconv.l_cache"):
        return width * (cached - 1)
    if head := number("kda.head_dim"):
        return heads * head * (3 * (kernel - 1 if kernel else 3) + head)
    if architecture == "minimax-01":
        return heads * key * key
    inner, states = number("ssm.inner_size"), number("ssm.state_size")
    return max(kernel - 1, 0) * (inner + 2 * number("ssm.group_count") * states) + inner * states


def _attends(architecture: str, values: Mapping[str, Value], layers: int) -> list[bool]:
    """Which layers may have attention; `head_count_kv` says further ones that have not."""
    if (key := f"{architecture}.attention.recurrent_layers") in values:
        return [not recurrent for recurrent in _per_layer(values, key, layers, 0)]
    period = _number(values, f"{architecture}.full_attention_interval") or _ATTENTION_PERIODS.get(architecture, 1)
    return [(layer + 1) % period == 0 for layer in range(layers)]


def _windowed(architecture: str, values: Mapping[str, Value], layers: int) -> Iterator[bool]:
    said = values.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(said, tuple) and len(said) >= layers:
        yield from (bool(item) for item in said[:layers])
        return
    period = said if isinstance(said, int) and said > 0 else _WINDOW_PERIODS.get(architecture, 1)
    yield from (layer % period < period - 1 for layer in range(layers))


def _per_layer(values: Mapping[str, Value], key: str, layers: int, default: int) -> list[int]:
    """A number that a file gives once for all layers or one by one."""
    value = values.get(key)
    if isinstance(value, tuple):
        items = [int(item) for item in value[:layers] if 0 <= item < 2**31]
        return [*items, *[default] * (layers - len(items))]
    return [int(value) if isinstance(value, int) and 0 <= value < 2**31 else default] * layers


def _number(values: Mapping[str, Value], key: str) -> int | None:
    value = values.get(key)
    if isinstance(value, tuple):
        value = max(value, default=None)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _flag(values: Mapping[str, Value], key: str) -> bool | None:
    value = values.get(key)
    return value if isinstance(value, bool) else None


def main(path: Path) -> int:
    """Print the facts of a model as JSON, or what is wrong with its file and end with 1."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        facts = facts_of([read_header(part, BLOCK_SIZES) for part in parts_of(path)])
    except (BadHeader, OSError, MemoryError) as err:
        sys.stdout.write(f"{err or 'it asks for more memory than a header needs'}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(facts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
