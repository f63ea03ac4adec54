"""What the registry says about speed reaches a real llama.cpp, and what the file forbids never starts."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.messages.infer import InferFinal, Sampling
from services.ctl.bench.demo_models import DEMO_MODEL
from services.inference.engines import NativeEngine
from services.kit.config import load_home
from services.kit.gguf_facts import read_facts
from tests.fakes.gguf_files import write_tiny_gguf
from tests.fakes.runnable_models import write_tiny_mamba, write_tiny_moe, write_tiny_windowed
from tests.system.inference_stack import CHECKOUT, FAKE_BINARY, InferenceStack, ask_for
from tests.system.test_inference_real import native_binary
from tests.unit.test_inference_command_line import DRAFT, EVERYTHING, MOE, launch
from tests.waiting import until

MIB = 1024**2


@pytest.fixture
def stack():
    with InferenceStack() as running:
        yield running


@pytest.fixture
def binary() -> str:
    found = native_binary()
    if found is None:
        pytest.skip("no llama-server: run deploy/build-native, or set TIERLINE_TEST_LLAMA_SERVER")
    return found


@pytest.fixture
def demo() -> Path:
    model = load_home().models / DEMO_MODEL
    if not model.is_file():
        pytest.skip(f"no demo model at {model}: run deploy/fetch-model, or set TIERLINE_CACHE")
    return model


def child(stack: InferenceStack, name: str) -> psutil.Process:
    return psutil.Process(stack.figures(name)["child_pid"])


def completion(command: list[str], env: dict[str, str], prompt: str, **fields: Any) -> dict[str, Any]:
    """Ask a child directly, as its service does: port from its command line, key from its environment."""
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}/completion"
    key = {"authorization": f"Bearer {env['LLAMA_API_KEY']}"}
    transport = httpx.HTTPTransport(retries=8)  # of connecting, with growing pauses: it may have just been started
    with httpx.Client(transport=transport, headers=key, timeout=200) as client:
        for _ in range(500):
            answer = client.post(url, json={"prompt": prompt, "temperature": 0, **fields})
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # the model is loading
                break
            time.sleep(0.2)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_fewer_experts_reach_the_process_and_change_what_it_computes(stack: InferenceStack, binary: str) -> None:
    """The same weights trained with 8, overridden to 4, and trained with 4: the last two answer alike."""
    files = {
        trained: write_tiny_moe(stack.models / f"moe{trained}.gguf", experts_trained=trained) for trained in (8, 4)
    }
    fields = {"engine": "llama-server", "binary": binary, "context_tokens": 256}
    stack.entry("as-trained", path=str(files[8]), **fields)
    stack.entry("reduced", path=str(files[8]), experts=4, **fields)
    stack.entry("trained-so", path=str(files[4]), **fields)
    answers: dict[str, list[str]] = {}
    for name in ("as-trained", "reduced", "trained-so"):
        stack.start(name)
        stack.hub.await_peer(f"inference-{name}")
        final = stack.ask(name, ask_for("a b c d e", max_tokens=24, sampling=Sampling(temperature=0, seed=1)))
        assert isinstance(final, InferFinal), final
        command, env = child(stack, name).cmdline(), child(stack, name).environ()
        texts = [completion(command, env, prompt, n_predict=24)["content"] for prompt in ("a b c", "x y", "k l")]
        answers[name] = [final.text, *texts]
    assert answers["reduced"] == answers["trained-so"]
    assert answers["reduced"] != answers["as-trained"]
    command = child(stack, "reduced").cmdline()
    assert command[command.index("--override-kv") + 1] == "llama.expert_used_count=int:4"


@pytest.mark.parametrize("engine", ["llama-server", "embedded"])
def test_a_draft_pair_and_a_lookup_really_guess(
    stack: InferenceStack, demo: Path, request: pytest.FixtureRequest, engine: str
) -> None:
    fields: dict[str, Any] = {"path": str(demo), "context_tokens": 1024, "engine": engine}
    if engine == "llama-server":
        fields["binary"] = request.getfixturevalue("binary")
    stack.entry("pair", **fields, speculation={"type": "draft", "draft": "small", "policy": "always"})
    stack.entry(
        "lookup", **fields, speculation={"type": "ngram-simple", "ngram_n": 3, "ngram_m": 8, "policy": "always"}
    )
    stack.entry("plain", **fields)
    stack.entry("small", tier="D", path=str(demo), engine=engine)
    timings = {}
    for name in ("pair", "lookup", "plain"):
        service = stack.start(name)
        stack.hub.await_peer(f"inference-{name}")
        assert isinstance(stack.ask(name, ask_for("a b c d", max_tokens=8)), InferFinal)
        # A service replaces a child whose slot is busy for nobody: what it started is started once more without it.
        command, env = child(stack, name).cmdline(), child(stack, name).environ()
        del stack.hub.peers[f"inference-{name}"]
        service.terminate()
        service.wait(60)
        if "--slot-save-path" in command:  # the service took its saved slots along
            Path(command[command.index("--slot-save-path") + 1]).mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(command, env=env, cwd=CHECKOUT, stderr=subprocess.DEVNULL) as server:
            try:
                timings[name] = completion(command, env, f"{'a b c d e f g ' * 3}a b c", n_predict=60)["timings"]
            finally:
                server.kill()
    assert timings["pair"]["draft_n"] > 0
    # A model agrees with itself, but for rounding: one token at a time or several makes a difference in the last bits.
    assert timings["pair"]["draft_n_accepted"] > 0.8 * timings["pair"]["draft_n"]
    assert timings["lookup"]["draft_n"] > 0
    assert "draft_n" not in timings["plain"]


def test_a_process_is_bound_to_its_cores(stack: InferenceStack) -> None:
    core = min(psutil.Process().cpu_affinity())
    stack.entry("bound", engine="llama-server", binary=str(FAKE_BINARY), numa={"cores": str(core)})
    stack.start("bound")
    stack.hub.await_peer("inference-bound")
    assert child(stack, "bound").cpu_affinity() == [core]


def fake_pair(stack: InferenceStack) -> None:
    engine = {"engine": "llama-server", "binary": str(FAKE_BINARY)}
    stack.entry("m", **engine, speculation={"type": "draft", "draft": "small"})
    stack.entry("small", tier="D", **engine)


def test_a_file_that_changed_after_the_check_is_refused_at_the_next_start_with_rule_file_and_line(
    stack: InferenceStack,
) -> None:
    fake_pair(stack)
    stack.start("m")
    stack.hub.await_peer("inference-m")
    first = child(stack, "m")
    assert first.cmdline()[first.cmdline().index("--spec-draft-model") + 1] == str(stack.model_path("small"))
    write_tiny_gguf(stack.model_path("small"), tokenizer="gpt2")
    first.kill()
    stack.hub.await_peer("inference-m", "degraded")
    stack.hub.until(lambda: "draft-vocabulary" in (stack.hub.pongs["inference-m"].reason or ""), "the rule is named")
    reason = stack.hub.pongs["inference-m"].reason or ""
    lines = (stack.registry / "models.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip() == "draft: small")
    assert f"models.yaml:{line}: models.m.speculation.draft: 'small'" in reason
    write_tiny_gguf(stack.model_path("small"))  # the cure needs no restart
    stack.hub.await_peer("inference-m")


def test_a_recurrent_model_is_refused_speculation_before_anything_is_started(stack: InferenceStack) -> None:
    fake_pair(stack)
    for name in ("m", "small"):
        write_tiny_gguf(stack.model_path(name), architecture="mamba")
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    assert "recurrent-speculation" in (stack.hub.pongs["inference-m"].reason or "")
    assert not (stack.root / "logs" / "inference-m.engine.out").exists()


def test_a_draft_has_no_process_of_its_own(stack: InferenceStack) -> None:
    fake_pair(stack)
    assert stack.start("small").wait(90) == 2
    assert "a draft is loaded by the process of the model" in stack.stderr("small")


def test_the_binary_knows_every_flag_of_the_table(binary: str) -> None:
    asyncio.run(NativeEngine(Path(binary)).check(launch(MOE, DRAFT, **EVERYTHING)))


@pytest.mark.parametrize(
    ("model", "type_k", "type_v"),
    [
        ("demo", "f16", "f16"),
        ("demo", "q8_0", "q4_0"),
        ("windowed", "f16", "f16"),
        ("mamba", "f16", "f16"),
    ],
)
def test_the_computed_size_of_the_caches_is_what_llama_cpp_allocates(
    request: pytest.FixtureRequest, binary: str, tmp_path: Path, model: str, type_k: str, type_v: str
) -> None:
    if model == "demo":
        path: Path = request.getfixturevalue("demo")
    else:
        path = {"windowed": write_tiny_windowed, "mamba": write_tiny_mamba}[model](tmp_path / "model.gguf")
    log = tmp_path / "log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [binary, "--model", str(path), "--port", "0", "--ctx-size", "9000", "--parallel", "3", "--no-kv-unified",
             "--cache-type-k", type_k, "--cache-type-v", type_v, "--log-verbosity", "5", "--threads", "1"],
            stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        until(lambda: "model loaded" in log.read_text(errors="replace"), "the model is loaded")
    finally:
        server.kill()
        server.wait()
    # It measures with caches first that it then throws away: what counts comes after the last mention of the weights.
    real = log.read_text(errors="replace").rpartition("model buffer size")[2]
    told = [float(size) for size in re.findall(r"(?:KV|RS) buffer size = +([\d.]+) MiB", real)]
    assert told
    computed = read_facts(path).kv_bytes(3000, 3, type_k, type_v)
    assert computed == pytest.approx(sum(told) * MIB, abs=len(told) * 0.0051 * MIB)  # it prints two digits
