"""`tierline bench gates`: whether the gates' verdicts are right, what they cost, and whether hostile artefacts get out.

All of it goes over a real hub to a real gates service. HumanEval's right solutions must pass; mutants of them that
fail their tests outside, in a bare Python, must fail here as well. What a gate costs is measured in pairs with its bare
tool, which take turns, so that a machine that gets slower meanwhile does not look like a cost.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from protocol.client import AsyncClient
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Category
from protocol.messages.gate import GateRequest, GateResult, Verdict
from services.ctl.bench import escapes
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.human_eval import NoCorpusError, Problem, problems
from services.ctl.bench.mutants import mutants
from services.ctl.bench.overhead import NOOP_MODELS
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import BadInput, ExitCode
from services.kit.config import CHECKOUT

T = TypeVar("T")
U = TypeVar("U")

_OUTSIDE_S: Final = 5.0
"""A mutant that runs longer outside has failed there."""
_ANSWER_S: Final = 120.0
_PAIRS: Final = 15
"""Measurements per tool of the bare run and the gated one."""
_ROUNDS: Final = 5
"""Measurements of gates in turn and of the same at once."""
_PARALLEL: Final = 4
"""Gates of one request whose time in turn is compared with their time at once."""
_BUSY_S: Final = 0.6
_RUNNER: Final = CHECKOUT / "services" / "gates" / "checks" / "run_tests.py"
_EXPECTED: Final = {"lint": Category.FORMAT, "unit": Category.CODE}


def add(commands: Commands) -> None:
    """Add `bench gates`."""
    parser = commands.add("gates", _run, "check the gates' verdicts on a corpus, their cost, and attempts to get out")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="only every so-many-th problem, N in all (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="few measurements: shows that it works, no real figures")
    parser.add_argument("--no-escapes", action="store_true", help="leave out the attempts of hostile artefacts")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    try:
        corpus = problems()
    except NoCorpusError as err:
        raise BadInput(str(err)) from err
    if arguments.sample is not None:
        corpus = corpus[:: max(1, len(corpus) // max(1, arguments.sample))][: max(1, arguments.sample)]
    context.screen.note(f"tierline: {len(corpus)} problems, their mutants and the attempts; all of it takes minutes")
    with tempfile.TemporaryDirectory(prefix="tl-") as folder, gate_stack(Path(folder)) as stack:
        figures = asyncio.run(measure(stack, corpus, quick=arguments.quick))
        if not arguments.no_escapes:
            figures |= try_escapes(stack)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


@contextmanager
def gate_stack(folder: Path) -> Iterator[BareStack]:
    """A hub and a gates service with the shipped gates, those for the attempts, and some to run side by side."""
    stack = BareStack(folder, models=NOOP_MODELS, core=("scheduler", "gates"), environ={"A_SECRET": "of the service"})
    path = stack.registry / "gates.yaml"
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    table["gates"]["unit"]["timeout_s"] = escapes.UNIT_TIMEOUT_S
    table["gates"][escapes.GATE] = dict(escapes.GATE_ENTRY)
    for number in range(_PARALLEL):
        table["gates"][_side(number)] = {**deepcopy(table["gates"]["unit"]), "depends_on": []}
    path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    with stack:
        yield stack


async def measure(stack: BareStack, corpus: list[Problem], *, quick: bool = False) -> dict[str, Any]:
    """Verdicts on the corpus, cost and speed-up."""
    async with AsyncClient(stack.home.hub_address, name="bench") as client:
        return {
            **await _verdicts(client, corpus),
            **await _overhead(client, corpus, 2 if quick else _PAIRS),
            **await _speedup(client, 1 if quick else _ROUNDS),
            "cache_hits": await _cache_hits(client, corpus),
        }


def try_escapes(stack: BareStack) -> dict[str, Any]:
    """Make every attempt of the corpus of hostile artefacts."""

    def ask(request: GateRequest) -> list[GateResult]:
        return stack.client.gates(request, _ANSWER_S)

    corpus = escapes.escapes()
    with escapes.Witness(stack.home) as witness:
        succeeded = {one.name: why for one in corpus if (why := escapes.attempt(one, ask, witness)) is not None}
    return {"escapes_tried": len(corpus), "escapes_succeeded": len(succeeded), "escapes": succeeded}


# Verdicts


@dataclass(frozen=True, slots=True)
class _Case:
    """One module with the tests of its problem."""

    problem: Problem
    source: str
    results: list[GateResult]

    @property
    def passed(self) -> bool:
        return all(result.verdict is Verdict.PASS for result in self.results)

    @property
    def odd(self) -> str | None:
        """What is not as it should be about a failure: an error, or a category that is not the gate's."""
        for result in self.results:
            if result.verdict is Verdict.ERROR:
                return f"{result.gate}: {result.message}"
            if result.verdict is Verdict.FAIL and result.category is not _EXPECTED[result.gate]:
                return f"{result.gate} failed with {result.category.value}"
        return None


