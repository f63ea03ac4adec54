"""The shapes of what an operator writes into the registry: one class per kind of entry, each field with its unit.

These classes check one entry by itself. What two entries or the machine must agree on (unknown names, port clashes,
missing files, cores) is in `rules`; reading files and naming lines is in `sections` and `yaml_lines`. The name of a
named entry is its key in the file, so it is written once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator

from protocol.messages.artefact import ArtefactKind
from protocol.messages.failure import Category
from protocol.messages.infer import AbortLimits
from protocol.messages.task import TaskType
from services.kit.hardware import Node
from services.kit.registry.acceleration import (
    CoreList,
    Declared,
    FlashAttention,
    KvType,
    Numa,
    RecurrentSpeculation,
    Speculation,
)
from services.kit.registry.entry import Entry, FilePath, Name, Text

VARIABLE_PATTERN: Final = r"^[A-Z][A-Z0-9_]{0,63}$"
"""Names of environment variables, which are names of files too. Capitals only, which few keys are made of: what stands
here is shown and logged."""

CLIENT_PATTERN: Final = r"^[A-Za-z0-9_.*?-]{1,64}$"
"""Names of clients are chosen by programs; `*` and `?` stand for any characters and for one."""

ClientPattern: TypeAlias = Annotated[str, StringConstraints(pattern=CLIENT_PATTERN)]

PLACEHOLDERS: Final = ("artefact", "artefacts", "test", "workspace", "python", "checks", "report", "command")
LISTS: Final = ("artefacts", "command")
"""Placeholders that stand for several arguments, and so for a whole one each."""
TARGETS: Final = ("artefact", "artefacts", "test", "command")
"""Placeholders that say how often a gate runs; a command has one of them, or none and runs once."""
_PLACEHOLDER: Final = re.compile(r"\{(\w*)\}")

Parser: TypeAlias = Literal[
    "lines", "pattern", "diff", "ruff", "sarif", "junit", "mypy", "shellcheck", "rumdl", "tests"
]


class RemoteLimits(Entry):
    """How a server elsewhere is spoken to and how long it is borne with. Only for engine openai."""

    dialect: Literal["openai", "vllm", "llama-server"] = "openai"
    """What it takes beyond the standard: vllm (SGLang too) also top_k, min_p, repeat_penalty; llama-server also a
    grammar. Both are asked for their /health as well."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How it is told to answer with JSON; what comes is checked against the schema here in any case."""
    connect_timeout_s: float = Field(default=5.0, gt=0, le=300)
    """Seconds a connection may take."""
    first_token_timeout_s: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds until the first token: waiting in its queue and reading the prompt."""
    silence_timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    """Seconds between two tokens, after which the answer counts as dead."""
    attempts: int = Field(default=4, ge=1, le=20)
    """Tries of one call while it says 429 or 503 or takes no connection."""
    pause_max_s: float = Field(default=30.0, gt=0, le=3_600)
    """Longest pause between two tries, in seconds; a Retry-After beyond it is not waited for."""
    breaker_failures: int = Field(default=5, ge=1, le=1_000)
    """So many failures within breaker_window_s open the circuit: nothing is sent until a probe is answered."""
    breaker_window_s: float = Field(default=30.0, gt=0, le=3_600)
    """Seconds over which failures are counted."""
    probe_after_s: float = Field(default=2.0, gt=0, le=3_600)
    """Seconds from the opening to the probe; doubles each time it is in vain."""
    probe_max_s: float = Field(default=60.0, gt=0, le=86_400)
    """Longest pause between two probes, in seconds."""
    ca_file: FilePath | None = None
    """Absolute path of the certificates (PEM) to trust for https, instead of the usual authorities."""
    proxy: str | None = Field(default=None, max_length=2_048)
    """URL of an HTTP proxy to reach it through; proxies of the environment are never used."""


class ModelEntry(Entry):
    """One model with its slots, the unit the scheduler spends credit on: a file that a llama.cpp process of ours loads,
    or a model that a server elsewhere has.
    """

    name: Name
    """Key of the entry; also the name of the process that serves it, as in `inference-worker`."""
    tier: Literal["A", "B", "C", "D"]
    """A front door, B specialist, C worker, D draft: used inside speculative decoding, so no role may map to it."""
    path: FilePath | None = None
    """GGUF file. A relative path is looked up in the models folder; `~` is the home folder. Not for engine noop."""
    engine: Literal["auto", "llama-server", "embedded", "noop", "openai"] = "auto"
    """auto = llama-server where such a binary is found, else embedded. openai = a server elsewhere that speaks the
    OpenAI API. noop answers at once without a model and exists to measure the bus."""
    base_url: str | None = Field(default=None, max_length=2_048)
    """For openai: where its API begins, such as https://gpu1.example:8000/v1."""
    remote_model: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """For openai: the model's name on that server."""
    api_key_env: Annotated[str, StringConstraints(pattern=VARIABLE_PATTERN)] | None = None
    """For openai: name of the environment variable that holds its key, or of a file with mode 0600 in the folder
    secrets/ of TIERLINE_HOME; never the key itself. Absent = it wants none."""
    remote: RemoteLimits = RemoteLimits()
    """For openai: dialect, timeouts, retries, circuit breaker."""
    binary: FilePath | None = None
    """Absolute path of the llama-server to use; absent = the one on PATH or built by deploy/build-native."""
    slots: int = Field(default=1, ge=1, le=256)
    """Requests that are decoded at the same time; each is one credit."""
    context_tokens: int = Field(default=2048, ge=256, le=4_194_304)
    """Context of one slot, in tokens: prompt and answer together. The process allocates slots times this."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Cores the process decodes with."""
    threads_batch: int | None = Field(default=None, ge=1, le=1024)
    """Cores it reads prompts with; absent = as many as `threads`."""
    batch_tokens: int | None = Field(default=None, ge=32, le=65_536)
    """Tokens taken into one batch at most; absent = llama.cpp's own."""
    ubatch_tokens: int | None = Field(default=None, ge=32, le=65_536)
    """Tokens computed at once at most; absent = llama.cpp's own."""
    experts: int | None = Field(default=None, ge=1, le=1024)
    """Experts per token of a mixture-of-experts model; fewer than trained are faster. Needs llama-server."""
    speculation: Speculation = Speculation()
    """Guessing ahead, by a draft model or by looking up the text so far."""
    speculation_on_recurrent: RecurrentSpeculation = RecurrentSpeculation()
    """Leave to speculate although the model is recurrent or a hybrid, build by build."""
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock"] = "auto"
    """How the file gets into memory: mmap = mapped, mlock = kept there under memory pressure, none = read."""
    numa: Numa = Numa()
    """The cores it may run on."""
    flash_attention: FlashAttention = "auto"
    """Attention computed in blocks; a quantised value cache needs it."""
    kv_type_k: KvType = "f16"
    """Type of the keys in the KV cache; q8_0 halves their memory."""
    kv_type_v: KvType = "f16"
    """Type of the values in the KV cache."""
    cache_reuse: int = Field(default=0, ge=0, le=65_536)
    """Shortest piece of a prompt, in tokens, that is taken from the cache although it has moved; 0 = none."""
    prefix_disk_bytes: int = Field(default=1024**3, ge=0, le=2**50)
    """Disk space for beginnings and contexts of its slots that are saved to be read from there, in bytes; 0 = none are,
    nor where the disk has less than twice that free. A token of a small model takes 23 KB, of a large one ten times as
    much."""
    declared: Declared | None = None
    """What the file holds, for checks on a machine that does not have it."""
    port: int = Field(default=0, ge=0, le=65_535)
    """TCP port of the llama.cpp server on 127.0.0.1; 0 = a free one is chosen at launch."""
    exclusive: Name | None = None
    """Group of models of which one computes at a time, such as `heavy`; absent = beside any other."""
    load_deadline_s: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds the model may take to load before the launch counts as failed."""
    residency: Literal["hot", "warm", "cold"] = "hot"
    """When it is in memory: hot = always; warm = loaded when work needs it, unloaded when idle or when another model
    needs the room; cold = loaded only when somebody asks for it (`tierline models load`), then treated as warm."""
    idle_unload_s: float | None = Field(default=None, gt=0, le=604_800)
    """For warm and cold: seconds without work after which it is unloaded; absent = 300."""
    pinned: bool = False
    """For warm and cold: once loaded it stays, whoever needs the room, until `tierline models unload`."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory the loaded model needs, in bytes; absent = estimated from its file, context and slots."""

    @property
    def is_local(self) -> bool:
        """True if a process on this machine computes it: it takes cores and memory here."""
        return self.engine not in ("noop", "openai")

    def thread_fields(self) -> tuple[tuple[str, int], ...]:
        """The fields that say how many threads compute, with their values."""
        batch = () if self.threads_batch is None else (("threads_batch", self.threads_batch),)
        return (("threads", self.threads), *batch)


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
    lateral: Name | None = None
    """Model of the same tier that serves this role while its own has no live worker; absent = the role waits."""
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
    by_rule: bool = True
    """Whether the rules may choose it while outcomes do not speak yet; False = only a step, a plan or outcomes do."""


