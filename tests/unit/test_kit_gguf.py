"""Headers of model files: what is read from them, and that no file can do more than be refused."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kit.gguf_facts import BLOCK_SIZES, command, facts_of, parsed, read_facts
from services.kit.gguf_header import BadHeader, Header, read_header
from services.kit.model_facts import KvShape, ModelFacts, Vocabulary, same_vocabulary
from tests.fakes.gguf_files import write_tiny_gguf
from tests.fakes.runnable_models import write_tiny_moe

MIB = 1024**2


def facts(path: Path) -> ModelFacts:
    return facts_of([read_header(path, BLOCK_SIZES)])


def test_tensors_have_the_sizes_that_the_reference_gives_them() -> None:
    """A newer package may know more types: one that is not in the table is no damage, see below."""
    reference = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    assert len(BLOCK_SIZES) > 30
    assert {kind: reference.get(kind) for kind in BLOCK_SIZES} == BLOCK_SIZES


def test_the_reader_starts_without_what_costs_more_than_reading(tmp_path: Path) -> None:
    """It runs at each launch of an engine, and `doctor` and `up` run it once for each model."""
    program = command(write_tiny_gguf(tmp_path / "m.gguf"))
    done = subprocess.run([program[0], "-X", "importtime", *program[1:]], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "services.kit.gguf_header" in imported
    assert not imported & {"gguf", "numpy", "pydantic"}


def test_it_reads_what_the_reference_reader_reads(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf")
    header, reader = read_header(path, BLOCK_SIZES), GGUFReader(path)
    assert header.tensors == len(reader.tensors)
    assert header.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    for key, value in header.values.items():
        told = reader.fields[key].contents()
        assert (list(value) if isinstance(value, tuple) else value) == told, key
    assert header.tokens is not None
    assert header.tokens.count == len(reader.fields["tokenizer.ggml.tokens"].contents())


def test_the_facts_of_a_mixture_of_experts(tmp_path: Path) -> None:
    found = read_facts(write_tiny_moe(tmp_path / "moe.gguf", experts_trained=8, experts_total=16))
    assert (found.architecture, found.experts_trained, found.experts_total) == ("llama", 8, 16)
    assert (found.context_tokens, found.vocabulary_tokens, found.recurrent) == (512, 285, None)
    assert found.kv == KvShape(full_k=2 * 64, full_v=2 * 64)


@pytest.mark.parametrize(
    ("architecture", "extra", "why"),
    [
        ("mamba", {}, "architecture mamba"),
        ("qwen3next", {}, "architecture qwen3next"),
        *(
            (name, {}, f"architecture {name}")
            for name in ("deepseek4", "bailingmoe3", "kimi-k3", "glm5-next", "qwen4exp")
        ),
        ("newfangled", {"ssm.state_size": 16}, "newfangled.ssm.state_size"),
        ("newfangled", {"wkv.head_size": 16}, "newfangled.wkv.head_size"),
        ("llama", {}, None),
    ],
)
def test_recurrent_models_are_known_by_architecture_and_by_metadata(
    tmp_path: Path, architecture: str, extra: dict[str, int], why: str | None
) -> None:
    found = facts(write_tiny_gguf(tmp_path / "m.gguf", architecture=architecture, extra=extra)).recurrent
    assert (found is None) == (why is None)
    assert why is None or (found is not None and why in found)


def test_a_split_model_counts_with_all_its_parts(tmp_path: Path) -> None:
    for number in (1, 2):
        write_tiny_gguf(tmp_path / f"big-0000{number}-of-00002.gguf", parameters=800)
    found = read_facts(tmp_path / "big-00001-of-00002.gguf")
    assert found.parameters == 1600
    assert found.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(OSError, match="big-00002"):
        read_facts(tmp_path / "big-00001-of-00002.gguf")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    first = read_facts(path)
    assert read_facts(path) is first
    write_tiny_gguf(path, context_tokens=99)
    assert read_facts(path).context_tokens == 99


def test_the_cache_has_a_size_for_full_windowed_and_recurrent_layers(tmp_path: Path) -> None:
    attention = {"attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 64}
    dense = facts(write_tiny_gguf(tmp_path / "a.gguf", extra={**attention, "attention.value_length": 32}))
    assert dense.kv == KvShape(full_k=128, full_v=64)
    # 1000 cells are rounded up to 1024; keys 128 and values 64 elements of two bytes; two slots
    assert dense.kv_bytes(1000, 2, "f16", "f16") == 2 * 1024 * (128 + 64) * 2
    assert dense.kv_bytes(1000, 1, "q8_0", "q4_0") == 1024 * 128 * 34 // 32 + 1024 * 64 * 18 // 32
    layers = [("gemma3", [0, 0, 0], 5, 1), ("llama", [1, 0, 1, 1, 1, 1], 5, 1), ("llama", [], 0, 6)]
    for number, (architecture, pattern, windowed, full) in enumerate(layers):
        path = tmp_path / f"{number}.gguf"
        extra = {**attention, "attention.value_length": 64, "attention.sliding_window": 512}
        if architecture == "llama" and pattern:
            extra["attention.sliding_window_pattern"] = pattern  # type: ignore[assignment]  # a list is meant
        found = facts(with_layers(path, architecture, 6, extra))
        assert (found.kv.window_k, found.kv.full_k) == (windowed * 128, full * 128)
        assert found.kv_bytes(4096, 1, "f16", "f16") == 2 * 256 * (full * 4096 + windowed * 1024)
    hybrid = facts(
        with_layers(
            tmp_path / "h.gguf",
            "qwen3next",
            8,
            {**attention, "attention.value_length": 64, "ssm.conv_kernel": 4, "ssm.inner_size": 32,
             "ssm.state_size": 16, "ssm.group_count": 2},
        )
    )  # fmt: skip
    assert hybrid.kv.full_k == 2 * 128  # every fourth layer has attention
    assert hybrid.kv.state_bytes == 6 * 4 * (3 * (32 + 2 * 2 * 16) + 32 * 16)


@pytest.mark.parametrize(
    ("architecture", "extra", "full", "state"),
    [
        # as the 7B one: attention and a state in each of 44 layers
        (
            "falcon-h1",
            {"attention.head_count": 12, "attention.head_count_kv": 2, "attention.key_length": 128,
             "ssm.conv_kernel": 4, "ssm.inner_size": 3072, "ssm.state_size": 256, "ssm.group_count": 1},
            44 * 2 * 128,
            44 * 4 * (3 * (3072 + 2 * 256) + 3072 * 256),
        ),
        # attention where heads are named; elsewhere three convolutions and one square a head
        (
            "kimi-linear",
            {"attention.head_count": 4, "attention.head_count_kv": [0, 0, 0, 1] * 11, "attention.key_length": 16,
             "kda.head_dim": 8, "ssm.conv_kernel": 4},
            11 * 16,
            33 * 4 * 4 * (3 * 3 * 8 + 8 * 8),
        ),
        # two shifted tokens where nothing is said, and one square a head; embedding_length is 8
        ("rwkv7", {"wkv.head_size": 4}, 0, 44 * 4 * 8 * (2 + 4)),
        ("rwkv6qwen2", {"wkv.head_size": 4, "token_shift_count": 1}, 0, 44 * 4 * 8 * (1 + 4)),
        (
            "lfm2",
            {"attention.head_count": 1, "attention.head_count_kv": [0, 1] * 22, "shortconv.l_cache": 3},
            22 * 8,
            22 * 4 * 8 * 2,
        ),
        # layers are attention, feed-forward or a state: as the 9B one begins, 44 layers of M-M-M-M*-M-...
        *(
            (
                architecture,
                {"attention.head_count": [0, 0, 0, 2] * 11, "attention.head_count_kv": [0, 0, 0, 1] * 11,
                 "feed_forward_length": [0, 96, 0, 0] * 11, "attention.key_length": 16, "attention.value_length": 16,
                 "ssm.conv_kernel": 4, "ssm.inner_size": 32, "ssm.state_size": 8, "ssm.group_count": 2},
                11 * 16,
                22 * 4 * (3 * (32 + 2 * 2 * 8) + 32 * 8),
            )
            for architecture in ("nemotron_h", "nemotron_h_moe")
        ),
        ("minimax-01", {"attention.head_count": 2, "attention.key_length": 4}, 5 * 2 * 4, 39 * 4 * 2 * 4 * 4),
        (
            "qwen3next",
            {"attention.head_count": 1, "attention.recurrent_layers": [True, False] * 22, "ssm.inner_size": 4,
             "ssm.state_size": 2},
            22 * 8,
            22 * 4 * 4 * 2,
        ),
    ],
)  # fmt: skip
def test_the_state_of_a_slot_is_counted_as_llama_cpp_lays_it_out(
    tmp_path: Path, architecture: str, extra: dict[str, int], full: int, state: int
) -> None:
    found = facts(with_layers(tmp_path / "m.gguf", architecture, 44, extra)).kv
    assert (found.full_k, found.state_bytes) == (full, state)


def with_layers(path: Path, architecture: str, layers: int, extra: dict[str, int]) -> Path:
    """A tiny file whose block_count is patched: the writer knows one layer only."""
    write_tiny_gguf(path, architecture=architecture, extra=extra)
    data = path.read_bytes()
    key = f"{architecture}.block_count".encode()
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", layers) + data[at + 4 :])
    return path


WORDS = [f"t{number}" for number in range(300)]


def vocabulary(tmp_path: Path, name: str, **fields: object) -> Vocabulary:
    found = facts(write_tiny_gguf(tmp_path / f"{name}.gguf", **fields)).vocabulary  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        ({}, None),
        ({"tokens": [*WORDS, *["pad"] * 128]}, None),  # one family pads its vocabularies differently
        ({"tokens": WORDS[:200]}, None),
        ({"tokens": ["other", *WORDS[1:]]}, None),  # the first five are not compared
        ({"tokens": [*WORDS, *["pad"] * 129]}, "more than 128 apart"),
        ({"tokens": [*WORDS[:150], "other", *WORDS[151:]]}, "tokens differ"),
        ({"tokens": [*WORDS[:299], "other"]}, "tokens differ"),
        ({"tokenizer": "gpt2"}, "tokenizer is gpt2"),
        ({"adds_bos": False}, "adds BOS: no"),
        ({"bos": 2}, "BOS token is 2"),
    ],
)
def test_a_draft_needs_the_vocabulary_of_its_target(tmp_path: Path, draft: dict[str, object], why: str | None) -> None:
    base = {"tokens": WORDS, "bos": 1, "adds_bos": True}
    found = same_vocabulary(vocabulary(tmp_path, "target", **base), vocabulary(tmp_path, "draft", **{**base, **draft}))
    assert (found is None) == (why is None), found
    assert why is None or (found is not None and why in found)


SPM, BPE, LLAMA3 = {"tokenizer": "llama"}, {"tokenizer": "gpt2"}, {"tokenizer": "gpt2", "pre": "llama-bpe"}


@pytest.mark.parametrize(
    ("target", "draft", "why"),
    [
        # what a file does not say is as llama.cpp takes it to be
        ({**SPM, "adds_bos": True}, SPM, None),
        ({**SPM, "bos": 1, "eos": 2, "adds_eos": True}, {**SPM, "adds_eos": True}, None),
        ({**SPM, "adds_bos": False}, SPM, "adds BOS: yes, the target: no"),
        ({**SPM, "bos": 5}, SPM, "BOS token is 1, the target's 5"),
        ({**SPM, "bos": 999}, SPM, None),  # beyond the vocabulary, so it is not taken
        ({**BPE, "adds_bos": False}, BPE, None),
        ({**BPE, "adds_bos": True}, BPE, "adds BOS: no"),
        ({**BPE, "pre": "qwen2"}, {**BPE, "adds_bos": False}, None),
        ({**LLAMA3, "adds_bos": True}, LLAMA3, None),
        ({**LLAMA3, "adds_bos": False}, LLAMA3, "adds BOS: yes"),
        ({**LLAMA3, "bos": 7}, {**LLAMA3, "bos": 8}, "BOS token is 8"),
        ({**BPE, "pre": "gemma4", "adds_bos": False, "bos": 2}, {**BPE, "pre": "gemma4", "bos": 2}, None),
        ({"tokenizer": "t5"}, {"tokenizer": "t5", "adds_eos": False}, "adds EOS: no, the target: yes"),
        ({"tokenizer": "newfangled"}, {"tokenizer": "newfangled", "adds_bos": False, "adds_eos": False}, None),
        # ids count where the token is added
        ({**BPE, "bos": 7}, {**BPE, "bos": 8}, None),
        ({**BPE, "eos": 7}, {**BPE, "eos": 8}, None),
        ({**BPE, "eos": 7, "adds_eos": True}, {**BPE, "eos": 8, "adds_eos": True}, "EOS token is 8, the target's 7"),
        ({**BPE, "adds_eos": True}, BPE, "adds EOS: no, the target: yes"),
    ],
)
def test_what_begins_and_ends_a_prompt_is_compared_as_llama_cpp_takes_it(
    tmp_path: Path, target: dict[str, object], draft: dict[str, object], why: str | None
) -> None:
    found = same_vocabulary(
        vocabulary(tmp_path, "target", **{"tokens": WORDS, **target}),
        vocabulary(tmp_path, "draft", **{"tokens": WORDS, **draft}),
    )
    assert (found is None) == (why is None), found
    assert why is None or (found is not None and why in found)


def cut(path: Path, size: int) -> Path:
    shorter = path.with_suffix(".cut")
    shorter.write_bytes(path.read_bytes()[:size])
    return shorter


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    for size in range(path.stat().st_size):
        with pytest.raises(BadHeader):
            read_header(cut(path, size), BLOCK_SIZES)


def test_a_type_of_tensor_that_only_llama_cpp_knows_is_no_damage(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    kind = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    path.write_bytes(data[:kind] + struct.pack("<I", 42) + data[kind + 4 :])
    assert 42 not in BLOCK_SIZES
    assert read_facts(path).parameters == 24
    begins_beyond = data[:kind] + struct.pack("<IQ", 42, 1 << 40) + data[kind + 12 :]
    path.write_bytes(begins_beyond)
    with pytest.raises(BadHeader, match="reaches byte"):
        read_header(path, BLOCK_SIZES)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HOSTILE = {
    "a list of lists": text(b"a") + struct.pack("<IIQ", 9, 9, 1 << 40),
    "more items than the bound": text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60),
    "items beyond the file": text(b"a") + struct.pack("<IIQ", 9, 12, 1 << 24),
    "a text beyond the bound": text(b"a") + struct.pack("<IQ", 8, 1 << 62),
    "an unknown type": text(b"a") + struct.pack("<I", 77),
    "a key twice": 2 * (text(b"a") + struct.pack("<II", 4, 1)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused_before_it_is_believed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2 if "twice" in name else 1) + HOSTILE[name] + bytes(64))
    with pytest.raises(BadHeader):
        read_header(path, BLOCK_SIZES)


@pytest.mark.parametrize("name", ["", "ll\0ama", "llama\n", "-llama", "x" * 65])
def test_an_architecture_that_is_no_name_is_refused_before_it_gets_into_a_command(tmp_path: Path, name: str) -> None:
    header = read_header(write_tiny_gguf(tmp_path / "m.gguf"), BLOCK_SIZES)
    header.values["general.architecture"] = name
    with pytest.raises(BadHeader, match="which is no name"):
        facts_of([header])


def test_what_an_installation_says_at_the_start_of_every_program_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stderr.write('watched by a profiler\\n')\n")
    path = write_tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read_facts(path).architecture == "llama"
    with pytest.raises(BadHeader, match="instead of the facts"):
        parsed(0, b"watched by a profiler")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_flipped_byte_does_more_than_be_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    path = GOOD.with_suffix(".flipped")
    path.write_bytes(data)
    try:
        header = read_header(path, BLOCK_SIZES)
    except BadHeader:
        return
    assert isinstance(header, Header)
    try:
        assert facts_of([header]).kv_bytes(4096, 4, "f16", "f16") >= 0
    except BadHeader:
        return


@pytest.fixture(scope="module", autouse=True)
def good(tmp_path_factory: pytest.TempPathFactory) -> None:
    global GOOD
    GOOD = write_tiny_moe(tmp_path_factory.mktemp("good") / "good.gguf")


GOOD = Path()


def test_a_damaged_file_is_refused_in_words_by_the_reader_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(BadHeader, match="breaks off at byte 200"):
        read_facts(cut(path, 200))
