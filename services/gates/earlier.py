"""What a task from before a reload still asks for: gates that have left the registry, and who judges for them.

The hub keeps the roles and models of such gates in force for as long as a task uses them (`scheduler/reloading.py`),
and only running tasks ask for them; so here nothing is ever let go but by a restart. Which copies there are is the
business of `kit/registry/copies.py`, when they are read that of `app`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType

from services.kit.registry import Registry


def with_earlier(registry: Registry, earlier: Iterable[Registry]) -> Registry:
    """The registry, and under it the gates, roles and models of `earlier` ones, the newest first; the newer entry wins.

    A gate found in one of them finds its role and that role's model: in the same one, or in a newer one.
    """
    gates, roles, models = dict(registry.gates), dict(registry.roles), dict(registry.models)
    for past in earlier:
        gates = {**past.gates, **gates}
        roles = {**past.roles, **roles}
        models = {**past.models, **models}
    return replace(
        registry, gates=MappingProxyType(gates), roles=MappingProxyType(roles), models=MappingProxyType(models)
    )