Argument: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class GateEntry(Entry):
    """A check of artefacts: a command in the sandbox, one the gates service has built in, or the verdict of a role."""

    name: Name
    """Key of the entry; steps and tasks name it in their `gates`."""
    description: Text
    """One sentence for `tierline` and for the planner: what a pass means."""
    kinds: tuple[ArtefactKind, ...] = Field(min_length=1)
    """Kinds of artefact it can check."""
    languages: tuple[Name, ...] = ()
    """Languages it can check, by content type or suffix; empty = any."""
    category: Literal[Category.FORMAT, Category.SCHEMA, Category.CODE, Category.LOGIC]
    """Category of its findings: decides through failures.yaml what happens to the step."""
    required: bool = True
    """False = advisory: its findings are shown and go into the prompt of a retry, but fail nothing."""
    argv: tuple[Argument, ...] = ()
    """Command and arguments, run in the sandbox without a shell; the placeholders are in gates.yaml."""
    builtin: Literal["schema", "taskir"] | None = None
    """Check of data without a tool: `schema` = the step's JSON Schema, `taskir` = a task that could be submitted."""
    role: Name | None = None
    """Role whose model judges the task's definition_of_done, criterion by criterion."""
    parser: Parser = "lines"
    """How the command's findings are read: the format of its output, or of the file {report}."""
    pattern: Annotated[str, StringConstraints(max_length=1_000)] | None = None
    """For parser `pattern`: regular expression of one line with the group `message`, and file, line, column, rule."""
    executes: bool = False
    """The command runs code of the artefact: then hanging or eating memory is the artefact's fault, not the tool's."""
    version_argv: tuple[Argument, ...] = ()
    """Command that prints the tool's version, part of the key of cached results; absent = the command's file is."""
    cores: int = Field(default=1, ge=0, le=1024)
    """Cores it takes from the machine's tokens while it runs; 0 = so short that it is not counted."""
    memory_bytes: int = Field(default=2 * 1024**3, ge=64 * 1024**2)
    """Memory it may use: address space of each of its processes, and resident memory of all of them."""
    timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    """Seconds after which it is killed from outside the sandbox."""
    depends_on: tuple[Name, ...] = ()
    """Gates that must not have failed on the same artefacts before; without these, gates run at the same time."""

    @property
    def target(self) -> str | None:
        """The one of `TARGETS` that its command has, None without one: then it runs once."""
        return next((word for word in self.placeholders() if word in TARGETS), None)

    def command(self, **values: str | Sequence[str]) -> list[str]:
        """Return argv with the placeholders filled in, once: a path that itself holds `{python}` stays as it is."""
        filled: list[str] = []
        for argument in self.argv:
            whole = _PLACEHOLDER.fullmatch(argument)
            if whole is not None and whole[1] in LISTS:
                filled += values[whole[1]]
            else:
                filled.append(_PLACEHOLDER.sub(lambda match: str(values[match[1]]), argument))
        return filled

    def placeholders(self) -> list[str]:
        """Return every `{word}` in argv, each once, in order."""
        return list(dict.fromkeys(word for argument in self.argv for word in _PLACEHOLDER.findall(argument)))


