"""What is tried for an entry: every option is one that the registry takes, also after any other one has won."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.ctl.tuning.search import Axis, Point
from services.ctl.tuning.space import Objective, axes_of, changes, start_of
from services.kit.gguf_facts import read_facts
from services.kit.hardware import Node, numbered_siblings
from services.kit.registry import ModelEntry, Registry, RegistryError, load_registry
from services.kit.registry.entries import Hardware
from services.kit.registry.launch import Launch
from services.kit.registry.models_file import with_settings
from tests.fakes.gguf_files import write_tiny_gguf
from tests.unit.test_registry_rules import GOOD

OBJECTIVES: tuple[Objective, Objective] = ("latency", "throughput")
SPECULATIONS: dict[str, Mapping[str, Any]] = {
    "none": {},
    "none, and off": {"policy": "off"},
    "a lookup": {"type": "ngram-simple"},
    "a lookup that is off": {"type": "ngram-map-k4v", "ngram_n": 6, "policy": "off"},
    "a lookup in any mode": {"type": "ngram-map-k", "ngram_m": 20, "policy": "always"},
    "ngram-mod": {"type": "ngram-mod", "ngram_n": 16},
    "ngram-mod with n_min": {"type": "ngram-mod", "n_min": 8},
    "ngram-mod with a long n_min": {"type": "ngram-mod", "n_min": 200, "ngram_m": 256},
    "a draft": {"type": "draft", "draft": "draft"},
    "a draft with n_min": {"type": "draft", "draft": "draft", "n_min": 8, "n_max": 12},
    "a draft and a lookup": {"type": "draft", "draft": "draft", "lookup": "ngram-mod", "n_min": 4, "ngram_m": 60},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model files, of which a header is read once only."""
    made = tmp_path_factory.mktemp("registry")
    for name in ("front.gguf", "worker.gguf"):
        write_tiny_gguf(made / name, extra={"attention.head_count": 2, "attention.head_count_kv": 2})
    return made


def registry(folder: Path, speculation: Mapping[str, Any], **fields: Any) -> Registry:
    """A registry of real files whose entry `worker` has these fields."""
    for name, text in GOOD.items():
        (folder / name).write_text(text, encoding="utf-8")
    models = yaml.safe_load(GOOD["models.yaml"])
    models["models"]["worker"] |= {**fields, **({"speculation": dict(speculation)} if speculation else {})}
    (folder / "models.yaml").write_text(yaml.safe_dump(models), encoding="utf-8")
    return load_registry(folder, folder)


def with_point(folder: Path, text: str, point: Point) -> ModelEntry:
    """The entry as the registry's reader gives it with the settings of a point. Fails where a rule refuses them."""
    (folder / "models.yaml").write_text(with_settings(text, "worker", dict(point.settings)), encoding="utf-8")
    try:
        return load_registry(folder, folder).models["worker"]
    except RegistryError as err:
        pytest.fail(f"{dict(point.settings)}: {'; '.join(str(problem) for problem in err.problems)}")


def axis(launch: Launch, objective: Objective, name: str, cores: int = 4) -> Axis | None:
    return next((one for one in axes_of(launch, cores, objective) if one.name == name), None)


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS.keys())
def test_the_registry_takes_every_way_to_guess_also_after_any_other_one(
    folder: Path, speculation: Mapping[str, Any]
) -> None:
    launch = registry(folder, speculation).launch("worker")
    text = (folder / "models.yaml").read_text(encoding="utf-8")
    found = axis(launch, "latency", "speculation")
    assert found is not None
    start = start_of(launch.entry)
    for second in found.options:
        with_point(folder, text, start.with_option(second))
        for first in found.options:
            point = start.with_option(first).with_option(second)
            if set(second) == {"speculation.policy"}:  # without: what is switched off stays as it was
                assert with_point(folder, text, point).speculation.policy == "off"
            else:
                assert point == start.with_option(second)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_registry_takes_every_option_of_every_axis(folder: Path, objective: Objective) -> None:
    launch = registry(folder, SPECULATIONS["a lookup in any mode"]).launch("worker")
    text = (folder / "models.yaml").read_text(encoding="utf-8")
    assert launch.hardware is not None
    axes = axes_of(launch, launch.hardware.cores, objective)
    assert len(axes) >= 4
    for option in (option for one in axes for option in one.options):
        with_point(folder, text, start_of(launch.entry).with_option(option))


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS.keys())
def test_latency_tries_to_guess_ahead_and_not_to(folder: Path, speculation: Mapping[str, Any]) -> None:
    launch = registry(folder, speculation).launch("worker")
    text = (folder / "models.yaml").read_text(encoding="utf-8")
    found = axis(launch, "latency", "speculation")
    assert found is not None
    start = start_of(launch.entry)
    tried = [with_point(folder, text, start.with_option(option)).speculation for option in found.options]
    guessing = [one for one in tried if one.types and one.policy != "off"]
    assert len(guessing) >= 3
    assert all(one == found for one, found in zip(guessing, dict.fromkeys(guessing), strict=True)), "each is another"
    assert len(tried) - len(guessing) == (1 if launch.entry.speculation.types else 0), "without, where it has any"
    assert axis(launch, "latency", "slots") is None, "one stream uses one slot"


