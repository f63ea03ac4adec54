#!/usr/bin/env python3
"""A scripted llama-server: the real one's command line and HTTP API, with answers and faults that a test chooses.

Set it as `binary:` of an entry with `engine: llama-server` (it is executable and needs only the standard library) and
give it a model file from `tests.fakes.gguf_files`. Its script is the JSON file named in TIERLINE_FAKE_SCRIPT, else
`<model file>.script.json`, else it answers `ok` to everything. It is read again for every request. Form:

    {"load_s": 0.5,                     seconds until /health is 200
     "record": "/tmp/x/requests.jsonl", every chat request is appended there as one JSON line
     "copies": false,                   refuse to save and restore slots
     "read_s": 0.5,                     seconds to read a beginning that several prompts share
     "metrics": "llamacpp:x y",         what /metrics says instead of its figures
     "slots": [],                       what /slots says instead of its state
     "persist": true,                   answers go on in turn after a respawn and over all processes of the script
     "default": ANSWER,                 where no rule matches
     "rules": [{"match": "text in the prompt", "model": "worker", "answers": [ANSWER, ANSWER, ...]}]}

The first rule counts whose `match` is part of the prompt (all messages, joined by newlines) and whose `model`, if
given, is the --alias; its answers are given in turn, the last one again and again. An ANSWER is a string or

    {"text": "...", "repeat": 1, "delay_s": 0, "token_s": 0, "finish_reason": "stop", "fault": null,
     "top_logprobs": [], "retry_after": null, "style": null, "hold": null, "together": 1, "usage": {},
     "timings": {}, "message": "scripted fault"}

with `delay_s` before the first token, `token_s` between tokens, no token before the file `hold` is there (so that a
test decides how long an answer takes), none before so many answers are at work `together`, `top_logprobs` the log
probabilities of each token's candidates, sent where the request asks for them. `style` `foreign` streams as other
servers do: CRLF, comments, fields that nobody asked for, usage null in every chunk and figures without timings at the
end; `bare` gives no usage at all. What stands in `usage` and `timings` replaces single figures of an answer, `message`
that of an error body.
Faults: `500`, `429`, `503` an error body, with a Retry-After header if `retry_after` is given; `401` one, after
`delay_s`, that quotes the key it was sent; `garbage` an event that is no JSON; `cut` a stream that ends without an
ending; `disconnect` in the middle of the text; `hang` no byte until the client leaves; `stuck` tokens, and a slot that
stays busy for ever; `die` SIGKILL to itself in the middle of the text; `hoard` takes memory there until the kernel has
none, and ends as a program does that cannot go on; `freeze` SIGSTOP to itself in the middle; `unbounded` ignores
max_tokens.
Tokens are words. `max_tokens`, `t_max_predict_ms`, the context of a slot, slots and the API key (LLAMA_API_KEY) work as
in the real one; sampling, grammar and schema are accepted and ignored.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

#: Flags that change how the real one computes and nothing here, with what its help says of their values.
ACCEPTED = {
    **dict.fromkeys(("--threads-batch", "--batch-size", "--ubatch-size", "--cache-reuse"), "N"),
    "--override-kv": "KEY=TYPE:VALUE",
    "--flash-attn": "on|off|auto",
    "--numa": "distribute,isolate,numactl",
    "--load-mode": "auto,none,mmap,mlock,mmap+mlock",
    **dict.fromkeys(("--cache-type-k", "--cache-type-v"), "f32,f16,bf16,q8_0,q4_0,q4_1,iq4_nl,q5_0,q5_1"),
    "--spec-type": "none,draft-simple,ngram-simple,ngram-map-k,ngram-map-k4v,ngram-mod",
    "--spec-draft-model": "FNAME",
    **{f"--spec-draft-{name}": "N" for name in ("n-max", "n-min", "p-min", "p-split", "threads", "type-k", "type-v")},
    **{f"--spec-{kind}-size-{x}": "N" for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v") for x in "nm"},
    **{f"--spec-ngram-mod-{name}": "N" for name in ("n-match", "n-max", "n-min")},
}

HOARD_BLOCK_BYTES = 16 * 1024 * 1024
HOARD_BLOCKS = 256
"""More are not taken where nothing limits this process; untouched, they cost the machine nothing."""

WORDS = re.compile(r"\S+\s*|\s+")


class Script:
    """What to answer; `turns` counts the answers that each rule has given."""

    def __init__(self, path: Path, alias: str) -> None:
        self._path = path
        self._alias = alias
        self._turns: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def answer(self, prompt: str) -> dict[str, Any]:
        script = self.read()
        chosen: Any = script.get("default", "ok")
        for rule in script.get("rules", []):
            if rule["match"] in prompt and rule.get("model", self._alias) == self._alias:
                turn = self._next_turn(f"{rule['match']}|{rule.get('model')}", bool(script.get("persist")))
                chosen = rule["answers"][min(turn, len(rule["answers"]) - 1)]
                break
        return {"text": chosen} if isinstance(chosen, str) else chosen

    def _next_turn(self, rule: str, persist: bool) -> int:
        with self._lock:
            if not persist:
                self._turns[rule] = self._turns.get(rule, -1) + 1
                return self._turns[rule]
            turns_file = self._path.with_suffix(".turns.json")
            with self._path.with_suffix(".turns.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                turns = json.loads(turns_file.read_text(encoding="utf-8")) if turns_file.exists() else {}
                turns[rule] = turns.get(rule, -1) + 1
                # Replaced whole: another answer may kill this process at any moment, and its turn must not come again.
                draft = turns_file.with_suffix(".draft")
                draft.write_text(json.dumps(turns), encoding="utf-8")
                draft.replace(turns_file)
                return turns[rule]


class Slots:
    """The slots and counters that /slots and /metrics show."""

    def __init__(self, count: int, context_tokens: int) -> None:
        self.context_tokens = context_tokens
        self.busy = [False] * count
        self.changed = threading.Condition()
        self.predicted = 0
        self.prompted = 0
        self.predicted_s = 0.0

    def take(self) -> int:
        with self.changed:
            self.changed.wait_for(lambda: not all(self.busy))
            slot = self.busy.index(False)
            self.busy[slot] = True
            return slot

    def free(self, slot: int) -> None:
        with self.changed:
            self.busy[slot] = False
            self.changed.notify()


class Gone(Exception):
    """The client has closed the connection, or the fault says so."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    script: Script
    slots: Slots
    meetings: ClassVar[dict[int, threading.Barrier]] = {}
    began = time.monotonic()
    retry_after: Any = None
    style: str | None = None

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.allowed():
            self.reply(200, {"object": "list", "data": [{"id": self.options.alias, "object": "model"}]})
        elif self.path == "/health":
            loading = time.monotonic() - self.began < self.script.read().get("load_s", 0)
            self.reply(503 if loading else 200, {"status": "loading" if loading else "ok"})
        elif not self.allowed():
            self.error(401, "authentication_error", "Invalid API Key")
        elif self.path == "/slots":
            states = enumerate(self.slots.busy)
            context = self.slots.context_tokens
            slots = [{"id": i, "n_ctx": context, "is_processing": busy} for i, busy in states]
            self.reply(200, self.script.read().get("slots", slots))
        elif self.path == "/metrics":
            self.reply_metrics()
        elif self.path == "/props":
            self.reply(200, {"total_slots": len(self.slots.busy), "model_path": self.options.model})
        else:
            self.error(404, "not_found_error", "File Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        if not self.allowed():
            self.error(401, "authentication_error", "Invalid API Key")
        elif self.path == "/tokenize":
            self.reply(200, {"tokens": list(range(len(WORDS.findall(body.get("content", "")))))})
        elif self.path == "/v1/chat/completions" and body.get("max_tokens") == 0:
            # The beginning of prompts to come, read into a slot: no answer, so no turn of the script either.
            tokens = len(WORDS.findall("\n".join(str(turn["content"]) for turn in body["messages"])))
            time.sleep(self.script.read().get("read_s", 0))
            self.reply(200, {"choices": [], "timings": {"prompt_n": tokens, "prompt_ms": 1.0}})
        elif self.path == "/v1/chat/completions":
            self.chat(body)
        elif self.path.startswith("/slots/"):
            self.copy_slot(self.path.rpartition("=")[2], body["filename"])
        else:
            self.error(404, "not_found_error", "File Not Found")

    def copy_slot(self, action: str, name: str) -> None:
        file = Path(self.options.slot_save_path) / name
        if self.script.read().get("copies") is False:
            self.error(501, "not_supported_error", "scripted: slots are not copied")
        elif action == "save":
            self.reply(200, {"n_written": file.write_bytes(b"a slot")})
        elif file.is_file():
            self.reply(200, {"n_restored": 1})
        else:
            self.error(400, "invalid_request_error", "Unable to restore slot")

    def chat(self, body: dict[str, Any]) -> None:
        prompt = "\n".join(str(turn["content"]) for turn in body["messages"])
        record = self.script.read().get("record")
        if record:
            with open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps({"model": self.options.alias, "prompt": prompt, "body": body}) + "\n")
        answer = self.script.answer(prompt)
        prompt_tokens = len(WORDS.findall(prompt))
        if prompt_tokens >= self.slots.context_tokens:
            numbers = {"n_prompt_tokens": prompt_tokens, "n_ctx": self.slots.context_tokens}
            self.error(400, "exceed_context_size_error", "request exceeds the available context size", **numbers)
            return
        if (fault := str(answer.get("fault"))) in ("429", "500", "503"):
            self.retry_after = answer.get("retry_after")
            self.error(int(fault), "server_error", answer.get("message", "scripted fault"))
            return
        if fault == "401":
            time.sleep(answer.get("delay_s", 0))
            self.error(401, "invalid_api_key", f"Incorrect API key provided: {self.headers.get('authorization')}")
            return
        slot = self.slots.take()
        try:
            self.slots.prompted += prompt_tokens
            self.pause(answer.get("delay_s", 0))
            self.meet(answer.get("together", 1))
            while answer.get("hold") and not os.path.exists(answer["hold"]):
                self.pause(0.05)
            self.generate(body, answer, prompt_tokens)
        except (Gone, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            if answer.get("fault") != "stuck":
                self.slots.free(slot)

    def generate(self, body: dict[str, Any], answer: dict[str, Any], prompt_tokens: int) -> None:
        words = WORDS.findall(answer.get("text", "") * answer.get("repeat", 1))
        limit = min(body.get("max_tokens", len(words)), self.slots.context_tokens - prompt_tokens)
        limit = len(words) if answer.get("fault") == "unbounded" else limit
        finish = "length" if len(words) > limit else answer.get("finish_reason", "stop")
        words = words[:limit]
        fault, stream, began = answer.get("fault"), bool(body.get("stream")), time.monotonic()
        self.style = answer.get("style")
        if fault == "hang":
            self.pause(86_400)
        if stream:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            self.event({"choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant"}}]})
        for number, word in enumerate(words, 1):
            if number > len(words) // 2:
                self.break_down(fault)
            self.slots.predicted += 1
            if stream:
                choice = {"index": 0, "finish_reason": None, "delta": {"content": word}}
                if body.get("logprobs") and answer.get("top_logprobs"):
                    candidates = [{"token": "x", "logprob": value} for value in answer["top_logprobs"]]
                    choice["logprobs"] = {"content": [{"token": word, "top_logprobs": candidates}]}
                self.event({"choices": [choice]})
            self.pause(answer.get("token_s", 0))
            took_ms = (time.monotonic() - began) * 1000
            if "\n" in word and 0 < body.get("t_max_predict_ms", 0) < took_ms:
                finish, words = "length", words[:number]
                break
        took_ms = (time.monotonic() - began) * 1000
        self.slots.predicted_s += took_ms / 1000
        figures = {
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(words), **answer.get("usage", {})},
            "timings": {
                "prompt_n": prompt_tokens,
                "prompt_ms": 1.0,
                "predicted_n": len(words),
                "predicted_ms": took_ms,
                **answer.get("timings", {}),
            },
        }
        if not stream:
            message = {"role": "assistant", "content": "".join(words)}
            self.reply(200, {"choices": [{"index": 0, "finish_reason": finish, "message": message}], **figures})
            return
        if fault == "cut":
            return
        self.event({"choices": [{"index": 0, "finish_reason": finish, "delta": {}}]})
        if self.style == "foreign":
            self.event({"choices": [], "usage": figures["usage"]})
        elif self.style is None:
            self.event({"choices": [], **figures})
        self.wfile.write(b"data: [DONE]\n\n")

    def break_down(self, fault: str | None) -> None:
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hoard":
            self.hoard()
        if fault == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1)  # another thread may have taken the signal: this one must not run on meanwhile
        if fault == "disconnect":
            raise Gone
        if fault == "garbage":
            self.wfile.write(b"data: {this is no JSON\n\n")
            raise Gone
        if fault == "stuck":
            self.pause(86_400)

    def hoard(self) -> None:
        """Meet the limit of this process (ulimit -v) like a C++ program: whoever gets no memory says so and aborts."""
        held = []
        try:
            while len(held) < HOARD_BLOCKS:
                held.append(bytearray(HOARD_BLOCK_BYTES))
        except MemoryError:
            held.clear()
            sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
            sys.stderr.flush()
            os.abort()

    def pause(self, seconds: float) -> None:
        """Wait, but notice a client that leaves: a readable socket that gives no byte is closed."""
        if seconds > 0 and select.select([self.connection], [], [], seconds)[0]:
            raise Gone

    def meet(self, count: int) -> None:
        """Wait until so many answers have come here."""
        if count > 1:
            with self.slots.changed:
                meeting = self.meetings.setdefault(count, threading.Barrier(count))
            try:
                meeting.wait(60)
            except threading.BrokenBarrierError:
                raise Gone from None

    def allowed(self) -> bool:
        key = os.environ.get("LLAMA_API_KEY")
        return key is None or self.headers.get("authorization") == f"Bearer {key}"

    def event(self, value: Any) -> None:
        if self.style == "foreign":
            data = json.dumps({"usage": None, "id": "cmpl-1", **value}).encode()
            self.wfile.write(b": keep-alive\r\nevent: message\r\nid: 7\r\ndata:" + data + b"\r\n\r\n")
        else:
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def error(self, code: int, kind: str, message: str, **more: Any) -> None:
        self.reply(code, {"error": {"code": code, "type": kind, "message": message, **more}})

    def reply(self, code: int, value: Any) -> None:
        self.reply_bytes(code, "application/json", json.dumps(value).encode())

    def reply_metrics(self) -> None:
        figures = {
            "prompt_tokens_total": self.slots.prompted,
            "tokens_predicted_total": self.slots.predicted,
            "tokens_predicted_seconds_total": self.slots.predicted_s,
            "requests_processing": sum(self.slots.busy),
        }
        lines = "".join(f"llamacpp:{name} {value}\n" for name, value in figures.items())
        self.reply_bytes(200, "text/plain", self.script.read().get("metrics", lines).encode())

    def reply_bytes(self, code: int, content_type: str, data: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(data)))
        if code in (429, 503) and self.retry_after is not None:
            self.send_header("retry-after", str(self.retry_after))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        return  # quiet, as the real one is at the verbosity we ask for


