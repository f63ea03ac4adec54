"""Finds the separate facts a question needs before anything can be computed: one look-up per named thing.

"Which is taller, the Eiffel Tower or Big Ben?" needs two heights and then a comparison. The look-ups do not wait for
each other; the computation waits for all of them. Deterministic and cautious: nothing is found unless the question
asks for a quantity or compares, and names two things at least. Rules of English, no lists of names: proper names by
their capitals ("Statue of Unity", "K2"), common nouns by their articles in a row ("a cheetah that …, an ostrich …").
One thing that is named twice, with another generic noun, an apostrophe or a slip of the pen, is looked up once.

What is done with the names is the business of `rules`; lists that somebody has written out are that of `parts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_MAX_CHARS: Final = 1_200
"""A longer text is a story or a report with figures in it, not one question."""
MAX_LOOKUPS: Final = 16
"""More things than this are no question but a table: left to other rules."""
_MAX_NAME_WORDS: Final = 6


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What says that facts are measured against each other: a computation, or the degree of something measurable. Words
#: such as `best`, `more` or `difference` alone ask for opinions and explanations.
_QUANTITY: Final = re.compile(
    r"\b(?:ratios?|averages?|mean (?:height|length|depth|size|speed|age|weight|population)|total|sum of|combined"
    r"|altogether|percent(?:age)?|proportion|how many (?:times|more)|how much (?:more|less|\w+er)|density"
    r"|(?:max|min)imum"
    r"|(?:height|depth|length|size|area|speed|age|weight|population|price|distance|temperature) differences?"
    r"|differences? (?:in|of) (?:height|depth|length|size|area|speed|age|weight|population|price|distance|temperature)"
    r"|exceeds?|outweighs?|most (?:populous|significant \w+)|(?:more|less|fewer) \w+ than|expensive"
    r"|(?:larg|small|bigg|tall|short|fast|quick|slow|high|low|deep|shallow|heavi|old|young|great|long|wid|narrow"
    r"|spe+di|warm|cold|hott|dens|rich|near|farth|furth|cheap|thick|thin)(?:er|est|ier|iest)|eldest)\b|\d ?%",
    re.IGNORECASE,
)
#: Requests that begin so want instructions or a piece of writing, however many names they hold.
_NO_QUESTION: Final = re.compile(
    r"\s*(?:please )?(?:how (?:to|do i|do you|can i|should i)|(?:re)?write|compose|draft|create|design|plan|imagine"
    r"|pretend|you are|you're|translate|summari[sz]e|act as)\b|.*\b(?:write|compose|tell) (?:me )?(?:a|an|the|your)\b",
    re.IGNORECASE | re.DOTALL,
)
_WORD: Final = re.compile(r"(?:Mt|St|Dr|Mr|Mrs|Ms|[A-Z])\.(?=\s?[A-Z])|[^\W_](?:[\w'\u2019&-]|\.(?=\w))*|[^\w\s]")
#: Small words inside a name, where a capital follows.
_LINKS: Final = _words("of the de da do del della di la le los las von van der den al el y")
#: Words that begin sentences and are no names although they have a capital there.
_OPENERS: Final = _words(
    "a about according across after all also although among amongst an and answer any are as assume assuming at "
    "based be because before being between both but by calculate can compare compared comparing compute consider "
    "considering could define describe determine did do does during each either estimate evaluate every explain "
    "factoring figure find following for from get give given had has have having help here how i identify if "
    "imagine in is it its let list look looking may me might my name no not now of on once one or order out over "
    "per please provide put rank rather say select shall she he should show since so solve suppose supposing take "
    "taking tell than that the their them then there these they this those through to under until up upon use "
    "using was we were what whats when where whether which while who whom whose why will with within without work "
    "would you your first second third finally next assess express round state sum add subtract multiply divide "
    "convert there'd what's who's"
)
#: Abbreviations that are written in capitals and name a measure, not a thing.
_MEASURES: Final = _words(
    "GDP USD EUR GBP BMI RPM MPH KM KG KMH PPP HDI IQ GPA CO2 UV AM PM BC AD BCE CE UTC GMT TV ID OK"
)
_MONTHS: Final = _words(
    "january february march april may june july august september october november december monday tuesday "
    "wednesday thursday friday saturday sunday celsius fahrenheit kelvin"
)
#: "a cheetah that …", "an ostrich enhancing …": an indefinite noun phrase with something said about it, or in a row.
_ARTICLE_PHRASE: Final = re.compile(
    r"\ban? ((?:[a-z]+(?:-[a-z]+)? ){0,2}?[a-z]+(?:-[a-z]+)?)"
    r"(?='s\b|\u2019s\b| (?:that|which|who|whose|with|has|is|was|were|can|runs?|ran|flew|fell|grew|rose"
    r"|swam|and|or|to|versus|vs|against|\w{3,}ing|\w{3,}ed)\b"
    r"|,|\s*[?.]|$)"
)
_FRAMES: Final = _words(
    "scenario situation world case year ratio result way time factor day month number list table value lot few "
    "percentage percent increase decrease reduction boost difference total sum row answer question certain single "
    "common length height speed size weight depth distance population change higher lower larger smaller greater "
    "longer shorter faster slower meter kilometer mile minute second hour week"
)
_NOUN: Final = r"(?:(?:the|an?) )?[a-z]+(?:[ -][a-z]+){0,2}"
_SEPARATOR: Final = r", and |, or |, | and | or | versus | vs\.? "
_COMMON_LIST: Final = re.compile(
    rf"(?:\b(?:between|among|of|for|compar\w+|than|from)|[:,?])\s+({_NOUN}(?:(?:{_SEPARATOR}){_NOUN}){{1,15}})\s*[?.]?$"
)
_FUNCTION_WORDS: Final = _words("by in of for from that which when where while people or and is are")


def find_lookups(question: str) -> tuple[str, ...]:
    """The distinct things whose facts the question needs, in its own words and order; empty where it needs none."""
    if len(question) > _MAX_CHARS or "```" in question or _NO_QUESTION.match(question):
        return ()
    text = question
    if not _QUANTITY.search(text):
        return ()
    names = _distinct(_names(text))
    if len(names) < 2:
        common = _distinct(_common(text))
        names = common if len(common) >= 2 and len(common) > len(names) else names
    return tuple(names) if 2 <= len(names) <= MAX_LOOKUPS else ()


def names_in(text: str) -> list[str]:
    """Everything that a text calls by a name with capitals, each thing once, in order."""
    return _distinct(_names(text))


def _names(text: str) -> Iterator[str]:
    """Runs of capitalised words, with their links; what merely begins a sentence is left out."""
    tokens = [match[0] for match in _WORD.finditer(text)]
    place = 0
    while place < len(tokens):
        if not _is_capital(tokens[place]):
            place += 1
            continue
        begins = place == 0 or tokens[place - 1] in (".", "?", "!", ":")
        if begins and not _names_something(tokens, place):
            place += 1
            continue
        end = _end_of_name(tokens, place)
        words = [_bare(token) for token in tokens[place:end]]
        place = end
        if words[0] in _MEASURES and len(words) > 1 and words[1] in _LINKS:
            words = words[2:]  # "GDP of France" asks for France
        if len(words) == 1 and (words[0] in _MEASURES or words[0].casefold() in _MONTHS):
            continue
        yield " ".join(words)


def _end_of_name(tokens: list[str], start: int) -> int:
    """One past the last word of the name that begins here."""
    end = start + 1
    while end < len(tokens) and end - start < _MAX_NAME_WORDS:
        if _ends_name(tokens[end - 1]):
            break
        if _is_capital(tokens[end]):
            end += 1
            continue
        links = end
        while links < len(tokens) and links - end < 2 and tokens[links] in _LINKS:
            links += 1
        if links > end and links < len(tokens) and _is_capital(tokens[links]):
            end = links + 1
            continue
        break
    return end


def _names_something(tokens: list[str], place: int) -> bool:
    """Whether the first word of a sentence is a name, and not only its first word."""
    word = tokens[place]
    if _bare(word).casefold() in _OPENERS:
        return False
    if word.endswith(("'s", "\u2019s")) or any(_bare(other) == _bare(word) for other in tokens[place + 1 :]):
        return True
    after = tokens[place + 1] if place + 1 < len(tokens) else ""
    if after in ("and", "or", "vs", "versus", ",", "&"):
        return any(_is_capital(token) for token in tokens[place + 2 : place + 4])
    return _is_capital(after) and not word.endswith("ing")


def _is_capital(token: str) -> bool:
    """Whether a word may belong to a name: it begins with a capital and is not `I`."""
    return token[:1].isupper() and _bare(token) != "I"


def _ends_name(token: str) -> bool:
    return token.endswith(("'s", "\u2019s", "s'", "s\u2019"))


def _bare(token: str) -> str:
    for ending in ("'s", "\u2019s", "'d", "\u2019d", "'", "\u2019"):
        token = token.removesuffix(ending)
    return token.rstrip(".")


def _common(text: str) -> Iterator[str]:
    """Common nouns in a row: those with an indefinite article, else a plain list after a word that announces one."""
    low = text.casefold()
    phrases = [match[1] for match in _ARTICLE_PHRASE.finditer(low)]
    found = [phrase for phrase in phrases if not (_FRAMES | _FUNCTION_WORDS) & set(phrase.split())]
    if len(found) >= 2:
        yield from found
        return
    if match := _COMMON_LIST.search(low.strip()):
        items = re.split(_SEPARATOR, match[1])
        items = [re.sub(r"^(?:the|an?) ", "", item.strip()) for item in items]
        if not any((_FRAMES | _FUNCTION_WORDS) & set(item.split()) for item in items):
            yield from items


def _distinct(names: Iterator[str]) -> list[str]:
    """Each thing once, as it is first called."""
    kept: list[str] = []
    for name in names:
        if name and not any(_same(name, other) for other in kept):
            kept.append(name)
    return kept


def _same(one: str, other: str) -> bool:
    """Whether two names mean one thing: equal words, where one may lack its last, generic word, which may be called
    otherwise if one contains the other (Forest, Rainforest); one letter may be wrong in a name of several words.
    """
    first, second = ([word for word in name.casefold().split() if word != "the"] for name in (one, other))
    if first == second:
        return True
    if not first or not second or len(first) != len(second):
        shorter, longer = sorted((first, second), key=len)
        # "Everest" for "Mount Everest", "Sahara" for "Sahara Desert"; never for names that differ in two words.
        return len(longer) - len(shorter) == 1 and bool(shorter) and shorter in (longer[:-1], longer[1:])
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    if len(differing) != 1 or len(first) < 2:
        return False
    a, b = differing[0]
    generic = (a, b) == (first[-1], second[-1]) and (a.endswith(b) or b.endswith(a)) and min(len(a), len(b)) > 3
    return generic or (min(len(a), len(b)) >= 5 and _one_letter_apart(a, b))


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether one replaced, missing or additional letter makes them equal."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    return (
        one[start + 1 :] == other[start + 1 :] or one[start + 1 :] == other[start:] or one[start:] == other[start + 1 :]
    )
