"""Is this answer still worth its slot? Watches one answer while it is decoded and says when to stop it.

Pure: text, tokens and time in, a verdict with its evidence out. Four things end an answer early: it repeats itself (an
exact loop at its end, the same few lines, the same few phrases), the model does not know what to say (entropy, where
the request asks for log probabilities), it is longer than any answer of its role may be, or the engine went on beyond
what it was allowed. What follows is the failure table's business; how the slot becomes free, `generation`'s.

Tables, code and lists repeat much and are fine. Hence: a loop must be exact or nearly so and long, and `_LENIENT` times
as much of it is needed

* in data: decoding is constrained, the answer begins like JSON, or it is within a fence of code;
* where the loop is made of rows: whole lines of at most `_ROW_CHARS` characters (labels, entries of a list, a log), or
  anything with the marks that separate cells and values;
* where it holds no words (rulers, zeros, empty cells).

The price is that a model which writes one bullet for ever is stopped after 1,600 characters, some 400 tokens, where a
sentence without line breaks is after 400 characters. It is the smaller one: a right answer that is stopped here is
stopped again at the stronger model, and its step fails. For the same reason entries with running numbers count by their
characters too, and three answers that change without order, such as labels, count as a loop only where there are more
of them than anybody lists.

Longer lists of equal entries are told from loops by what bounds them: rows and entries pass up to as many as the
request asks for (`asked`), and rows of an array, each closed by its bracket, up to a square. What goes on beyond is
stopped with the next one.
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
_KEPT_TEXT_CHARS: Final = 32_000
"""Of the answer's end: a square of zeros has 72 rows of 72 in half of it."""
_AROUND: Final = 8
"""Lines or values beside the entries that a request asks for: a heading, a closing sentence."""
_PROBE_CHARS: Final = 16
_MAX_PERIODS: Final = 64
"""Lengths of a loop that are tried at one look."""
_LOOPED_LINES: Final = 24
"""So many lines in a row at least are the same one, two or three in turn; `_LENIENT` times as many in any order."""
_COUNTED_LINES: Final = 40
"""The same for entries of a list in which only numbers differ: it counts on and says nothing new."""
_FEW_LINES: Final = 3
_ROW_CHARS: Final = 80
"""A line that is no longer may be one of many that are alike on purpose; paragraphs of prose come in one long line."""
_LINE_CHARS: Final = 16
"""Shorter lines, such as braces and empty cells, say nothing."""
_WINDOW_WORDS: Final = 200
_GRAM: Final = 4
_ROWS: Final = 2
"""Times as many words in rows as in prose: some 2,000 characters, near to what an exact loop of rows needs."""
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
_MARKS: Final = re.compile(r"[|\t<>{}\[\]()]|,\S[^,\n]*,\S|[\"'],")
"""Between cells and values: of tables, markup, JSON, code and comma-separated values. Prose has blanks after commas."""
_FENCE: Final = re.compile(r"\s*(?:(?:\d+[.)]|[-*•>])\s+)*(`{3,}|~{3,})([^`]*)$")
_WORDS: Final = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this answer. `code` is stable, `message` for people, `evidence` values that show why."""

    code: str
    message: str
    evidence: dict[str, Any]


@dataclass(slots=True)
class _Phrases:
    """The newest `window` words, and how often each four in a row stand among them."""

    window: int
    words: deque[str] = field(default_factory=deque)
    grams: Counter[tuple[str, ...]] = field(default_factory=Counter)
    signs: int = 0
    """Words among them that are numbers and signs."""

    def add(self, word: str) -> None:
        words, grams = self.words, self.grams
        words.append(word)
        self.signs += not _WORDS.search(word)
        if len(words) >= _GRAM:
            grams[tuple(words[index] for index in range(-_GRAM, 0))] += 1
        if len(words) > self.window:
            oldest = tuple(words[index] for index in range(_GRAM))
            grams[oldest] -= 1
            if not grams[oldest]:
                del grams[oldest]
            self.signs -= not _WORDS.search(words.popleft())

    def share_of_different(self) -> float:
        """1 while there are too few words to tell, or most of them are numbers and signs."""
        if len(self.words) < self.window or 2 * self.signs > self.window:
            return 1.0
        return len(self.grams) / (self.window - _GRAM + 1)


@dataclass(slots=True)
class DecodingMonitor:
    """Watches one answer. `take` and `beyond` return the reason to stop, once; after that the monitor is done.

    `max_tokens` and `t_max_s` are what the engine was allowed; `constrained`: it decodes under a schema or grammar;
    `items`: entries of the longest list that the request asks for.
    """

    limits: AbortLimits
    max_tokens: int
    t_max_s: float | None = None
    constrained: bool = False
    items: int = 0
    _text: str = ""
    """The newest part of the answer, as long as the longest loop that can be found."""
    _dropped: int = 0
    """Characters of the answer before `_text`."""
    _looked: int = 0
    """Length of the answer when its end was last looked at."""
    _line: str = ""
    """The line that is being written, or its end."""
    _unread: str = ""
    """The part of it that is not cut into words yet."""
    _json: bool | None = None
    """Whether the answer begins like JSON; None until its beginning is there."""
    _fence: str = ""
    """The marks that opened the block of code which is being written; empty outside of one."""
    _lines: deque[str] = field(default_factory=deque)
    _counted: deque[str] = field(default_factory=deque)
    """Newest entries of lists with every number the same."""
    _phrases: tuple[_Phrases, ...] = field(
        default_factory=lambda: tuple(_Phrases(_WINDOW_WORDS * times) for times in (1, _ROWS, _LENIENT))
    )
    """Of prose; of prose and rows; of everything."""
    _entropies: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW_TOKENS))
    _tokens: int = 0
    _breaks: int = 0
    """Line breaks in the answer."""
    _commas: int = 0
    _objects: int = 0
    """Closing braces."""

    def take(self, text: str, tokens: int, entropies: Iterable[float] = ()) -> Abort | None:
        """A piece of the answer has come; `tokens` counts the whole answer, `entropies` (nats) the piece's tokens."""
        self._tokens = max(self._tokens, tokens)
        self._text += text
        if self._json is None and (head := self._text.lstrip()[:1]):
            self._json = head in "[{"
        found = self._too_long() or self._too_unsure(entropies)
        if found is None and self.limits.repetition and text:
            self._breaks += text.count("\n")
            self._commas += text.count(",")
            self._objects += text.count("}")
            found = self._repeats(text)
        return found

    def beyond(self, elapsed_s: float) -> Abort | None:
        """The engine decodes since `elapsed_s` seconds: more than the time that it was told to keep?"""
        if self.t_max_s is None or elapsed_s <= self.t_max_s + _SLACK_S:
            return None
        return self._abort("runaway", f"the engine goes on after {elapsed_s:.1f} s of {self.t_max_s:.1f} s", {})

    @property
    def _as_asked(self) -> bool:
        """No more entries have been written than the request asks for, and a few lines around them."""
        written = (self._data and self._objects) or self._breaks or self._commas
        return self.items > 0 and written <= self.items + _AROUND

    @property
    def _data(self) -> bool:
        """What is being written has the form of data."""
        return self.constrained or bool(self._json) or bool(self._fence)

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
        found = self._line_by_line(text) or self._same_phrases()
        length = self._dropped + len(self._text)
        if found is None and length - self._looked >= _STRIDE_CHARS:
            self._looked = length
            found = self._loop()
            keep = max(2 * _LENIENT * self.limits.repeated_chars, _KEPT_TEXT_CHARS // 2)
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
        if not (self._data or _of_rows(passage) or not _WORDS.search(passage)):
            return self.limits.repeated_chars
        meant = max(self.items, _square_of(passage)) + 1
        meant_chars = min(meant * len(passage), _KEPT_TEXT_CHARS // 2)
        return max(self.limits.repeated_chars * _LENIENT, meant_chars)

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

    def _line_by_line(self, text: str) -> Abort | None:
        *ends, rest = text.split("\n")
        for end in ends:
            self._extend(end)
            self._read_words(self._unread.split(), row=len(self._line) <= _ROW_CHARS)
            found = self._same_lines(self._line)
            self._pass_fence(self._line)
            self._line = self._unread = ""
            if found is not None:
                return found
        self._extend(rest)
        if len(self._line) > _ROW_CHARS:  # no short one any more, so its words need not wait for its end
            *done, self._unread = re.split(r"\s+", self._unread)
            self._read_words(done, row=False)
        return None

    def _extend(self, part: str) -> None:
        self._line = (self._line + part)[-_KEPT_CHARS:]
        self._unread = (self._unread + part)[-_KEPT_CHARS:]

    def _pass_fence(self, line: str) -> None:
        mark = _FENCE.match(line)
        if mark is not None and not self._fence:
            self._fence = mark[1]
        elif mark is not None and mark[1].startswith(self._fence) and not mark[2].strip():
            self._fence = ""

    def _same_lines(self, line: str) -> Abort | None:
        bare = _NUMBERING.sub("", line).strip()
        numbers_matter = self._data and _NUMBER.search(bare)
        if not numbers_matter and (len(bare) < _LINE_CHARS or not _WORDS.search(bare)):
            return None
        found = self._add_line(self._lines, bare, _LOOPED_LINES * (_LENIENT if self._data else 1))
        if found is None and not self._data and bare != line.strip() and not _ROW.search(bare):
            found = self._add_line(self._counted, _NUMBER.sub("N", bare), _COUNTED_LINES)
        return found

    def _add_line(self, lines: deque[str], line: str, least: int) -> Abort | None:
        """Add one; the verdict if the newest are the same few in turn, or many more of them the same few in any order.

        Short lines have to be as long together as a loop of rows is.
        """
        lines.append(line)
        most = max(_LENIENT * least, self.items + 1)
        while len(lines) > most:
            lines.popleft()
        newest = list(lines)
        for period in range(1, _FEW_LINES + 1):
            count = period
            while count < len(newest) and newest[-count - 1] == newest[period - count - 1]:
                count += 1
            written = sum(map(len, newest[-count:]))
            if count >= max(least, self.items + 1) and written >= _LENIENT * self.limits.repeated_chars:
                return self._few_lines(newest[-count:])
        return self._few_lines(newest) if len(newest) == most else None

    def _few_lines(self, lines: Sequence[str]) -> Abort | None:
        """The verdict where hardly any of these differ."""
        counts = Counter(lines)
        if len(counts) > _FEW_LINES or not any(map(_WORDS.search, counts)):
            return None  # of values without words only an exact loop is one
        line, times = counts.most_common(1)[0]
        evidence = {
            "repeated": line[:_SHOWN_CHARS],
            "times": times,
            "lines": len(lines),
            "different_lines": len(counts),
        }
        message = f"the last {len(lines)} lines are the same {len(counts)} again and again, such as {line[:60]!r}"
        return self._abort("repetition", message, evidence)

    def _read_words(self, words: Iterable[str], *, row: bool) -> None:
        row = row or _MARKS.search(self._line[-_ROW_CHARS:]) is not None
        least = 2 if self._data else int(row)
        for word in words:
            if word:
                for phrases in self._phrases[least:]:
                    phrases.add(word)

    def _same_phrases(self) -> Abort | None:
        """Few different phrases among many words: a loop that is not quite exact."""
        prose, *rows = self._phrases
        for phrases in (prose, *(() if self._as_asked else rows)):
            share = phrases.share_of_different()
            if share <= _FEW_GRAMS:
                gram, times = phrases.grams.most_common(1)[0]
                repeated = " ".join(gram)[:_SHOWN_CHARS]
                words = phrases.window
                evidence = {"repeated": repeated, "times": times, "words": words, "different": round(share, 3)}
                message = f"the last {words} words are few phrases again and again, such as {repeated[:60]!r}"
                return self._abort("repetition", message, evidence)
        return None

    def _abort(self, code: str, message: str, evidence: dict[str, Any]) -> Abort:
        where = {"generated_tokens": self._tokens, "answer_chars": self._dropped + len(self._text)}
        return Abort(f"decoding.{code}", message, evidence | where)


def _of_rows(passage: str) -> bool:
    """True if a loop of this passage is one of short lines, or of cells and values."""
    twice = passage + passage  # it may begin in the middle of a line, or between two marks
    lines = twice.split("\n")
    return (len(lines) > 1 and max(map(len, lines)) <= _ROW_CHARS) or _MARKS.search(twice) is not None


def _square_of(passage: str) -> int:
    """How many rows make a square with a loop of this passage: the elements of one, where it is a closed array."""
    closed = passage.count("]")
    return passage.count(",") // closed if closed and closed == passage.count("[") else 0


def entropy_nats(top_logprobs: Sequence[float]) -> float:
    """Shannon entropy of a token's distribution from its most probable candidates, in nats.

    What they leave out counts as one further candidate, so this is a lower bound: H >= -sum p ln p.
    """
    probabilities = [exp(min(0.0, value)) for value in top_logprobs]
    rest = 1.0 - sum(probabilities)
    if rest > 0:
        probabilities.append(rest)
    return -sum(p * log(p) for p in probabilities if p > 0)
