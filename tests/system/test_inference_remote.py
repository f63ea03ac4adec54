"""The inference service with a server elsewhere: dialects, retries, the circuit breaker, and a key that never shows."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferPartial, Sampling
from protocol.messages.reply import ErrorReply
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for
from tests.waiting import until

KEY = "sk-Zq81kVwT0e5r"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Elsewhere:
    """Another host's server: a scripted llama-server on a port that it keeps over restarts."""

    def __init__(self, root: Path) -> None:
        self.script_path = root / "elsewhere.json"
        self.record = root / "requests.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.script({})

    def script(self, script: dict[str, Any]) -> None:
        new = self.script_path.with_suffix(".new")
        new.write_text(json.dumps({"record": str(self.record), **script}))
        new.replace(self.script_path)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_BINARY), "--port", str(self.port), "--alias", "big", "--parallel", "8"],
            env={**os.environ, "TIERLINE_FAKE_SCRIPT": str(self.script_path), "LLAMA_API_KEY": KEY},
        )
        until(self.listens, "the server elsewhere listens")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(60)

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line)["body"] for line in self.record.read_text().splitlines()]


@pytest.fixture
def stack() -> Iterator[InferenceStack]:
    with InferenceStack() as running:
        yield running


@pytest.fixture
def elsewhere(stack: InferenceStack) -> Iterator[Elsewhere]:
    there = Elsewhere(stack.root)
    there.start()
    yield there
    there.stop()


def entry(stack: InferenceStack, there: Elsewhere, slots: int = 4, **remote: Any) -> None:
    limits = {"attempts": 3, "pause_max_s": 2, "breaker_failures": 4, "probe_after_s": 0.5, "probe_max_s": 1, **remote}
    url = limits.pop("base_url", f"http://127.0.0.1:{there.port}/v1")
    stack.entry(
        "m", engine="openai", base_url=url, remote_model="big", api_key_env="FAR_KEY", slots=slots,
        context_tokens=512, remote=limits,
    )  # fmt: skip


def start(stack: InferenceStack, **env: str) -> None:
    secrets = stack.root / "secrets"
    secrets.mkdir(exist_ok=True)
    (secrets / "FAR_KEY").touch(0o600)
    (secrets / "FAR_KEY").write_text(KEY)
    stack.start("m", **env)


def failure_of(body: object) -> Failure:
    assert isinstance(body, ErrorReply), body
    return body.failure


def assert_key_is_nowhere(stack: InferenceStack, *said: object) -> None:
    """In no log, no pong, no answer: the key is in its file, and there only."""
    files = [path for path in stack.root.rglob("*") if path.is_file() and path.parent.name != "secrets"]
    assert any(path.suffix == ".jsonl" and path.parent.name == "logs" for path in files)
    holding = [path for path in files if KEY.encode() in path.read_bytes()]
    assert holding == []
    assert KEY not in repr([*said, stack.hub.pongs, stack.hub.received])


@pytest.mark.parametrize("style", [None, "foreign", "bare"])
def test_an_answer_comes_in_every_dialect_with_figures(
    stack: InferenceStack, elsewhere: Elsewhere, style: str | None
) -> None:
    elsewhere.script({"default": {"text": "one two three four", "token_s": 0.06, "style": style}})
    entry(stack, elsewhere)
    start(stack)
    hello = stack.hub.await_peer("inference-m")
    assert hello.capabilities == ["infer.m"]
    assert stack.hub.credit["inference-m"] == 4, "slots are the concurrency"
    request = stack.hub.request("inference-m", "infer.request", ask_for("hi there", stream=True))
    _, final, partials = stack.hub.collect(request)
    assert isinstance(final, InferFinal), final
    assert (final.text, final.finish_reason, final.engine) == ("one two three four", "stop", "openai")
    assert final.generated_tokens == 4
    assert final.prompt_tokens == 2, "as counted there; or our estimate, where nothing is"
    assert final.generate_ms > 100, "measured here where the server gives no timings"
    assert [piece for piece in partials if isinstance(piece, InferPartial)]
    figures = stack.figures("m")
    assert figures["tokens_predicted_total"] == 4
    assert figures["breaker"] == "closed"
    assert_key_is_nowhere(stack, final)


