"""The shapes of what an operator writes into the registry: one class per kind of entry, each field with its unit.

These classes check one entry by itself. What two entries or the machine must agree on (unknown names, port clashes,
missing files, cores) is in `rules`; reading files and naming lines is in `sections` and `yaml_lines`. The name of a
named entry is its key in the file, so it is written once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from protocol.messages.artefact import ArtefactKind
from protocol.messages.failure import Category
from protocol.messages.infer import AbortLimits
from protocol.messages.task import TaskType
from services.kit.hardware import Node, parse_cores

NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,31}$"
"""Names become parts of process names, file names and log fields, hence so narrow."""

CLIENT_PATTERN: Final = r"^[A-Za-z0-9_.*?-]{1,64}$"
"""Names of clients are chosen by programs; `*` and `?` stand for any characters and for one."""

Name: TypeAlias = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ClientPattern: TypeAlias = Annotated[str, StringConstraints(pattern=CLIENT_PATTERN)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=16_000, strip_whitespace=True)]

PLACEHOLDERS: Final = frozenset({"artefact", "workspace", "python"})
_PLACEHOLDER: Final = re.compile(r"\{(\w*)\}")


def _core_list(text: str) -> str:
    parse_cores(text)
    return text


class Entry(BaseModel):
    """Base of everything an operator writes: frozen, and a misspelt field is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelEntry(Entry):
    """One model file as one llama.cpp process with its slots: the unit the scheduler spends credit on."""

    name: Name
    """Key of the entry; also the name of the process that serves it, as in `inference-worker`."""
    tier: Literal["A", "B", "C", "D"]
    """A front door, B specialist, C worker, D draft: used inside speculative decoding, so no role may map to it."""
    path: Path | None = None
    """GGUF file. A relative path is looked up in the models folder; `~` is the home folder. Not for engine noop."""
    engine: Literal["auto", "llama-server", "embedded", "noop"] = "auto"
    """auto = llama-server where such a binary is found, else embedded. noop answers at once without a model and
    exists to measure the bus."""
    binary: Path | None = None
    """Absolute path of the llama-server to use; absent = the one on PATH or built by deploy/build-native."""
    slots: int = Field(default=1, ge=1, le=256)
    """Requests that are decoded at the same time; each is one credit."""
    context_tokens: int = Field(default=2048, ge=256, le=4_194_304)
    """Context of one slot, in tokens: prompt and answer together. The process allocates slots times this."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Cores the process decodes with."""
    port: int = Field(default=0, ge=0, le=65_535)
    """TCP port of the llama.cpp server on 127.0.0.1; 0 = a free one is chosen at launch."""
    exclusive: Name | None = None
    """Group of models of which one computes at a time, such as `heavy`; absent = beside any other."""
    load_deadline_s: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds the model may take to load before the launch counts as failed."""


class Sampling(Entry):
    """How tokens are drawn for a role. The defaults are llama.cpp's own."""

    temperature: float = Field(default=0.8, ge=0, le=5)
    """0 = always the most probable token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Keep the most probable tokens that together reach this probability; 1 = off."""
    top_k: int = Field(default=40, ge=0, le=100_000)
    """Keep this many most probable tokens; 0 = off."""
    min_p: float = Field(default=0.05, ge=0, le=1)
    """Drop tokens less probable than this share of the best one; 0 = off."""
    repeat_penalty: float = Field(default=1.0, gt=0, le=2)
    """Above 1 repeated tokens become less probable; 1 = off."""
    seed: int | None = Field(default=None, ge=0, lt=2**32 - 1)
    """Fixed seed for repeatable answers; absent = derived per attempt."""


class EarlyAbort(Entry):
    """When an answer of a role is stopped while it is decoded, so that a stronger role has the time."""

    enabled: bool = True
    """false = never."""
    repetition: bool = True
    """Stop an answer that repeats itself: exact loops, the same few lines, the same few phrases."""
    repeated_chars: int = Field(default=400, ge=80, le=100_000)
    """Characters that a loop must cover to count; four times as many where the answer has the form of data."""
    runaway_tokens: int | None = Field(default=None, ge=1)
    """Tokens that no good answer of the role needs, although max_tokens allows them; absent = max_tokens ends it."""
    entropy_nats: float | None = Field(default=None, gt=0, le=20)
    """Mean entropy per token over 64 tokens above which the model is lost, at most 2.4 is ever seen; absent = not
    measured. Costs the log probabilities of ten candidates for each token."""

    def limits(self) -> AbortLimits | None:
        """The limits as they go on the wire; None where it is switched off."""
        return AbortLimits(**self.model_dump(exclude={"enabled"})) if self.enabled else None


class RoleEntry(Entry):
    """What a step can ask for: a model with a system prompt, sampling, limits and a place to escalate to."""

    name: Name
    """Key of the entry; plans name it as the `actor` of a step."""
    description: Text
    """One sentence for the planner and for `tierline roles`: what this role is for."""
    model: Name
    """Entry in models.yaml that serves this role."""
    prompt: Text
    """System prompt."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    max_tokens: int = Field(default=512, ge=1, le=1_048_576)
    """Longest answer in tokens when the step sets none; must be less than the model's context_tokens."""
    timeout_s: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds one attempt may take when the step sets none."""
    early_abort: EarlyAbort = EarlyAbort()
    """When an answer is stopped while it is decoded."""
    escalates_to: Name | None = None
    """Role that takes over when this one fails in a way that asks for a stronger one; absent = none, the step fails."""


class PersonaFit(Entry):
    """Where a persona may be chosen. An empty list means: anywhere."""

    roles: tuple[Name, ...] = ()
    """Roles it suits."""
    task_types: tuple[TaskType, ...] = ()
    """Types of task it suits."""


class PersonaEntry(Entry):
    """A prompt overlay, independent of the role: it changes the manner, never the model."""

    name: Name
    """Key of the entry."""
    description: Text
    """One sentence on when to choose it."""
    prompt: Text
    """Text that is added to the role's system prompt."""
    fits: PersonaFit = PersonaFit()
    """Where it may be chosen."""