def main() -> None:
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("--version", action="version", version="version: 0 (scripted fake)")
    parser.add_argument("-m", "--model", default="", metavar="FNAME")
    parser.add_argument("--alias", default="", metavar="STRING")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST")
    parser.add_argument("--port", type=int, default=8080, metavar="PORT")
    parser.add_argument("--ctx-size", type=int, default=4096, metavar="N")
    parser.add_argument("--parallel", type=int, default=1, metavar="N")
    parser.add_argument("--no-kv-unified", action="store_true")
    parser.add_argument("--no-cache-idle-slots", action="store_true")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--cache-ram", type=int, default=0, metavar="N")
    parser.add_argument("--log-verbosity", type=int, default=0, metavar="N")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--slots", action="store_true")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--slot-save-path", default="", metavar="PATH")
    for flag, values in ACCEPTED.items():
        parser.add_argument(flag, metavar=values)
    if "--help" in sys.argv:
        for action in parser._actions:  # one line per flag, in column 0 as the real page has them
            sys.stdout.write(f"{', '.join(action.option_strings)} {action.metavar or ''}".ljust(38) + "  scripted\n")
        return
    options = parser.parse_args()
    path = os.environ.get("TIERLINE_FAKE_SCRIPT") or f"{options.model}.script.json"
    Handler.options = options
    Handler.script = Script(Path(path), options.alias)
    Handler.slots = Slots(options.parallel, options.ctx_size // options.parallel)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
