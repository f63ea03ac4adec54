"""Tiny real GGUF files, for stacks whose engine is the fake: the header check reads them like any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter


def write_tiny_gguf(path: Path, *, architecture: str = "llama", context_tokens: int = 4096) -> Path:
    """Write a valid GGUF file of about 1 kB with one tensor; returns its path. llama.cpp itself cannot load it."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(context_tokens)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
