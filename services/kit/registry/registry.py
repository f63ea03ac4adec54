"""The one truth about models, roles, personas, gates, failures and hardware, loaded once and then immutable.

`load_registry` is the only door: a `Registry` that exists has passed every rule. It starts nothing and watches nothing;
a reload is a second call, and `digest` tells whether anything changed. Prompts, budgets and launch commands are made
from it by the services.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from protocol.messages.failure import Category
from services.kit.hardware import Machine, Node, detect, numbered_siblings, parse_cores
from services.kit.registry.entries import (
    ClientEntry,
    FailureCaps,
    FailureRule,
    FailureTable,
    GateEntry,
    GatePolicy,
    Hardware,
    HardwareEntry,
    LearningEntry,
    ModelEntry,
    PersonaEntry,
    RoleEntry,
    TrialPolicy,
)
from services.kit.registry.launch import Launch
from services.kit.registry.launch_rules import LAUNCH_ERRORS, LAUNCH_NOTES, known_facts
from services.kit.registry.problems import Problem, RegistryError, UnknownNameError
from services.kit.registry.rules import ERRORS, NOTES, Scene, resolved_path
from services.kit.registry.sections import FILES, Draft, read_files
from services.kit.registry.yaml_lines import Document


@dataclass(frozen=True, slots=True, eq=False)
class Registry:
    """A checked registry. All mappings are read-only and keep the order of the files.

    One is equal to itself only, so that what follows from it can be kept beside it; `digest` compares contents.

    Attributes:
        models: entries by name; `path` is absolute here (None for engine noop).
        roles: entries by name; every `model` and `escalates_to` exists.
        personas: entries by name.
        gates: entries by name; `depends_on` is acyclic.
        gate_policy: how the gates of one request are run.
        clients: what share each gets, in the order of the file; `weight_of` applies them.
        learning: whether learned choices may replace the rules'.
        failures: a rule for every `Category`, and the caps.
        hardware: what may be spent, detected where the file is silent.
        digest: sha256 in hex over the content of the files; comments, order and detected values do not change it.
        notes: what is worth knowing but refuses no launch.
        document: models.yaml as it was read, for the lines of its fields.
        trials: how personas that were made at run time earn their place.
        on_trial: names of those among `personas`.
    """

    models: Mapping[str, ModelEntry]
    roles: Mapping[str, RoleEntry]
    personas: Mapping[str, PersonaEntry]
    gates: Mapping[str, GateEntry]
    gate_policy: GatePolicy
    clients: tuple[ClientEntry, ...]
    learning: LearningEntry
    failures: FailureTable
    hardware: Hardware
    digest: str
    notes: tuple[Problem, ...]
    document: Document
    trials: TrialPolicy = field(default_factory=TrialPolicy)
    on_trial: frozenset[str] = frozenset()

    def launch(self, model: str) -> Launch:
        """Return what the process of a model is started from. Raises `UnknownNameError`."""
        if model not in self.models:
            raise UnknownNameError("model", model, self.models)
        entry = self.models[model]
        draft = entry.speculation.loaded_draft
        return Launch(entry, None if draft is None else self.models[draft], self.hardware, self.document)

    @property
    def served(self) -> Mapping[str, ModelEntry]:
        """The entries that have a process: drafts are loaded by the process of the model that they guess for."""
        return {name: model for name, model in self.models.items() if model.tier != "D"}

    def model_of(self, role: str) -> ModelEntry:
        """Return the model that serves a role. Raises `UnknownNameError`."""
        return self.models[self._role(role).model]

    def roles_of(self, model: str) -> tuple[RoleEntry, ...]:
        """Return the roles that a model serves, in the order of the file. Raises `UnknownNameError`."""
        if model not in self.models:
            raise UnknownNameError("model", model, self.models)
        return tuple(role for role in self.roles.values() if role.model == model)

    def escalation_chain(self, role: str) -> tuple[RoleEntry, ...]:
        """Return the roles that take over from a role, nearest first, itself excluded. Raises `UnknownNameError`."""
        chain: list[RoleEntry] = []
        target = self._role(role).escalates_to
        while target is not None:  # ends: the rules refuse circles
            chain.append(self.roles[target])
            target = self.roles[target].escalates_to
        return tuple(chain)

    def weight_of(self, client: str) -> float:
        """Return the weight of a client by its name on the bus, `<name>-<boot>`: the first entry that fits, else 1.

        An entry fits the whole name or the part before the last '-', which is the name the program gave itself.
        """
        given = client.rpartition("-")[0] or client
        for entry in self.clients:
            if fnmatchcase(given, entry.name) or fnmatchcase(client, entry.name):
                return entry.weight
        return 1.0

    def _role(self, name: str) -> RoleEntry:
        if name not in self.roles:
            raise UnknownNameError("role", name, self.roles)
        return self.roles[name]


def load_registry(
    folder: Path, models_folder: Path, *, check_files: bool = True, hardware_file: Path | None = None
) -> Registry:
    """Read and check the registry in a folder.

    Args:
        folder: holds the YAML files.
        models_folder: where relative model paths are looked up.
        check_files: False leaves out what needs the model files and binaries themselves (their existence, memory), for
            checks on a machine that does not have them; what entries declare of their files counts instead.
        hardware_file: read instead of the folder's hardware.yaml.

    Raises `RegistryError` with every problem of every file.
    """
    folder = folder.resolve()  # of a link that moves meanwhile all files shall be of one folder
    if not folder.is_dir():
        message = f"there is no folder {folder}; set TIERLINE_REGISTRY to the folder that holds {', '.join(FILES)}"
        raise RegistryError([Problem(folder.name, 1, "", "folder-missing", message)])
    draft = read_files(folder, hardware_file)
    hardware = hardware_of(draft.single("hardware", HardwareEntry), detect())
    entries = draft.valid("models", ModelEntry)
    facts, damaged = known_facts(draft, entries, models_folder, check_files=check_files)
    scene = Scene(draft, hardware, models_folder, check_files, facts)
    found = (problem for rule in (*ERRORS, *LAUNCH_ERRORS) for problem in rule(scene))
    problems = [*draft.problems, *damaged, *found]
    if problems:
        raise RegistryError(problems)
    return Registry(
        models=MappingProxyType({name: _at_home(model, models_folder) for name, model in scene.models.items()}),
        roles=MappingProxyType(scene.roles),
        personas=MappingProxyType(draft.valid("personas", PersonaEntry)),
        gates=MappingProxyType(scene.gates),
        gate_policy=draft.single("policy", GatePolicy),
        clients=tuple(draft.valid("clients", ClientEntry).values()),
        learning=draft.single("learning", LearningEntry),
        failures=_failure_table(draft),
        hardware=hardware,
        digest=_digest(draft),
        notes=tuple(note for rule in (*NOTES, *LAUNCH_NOTES) for note in rule(scene)),
        document=draft.document("models"),
        trials=draft.single("trials", TrialPolicy),
    )


def hardware_of(entry: HardwareEntry, machine: Machine) -> Hardware:
    """What hardware.yaml says, and where it is silent what was detected."""
    nodes = tuple(Node(parse_cores(node.cores), node.memory_bytes) for node in entry.nodes) or machine.nodes
    here = [node.cores for node in nodes] == [node.cores for node in machine.nodes]
    threads = entry.threads_per_core or (machine.threads_per_core if here else 1)
    told = here and threads == machine.threads_per_core
    return Hardware(
        cores=entry.cores or machine.cores,
        memory_bytes=entry.memory_bytes or machine.memory_bytes,
        nodes=nodes,
        siblings=machine.siblings if told else numbered_siblings(nodes, threads),
    )


def _at_home(model: ModelEntry, models_folder: Path) -> ModelEntry:
    binary = model.binary.expanduser() if model.binary is not None else None
    return model.model_copy(update={"path": resolved_path(model, models_folder), "binary": binary})


def _failure_table(draft: Draft) -> FailureTable:
    rules = {Category(key): rule for key, rule in draft.valid("failures", FailureRule).items()}
    lines = {category.value: draft.line_of("failures", category.value) for category in rules}
    lines |= {name: draft.line_of("caps", name) for name in FailureCaps.model_fields}
    return FailureTable(MappingProxyType(rules), draft.single("caps", FailureCaps), MappingProxyType(lines))


def _digest(draft: Draft) -> str:
    content = {
        **{
            section: {key: entry.model_dump(mode="json") for key, entry in entries.items()}
            for section, entries in draft.entries.items()
        },
        **{section: entry.model_dump(mode="json") for section, entry in draft.singles.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
