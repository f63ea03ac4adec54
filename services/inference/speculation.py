"""Whether the engine should guess ahead: pure, from finished answers and the load to a mode and its reason.

llama.cpp takes the kind of speculation at its start, not per request, so a change of mode is a new child. It is wished
for here, and carried out by `supervisor` where no call runs. The rules, first match:

1. Several streams at once: PLAIN. A batch uses the cores well already, and checking guesses takes them from others.
2. A trial that has failed: PLAIN until its pause is over; pauses double. New trials begin with a clean slate.
3. Few guesses accepted: the trial has failed. Many guesses were computed for nothing. Any answer shows it, also one
   beside others: where answers always overlap a little, there is no speed to judge by.
4. No measure of the plain speed yet, and enough answers with guesses: PLAIN for a while, to have one.
5. Guessing is not faster than plain by `PAYS`: the trial has failed.
6. Otherwise SPECULATING.

Speeds are tokens per second of answers that had the engine for themselves, averaged over the last tokens, so that an
engine whose work changes is judged by its present work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from services.inference.command_line import Mode

MANY_STREAMS: Final = 1.5
"""Mean number of answers at once from which the load is a batch."""
FEW_STREAMS: Final = 1.2
"""Mean below which it is a single stream again; the gap keeps a load in between from toggling."""
LOAD_MEMORY_MS: Final = 5_000
"""How fast the mean of the load forgets."""
SPEED_MEMORY_TOKENS: Final = 400
"""How fast a mean speed forgets."""
TRIAL_TOKENS: Final = 160
"""Tokens of answers with guesses before a trial is judged: of all for its acceptance, of those alone for its speed."""
BASELINE_TOKENS: Final = 96
"""Tokens of plain answers that make a measure of the plain speed."""
BASELINE_AFTER_TOKENS: Final = 600
"""Tokens with guesses after which the plain speed is measured, though nothing speaks against guessing."""
ACCEPTED_SHARE: Final = 0.4
"""Least accepted share of guesses. Checking a guess costs half of a step on cores that are busy anyway, so that below
this a guess costs more than it saves; on a model bound by memory it costs less, and rule 5 has the last word."""
PAYS: Final = 1.1
"""Guessing has to be faster by this factor. Both speeds are means of other answers at another time, and what a machine
does besides moves them by 5 % and more: with 1.02, prose stayed with guesses that gave 1.06 to 1.09 times the plain
speed by these means, and 0.95 times by pairs of the same answers. What pays gives far more than that."""
FIRST_PAUSE_MS: Final = 60_000
LONGEST_PAUSE_MS: Final = 3_600_000
SETTLE_MS: Final = 300
"""Time without any call before a change: the next call of a busy client is not made to wait for a new child."""
LEAST_STAY_MS: Final = 5_000
"""Shortest time in a mode; at least this many times the launch time is spent in it, see STAY_LAUNCHES."""
STAY_LAUNCHES: Final = 10
PATIENCE_MS: Final = 30_000
"""A wish that finds no idle moment for so long is worth holding new calls back until the running ones are done."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete answer."""

    mode: Mode
    alone: bool
    """Whether it had the engine for itself from its first to its last token."""
    generated_tokens: int
    generate_ms: float
    draft_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What the policy wants now, and why, for people."""

    mode: Mode
    reason: str


def mode_under(modes: Sequence[Mode], streams: int) -> Mode:
    """The mode that so many answers at once lead to, of those an entry allows, while nothing speaks against guesses."""
    return Mode.PLAIN if Mode.PLAIN in modes and streams > MANY_STREAMS else modes[0]


@dataclass(slots=True)
class _Speed:
    """Mean tokens per second over the last tokens."""

    tokens: float = 0.0
    seconds: float = 0.0
    seen_tokens: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        keep = max(0.0, 1 - tokens / SPEED_MEMORY_TOKENS)
        self.tokens = self.tokens * keep + tokens
        self.seconds = self.seconds * keep + seconds
        self.seen_tokens += tokens

    @property
    def per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class SpeculationPolicy:
    """One engine's policy. `modes` are those its registry entry allows, the first one it starts in."""

    modes: Sequence[Mode]
    mode: Mode = field(init=False)
    """Of the present child."""
    _since_ms: int = 0
    _launch_ms: int = 0
    _streams: float = 0.0
    _active: int = 0
    _seen_ms: int = 0
    _idle_since_ms: int = 0
    _batch: bool = False
    _speeds: dict[Mode, _Speed] = field(default_factory=lambda: {mode: _Speed() for mode in Mode})
    _trial_tokens: int = 0
    """Tokens of all answers with guesses in this trial."""
    _drafted: float = 0.0
    _accepted: float = 0.0
    _off_until_ms: int = 0
    _why_off: str = ""
    _pause_ms: int = FIRST_PAUSE_MS
    _wished_since_ms: int | None = None

    def __post_init__(self) -> None:
        """Begin in the first mode."""
        self.mode = self.modes[0]

    @property
    def may_change(self) -> bool:
        """Whether there is anything to decide."""
        return len(self.modes) > 1

    def launched(self, at_ms: int, mode: Mode, took_ms: int) -> None:
        """A child serves in this mode; it took so long to get there."""
        self.mode = mode
        self._since_ms = at_ms
        self._launch_ms = took_ms
        self._wished_since_ms = None

    def failed(self, at_ms: int, mode: Mode, reason: str) -> None:
        """A child of this mode could not be had or has died: with guesses, that is a failed trial."""
        if mode is Mode.SPECULATING and self.may_change:
            self._switch_off(at_ms, f"the engine failed while guessing ahead: {reason}")

    def load(self, at_ms: int, active: int) -> None:
        """So many calls have slots from now on."""
        self._age(at_ms)
        if self._active and not active:
            self._idle_since_ms = at_ms
        self._active = active

    def answered(self, event: Answered) -> None:
        """Take one answer into account. Those of several at once say nothing about the speed of a single stream."""
        if event.mode is Mode.SPECULATING:
            self._trial_tokens += event.generated_tokens
            keep = max(0.0, 1 - event.generated_tokens / SPEED_MEMORY_TOKENS)
            self._drafted = self._drafted * keep + event.draft_tokens
            self._accepted = self._accepted * keep + event.accepted_tokens
        if event.alone and event.generated_tokens and event.generate_ms > 0:
            self._speeds[event.mode].add(event.generated_tokens, event.generate_ms / 1000)

    def choose(self, at_ms: int) -> Choice:
        """The mode that the load and the answers call for; remembers failed trials."""
        self._age(at_ms)
        if not self.may_change:
            return Choice(self.modes[0], "the registry entry leaves no choice")
        self._batch = self._streams > (FEW_STREAMS if self._batch else MANY_STREAMS)
        if self._batch:
            return Choice(Mode.PLAIN, f"{self._streams:.1f} answers at once: a batch is faster without guesses")
        if self._why_off and at_ms >= self._off_until_ms:
            self._why_off = ""
            self._speeds[Mode.SPECULATING] = _Speed()
            self._trial_tokens = 0
            self._drafted = self._accepted = 0.0
        if self._why_off:
            left_s = (self._off_until_ms - at_ms) / 1000
            return Choice(Mode.PLAIN, f"{self._why_off}; tried again in {left_s:.0f} s")
        return self._judge(at_ms)

    def change(self, at_ms: int) -> Choice | None:
        """The mode to change to now, by a new child, if no call runs; None = stay."""
        wish = self._wish(at_ms)
        if wish is None or self._active or at_ms - self._idle_since_ms < SETTLE_MS:
            return None
        return wish

    def hold(self, at_ms: int) -> Choice | None:
        """The mode for which new calls are worth holding back, since no idle moment has come by itself."""
        wish = self._wish(at_ms)
        if wish is None or self._wished_since_ms is None or at_ms - self._wished_since_ms < PATIENCE_MS:
            return None
        return wish

    def figures(self, at_ms: int) -> dict[str, float | str]:
        """What status shows."""
        choice = self.choose(at_ms)
        plain, guessing = (self._speeds[mode].per_s for mode in (Mode.PLAIN, Mode.SPECULATING))
        return {
            "mode": self.mode.value,
            "mode_wanted": choice.mode.value,
            "mode_reason": choice.reason,
            "streams": round(self._streams, 2),
            "acceptance": round(self.acceptance, 3),
            "plain_tokens_per_s": round(plain, 1),
            "speculating_tokens_per_s": round(guessing, 1),
        }

    @property
    def acceptance(self) -> float:
        """Accepted share of the last guesses, 0 to 1; 0 without any."""
        return self._accepted / self._drafted if self._drafted else 0.0

    def _judge(self, at_ms: int) -> Choice:
        plain, guessing = self._speeds[Mode.PLAIN], self._speeds[Mode.SPECULATING]
        if self._trial_tokens < TRIAL_TOKENS:
            return Choice(Mode.SPECULATING, "a single stream: guessing ahead is on trial")
        if self._drafted >= TRIAL_TOKENS / 4 and self.acceptance < ACCEPTED_SHARE:
            return self._switch_off(at_ms, f"{self.acceptance:.0%} of the guesses were accepted")
        if guessing.seen_tokens < TRIAL_TOKENS:
            accepted = f"{self.acceptance:.0%} of the guesses are accepted"
            return Choice(Mode.SPECULATING, f"{accepted}; answers overlap, so that the speed is not known")
        if plain.seen_tokens < BASELINE_TOKENS:
            if guessing.seen_tokens < BASELINE_AFTER_TOKENS:
                return Choice(Mode.SPECULATING, f"a single stream; {self.acceptance:.0%} of the guesses are accepted")
            return Choice(Mode.PLAIN, "measuring the speed without guesses")
        ratio = guessing.per_s / plain.per_s
        if ratio < PAYS:
            return self._switch_off(at_ms, f"guessing ahead gave {ratio:.2f} times the plain speed")
        self._pause_ms = FIRST_PAUSE_MS
        return Choice(Mode.SPECULATING, f"a single stream: guessing ahead gives {ratio:.2f} times the plain speed")

    def _switch_off(self, at_ms: int, why: str) -> Choice:
        self._why_off = why
        self._off_until_ms = at_ms + self._pause_ms
        self._pause_ms = min(2 * self._pause_ms, LONGEST_PAUSE_MS)
        return Choice(Mode.PLAIN, why)

    def _wish(self, at_ms: int) -> Choice | None:
        choice = self.choose(at_ms)
        if choice.mode is self.mode:
            self._wished_since_ms = None
            return None
        if self._wished_since_ms is None:
            self._wished_since_ms = at_ms
        stay_ms = max(LEAST_STAY_MS, STAY_LAUNCHES * self._launch_ms)
        return choice if at_ms - self._since_ms >= stay_ms else None

    def _age(self, at_ms: int) -> None:
        """Let the mean of the load forget. Idle time does not count: it says nothing about what comes next."""
        passed_ms = max(0, at_ms - self._seen_ms)
        self._seen_ms = max(self._seen_ms, at_ms)
        if self._active:
            weight = min(1.0, passed_ms / LOAD_MEMORY_MS)
            self._streams += (self._active - self._streams) * weight