async def _verdicts(client: AsyncClient, corpus: list[Problem]) -> dict[str, Any]:
    async def judged(case: tuple[Problem, str]) -> _Case:
        problem, source = case
        return _Case(problem, source, await client.gates(_request(source, problem.tests, "lint", "unit"), _ANSWER_S))

    made = [(problem, mutant) for problem in corpus for mutant in mutants(problem.solution)]
    right = await _each([(problem, problem.solution) for problem in corpus], judged)
    outside = await _each([(problem, mutant.source) for problem, mutant in made], _passes_outside)
    wrong = await _each([(problem, mutant.source) for problem, mutant in made], judged)
    failing = [case for case, passes in zip(wrong, outside, strict=True) if not passes]
    surviving = [case for case, passes in zip(wrong, outside, strict=True) if passes]
    categories = Counter(result.category.value for case in failing for result in case.results if _failed(result))
    odd = [f"{case.problem.name}: {case.odd}" for case in (*right, *wrong) if case.odd is not None]
    return {
        "canonical": len(right),
        "canonical_passed": sum(case.passed for case in right),
        "mutants": len(wrong),
        "mutants_by_kind": dict(Counter(mutant.kind for _, mutant in made)),
        "mutants_failing_outside": len(failing),
        "mutants_missed": sum(case.passed for case in failing),
        "mutants_passing_outside": len(surviving),
        "mutants_refused_wrongly": sum(not case.passed for case in surviving),
        "categories": dict(categories),
        "unexpected": odd[:20],
    }


def _failed(result: GateResult) -> bool:
    return result.verdict is Verdict.FAIL


async def _passes_outside(case: tuple[Problem, str]) -> bool:
    """Whether the tests pass in a bare Python: the module and its tests in one namespace, exit status 0."""
    problem, source = case
    tests = problem.tests.partition("\n")[2].partition("\n")[2]
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        file = Path(folder) / "both.py"
        file.write_text(f"{source}\n{tests}\n\ntest_corpus()\n", encoding="utf-8")
        return await _bare([sys.executable, "-I", str(file)], folder) == 0


async def _bare(argv: list[str], folder: str) -> int:
    """Run a command without any gate; its exit status, -1 if it took too long."""
    child = await asyncio.create_subprocess_exec(
        *argv,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},  # as in the sandbox
    )
    try:
        async with asyncio.timeout(_OUTSIDE_S):
            return await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
        return -1


# Cost


async def _overhead(client: AsyncClient, corpus: list[Problem], pairs: int) -> dict[str, Any]:
    """Wall clock of a request with one gate, bus and sandbox included, less that of its bare tool."""
    problem = corpus[0]
    extra: dict[str, list[float]] = {"lint": [], "unit": []}
    tools = {
        "lint": [str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--no-cache", "solution.py"],
        "unit": [sys.executable, str(_RUNNER), "test_solution.py"],
    }
    await client.gates(_request(problem.solution, problem.tests, *tools), _ANSWER_S)  # versions of tools, first imports
    for number in range(pairs):
        source = f"{problem.solution}\n# {number}\n"  # another file each time, or the cache would answer
        for gate, argv in tools.items():
            with tempfile.TemporaryDirectory(prefix="tl-") as folder:
                (Path(folder) / "solution.py").write_text(source, encoding="utf-8")
                (Path(folder) / "test_solution.py").write_text(problem.tests, encoding="utf-8")
                bare_s = await _timed(_bare(argv, folder))
            gated_s = await _timed(client.gates(_request(source, problem.tests, gate), _ANSWER_S))
            extra[gate].append((gated_s - bare_s) * 1000)
    everything = [value for values in extra.values() for value in values]
    return {
        "overhead_ms_p50": round(statistics.median(everything), 1),
        **{f"overhead_{gate}_ms_p50": round(statistics.median(values), 1) for gate, values in extra.items()},
    }


async def _speedup(client: AsyncClient, rounds: int) -> dict[str, Any]:
    """Time of one request's gates in turn over their time at once, medians of runs that take turns."""
    cores = os.cpu_count() or 1
    in_turn: list[float] = []
    at_once: list[float] = []
    for number in range(rounds):
        for wanted, times in ((1, in_turn), (min(cores, _PARALLEL), at_once)):
            tests = _BUSY.format(seconds=_BUSY_S, number=f"{number}-{wanted}")
            names = [_side(index) for index in range(_PARALLEL)]
            request = _request("x = 1\n", tests, *names)
            times.append(await _timed(_passing(client.gates(request, _ANSWER_S, cores=wanted))))
    return {"parallel_speedup": round(statistics.median(in_turn) / statistics.median(at_once), 2)}


_BUSY: Final = """\
import time


def test_busy():
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
    assert "{number}"
"""


async def _cache_hits(client: AsyncClient, corpus: list[Problem]) -> int:
    """How many of the verdicts on files that were checked before came from the cache."""
    request = _request(corpus[0].solution, corpus[0].tests, "lint", "unit")
    return sum(result.cached for result in await client.gates(request, _ANSWER_S))


async def _passing(results: Awaitable[list[GateResult]]) -> None:
    for result in await results:
        if result.verdict is not Verdict.PASS:
            raise BenchmarkGateError(f"{result.gate}: {result.verdict.value} {result.message}")


class BenchmarkGateError(Exception):
    """A gate of the benchmark did not pass: its time would mean nothing."""


async def _timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[U]]) -> list[U]:
    """Do it for all of them, as many at once as there are cores; results in their order."""
    free = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(item: T) -> U:
        async with free:
            return await work(item)

    return list(await asyncio.gather(*(one(item) for item in items)))


def _request(source: str, tests: str, *gates: str) -> GateRequest:
    return GateRequest(
        gates=list(gates), artefacts=[_code("solution", source)], context=[_code("test_solution", tests)]
    )


def _code(name: str, source: str) -> Artefact:
    return Artefact(name=name, kind=ArtefactKind.CODE, value=source)


def _side(number: int) -> str:
    return f"side{number}"
