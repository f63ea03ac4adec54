"""Entries whose model a server elsewhere has: what the rules refuse, where, and that no error repeats a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.kit.registry import Problem, Registry, RegistryError, load_registry
from services.scheduler.resources import NOTHING, Needs, inference_needs
from tests.fakes.gguf_files import write_tiny_gguf
from tests.unit.test_registry_rules import GOOD

REMOTE = """\
models:
  front:
    tier: A
    engine: openai
    base_url: https://gpu1.example:8000/v1
    remote_model: Qwen/Qwen3-32B
    api_key_env: GPU1_KEY
    slots: 8
    context_tokens: 8192
    remote: {dialect: vllm, probe_after_s: 1, ca_file: CA}
  worker:
    tier: C
    path: worker.gguf
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, text in GOOD.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "ca.pem").write_text("")
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "worker.gguf")
    (tmp_path / "models.yaml").write_text(REMOTE.replace("CA}", f"{tmp_path}/ca.pem}}"))
    return tmp_path


def load(folder: Path) -> Registry:
    return load_registry(folder, folder / "models")


def edit(folder: Path, old: str, new: str, file: str = "models.yaml") -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def refused(folder: Path) -> Problem:
    with pytest.raises(RegistryError) as caught:
        load(folder)
    (problem,) = caught.value.problems
    return problem


def test_a_remote_entry_needs_no_file_and_takes_no_core_here(folder: Path) -> None:
    registry = load(folder)
    assert registry.models["front"].path is None
    assert inference_needs(registry, "infer.front") is NOTHING
    assert inference_needs(registry, "infer.worker").cores == 1


def test_a_remote_entry_of_an_exclusive_group_takes_that_and_no_core(folder: Path) -> None:
    edit(folder, "slots: 8", "slots: 8\n    exclusive: heavy")
    assert inference_needs(load(folder), "infer.front") == Needs(shared_by="infer.front", group="heavy")


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "rule"),
    [
        ("slots: 8", "threads: 2", 8, "models.front.threads", "remote-fields"),
        ("slots: 8", "port: 9000", 8, "models.front.port", "remote-fields"),
        ("slots: 8", "speculation: {type: ngram-mod}", 8, "models.front.speculation", "remote-fields"),
        ("slots: 8", 'numa: {cores: "0-99"}', 8, "models.front.numa", "remote-fields"),
        ("slots: 8", "experts: 4", 8, "models.front.experts", "remote-fields"),
        ("slots: 8", "kv_type_k: q8_0", 8, "models.front.kv_type_k", "remote-fields"),
        ("slots: 8", "path: x.gguf", 8, "models.front.path", "remote-fields"),
        ("slots: 8", "binary: /bin/sh", 8, "models.front.binary", "engine-fields"),
        ("    base_url: https://gpu1.example:8000/v1\n", "", 2, "models.front", "remote-fields"),
        ("    remote_model: Qwen/Qwen3-32B\n", "", 2, "models.front", "remote-fields"),
        ("tier: C", "tier: C\n    base_url: https://x.example", 13, "models.worker.base_url", "remote-fields"),
        ("tier: C", "tier: C\n    api_key_env: KEY", 13, "models.worker.api_key_env", "remote-fields"),
        ("https://gpu1", "ftp://gpu1", 5, "models.front.base_url", "remote-url"),
        ("https://gpu1.example:8000/v1", "gpu1:8000", 5, "models.front.base_url", "remote-url"),
        ("https://gpu1.example:8000/v1", "https://:8000/v1", 5, "models.front.base_url", "remote-url"),
        ("https://gpu1.example:8000/v1", "https://gpu1:99999/v1", 5, "models.front.base_url", "remote-url"),
        ("https://gpu1.example:8000/v1", "http://10.0.0.999/v1", 5, "models.front.base_url", "remote-url"),
        ("https://gpu1.example:8000/v1", '"http://gpu1\\x7f/v1"', 5, "models.front.base_url", "remote-url"),
        ("probe_after_s: 1", "probe_after_s: 100", 10, "models.front.remote.probe_max_s", "remote-probe"),
        ("probe_after_s: 1", "proxy: socks9", 10, "models.front.remote.proxy", "remote-url"),
        ("ca.pem", "none.pem", 10, "models.front.remote.ca_file", "remote-ca"),
        ("dialect: vllm", "dialect: olama", 10, "models.front.remote.dialect", "literal_error"),
        ("dialect: vllm", "atempts: 3", 10, "models.front.remote.atempts", "extra_forbidden"),
    ],
)
def test_a_mistake_is_refused_at_its_line(folder: Path, old: str, new: str, line: int, field: str, rule: str) -> None:
    edit(folder, old, new)
    problem = refused(folder)
    assert (problem.line, problem.field, problem.rule) == (line, field, rule)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("api_key_env: GPU1_KEY", "api_key_env: sk-s3cret"),
        ("https://gpu1.example", "https://me:s3cret@gpu1.example"),
        ("/v1", "/v1?key=s3cret"),
        ("probe_after_s: 1", "proxy: 'http://me:s3cret@proxy.example'"),
    ],
)
def test_a_secret_in_the_registry_is_refused_and_not_repeated(folder: Path, old: str, new: str) -> None:
    edit(folder, old, new)
    assert "s3cret" not in str(refused(folder))


def test_sampling_that_the_server_will_not_be_told_is_noted(folder: Path) -> None:
    edit(
        folder, "prompt: Talk.", "prompt: Talk.\n    sampling: {top_k: 40, min_p: 0.0, temperature: 0.5}", "roles.yaml"
    )
    assert load(folder).notes == ()
    edit(folder, "dialect: vllm, ", "")
    (note,) = load(folder).notes
    assert (note.rule, note.field) == ("remote-sampling", "roles.talker.sampling")
    assert note.message.startswith("top_k cannot")