def test_ngram_mod_is_among_the_lookups_and_with_n_min_the_only_one(folder: Path) -> None:
    without_n_min = axis(registry(folder, {}).launch("worker"), "latency", "speculation")
    with_n_min = axis(registry(folder, {"type": "ngram-mod", "n_min": 8}).launch("worker"), "latency", "speculation")
    assert without_n_min is not None
    assert with_n_min is not None
    assert {option["speculation.type"] for option in without_n_min.options} == {
        "ngram-simple",
        "ngram-map-k",
        "ngram-mod",
    }
    lengths = [(option.get("speculation.n_min"), option.get("speculation.ngram_m")) for option in with_n_min.options]
    assert lengths == [(None, None), (8, 24), (16, 48), (48, 64)]


def test_a_draft_is_tried_with_lengths_that_its_shortest_guess_allows(folder: Path) -> None:
    found = axis(registry(folder, SPECULATIONS["a draft with n_min"]).launch("worker"), "latency", "speculation")
    assert found is not None
    assert [option.get("speculation.n_max") for option in found.options] == [None, 8, 16, 24]


def test_throughput_tries_slots_and_guesses_only_where_the_service_guesses_with_all_slots_at_work(
    folder: Path,
) -> None:
    for name, speculation in SPECULATIONS.items():
        launch = registry(folder, speculation).launch("worker")
        slots, guesses = (axis(launch, "throughput", one) for one in ("slots", "speculation"))
        assert slots is not None
        assert [option["slots"] for option in slots.options] == [2, 4, 8, 16]
        assert (guesses is not None) == (name == "a lookup in any mode"), name
        if guesses is not None:
            assert guesses.options[0] == {"speculation.policy": "auto"}, "a single stream goes on guessing"


def test_a_recurrent_model_is_tried_without_guesses_unless_a_build_is_allowed(folder: Path) -> None:
    launch = registry(folder, {}).launch("worker")
    facts = read_facts(write_tiny_gguf(folder / "mamba.gguf", architecture="mamba", extra={"ssm.state_size": 16}))
    assert facts.recurrent is not None
    assert axis(launch.with_facts(facts, None), "latency", "speculation") is None
    leave = {**launch.entry.model_dump(), "speculation_on_recurrent": {"allowed_builds": ["b1"]}}
    allowed = replace(launch, entry=ModelEntry.model_validate(leave)).with_facts(facts, None)
    assert axis(allowed, "latency", "speculation") is not None


@pytest.mark.parametrize("field", ["threads", "threads_batch"])
def test_over_several_nodes_no_more_threads_are_tried_than_there_are_physical_cores(folder: Path, field: str) -> None:
    nodes = tuple(Node(tuple(range(first, first + 4)), 1 << 39) for first in (0, 4))
    hardware = Hardware(cores=8, memory_bytes=1 << 40, nodes=nodes, siblings=numbered_siblings(nodes, 2))
    launch = replace(registry(folder, {}).launch("worker"), hardware=hardware)
    assert threads_of(launch, field, cores=8) == [1, 2, 4]
    assert threads_of(replace(launch, hardware=replace(hardware, siblings=())), field, cores=8) == [1, 2, 4, 8]
    bound = ModelEntry.model_validate({**launch.entry.model_dump(), "numa": {"nodes": [1]}})
    assert threads_of(replace(launch, entry=bound), field, cores=4) == [1, 2, 4]


def threads_of(launch: Launch, field: str, cores: int) -> list[object]:
    found = axis(launch, "latency", field, cores=cores)
    assert found is not None
    return [option[field] for option in found.options]


def test_on_one_core_there_are_no_threads_to_choose(folder: Path) -> None:
    launch = registry(folder, {}, threads=1).launch("worker")
    assert axis(launch, "latency", "threads_batch", cores=1) is None


def test_the_start_holds_what_the_entry_sets_and_what_is_tried_at_once(folder: Path) -> None:
    entry = registry(folder, SPECULATIONS["ngram-mod with n_min"], batch_tokens=256).launch("worker").entry
    start = start_of(entry)
    assert dict(start.settings) == {
        "threads": 2,
        "slots": 4,
        "batch_tokens": 256,
        "speculation.type": "ngram-mod",
        "speculation.n_min": 8,
        "speculation.policy": "auto",
    }
    best = start.with_option({"speculation.policy": "auto", "threads": 4})
    assert changes(start, best) == {"threads": 4}, "what it has already is not written"
    assert "speculation.policy" not in dict(start_of(registry(folder, {}).launch("worker").entry).settings)
