"""Is this answer still worth its slot? Watches one answer while it is decoded and says when to stop it.

Pure: text, tokens and time in, a verdict with its evidence out. Four things end an answer early: it repeats itself (an
exact loop at its end, the same few lines, the same few phrases), the model does not know what to say (entropy, where
the request asks for log probabilities), it is longer than any answer of its role may be, or the engine went on beyond
what it was allowed. What follows is the failure table's business; how the slot becomes free, `generation`'s.

Tables, code and lists repeat much and are fine. Hence: a loop must be exact or nearly so and long, and where an answer
has the form of data (decoding is constrained, or it begins like JSON) or its loop holds no words (rulers, zeros, empty
cells), `_LENIENT` times as much of it is needed.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any, Final

from protocol.messages.infer import AbortLimits

MIN_REPEATS: Final = 4
"""A passage that stands there four times in a row is a loop if it is long enough as well."""
_LENIENT: Final = 4
_STRIDE_CHARS: Final = 48
"""The end of the text is looked at each time it has grown by so much; it costs microseconds."""
_PROBE_CHARS: Final = 16
_MAX_PERIODS: Final = 64
"""Lengths of a loop that are tried at one look."""
_WINDOW_LINES: Final = 24
_WINDOW_COUNTED: Final = 40
"""The same for entries of a list in which only numbers differ: it counts on and says nothing new."""
_FEW_LINES: Final = 3
_LINE_CHARS: Final = 16
"""Shorter lines, such as braces and empty cells, say nothing."""
_WINDOW_WORDS: Final = 200
_GRAM: Final = 4
_FEW_GRAMS: Final = 0.12
"""Share of different four-word phrases below which a passage says the same again and again."""
_WINDOW_TOKENS: Final = 64
_SLACK_TOKENS: Final = 16
_SLACK_S: Final = 1.0
_SHOWN_CHARS: Final = 200
_KEPT_CHARS: Final = 1_000
"""Of a line or a word that does not end."""
_NUMBERING: Final = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*")
_NUMBER: Final = re.compile(r"\d+")
_ROW: Final = re.compile(r"[|\t]|,.*,")
"""Tables and comma-separated values: there the numbers are what matters."""
_WORDS: Final = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this answer. `code` is stable, `message` for people, `evidence` values that show why."""

    code: str
    message: str
    evidence: dict[str, Any]