def test_each_dialect_is_sent_what_it_takes_and_a_grammar_is_refused_clearly(
    stack: InferenceStack, elsewhere: Elsewhere
) -> None:
    sampling = Sampling(temperature=0.2, top_k=0, min_p=0.1, repeat_penalty=1.1, seed=7)
    entry(stack, elsewhere, dialect="vllm")
    start(stack)
    stack.hub.await_peer("inference-m")
    elsewhere.script({"default": '{"n": 1}'})
    assert isinstance(stack.ask("m", ask_for("go", sampling=sampling, json_schema=SCHEMA)), InferFinal)
    (body,) = elsewhere.requests()
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert {name: body[name] for name in ("model", "top_k", "repetition_penalty", "seed", "temperature")} == {
        "model": "big", "top_k": -1, "repetition_penalty": 1.1, "seed": 7, "temperature": 0.2,
    }  # fmt: skip
    assert not {"cache_prompt", "repeat_penalty", "grammar"} & body.keys()
    failure = failure_of(stack.ask("m", ask_for("go", grammar='root ::= "a"')))
    assert (failure.category, failure.code) == (Category.POLICY, "engine.refused")
    assert "json_schema" in failure.message
    elsewhere.script({"default": '{"n": "three"}'})
    failure = failure_of(stack.ask("m", ask_for("go", json_schema=SCHEMA)))
    assert (failure.category, failure.code) == (Category.SCHEMA, "answer.schema"), "checked here all the same"


def test_429_and_503_are_tried_again_and_retry_after_is_honoured(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    busy = {"fault": "429", "retry_after": 1}
    elsewhere.script({"rules": [{"match": "busy", "answers": [busy, {"fault": "503"}, "at last"]}]})
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m")
    began = time.monotonic()
    final = stack.ask("m", ask_for("busy"))
    assert isinstance(final, InferFinal)
    assert final.text == "at last"
    assert time.monotonic() - began >= 1.0
    figures = stack.figures("m")
    assert (figures["remote_retries"], figures["remote_no_room"]) == (2, 2)


def test_more_patience_than_we_have_is_a_resource_failure_at_once(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    elsewhere.script({"default": {"fault": "429", "retry_after": 3_600}})
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.RESOURCE, "remote.no_room")
    assert failure.evidence["retry_after_ms"] == 3_600_000
    assert stack.figures("m")["breaker"] == "closed", "it is well, we are too many"


@pytest.mark.parametrize(
    ("fault", "code"),
    [("500", "engine.faulty"), ("garbage", "engine.faulty"), ("cut", "engine.died"), ("disconnect", "engine.died")],
)
def test_a_fault_is_a_peer_failure_and_the_next_call_works(
    stack: InferenceStack, elsewhere: Elsewhere, fault: str, code: str
) -> None:
    elsewhere.script({"rules": [{"match": "bad", "answers": [{"text": "a b c d", "fault": fault}]}]})
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("bad")))
    assert (failure.category, failure.code) == (Category.PEER, code)
    assert isinstance(stack.ask("m", ask_for("good")), InferFinal)


def test_figures_and_half_characters_that_no_message_can_carry_cost_no_slot(
    stack: InferenceStack, elsewhere: Elsewhere
) -> None:
    absurd = {"usage": {"prompt_tokens": 10**30, "completion_tokens": 2**64}, "timings": {"predicted_ms": 10**400}}
    rules = [
        {"match": "bad", "answers": [{"text": "", "fault": "500", "message": "no \ud800 room"}]},
        {"match": "good", "answers": [{"text": "a\ud800b c", **absurd}]},
    ]
    elsewhere.script({"rules": rules})
    entry(stack, elsewhere, slots=1)
    start(stack)
    stack.hub.await_peer("inference-m")
    assert "no ? room" in failure_of(stack.ask("m", ask_for("bad"))).message
    for _ in range(2):  # with the one slot that there is
        final = stack.ask("m", ask_for("good"))
        assert isinstance(final, InferFinal), final
        assert (final.text, final.generated_tokens) == ("a?b c", 2)


