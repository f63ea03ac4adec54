"""A service follows the hub's registry: whole, in its own time, and not at all where the files are wrong."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from services.kit.clock import SteadyClock
from services.kit.config import CHECKOUT, Home, load_home
from services.kit.following import RegistryFollower
from services.kit.logs import Log
from services.kit.registry import Registry, load_registry


@pytest.fixture
def home(tmp_path: Path) -> Home:
    shutil.copytree(CHECKOUT / "registry", tmp_path / "registry", ignore=shutil.ignore_patterns("schema", "examples"))
    return load_home({"TIERLINE_HOME": str(tmp_path / "h"), "TIERLINE_REGISTRY": str(tmp_path / "registry")}).make()


class Service:
    def __init__(self, home: Home) -> None:
        self.home = home
        self.taken: list[tuple[Registry, bool]] = []
        self.willing = True
        self.log = Log(home.logs, "test", SteadyClock())
        registry = load_registry(home.registry, home.models, check_files=False)
        self.follower = RegistryFollower(home, self.log, registry, self._take)
        self.first = registry.digest

    def _take(self, registry: Registry, needed: bool) -> bool:
        self.taken.append((registry, needed))
        return self.willing

    def edit(self, old: str, new: str) -> str:
        path = self.home.registry / "roles.yaml"
        path.write_text(path.read_text().replace(old, new))
        return load_registry(self.home.registry, self.home.models, check_files=False).digest

    async def told(self, digest: str, *, needed: bool = True) -> None:
        self.follower.told(digest, needed=needed)
        if self.follower._reading is not None:
            await asyncio.wait([self.follower._reading])

    def events(self) -> list[str]:
        lines = (self.home.logs / "test.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]


async def test_a_changed_registry_is_read_and_taken_once(home: Home) -> None:
    service = Service(home)
    await service.told(service.first)
    assert service.taken == [], "it has that one"
    new = service.edit("max_tokens: 384", "max_tokens: 400")
    for _ in range(3):
        await service.told(new)
    assert [registry.digest for registry, _ in service.taken] == [new]
    assert service.follower.digest == new
    assert service.events() == ["registry.taken"]


async def test_files_with_errors_leave_the_service_with_the_old_one_until_they_are_mended(home: Home) -> None:
    service = Service(home)
    roles = home.registry / "roles.yaml"
    good = roles.read_text()
    roles.write_text(good.replace("max_tokens: 384", "max_tokens: lots"))
    await service.told("a" * 64)
    assert (service.taken, service.follower.digest) == ([], service.first)
    assert service.events() == ["registry.refused"]
    roles.write_text(good.replace("max_tokens: 384", "max_tokens: 400"))
    await service.told("a" * 64)
    assert service.follower.digest == service.taken[0][0].digest


async def test_a_service_that_does_not_take_it_yet_lags_and_is_asked_again(home: Home) -> None:
    service = Service(home)
    service.willing = False
    new = service.edit("max_tokens: 384", "max_tokens: 400")
    await service.told(new)
    assert service.follower.digest == service.first
    service.willing = True
    await service.told(new, needed=False)
    assert [needed for _, needed in service.taken] == [True, False]
    assert service.follower.digest == new


async def test_a_service_that_leaves_hears_even_of_the_registry_it_had(home: Home) -> None:
    service = Service(home)
    service.follower.let_go()
    assert service.follower.digest not in (service.first, None), "the hub sees that it lags"
    service.willing = False
    await service.told(service.first)
    assert [registry.digest for registry, _ in service.taken] == [service.first]
