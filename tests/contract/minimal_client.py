"""A client in under 60 lines that knows nothing but protocol/README.md: `minimal_client.py ADDRESS OBJECTIVE`.

Prints each event, then the result as JSON; exit status 0 if the task succeeded. Survives a restart of the hub.
"""

import itertools
import json
import os
import sys
import time

import msgpack
import zmq

address, objective = sys.argv[1:3]
me, numbers = f"minimal-{os.urandom(6).hex()}", itertools.count(1)
socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
socket.identity = b"\x01" + os.urandom(12)
socket.linger = 500
socket.connect(address)


def send(kind: str, body: dict[str, object]) -> str:
    number = next(numbers)
    header = {"v": 1, "kind": kind, "id": f"{me}.{number}", "src": me, "epoch": me, "seq": number}
    socket.send_multipart([msgpack.packb(header), msgpack.packb(body)])
    return f"{me}.{number}"


def hello() -> str:
    return send("session.hello", {"service": me, "protocol_min": 1, "protocol_max": 1})


def ask(kind: str, body: dict[str, object], final: str, patience_s: float) -> dict[str, object]:
    """Send a request and return the body of its final; after a silence, or when the hub does not know us, again."""
    ends, seen, waiting = time.monotonic() + patience_s, 0, hello()
    while time.monotonic() < ends:
        if not socket.poll(5_000):
            waiting = hello()
            continue
        header, answer = (msgpack.unpackb(frame) for frame in socket.recv_multipart())
        if header["kind"] == "error" and answer["failure"]["code"] == "peer.unknown":
            waiting = hello()
        elif header.get("corr") != waiting:
            continue  # the answer to something older
        elif header["kind"] == "session.welcome":
            waiting = send(kind, {**body, "after_seq": seen} if kind == "task.watch" else body)
        elif header["kind"] == "task.event":
            seen = max(seen, answer["seq"])
            print(f"{answer['seq']:4} {answer['event']} {answer.get('step', '')}")  # noqa: T201  a program that prints
        else:
            return answer if header["kind"] == final else sys.exit(f"{kind} ended in {header['kind']}: {answer}")
    sys.exit(f"{kind} was not answered within {patience_s} s")


accepted = ask("task.submit", {"task": {"objective": objective, "idempotency_key": me}}, "task.accepted", 30)
result = ask("task.watch", {"task_id": accepted["task_id"]}, "task.result", 600)
print(json.dumps(result, indent=1))  # noqa: T201  as above
sys.exit(0 if result["state"] == "succeeded" else 1)
