"""Tiny models of random weights that llama.cpp really runs: a mixture of experts, one with sliding windows, a Mamba.

Their answers are noise, and at temperature 0 the same noise every time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from tests.fakes.gguf_files import TOKENS, written

_WIDTH = 64
_LETTERS = [f"\N{LOWER ONE EIGHTH BLOCK}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


class _Model:
    """A writer with a vocabulary of bytes and letters, and a source of weights."""

    def __init__(self, path: Path, architecture: str, layers: int, *, context_tokens: int, seed: int) -> None:
        self.path = path
        self._draw = np.random.default_rng(seed)
        self.writer = writer = GGUFWriter(path, architecture)
        writer.add_context_length(context_tokens)
        writer.add_embedding_length(_WIDTH)
        writer.add_block_count(layers)
        words = [*TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS]
        kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words)
        writer.add_token_scores([0.0] * len(words))
        writer.add_token_types(kinds + [TokenType.NORMAL] * len(_LETTERS))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        self.weights("token_embd.weight", len(words), _WIDTH, spread=1.0)
        self.ones("output_norm.weight", _WIDTH)
        self.vocabulary = len(words)

    def weights(self, name: str, *shape: int, spread: float = 0.3) -> None:
        self.writer.add_tensor(name, self._draw.normal(0, spread, shape).astype(np.float32))

    def ones(self, name: str, *shape: int) -> None:
        self.writer.add_tensor(name, np.ones(shape, dtype=np.float32))

    def write(self) -> Path:
        return written(self.writer, self.path)


def write_tiny_moe(path: Path, *, experts_trained: int = 8, experts_total: int = 16, seed: int = 1) -> Path:
    """Write a mixture of experts; its answers depend on the experts per token, its weights on the seed alone."""
    heads, hidden, layers = 4, 32, 2
    model = _Model(path, "llama", layers, context_tokens=512, seed=seed)
    model.writer.add_feed_forward_length(hidden)
    model.writer.add_head_count(heads)
    model.writer.add_head_count_kv(heads)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(_WIDTH // heads)
    model.writer.add_expert_count(experts_total)
    model.writer.add_expert_used_count(experts_trained)
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            model.weights(f"blk.{layer}.{part}.weight", _WIDTH, _WIDTH)
        model.weights(f"blk.{layer}.ffn_gate_inp.weight", experts_total, _WIDTH)
        model.weights(f"blk.{layer}.ffn_gate_exps.weight", experts_total, hidden, _WIDTH)
        model.weights(f"blk.{layer}.ffn_up_exps.weight", experts_total, hidden, _WIDTH)
        model.weights(f"blk.{layer}.ffn_down_exps.weight", experts_total, _WIDTH, hidden)
        for norm in ("attn_norm", "ffn_norm"):
            model.ones(f"blk.{layer}.{norm}.weight", _WIDTH)
    model.weights("output.weight", model.vocabulary, _WIDTH)
    return model.write()


def write_tiny_windowed(path: Path) -> Path:
    """Write a model with a sliding window of 512 tokens in six of its seven layers."""
    heads, kv_heads, head, hidden, layers = 4, 2, 32, 64, 7
    model = _Model(path, "gemma3", layers, context_tokens=8192, seed=1)
    model.writer.add_feed_forward_length(hidden)
    model.writer.add_head_count(heads)
    model.writer.add_head_count_kv(kv_heads)
    model.writer.add_key_length(head)
    model.writer.add_value_length(head)
    model.writer.add_layer_norm_rms_eps(1e-6)
    model.writer.add_sliding_window(512)
    shapes = {
        "attn_q": (heads * head, _WIDTH),
        "attn_k": (kv_heads * head, _WIDTH),
        "attn_v": (kv_heads * head, _WIDTH),
        "attn_output": (_WIDTH, heads * head),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "ffn_gate": (hidden, _WIDTH),
        "ffn_up": (hidden, _WIDTH),
        "ffn_down": (_WIDTH, hidden),
        **dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (_WIDTH,)),
    }
    for layer in range(layers):
        for part, shape in shapes.items():
            model.weights(f"blk.{layer}.{part}.weight", *shape)
    return model.write()


def write_tiny_mamba(path: Path) -> Path:
    """Write a model without attention, which keeps a state instead of a cache."""
    inner, kernel, state, rank, layers = 128, 4, 16, 4, 3
    model = _Model(path, "mamba", layers, context_tokens=8192, seed=1)
    model.writer.add_feed_forward_length(0)
    model.writer.add_head_count(0)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_ssm_conv_kernel(kernel)
    model.writer.add_ssm_inner_size(inner)
    model.writer.add_ssm_state_size(state)
    model.writer.add_ssm_time_step_rank(rank)
    shapes = {
        "attn_norm.weight": (_WIDTH,),
        "ssm_in.weight": (2 * inner, _WIDTH),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (_WIDTH, inner),
    }
    for layer in range(layers):
        for part, shape in shapes.items():
            model.weights(f"blk.{layer}.{part}", *shape)
    return model.write()
