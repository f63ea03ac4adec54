"""What is read from /proc and /sys: trees of files stand for machines of every shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.kit.hardware import Machine, Node, available_memory, detect, format_cores, numbered_siblings, parse_cores
from services.kit.registry.hardware_file import with_machine

GIB = 2**30
NODES = (Node((0, 1), 4 * GIB), Node((2, 3), 4 * GIB))
MACHINE = Machine(4, 8 * GIB, NODES, "affinity", "installed", siblings=((0, 1), (2, 3)))


def machine_of(root: Path, files: dict[str, str]) -> Path:
    """A root folder with these files, and 16 GiB of memory where nothing else is said."""
    for name, text in {"proc/meminfo": f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


def test_a_plain_machine_is_one_node_with_everything(tmp_path: Path) -> None:
    found = detect(machine_of(tmp_path, {}), {0, 1, 5})
    assert found == Machine(3, 16 * GIB, (Node((0, 1, 5), 16 * GIB),), "affinity", "installed")


def test_nodes_are_cut_to_the_usable_cores_and_those_without_any_are_left_out(tmp_path: Path) -> None:
    folder = "sys/devices/system/node"
    files = {
        f"{folder}/node0/cpulist": "0-3,16-19\n",
        f"{folder}/node0/meminfo": f"Node 0 MemTotal: {8 * GIB // 1024} kB\n",
        f"{folder}/node1/cpulist": "4-7\n",
        f"{folder}/node1/meminfo": f"Node 1 MemTotal: {4 * GIB // 1024} kB\n",
        f"{folder}/node2/cpulist": "\n",
        f"{folder}/node2/meminfo": f"Node 2 MemTotal: {4 * GIB // 1024} kB\n",
        f"{folder}/node10/cpulist": "8-9\n",
        f"{folder}/node10/meminfo": f"Node 10 MemTotal: {1 * GIB // 1024} kB\n",
    }
    found = detect(machine_of(tmp_path, files), {2, 3, 8, 16})
    assert found.nodes == (Node((2, 3, 16), 8 * GIB), Node((8,), 1 * GIB))
    assert found.cores == 4


def test_the_threads_of_one_core_are_known_as_far_as_they_are_usable(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu"
    files = {
        f"{folder}/cpu{number}/topology/thread_siblings_list": text
        for number, text in enumerate(["0,4\n", "1,5\n", "2,6\n", "3,7\n", "0,4\n", "1,5\n", "2,6\n", "3,7\n"])
    }
    found = detect(machine_of(tmp_path, files), {0, 1, 2, 4, 5})
    assert found.siblings == ((0, 4), (1, 5))
    assert found.threads_per_core == 2
    assert detect(tmp_path, {0, 1, 2}).threads_per_core == 1
    assert detect(tmp_path, {0, 9}).siblings == (), "the kernel need not tell"


def test_where_nobody_was_asked_a_node_has_one_thread_of_every_core_first() -> None:
    nodes = (Node((0, 1, 4, 5), 1), Node((2, 3, 6, 7), 1))
    assert numbered_siblings(nodes, 2) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert numbered_siblings(nodes, 1) == ()
    assert numbered_siblings((Node((0, 1, 2, 3, 4), 1),), 2) == ((0, 3), (1, 4))


def test_the_only_node_has_all_memory_however_little_the_host_lends_at_the_moment(tmp_path: Path) -> None:
    folder = "sys/devices/system/node/node0"
    files = {f"{folder}/cpulist": "0-1\n", f"{folder}/meminfo": f"Node 0 MemTotal: {5 * GIB // 1024} kB\n"}
    assert detect(machine_of(tmp_path, files), {0, 1}).nodes == (Node((0, 1), 16 * GIB),)


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "250000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "max 1",
        },
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["version 2, set on the group above", "version 1"],
)
def test_a_cpu_quota_bounds_the_cores_rounded_down(tmp_path: Path, files: dict[str, str]) -> None:
    found = detect(machine_of(tmp_path, files), set(range(8)))
    assert (found.cores, found.cores_bound) == (2, "quota of a control group")
    assert len(found.nodes[0].cores) == 8


def test_a_quota_of_less_than_one_core_is_one_core_and_no_quota_is_none(tmp_path: Path) -> None:
    tiny = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}
    assert detect(machine_of(tmp_path / "tiny", tiny), {0, 1}).cores == 1
    free = {
        "proc/self/cgroup": "1:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert detect(machine_of(tmp_path / "free", free), {0, 1}).cores == 2


@pytest.mark.parametrize(
    ("files", "memory", "bound"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": f"{GIB}"}, GIB, "limit of a control group"),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max"}, 16 * GIB, "installed"),
        (
            {"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}"},
            2 * GIB,
            "limit of a control group",
        ),
        (
            {"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2**63 - 4096}"},
            16 * GIB,
            "installed",
        ),
    ],
)
def test_the_memory_is_bounded_by_every_control_group_above(
    tmp_path: Path, files: dict[str, str], memory: int, bound: str
) -> None:
    found = detect(machine_of(tmp_path, files), {0})
    assert (found.memory_bytes, found.memory_bound) == (memory, bound)


def test_this_very_machine_can_be_detected() -> None:
    found = detect()
    assert found.cores >= 1
    assert found.memory_bytes > 2**20
    assert found.cores <= sum(len(node.cores) for node in found.nodes)


@given(st.sets(st.integers(min_value=0, max_value=300), min_size=1))
def test_cores_survive_the_way_through_text(cores: set[int]) -> None:
    assert parse_cores(format_cores(cores)) == tuple(sorted(cores))


@pytest.mark.parametrize("bad", ["", "a", "1-", "3-1", "1,,2", "1 2", "0-99999", "-1", "0-65536"])
def test_what_is_no_list_of_cores_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"cores|rise"):
        parse_cores(bad)


# Writing the file


def hardware_in(text: str) -> dict[str, object]:
    value = yaml.safe_load(text)["hardware"]
    assert isinstance(value, dict)
    return value


EXPECTED = {
    "cores": 4,
    "threads_per_core": 2,
    "memory_bytes": 8 * GIB,
    "nodes": [{"cores": "0-1", "memory_bytes": 4 * GIB}, {"cores": "2-3", "memory_bytes": 4 * GIB}],
}


@pytest.mark.parametrize(
    "before",
    [
        "",
        "# a comment\n",
        "hardware:\n",
        "hardware:  # all of it\n  # cores: 2\n  # memory_bytes: 8\n",
        "hardware:\n  cores: 64  # leave some\n  nodes:\n    - {cores: '0', memory_bytes: 1}\n    - {cores: '1'}\n",
        "hardware:\n  nodes:\n  - cores: '0'\n    memory_bytes: 1\n  cores: 1\n# the end\n",
    ],
)
def test_detected_values_replace_what_stands_there_and_comments_stay(before: str) -> None:
    after = with_machine(before, MACHINE)
    assert hardware_in(after) == EXPECTED
    assert with_machine(after, MACHINE) == after, "a second time changes nothing"
    for comment in ("# a comment", "# all of it", "# leave some", "# the end"):
        assert (comment in before) == (comment in after)


def test_what_is_left_is_what_the_kernel_says_or_less_where_a_group_ends_earlier(tmp_path: Path) -> None:
    assert available_memory(machine_of(tmp_path, {})) is None, "an old kernel does not say"
    machine_of(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\n"})
    assert available_memory(tmp_path) == 6 * GIB
    group = {
        "proc/meminfo": f"MemAvailable: {6 * GIB // 1024} kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": f"{4 * GIB}",
        "sys/fs/cgroup/a/memory.current": f"{3 * GIB}",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/b/memory.current": f"{GIB}",
    }
    assert available_memory(machine_of(tmp_path, group)) == GIB + GIB // 2
