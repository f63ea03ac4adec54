"""The registry: what an operator declares about models, roles, personas, gates, failures and hardware.

`load_registry(folder, models_folder)` gives a frozen `Registry` or raises `RegistryError` with every problem as
`file:line: field: message`. Field by field: registry/README.md.
"""

from services.kit.registry.copies import keep_copy, make_current, past_registries
from services.kit.registry.entries import (
    EarlyAbort,
    FailureCaps,
    FailureRule,
    FailureTable,
    GateEntry,
    Hardware,
    ModelEntry,
    PersonaEntry,
    PersonaFit,
    RemoteLimits,
    RoleEntry,
    Sampling,
    TrialPolicy,
)
from services.kit.registry.problems import Problem, RegistryError, UnknownNameError
from services.kit.registry.registry import Registry, load_registry
from services.kit.registry.trials import free_name, persona_entry, with_own, with_trials

__all__ = [
    "EarlyAbort",
    "FailureCaps",
    "FailureRule",
    "FailureTable",
    "GateEntry",
    "Hardware",
    "ModelEntry",
    "PersonaEntry",
    "PersonaFit",
    "Problem",
    "Registry",
    "RegistryError",
    "RemoteLimits",
    "RoleEntry",
    "Sampling",
    "TrialPolicy",
    "UnknownNameError",
    "free_name",
    "keep_copy",
    "load_registry",
    "make_current",
    "past_registries",
    "persona_entry",
    "with_own",
    "with_trials",
]
