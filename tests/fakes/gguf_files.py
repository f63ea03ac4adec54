"""Tiny real GGUF files: for stacks with a fake engine, for the rules about metadata, and one that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

TOKENS = ["<unk>", "<s>", "</s>"]


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    context_tokens: int = 4096,
    tokens: Sequence[str] = TOKENS,
    parameters: int = 24,
    tokenizer: str = "llama",
    bos: int | None = None,
    adds_bos: bool | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a valid GGUF file with one tensor of so many parameters; returns its path. llama.cpp itself cannot load it.

    `extra` holds further metadata without the architecture's name: {"expert_count": 8, "ssm.state_size": 16}.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(context_tokens)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    for key, value in (extra or {}).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((parameters // 8, 8), dtype=np.float32))
    return _written(writer, path)


def write_tiny_moe(path: Path, *, experts_trained: int = 8, experts_total: int = 16, seed: int = 1) -> Path:
    """Write a mixture-of-experts model of random weights that llama.cpp runs; the same seed gives the same weights.

    Its answers are noise, and at temperature 0 the same noise every time, which depends on the experts per token.
    """
    draw = np.random.default_rng(seed)
    width, heads, hidden, layers = 64, 4, 32, 2
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_expert_count(experts_total)
    writer.add_expert_used_count(experts_trained)
    letters = [f"\N{LOWER ONE EIGHTH BLOCK}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [*TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * len(letters)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def weights(name: str, *shape: int) -> None:
        values = draw.normal(0, 1.0 if "embd" in name else 0.3, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)

    weights("token_embd", len(words), width)
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights(f"blk.{layer}.{part}", width, width)
        weights(f"blk.{layer}.ffn_gate_inp", experts_total, width)
        weights(f"blk.{layer}.ffn_gate_exps", experts_total, hidden, width)
        weights(f"blk.{layer}.ffn_up_exps", experts_total, hidden, width)
        weights(f"blk.{layer}.ffn_down_exps", experts_total, width, hidden)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    weights("output", len(words), width)
    return _written(writer, path)


def _written(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
