"""A program that speaks the protocol starts without building what it does not use, in any number of threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.kit.config import CHECKOUT

_BUILT = """
import sys
from importlib import import_module
from pydantic import BaseModel

def below(kind):
    for one in kind.__subclasses__():
        yield one
        yield from below(one)

import_module(sys.argv[1])
ours = [one for one in below(BaseModel) if one.__module__.partition(".")[0] == "protocol"]
print(len(ours) > 50, [one.__name__ for one in ours if one.__pydantic_complete__])
"""
_IN_THREADS = """
import sys
from threading import Barrier, Thread
from protocol.codec import pack_body, unpack_body
from protocol.messages.plan import PlanRequest
from protocol.messages.task import TaskIR

together, sound = Barrier(8), []

def read():
    together.wait()
    for _ in range(20):
        asked = PlanRequest(task=TaskIR(objective="count"))
        sound.append(unpack_body(PlanRequest, pack_body(asked)) == asked)

sys.setswitchinterval(1e-5)
threads = [Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(sound), all(sound))
"""


def last_line_of(program: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", ["protocol.client", "services.inference.__main__", "services.scheduler.__main__"])
def test_no_message_is_built_before_it_is_used(module: str) -> None:
    assert last_line_of(_BUILT, module) == "True []"


def test_threads_may_use_a_message_for_the_first_time_together() -> None:
    assert last_line_of(_IN_THREADS) == "160 True"