class GatePolicy(Entry):
    """How the gates of one request are run."""

    stop_after_failure: bool = True
    """When a required gate has failed, stop the others that cost cores: the attempt has failed anyway. False = let them
    end, for the sake of all their findings."""
    cache_bytes: int = Field(default=64 * 1024**2, ge=0)
    """Disk space for results of artefacts that were checked before, below the home; 0 = nothing is kept."""


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
    another process or after a restart; backoff = the same attempt after a pause; fail = the step fails. What is run
    again by rerun and backoff is the work that failed: of an attempt whose gates could not run, the gates alone."""
    same_role: int = Field(default=0, ge=0, le=100)
    """For retry: further attempts in the same role before `then`. For backoff: pauses before `then`."""
    then: Literal["escalate", "fail"] = "fail"
    """For retry and backoff: what follows when `same_role` is used up."""
    constrained: bool = False
    """For retry: decode under the step's JSON Schema."""
    replan: bool = False
    """Where the step would fail for good, the rest of the plan is made anew instead, within caps.replans_per_task."""
    quality_signal: bool
    """Whether the outcome says something about role, persona or plan, so that learning counts it."""


class FailureCaps(Entry):
    """Bounds over all categories, and the pauses between attempts."""

    retries_per_step: int = Field(default=3, ge=0, le=100)
    """Further attempts of one step, retries and escalations together; reruns and pauses are no attempts."""
    worker_deaths: int = Field(default=3, ge=1, le=100)
    """Processes that may die while they run one step; then it counts as poisoned and fails with that reason."""
    replans_per_task: int = Field(default=2, ge=0, le=16)
    """New versions of one task's plan, whatever asks for them: a failure, a result that contradicts the plan, or a
    deadline that would be missed; 0 = plans are never changed. Plans that came with their task are changed only where
    the task says so (`escalation.max_replans`)."""
    peer_backoff_ms: int = Field(default=200, ge=0, le=600_000)
    """Pause before the first rerun after a lost peer, in milliseconds; doubles each time."""
    resource_backoff_ms: int = Field(default=1_000, ge=0, le=600_000)
    """Pause before the first attempt after a lack of resources, in milliseconds; doubles each time."""
    backoff_max_ms: int = Field(default=30_000, ge=0, le=3_600_000)
    """Longest pause, in milliseconds."""
    circuit_failures: int = Field(default=3, ge=1, le=100)
    """So many failures of a model's processes within circuit_window_ms, with different calls, open its circuit: calls
    wait, or go to the role's lateral model, until a probe has gone well."""
    circuit_window_ms: int = Field(default=60_000, ge=1_000, le=3_600_000)
    """How long a failure counts towards opening the circuit, in milliseconds."""
    circuit_pause_ms: int = Field(default=5_000, ge=100, le=3_600_000)
    """From the opening of a circuit to the probe, in milliseconds; doubles each time the probe fails."""
    circuit_pause_max_ms: int = Field(default=60_000, ge=100, le=3_600_000)
    """Longest of these pauses, in milliseconds."""
    lateral_after_ms: int = Field(default=5_000, ge=0, le=3_600_000)
    """How long a model must have no live worker before waiting steps go to their role's lateral model."""
    degraded_wait_ms: int = Field(default=180_000, ge=1_000, le=86_400_000)
    """How long a call waits for a model whose service is DEGRADED, in milliseconds, before it ends with RESOURCE
    `model.degraded` and the service's reason; after the pauses of that row it waits as long again."""
    think_harder: Literal["off", "measured", "always"] = "measured"
    """Whether the last retry before an escalation gets a larger budget: measured = where outcomes so far say that this
    saves more time than it costs."""
    think_harder_factor: float = Field(default=2.0, ge=1.1, le=16)
    """How many times as many tokens, and as much time, such an attempt gets."""


