"""Tiny real GGUF files, for stacks with a fake engine and for the rules about metadata; llama.cpp cannot load them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

TOKENS = ["<unk>", "<s>", "</s>"]


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    context_tokens: int = 4096,
    tokens: Sequence[str] = TOKENS,
    parameters: int = 24,
    tokenizer: str = "llama",
    pre: str | None = None,
    bos: int | None = None,
    adds_bos: bool | None = None,
    eos: int | None = None,
    adds_eos: bool | None = None,
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
    if eos is not None:
        writer.add_eos_token_id(eos)
    if adds_eos is not None:
        writer.add_add_eos_token(adds_eos)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, value in (extra or {}).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((parameters // 8, 8), dtype=np.float32))
    return written(writer, path)


def written(writer: GGUFWriter, path: Path) -> Path:
    """Write out everything and close."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