class GateEntry(Entry):
    """A deterministic check of one artefact: a command in the sandbox, or one that the gates service has built in."""

    name: Name
    """Key of the entry; steps and tasks name it in their `gates`."""
    description: Text
    """One sentence for `tierline` and for the planner: what a pass means."""
    kinds: tuple[ArtefactKind, ...] = Field(min_length=1)
    """Kinds of artefact it can check."""
    languages: tuple[Name, ...] = ()
    """Languages of code it can check; empty = any."""
    category: Literal[Category.FORMAT, Category.SCHEMA, Category.CODE, Category.LOGIC]
    """Category of its findings: decides through failures.yaml what happens to the step."""
    argv: tuple[Annotated[str, StringConstraints(min_length=1, max_length=4096)], ...] = ()
    """Command and arguments, run in the sandbox without a shell. May use {artefact}, {workspace} and {python}."""
    builtin: Literal["schema"] | None = None
    """Check done inside the gates service instead of a command: `schema` = the step's JSON Schema."""
    cores: int = Field(default=1, ge=1, le=1024)
    """Cores it takes from the budget while it runs."""
    timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    """Seconds after which it is killed from outside the sandbox."""
    depends_on: tuple[Name, ...] = ()
    """Gates that must have passed on the same artefact first; without these, gates run at the same time."""

    def command(self, *, artefact: str, workspace: str, python: str) -> list[str]:
        """Return argv with the placeholders filled in, once: a path that itself holds `{python}` stays as it is."""
        values = {"artefact": artefact, "workspace": workspace, "python": python}
        return [_PLACEHOLDER.sub(lambda match: values[match[1]], argument) for argument in self.argv]

    def unknown_placeholders(self) -> list[str]:
        """Return every `{word}` in argv that `command` could not fill in."""
        found = {word for argument in self.argv for word in _PLACEHOLDER.findall(argument)}
        return sorted(found - PLACEHOLDERS)


class ClientEntry(Entry):
    """What share of the slots the clients of a name get, where several wait for the same model."""

    name: ClientPattern
    """Key of the entry: the name a client gives itself, or a pattern with `*` and `?`."""
    weight: float = Field(default=1.0, ge=0.01, le=100)
    """Calls that a client of this name gets for each one of a client of weight 1."""


class FailureRule(Entry):
    """What happens to a step that failed in one category."""

    action: Literal["retry", "escalate", "rerun", "backoff", "fail"]
    """retry = same role with the findings; escalate = the role it escalates to, at once; rerun = the same attempt on
    another process or after a restart; backoff = the same attempt after a pause; fail = the step fails."""
    same_role: int = Field(default=0, ge=0, le=100)
    """For retry and backoff: further attempts in the same role before `then`."""
    then: Literal["escalate", "fail"] = "fail"
    """For retry and backoff: what follows when `same_role` is used up."""
    constrained: bool = False
    """For retry: decode under the step's JSON Schema."""
    quality_signal: bool
    """Whether the outcome says something about role, persona or plan, so that learning counts it."""


class FailureCaps(Entry):
    """Bounds over all categories, and the pauses between attempts."""

    retries_per_step: int = Field(default=3, ge=0, le=100)
    """Further attempts of one step, retries and escalations together."""
    worker_deaths: int = Field(default=3, ge=1, le=100)
    """Processes that may die while they run one step; then it counts as poisoned and fails with that reason."""
    peer_backoff_ms: int = Field(default=200, ge=0, le=600_000)
    """Pause before the first rerun after a lost peer, in milliseconds; doubles each time."""
    resource_backoff_ms: int = Field(default=1_000, ge=0, le=600_000)
    """Pause before the first attempt after a lack of resources, in milliseconds; doubles each time."""
    backoff_max_ms: int = Field(default=30_000, ge=0, le=3_600_000)
    """Longest pause, in milliseconds."""


class NodeEntry(Entry):
    """One NUMA node: cores and the memory that is near to them."""

    cores: Annotated[str, StringConstraints(max_length=4_096), AfterValidator(_core_list)]
    """Numbers of its cores as Linux counts them, as text such as "0-7,16-23"."""
    memory_bytes: int = Field(ge=1)
    """Memory of the node, in bytes."""


class HardwareEntry(Entry):
    """What this machine may spend. Absent values are detected at load; `tierline doctor --detect` shows them."""

    cores: int | None = Field(default=None, ge=1, le=65_536)
    """Cores for models and gates; absent = those this process may run on."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory for models, in bytes; absent = all that the machine has, or its control group allows."""
    nodes: tuple[NodeEntry, ...] = ()
    """NUMA nodes; absent = detected. A core belongs to one node, and `cores` may not exceed all of them together."""


class LearningEntry(Entry):
    """Whether what outcomes have taught may change what is chosen. Outcomes are recorded either way."""

    enabled: bool = True
    """False: the rules choose alone, nothing is tried out."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """HardwareEntry after detection: what the scheduler and the rules count with."""

    cores: int
    memory_bytes: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class FailureTable:
    """The only place that says what happens to a failed step: a rule for every category, and the caps."""

    rules: Mapping[Category, FailureRule]
    caps: FailureCaps
