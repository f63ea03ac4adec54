"""The copy of the demo model that runs: same metadata, same weights but for the rounding of Q8_0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from services.kit.config import CHECKOUT

Q4_1, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0


def write(path: Path, norm: npt.NDArray[np.float32]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_file_type(3)
    writer.add_token_list(["a", "ü", "<end>"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_chat_template("{{ messages }}")
    weights = np.random.default_rng(3).normal(size=(4, len(norm))).astype(np.float32)
    writer.add_tensor("blk.0.attn_q.weight", quantize(weights, Q4_1), raw_dtype=Q4_1)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_stays_and_weights_are_those_of_the_source_to_the_rounding_of_q8_0(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    norm = np.linspace(0.5, 2, 64, dtype=np.float32)
    write(source, norm)
    subprocess.run([sys.executable, CHECKOUT / "deploy" / "requantize.py", source, target], timeout=120, check=True)
    before, after = GGUFReader(source), GGUFReader(target)
    told, kept = ({name: field.contents() for name, field in one.fields.items()} for one in (before, after))
    assert (told.pop("general.file_type"), kept.pop("general.file_type")) == (3, 7), "mostly Q4_1, mostly Q8_0"
    assert kept == told
    first, plain = after.tensors
    assert (first.name, first.tensor_type) == ("blk.0.attn_q.weight", Q8_0)
    assert np.array_equal(plain.data, norm)
    weights = dequantize(before.tensors[0].data, Q4_1)
    assert np.abs(dequantize(first.data, Q8_0) - weights).max() < 0.51 * np.abs(weights).max() / 127
