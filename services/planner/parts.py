"""Finds the separate things an objective asks for, so that they can be worked on at the same time.

Deterministic and cautious: a missed list costs parallelism, a list seen where there is none costs sense. What is
found is only a piece of the objective's own text; what is done with the pieces is the business of `rules`. Words are
English, punctuation is that of many scripts. Only the beginning of an objective is read, by patterns without nested
repetition, because objectives are untrusted text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

_READ_CHARS: Final = 8_000
MAX_PARTS: Final = 16
"""More things than this are worked on in groups."""
_MAX_PART_CHARS: Final = 400

# Full-width forms stand as escapes: \uff0c comma, \uff1b semicolon, \uff1f question mark, \uff0e full stop,
# \uff01 exclamation mark, \uff1a colon; \u061b and \u061f are the Arabic semicolon and question mark.
_LIST_LINE: Final = re.compile(r"^[ \t]{0,8}(?:\d{1,3}[.)\uff0e、]|[-*•·\u2013])[ \t]*(\S.*)$", re.MULTILINE)
_INLINE_NUMBER: Final = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)]\s")
_CLAUSE_END: Final = re.compile(r"[;\uff1b\u061b]")
_QUESTION_END: Final = re.compile(r"[?\uff1f\u061f]")
_COMPARE: Final = re.compile(r"\b(?:compar(?:e|ing)|contrast|differences? between)\s([^.!?;:\n]{3,300})", re.IGNORECASE)
_VERSUS: Final = re.compile(r"\s(?:vs\.?|versus)\s", re.IGNORECASE)
_QUALIFIER: Final = re.compile(
    r"\s(?:in terms of|with respect to|with regard to|regarding|concerning|and (?:say|tell|write|give|explain|list|show"
    r"|summari[sz]e|decide|recommend|then)|in (?:a|an|one|two|three|\d+)|for|by|using|on)\s",
    re.IGNORECASE,
)
_SEPARATOR: Final = re.compile(
    r"\s*[,\uff0c、]\s*(?:and\s|or\s|&\s)?|\s(?:and|or|&|with|to|against|vs\.?|versus)\s", re.IGNORECASE
)
_ITEM: Final = r"[^\s,;:.!?()\"]{1,40}(?:[ ][^\s,;:.!?()\"]{1,40}){0,2}"
_COMMA_LIST: Final = re.compile(
    r"(?:\b(?:about|of|for|in|between|on|from|are|is)\s|:\s?)"
    rf"((?:{_ITEM},[ ]){{1,15}}{_ITEM},?[ ](?:and|or|&)[ ]{_ITEM})(?=\s*(?:[.!?;\n]|$))",
    re.IGNORECASE,
)
_NAME_PAIR: Final = re.compile(
    r"\b(?:about|of|for|in|between)\s(?:both\s)?([A-Z][\w-]{0,40}(?: [A-Z][\w-]{0,40})?)"
    r" and ([A-Z][\w-]{0,40}(?: [A-Z][\w-]{0,40})?)\s*\?"
)
_IDEOGRAPHIC_LIST: Final = re.compile(
    r"[^\s、。\uff0c,!?\uff1f\uff01\uff1a]{1,20}(?:、[^\s、。\uff0c,!?\uff1f\uff01\uff1a]{1,20}){2,15}"
)
_INDEFINITE: Final = ("a ", "an ")
_POINTERS: Final = ("these", "those", "them", "it", "this", "that", "each", "all", "both", "the two", "the files")


@dataclass(frozen=True, slots=True)
class Parts:
    """Two or more things one objective asks for."""

    how: Literal["list", "questions", "clauses", "comparison", "names"]
    """What gave the list away, for the plan's reason."""
    items: tuple[str, ...]
    """In the objective's own words, in its order, each at most 400 characters."""


def find_parts(objective: str, *, explicit_only: bool = False) -> Parts | None:
    """Return the parts of an objective, None where it is one thing.

    `explicit_only` accepts only numbered and bulleted lists: in text about code, commas, semicolons and question
    marks mean other things.
    """
    text = objective[:_READ_CHARS]
    if "```" in text:
        return None  # punctuation inside code is no list; the prose around it is seldom one
    if items := _listed(text):
        return _parts("list", items)
    if explicit_only:
        return None
    if items := _pieces(_QUESTION_END.split(text)[:-1]):
        return _parts("questions", [f"{item}?" for item in items])
    if items := _pieces(_CLAUSE_END.split(text)):
        return _parts("clauses", items)
    if items := _compared(text):
        return _parts("comparison", items)
    if items := _named(text):
        return _parts("names", items)
    return None


def _parts(how: Literal["list", "questions", "clauses", "comparison", "names"], items: list[str]) -> Parts:
    return Parts(how, tuple(item[:_MAX_PART_CHARS] for item in items))


def _pieces(raw: list[str]) -> list[str]:
    """The pieces with substance; none where fewer than two have any, since that is no list."""
    pieces = [piece.strip() for piece in raw]
    pieces = [piece for piece in pieces if any(char.isalnum() for char in piece)]
    return pieces if len(pieces) > 1 else []


def _listed(text: str) -> list[str]:
    if items := _pieces(_LIST_LINE.findall(text)):
        return items
    marks = list(_INLINE_NUMBER.finditer(text))
    if len(marks) < 2 or [int(mark[1]) for mark in marks] != list(range(1, len(marks) + 1)):
        return []  # numbers that do not count 1, 2, 3 are something else
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return _pieces([text[mark.end() : end].strip(" ,;\n") for mark, end in zip(marks, ends, strict=True)])


def _compared(text: str) -> list[str]:
    if match := _COMPARE.search(text):
        items = _pieces(_SEPARATOR.split(_QUALIFIER.split(match[1])[0]))
    elif _VERSUS.search(text):
        items = _pieces(_VERSUS.split(text.partition(":")[0].rstrip(" .?!\n")))
    else:
        return []
    if any(len(item.split()) > 6 or item.lower().startswith(_POINTERS) for item in items):
        return []  # "compare these two files" names nothing
    return items


def _named(text: str) -> list[str]:
    if match := _COMMA_LIST.search(text):
        # "in a short, clear and friendly tone" is a list of adjectives.
        return [] if match[1].lower().startswith(_INDEFINITE) else _pieces(_SEPARATOR.split(match[1]))
    if match := _NAME_PAIR.search(text):
        return [match[1], match[2]]
    if match := _IDEOGRAPHIC_LIST.search(text):
        return _pieces(match[0].split("、"))
    return []
