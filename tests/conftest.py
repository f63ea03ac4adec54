"""Homes for tests: short, since the path of a unix socket has a limit of 107 bytes, and gone afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

LONGEST_FIRST = (
    "tests/system/test_registry_reload.py",
    "tests/system/test_stack.py",
    "tests/chaos/test_stack_faults.py",
    "tests/system/test_speculation_policy.py",
    "tests/system/test_model_faults.py",
    "tests/system/test_ctl_tasks.py",
    "tests/chaos/test_memory_crashes.py",
    "tests/system/test_memory_service.py",
    "tests/system/test_inference_acceleration.py",
    "tests/bench/test_bench_inference.py",
    "tests/bench/test_planning.py",
    "tests/chaos/test_hostile_clients.py",
    "tests/system/test_residency.py",
    "tests/system/test_models_load.py",
    "tests/unit/test_scheduler_account_property.py",
    "tests/chaos/test_memory_damage.py",
    "tests/system/test_personas.py",
    "tests/system/test_inference_fake.py",
    "tests/system/test_tune.py",
    "tests/system/test_prefix_affinity.py",
    "tests/chaos/test_hub_kill.py",
    "tests/system/test_inference_real.py",
    "tests/system/test_generation_stack.py",
    "tests/system/test_memory_commands.py",
    "tests/system/test_ctl_stack.py",
    "tests/system/test_planner_service.py",
    "tests/system/test_failure_routing.py",
    "tests/chaos/test_memory_kill.py",
    "tests/system/test_gates_service.py",
    "tests/system/test_inference_remote.py",
    "tests/system/test_gates_shipped.py",
    "tests/system/test_learned_width.py",
    "tests/system/test_learned_routing.py",
)
"""Files that take longest. Workers that share the files (`-n 2 --dist loadfile --no-loadscope-reorder`) end together
only if none of these is begun last. Their order is what `pytest --durations=0` says; all other files follow as they
are found."""

# How long an example takes depends on what else this machine does; timings are the benchmarks' business.
settings.register_profile("tierline", deadline=None)
settings.load_profile("tierline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--memory-kills", type=int, default=6, help="rounds of kill -9 of the memory service (long: 50)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [name for name in LONGEST_FIRST if not (config.rootpath / name).is_file()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(missing)}")
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@contextmanager
def temporary_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with temporary_home() as folder:
        yield folder
