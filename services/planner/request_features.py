"""What a request looks like, as numbers: the evidence of the decision whether its answer divides into parts.

Pure functions of the text. `shape_of` gives named numbers about form (length, questions, code, lists) and about what
kind of answer the words ask for (ways, reasons, a story, a fix); `words_of` gives the words and pairs of words for a
model that is trained (`divide`). The vocabulary is everyday English; a request in another language is judged by its
form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

READ_CHARS: Final = 4_000
"""A longer request is judged by its beginning."""
_MAX_WORDS: Final = 400

_WORD: Final = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END: Final = re.compile(r"[.?!]+\s|\n+")
_QUESTION_PART: Final = re.compile(r"(?<=[.?!])\s|\n")
_LIST_LINE: Final = re.compile(r"^\s*(?:[-*]|\d+[.)])\s", re.MULTILINE)

#: Name -> what the words of a request ask for or are about.
CUES: Final[Mapping[str, re.Pattern[str]]] = {
    name: re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for name, pattern in {
        "opens_how": r"\Ahow\b",
        "how_to": r"\Ahow to\b",
        "how_do": r"\bhow (?:do|can|would|should)\b",
        "opens_what": r"\Awhat\b",
        "why": r"\bwhy\b",
        "what_is": r"\bwhat(?:'s| is)\b",
        "what_are": r"\bwhat are\b",
        "compares": r"\bdifferences?\b|\bdistinguish|\bcompar",
        "several": r"\b(?:ways|tips|steps|methods|reasons|ideas|advice|suggest\w*|options|examples|benefits|advantages"
        r"|disadvantages|pros|cons|types|kinds|best|alternatives)\b",
        "writes": r"\b(?:write|compose|draft|rewrite)\b",
        "one_piece": r"\b(?:story|poem|scene|limerick|haiku|letter|song|essay|speech|novel|monologue|dialogue|chapter"
        r"|lyrics|joke|email|ad|review)\b",
        "you": r"\byou\b",
        "you_are": r"\byou(?:'re| are| have)\b",
        "i": r"\bi\b",
        "my": r"\bmy\b",
        "me": r"\bme\b",
        "should": r"\bshould\b",
        "is_there": r"\bis there\b",
        "is_it": r"\bis it\b",
        "yes_no": r"\A(?:can|could|is|are|do|does|did|will|would|was|has|have)\b",
        "code": r"```",
        "formula": r"\$",
        "lists": r"\b(?:list|name|give me|show me|recommend)\b",
        "explains": r"\b(?:explain|describe|discuss|analy[sz]e|summari[sz]e|review)\b",
        "error": r"\b(?:error|exception|fail\w*|bug|fix)\b",
        "what_do_i": r"what (?:should|can|do) i",
        "makes": r"\b(?:plan|schedule|itinerary|guide|outline|design|strategy|create|develop|make)\b",
        "number": r"\b(?:\d+|two|three|four|five|six|ten)\b",
        "one_result": r"\b(?:translate|calculate|compute|solve|convert|classify|answer)\b",
        "imperative": r"\A(?:write|give|make|create|tell|explain|describe|list|name|design|plan|help|suggest|recommend"
        r"|imagine|pretend|act|please|show|let)",
        "prompt_mark": r"\[\w\w\]",
        "quotes": r'^>|"',
        "entities": r"&amp|&lt|&quot",
        "scripture": r"\b(?:verse|god|jesus|lord|bible|genesis|matthew)\b",
        "length_asked": r"\b(?:words|sentences?|paragraphs?|lines)\b",
        "one_fact": r"\b(?:who|when|where|which)\b",
        "meaning": r"\b(?:mean|meaning|definition|called|origin)\b",
        "and": r"\band\b",
        "or": r"\bor\b",
        "short_how_to": r"\Ahow to \w+(?: \w+){0,4}\?\Z",
        "plural_asked": r"\b\w+s\?\Z",
        "people": r"\b(?:boyfriend|girlfriend|husband|wife|child|kids?|son|daughter|friend|boss|mother|father"
        r"|parents)\b",
        "programming": r"\b(?:java|python|c#|c\+\+|php|javascript|jquery|html|css|linux|sql|git|android|array|string"
        r"|function|class|object)\b",
    }.items()
}


def shape_of(request: str) -> dict[str, float]:
    """Named numbers about the form of a request; the same names for every request."""
    text = request[:READ_CHARS].strip()
    words, sentences = text.split(), _SENTENCE_END.split(text)
    size = max(1, len(text))
    found = {
        "log_chars": math.log1p(len(text)),
        "log_words": math.log1p(len(words)),
        "log_sentences": math.log1p(len(sentences)),
        "question_marks": float(min(text.count("?"), 10)),
        "line_breaks": float(min(text.count("\n"), 10)),
        "commas": float(min(text.count(","), 10)),
        "word_chars": sum(map(len, words)) / max(1, len(words)),
        "ends_asking": float(text.endswith("?")),
        "ends_telling": float(text.endswith(".")),
        "asks_nothing": float("?" not in text),
        "begins_small": float(text[:1].islower()),
        "capitals": sum(char.isupper() for char in text) / size,
        "marks": sum(not char.isalnum() and not char.isspace() for char in text) / size,
        "digits": sum(char.isdigit() for char in text) / size,
        "not_ascii": sum(ord(char) > 127 for char in text) / size,
        "list_lines": float(min(len(_LIST_LINE.findall(text)), 10)),
        "last_sentence_chars": float(min(len(sentences[-1]), 400)),
        "code_fences": float(min(text.count("```"), 10)),
    }
    found |= {f"under_{bound}_chars": float(len(text) < bound) for bound in (30, 50, 80, 150, 300, 600)}
    return found | {name: float(bool(cue.search(text))) for name, cue in CUES.items()}


def words_of(request: str) -> list[str]:
    """Words, pairs, how it opens and ends, and by themselves the words of its first sentence and last question."""
    text = request[:READ_CHARS].casefold().strip()
    words = _WORD.findall(text)[:_MAX_WORDS]
    parts = [part for part in _QUESTION_PART.split(text) if part] or [""]
    asked = [part for part in parts if "?" in part]
    question = _WORD.findall(asked[-1])[:_MAX_WORDS] if asked else []
    return [
        *words,
        *_pairs(words),
        *(f"^{' '.join(words[:count])}" for count in (1, 2, 3)),
        f"${''.join(words[-1:])}",
        *(f"first:{word}" for word in _WORD.findall(parts[0])[:_MAX_WORDS]),
        *(f"asked:{word}" for word in question),
        *(f"asked:{pair}" for pair in _pairs(question)),
        *(f"last:{word}" for word in words[-12:]),
    ]


def _pairs(words: list[str]) -> list[str]:
    return [f"{one} {other}" for one, other in pairwise(words)]