def test_a_silent_server_is_given_up_and_the_deadline_holds(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    elsewhere.script({"default": {"text": "a b c", "delay_s": 300}})
    entry(stack, elsewhere, first_token_timeout_s=0.5)
    start(stack)
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.PEER, "engine.died")
    deadline = int((time.time() + 0.2) * 1000)
    request = stack.hub.request("inference-m", "infer.request", ask_for("go"), deadline=deadline)
    assert failure_of(stack.hub.collect(request)[1]).category is Category.TIMEOUT


def test_a_server_that_lets_every_deadline_pass_is_left_alone(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    """Its limit for the first token is no shorter than the time that its callers have, as in the registry shipped."""
    elsewhere.script({"default": {"text": "a b c", "delay_s": 300}})
    entry(stack, elsewhere, first_token_timeout_s=2, breaker_failures=2, probe_after_s=60, probe_max_s=60)
    start(stack)
    stack.hub.await_peer("inference-m")
    deadline = int((time.time() + 1.5) * 1000)
    asked = [stack.hub.request("inference-m", "infer.request", ask_for("go"), deadline=deadline) for _ in range(2)]
    for request in asked:
        assert failure_of(stack.hub.collect(request)[1]).category is Category.TIMEOUT
    stack.hub.await_peer("inference-m", "degraded")
    assert "no word within" in (stack.hub.pongs["inference-m"].reason or "")
    assert failure_of(stack.ask("m", ask_for("go"))).code == "breaker.open"


def test_a_caller_in_a_hurry_says_nothing_about_the_server(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    elsewhere.script({"rules": [{"match": "slow", "answers": [{"text": "a b c", "delay_s": 300}]}], "default": "ok"})
    entry(stack, elsewhere, first_token_timeout_s=60, breaker_failures=1)
    start(stack)
    stack.hub.await_peer("inference-m")
    deadline = int((time.time() + 0.3) * 1000)
    request = stack.hub.request("inference-m", "infer.request", ask_for("slow"), deadline=deadline)
    assert failure_of(stack.hub.collect(request)[1]).category is Category.TIMEOUT
    assert isinstance(stack.ask("m", ask_for("go")), InferFinal)


def test_silence_in_the_middle_of_an_answer_ends_it(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere, silence_timeout_s=0.5)
    start(stack)
    stack.hub.await_peer("inference-m")
    elsewhere.script({"default": {"text": "one two", "token_s": 60}})
    failure = failure_of(stack.ask("m", ask_for("go", stream=True)))
    assert (failure.category, failure.code) == (Category.PEER, "engine.died")
    assert "no token for 0.5 s" in failure.message


@pytest.mark.parametrize(("way", "sent"), [("json_object", {"type": "json_object"}), ("none", None)])
def test_json_is_asked_for_as_the_server_takes_it_and_judged_here(
    stack: InferenceStack, elsewhere: Elsewhere, way: str, sent: dict[str, str] | None
) -> None:
    entry(stack, elsewhere, response_format=way)
    start(stack)
    stack.hub.await_peer("inference-m")
    elsewhere.script({"rules": [{"match": "go", "answers": ['{"n": 1}', '{"n": "one"}', '{"n": "one"}']}]})
    assert isinstance(stack.ask("m", ask_for("go", json_schema=SCHEMA)), InferFinal)
    assert failure_of(stack.ask("m", ask_for("go", json_schema=SCHEMA))).code == "answer.schema"
    assert [body.get("response_format") for body in elsewhere.requests()] == [sent] * 3, "the repair too"


def test_the_proxy_of_the_entry_is_used(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere, proxy="http://127.0.0.1:9")
    start(stack)
    stack.hub.await_peer("inference-m", state="degraded")
    assert "no connection" in (stack.hub.pongs["inference-m"].reason or ""), "nobody listens at the proxy"


def test_the_breaker_opens_fails_fast_and_recovers_by_its_own_probe(
    stack: InferenceStack, elsewhere: Elsewhere
) -> None:
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m")
    assert isinstance(stack.ask("m", ask_for("go")), InferFinal)
    elsewhere.stop()
    first = failure_of(stack.ask("m", ask_for("go")))
    assert (first.category, first.code) == (Category.PEER, "remote.unreachable")
    failure_of(stack.ask("m", ask_for("go")))
    stack.hub.await_peer("inference-m", state="degraded")
    assert "circuit open: 4 failures" in (stack.hub.pongs["inference-m"].reason or "")
    failure = failure_of(stack.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.PEER, "breaker.open")
    assert 0 <= failure.evidence["retry_after_ms"] <= 1_000
    assert "next probe in" in failure.message
    elsewhere.start()
    stack.hub.await_peer("inference-m", state="ready")
    assert isinstance(stack.ask("m", ask_for("go")), InferFinal)
    figures = stack.figures("m")
    assert figures["breaker"] == "closed"
    assert figures["breaker_opened"] >= 1
    assert figures["breaker_probe_in_ms"] is None
    assert_key_is_nowhere(stack, failure, first)


def test_a_server_that_is_not_there_yet_is_degraded_and_ready_once_it_is(
    stack: InferenceStack, elsewhere: Elsewhere
) -> None:
    elsewhere.stop()
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m", state="degraded")
    elsewhere.start()
    stack.hub.await_peer("inference-m")


def test_a_key_that_is_quoted_back_is_shown_to_nobody(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    elsewhere.script({"default": {"fault": "401"}})
    entry(stack, elsewhere)
    start(stack)
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.RESOURCE, "remote.rejected")
    assert "Incorrect API key provided: Bearer [key]" in failure.message
    stack.hub.await_peer("inference-m", state="degraded")
    assert_key_is_nowhere(stack, failure)


def test_a_key_that_was_replaced_meanwhile_is_shown_to_nobody_either(
    stack: InferenceStack, elsewhere: Elsewhere
) -> None:
    """An answer that comes late quotes the key that it was asked with."""
    late = {"fault": "401", "delay_s": 2}
    elsewhere.script({"rules": [{"match": "late", "answers": [late]}], "default": {"fault": "401"}})
    entry(stack, elsewhere, breaker_failures=100)
    start(stack)
    stack.hub.await_peer("inference-m")
    asked = stack.hub.request("inference-m", "infer.request", ask_for("late"))
    stack.hub.until(lambda: elsewhere.record.exists(), "it is on its way")
    (stack.root / "secrets" / "FAR_KEY").write_text("sk-the-next-one")
    newer = failure_of(stack.ask("m", ask_for("now")))
    failure = failure_of(stack.hub.collect(asked)[1])
    assert "Incorrect API key provided: Bearer [key]" in failure.message
    stack.hub.pump_for(1)
    assert_key_is_nowhere(stack, newer, failure)


def test_a_missing_key_a_wrong_model_and_a_wrong_url_are_reasons(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere)
    stack.start("m")
    stack.hub.await_peer("inference-m", state="degraded")
    assert "no environment variable FAR_KEY and no file" in (stack.hub.pongs["inference-m"].reason or "")
    (stack.root / "secrets").mkdir()
    (stack.root / "secrets" / "FAR_KEY").touch(0o600)
    (stack.root / "secrets" / "FAR_KEY").write_text("wrong-key")
    stack.hub.until(lambda: "refuses the key" in (stack.hub.pongs["inference-m"].reason or ""), "the key is refused")
    (stack.root / "secrets" / "FAR_KEY").write_text(KEY)
    stack.hub.await_peer("inference-m")


def test_an_unknown_model_is_named_with_those_there_are(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere, base_url=f"http://127.0.0.1:{elsewhere.port}")
    start(stack)
    stack.hub.await_peer("inference-m", state="degraded")
    assert "check base_url, which usually ends in /v1" in (stack.hub.pongs["inference-m"].reason or "")


def test_a_host_name_that_is_none_is_a_reason_and_no_end_of_the_service(stack: InferenceStack) -> None:
    stack.entry("m", engine="openai", base_url="http://xn--zz--/v1", remote_model="big", context_tokens=512)
    stack.start("m")
    stack.hub.await_peer("inference-m", state="degraded")
    assert "base_url" in (stack.hub.pongs["inference-m"].reason or "")
    failure = failure_of(stack.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.RESOURCE, "engine.not_ready")


def test_a_proxy_of_the_environment_is_not_used(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere)
    start(stack, HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9", ALL_PROXY="http://127.0.0.1:9")
    stack.hub.await_peer("inference-m")
    assert isinstance(stack.ask("m", ask_for("go")), InferFinal)


def test_a_cancel_closes_the_stream_and_gives_the_slot_back(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    elsewhere.script({"rules": [{"match": "long", "answers": [{"text": "a " * 1_000, "token_s": 0.02}]}]})
    entry(stack, elsewhere, slots=1)
    start(stack)
    stack.hub.await_peer("inference-m")
    request = stack.hub.request("inference-m", "infer.request", ask_for("long", max_tokens=400), key="k1")
    stack.hub.until(lambda: elsewhere.record.exists(), "it is at work")
    stack.hub.send(stack.hub.peers["inference-m"], "infer.cancel", ask_for("x"), key="k1")
    assert failure_of(stack.hub.collect(request)[1]).code == "call.cancelled"
    assert isinstance(stack.ask("m", ask_for("go")), InferFinal)
    stack.await_figures("m", requests_processing=0)


def test_a_core_dump_is_ruled_out(stack: InferenceStack, elsewhere: Elsewhere) -> None:
    entry(stack, elsewhere)
    start(stack)
    hello = stack.hub.await_peer("inference-m")
    limits = Path(f"/proc/{hello.pid}/limits").read_text()
    (core,) = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core == ["0", "0"]
    os.kill(hello.pid, signal.SIGTERM)


def test_https_is_verified_and_a_ca_file_of_ones_own_is_trusted(stack: InferenceStack) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    ca_file = stack.root / "ca.pem"
    ca_file.write_text("no certificate yet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        entry(stack, Elsewhere(stack.root), base_url=f"https://localhost:{server.server_port}/v1")
        start(stack)
        stack.hub.await_peer("inference-m", state="degraded")
        assert "certificate is not trusted" in (stack.hub.pongs["inference-m"].reason or "")
        trusting = {"base_url": f"https://localhost:{server.server_port}/v1", "ca_file": str(ca_file)}
        entry(stack, Elsewhere(stack.root), **trusting)
        stack.start("m")
        stack.hub.await_peer("inference-m", state="degraded")
        assert "remote.ca_file" in (stack.hub.pongs["inference-m"].reason or "")
        authority.cert_pem.write_to_path(str(ca_file))
        stack.hub.await_peer("inference-m", state="ready")  # by itself
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_whose_bytes_make_no_sense_is_a_reason_and_no_end_of_the_service(stack: InferenceStack) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        entry(stack, Elsewhere(stack.root), base_url=f"http://127.0.0.1:{server.server_port}/v1")
        start(stack)
        pid = stack.hub.await_peer("inference-m", state="degraded").pid
        stack.hub.until(lambda: stack.figures("m")["breaker_probes"] >= 2, "it goes on asking")
        assert stack.hub.hellos["inference-m"].pid == pid
    finally:
        server.shutdown()
        server.server_close()


class Nonsense(BaseHTTPRequestHandler):
    """Sends whoever asks to a host whose name is none."""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("location", "http://xn--zz--/")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        return


class Models(BaseHTTPRequestHandler):
    """Says that it has the model."""

    def do_GET(self) -> None:
        data = b'{"data": [{"id": "big"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        return