class NodeEntry(Entry):
    """One NUMA node: cores and the memory that is near to them."""

    cores: CoreList
    """Numbers of its cores as Linux counts them, as text such as "0-7,16-23"."""
    memory_bytes: int = Field(ge=1)
    """Memory of the node, in bytes."""


class HardwareEntry(Entry):
    """What this machine may spend. Absent values are detected at load; `tierline doctor --detect` shows them."""

    cores: int | None = Field(default=None, ge=1, le=65_536)
    """Cores for models and gates; absent = those this process may run on."""
    threads_per_core: int | None = Field(default=None, ge=1, le=16)
    """Numbers that Linux gives to each physical core; absent = detected, 1 where `nodes` are of another machine."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory for models, in bytes; absent = all that the machine has, or its control group allows."""
    nodes: tuple[NodeEntry, ...] = ()
    """NUMA nodes; absent = detected. A core belongs to one node, and `cores` may not exceed all of them together."""


class LearningEntry(Entry):
    """Whether what outcomes have taught may change what is chosen. Outcomes are recorded either way."""

    enabled: bool = True
    """False: the rules choose alone, nothing is tried out."""


class TrialPolicy(Entry):
    """How personas that were made at run time earn a place in personas.yaml, and when they lose their trial."""

    offer: bool = True
    """Whether one on trial may be tried where nobody names it, as outcomes of that decide; False = only steps and plans
    that name it use it."""
    adopt: bool = True
    """Whether one that has earned it is written into personas.yaml; False = it stays on trial and `tierline personas`
    says so."""
    at_once: int = Field(default=32, ge=0, le=64)
    """Personas on trial at the same time. A further one takes the place of the one that was idle for longest, or only
    the task that it was made for knows it."""
    idle_s: float = Field(default=3_600.0, ge=0, le=31_536_000)
    """Seconds without any use, after which a persona on trial may have to make way."""
    least_outcomes: int = Field(default=20, ge=2, le=10_000)
    """Outcomes before anything is decided."""
    most_outcomes: int = Field(default=200, ge=2, le=100_000)
    """Outcomes after which one that is still not clearly better is dropped."""
    deviations: float = Field(default=1.64, gt=0, le=10)
    """Standard deviations between the mean and a bound. Adopted is whose lower bound lies above the best declared
    choice in the same kinds of work, dropped whose upper bound lies below it. 1.64: wrong once in twenty."""

    @model_validator(mode="after")
    def _in_order(self) -> "TrialPolicy":
        if self.most_outcomes < self.least_outcomes:
            raise ValueError("most_outcomes must not be less than least_outcomes")
        return self


@dataclass(frozen=True, slots=True)
class Hardware:
    """HardwareEntry after detection: what the scheduler and the rules count with."""

    cores: int
    memory_bytes: int
    nodes: tuple[Node, ...]
    siblings: tuple[tuple[int, ...], ...] = ()
    """Numbers that are threads of one physical core, for each that has several."""

    def physical_cores(self) -> dict[int, int]:
        """The physical core of every number of the nodes, told by its first number."""
        first = {number: group[0] for group in self.siblings for number in group}
        return {number: first.get(number, number) for node in self.nodes for number in node.cores}


@dataclass(frozen=True, slots=True)
class FailureTable:
    """The only place that says what happens to a failed step: a rule for every category, and the caps."""

    rules: Mapping[Category, FailureRule]
    caps: FailureCaps
    lines: Mapping[str, int]
    """Line in failures.yaml of each category and each field of the caps; a default has that of the section."""

    def source(self, name: str) -> str:
        """Where a rule stands, for people: `failures.yaml:<line>`."""
        return f"failures.yaml:{self.lines[name]}"