@dataclass(slots=True)
class DecodingMonitor:
    """Watches one answer. `take` and `beyond` return the reason to stop, once; after that the monitor is done.

    `max_tokens` and `t_max_s` are what the engine was allowed; `constrained`: it decodes under a schema or grammar.
    """

    limits: AbortLimits
    max_tokens: int
    t_max_s: float | None = None
    constrained: bool = False
    _text: str = ""
    """The newest part of the answer, as long as the longest loop that can be found."""
    _dropped: int = 0
    """Characters of the answer before `_text`."""
    _looked: int = 0
    """Length of the answer when its end was last looked at."""
    _line: str = ""
    _word: str = ""
    _data: bool | None = None
    """Whether the answer has the form of data; None until its beginning is there."""
    _lines: deque[str] = field(default_factory=deque)
    _counted: deque[str] = field(default_factory=deque)
    """Newest entries of lists with every number the same."""
    _words: deque[str] = field(default_factory=deque)
    _grams: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _entropies: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW_TOKENS))
    _tokens: int = 0

    def take(self, text: str, tokens: int, entropies: Iterable[float] = ()) -> Abort | None:
        """A piece of the answer has come; `tokens` counts the whole answer, `entropies` (nats) the piece's tokens."""
        self._tokens = max(self._tokens, tokens)
        self._text += text
        if self._data is None:
            self._data = self._has_form_of_data()
        found = self._too_long() or self._too_unsure(entropies)
        if found is None and self.limits.repetition and text:
            found = self._repeats(text)
        return found

    def beyond(self, elapsed_s: float) -> Abort | None:
        """The engine decodes since `elapsed_s` seconds: more than the time that it was told to keep?"""
        if self.t_max_s is None or elapsed_s <= self.t_max_s + _SLACK_S:
            return None
        return self._abort("runaway", f"the engine goes on after {elapsed_s:.1f} s of {self.t_max_s:.1f} s", {})

    def _has_form_of_data(self) -> bool | None:
        """None while the beginning is too short to tell."""
        head = self._text.lstrip()[: len("```json")]
        if self.constrained or head[:1] in ("[", "{") or head == "```json":
            return True
        return None if not head or "```json".startswith(head) else False

    def _too_long(self) -> Abort | None:
        own = self.limits.runaway_tokens
        if own is not None and self._tokens > own:
            message = f"the answer ran away: {self._tokens} tokens, where answers of this role need at most {own}"
            return self._abort("runaway", message, {"runaway_tokens": own})
        if self._tokens > self.max_tokens + _SLACK_TOKENS:
            message = f"the engine goes on after {self._tokens} tokens of {self.max_tokens}"
            return self._abort("runaway", message, {"max_tokens": self.max_tokens})
        return None

    def _too_unsure(self, entropies: Iterable[float]) -> Abort | None:
        limit = self.limits.entropy_nats
        self._entropies.extend(entropies)
        if limit is None or len(self._entropies) < _WINDOW_TOKENS:
            return None
        mean = sum(self._entropies) / len(self._entropies)
        if mean <= limit:
            return None
        message = (
            f"the model does not know what to say: {mean:.2f} nats of entropy a token over {_WINDOW_TOKENS} tokens"
        )
        return self._abort("entropy", message, {"entropy_nats": round(mean, 3), "limit_nats": limit})

    def _repeats(self, text: str) -> Abort | None:
        found = self._same_lines(text) or self._same_phrases(text)
        length = self._dropped + len(self._text)
        if found is None and length - self._looked >= _STRIDE_CHARS:
            self._looked = length
            found = self._loop()
            keep = 2 * _LENIENT * self.limits.repeated_chars
            if len(self._text) > 2 * keep:
                self._dropped += len(self._text) - keep
                self._text = self._text[-keep:]
        return found

    def _loop(self) -> Abort | None:
        """An exact loop: the text ends in at least four copies of one passage that together are long enough."""
        text = self._text
        probe = text[-_PROBE_CHARS:]
        at = len(text) - len(probe)
        for _ in range(_MAX_PERIODS):
            at = text.rfind(probe, 0, at + len(probe) - 1)
            period = len(text) - len(probe) - at
            if at < 0 or MIN_REPEATS * period > len(text):
                return None
            span = max(MIN_REPEATS * period, self._span_needed(text[-period:]))
            if span <= len(text) and text[-span:-period] == text[len(text) - span + period :]:
                return self._looped(period)
        return None

    def _span_needed(self, passage: str) -> int:
        """How many characters a loop of this passage must cover to count as one."""
        if passage.isspace():
            return self.limits.repeated_chars  # a grammar that allows blanks without end
        plain = not _WORDS.search(passage)
        return self.limits.repeated_chars * (_LENIENT if self._data or plain else 1)

    def _looped(self, period: int) -> Abort:
        text, begin = self._text, len(self._text) - period
        while begin > 0 and text[begin - 1] == text[begin - 1 + period]:
            begin -= 1
        times = (len(text) - begin) // period
        evidence = {
            "repeated": text[-period:][:_SHOWN_CHARS],
            "times": times,
            "first_char": self._dropped + begin,
            "repeated_chars": len(text) - begin,
        }
        passage = text[-period:] if period <= 60 else f"{text[-period:][:60]}…"
        message = (
            f"from character {self._dropped + begin} on it repeats {passage!r} ({period} characters) {times} times"
        )
        return self._abort("repetition", message, evidence)

    def _same_lines(self, text: str) -> Abort | None:
        self._line += text
        if "\n" not in self._line:
            self._line = self._line[-_KEPT_CHARS:]
            return None
        *done, self._line = self._line.split("\n")
        for line in done:
            bare = _NUMBERING.sub("", line).strip()
            if len(bare) < _LINE_CHARS or not _WORDS.search(bare):
                continue
            found = self._add_line(self._lines, bare, _WINDOW_LINES * (_LENIENT if self._data else 1))
            if found is None and not self._data and bare != line.strip() and not _ROW.search(bare):
                found = self._add_line(self._counted, _NUMBER.sub("N", bare), _WINDOW_COUNTED)
            if found is not None:
                return found
        return None

    def _add_line(self, lines: deque[str], line: str, window: int) -> Abort | None:
        """Add one; the verdict if the newest `window` of them are hardly different."""
        lines.append(line)
        if len(lines) > window:
            lines.popleft()
        if len(lines) < window or len(counts := Counter(lines)) > _FEW_LINES:
            return None
        line, times = counts.most_common(1)[0]
        evidence = {"repeated": line[:_SHOWN_CHARS], "times": times, "lines": window, "different_lines": len(counts)}
        message = f"the last {window} lines are the same {len(counts)} again and again, such as {line[:60]!r}"
        return self._abort("repetition", message, evidence)

    def _same_phrases(self, text: str) -> Abort | None:
        """Few different phrases among many words: a loop that is not quite exact."""
        self._word += text
        *done, last = re.split(r"\s+", self._word)
        self._word = last[-_KEPT_CHARS:]
        window = _WINDOW_WORDS * (_LENIENT if self._data else 1)
        for word in done:
            if word:
                self._add_word(word, window)
        if len(self._words) < window:
            return None
        share = len(self._grams) / (window - _GRAM + 1)
        if share > _FEW_GRAMS or 2 * sum(1 for word in self._words if _WORDS.search(word)) < window:
            return None
        gram, times = self._grams.most_common(1)[0]
        repeated = " ".join(gram)[:_SHOWN_CHARS]
        evidence = {"repeated": repeated, "times": times, "words": window, "different": round(share, 3)}
        message = f"the last {window} words are few phrases again and again, such as {repeated[:60]!r}"
        return self._abort("repetition", message, evidence)

    def _add_word(self, word: str, window: int) -> None:
        words, grams = self._words, self._grams
        words.append(word)
        if len(words) >= _GRAM:
            grams[tuple(words[index] for index in range(-_GRAM, 0))] += 1
        if len(words) > window:
            oldest = tuple(words[index] for index in range(_GRAM))
            grams[oldest] -= 1
            if not grams[oldest]:
                del grams[oldest]
            words.popleft()

    def _abort(self, code: str, message: str, evidence: dict[str, Any]) -> Abort:
        where = {"generated_tokens": self._tokens, "answer_chars": self._dropped + len(self._text)}
        return Abort(f"decoding.{code}", message, evidence | where)


def entropy_nats(top_logprobs: Sequence[float]) -> float:
    """Shannon entropy of a token's distribution from its most probable candidates, in nats.

    What they leave out counts as one further candidate, so this is a lower bound: H >= -sum p ln p.
    """
    probabilities = [exp(min(0.0, value)) for value in top_logprobs]
    rest = 1.0 - sum(probabilities)
    if rest > 0:
        probabilities.append(rest)
    return -sum(p * log(p) for p in probabilities if p > 0)
