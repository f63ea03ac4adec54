"""What the comparison of streams says of answers that did not come in pieces."""

from __future__ import annotations

import pytest

from services.ctl.bench.overhead import BenchmarkFailedError
from services.ctl.bench.streams import Round, check_streamed


def of(answers: int, streamed: int) -> Round:
    return Round(100.0, (5.0,) * answers, 20.0, 4.0, 2.0, streamed)


def test_an_answer_that_came_whole_now_and_then_is_the_machine_and_many_are_the_bus() -> None:
    check_streamed([of(8, 8), of(8, 7), of(4, 4)])
    with pytest.raises(BenchmarkFailedError, match="of 20 answers over the bus only 17 came in pieces"):
        check_streamed([of(8, 7), of(8, 6), of(4, 4)])
