"""Is this a JSON Schema, and what has it against a text? Both may come from a model, so neither may do harm.

A schema of two kilobytes can ask for more steps than a lifetime has: references that double at each level, regular
expressions that backtrack. So every rule that is applied is paid for from a budget, and a check that would cost more
ends with TooCostly. Where a single rule can take for ever (`unbounded`), no budget helps: such schemas are checked in
a process of their own, which is this module as a program, and which can be killed. `answer` decides where.

The library is loaded by the first check: most processes that could check something never do, and it takes 40 ms.
References are never fetched. Expressions are those of ECMA-262, of which Python reads a part: one that it cannot read
constrains nothing here, as a schema that the engine cannot take costs the constraint and not the answer.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from protocol.codec import check_value
from protocol.errors import BadFrame

BUDGET: Final = 100_000
"""Rules that are applied to one answer, a longer rule counted by its parts: under a second even where each of them
follows a reference."""

_MAX_FINDINGS: Final = 20
_UNBOUNDED: Final = frozenset({"pattern", "patternProperties", "unevaluatedItems", "unevaluatedProperties"})
"""Keywords one application of which can take any time: expressions, and searches that follow references themselves."""

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_Rule: TypeAlias = "Callable[[Validator, Any, Any, Any], Iterable[Any] | None]"


class BadSchema(Exception):
    """The schema itself is wrong; the message says where, or why."""


class TooCostly(Exception):
    """The budget is spent and nothing is known of the text."""


def check_schema(schema: dict[str, Any]) -> None:
    """Raise BadSchema unless it is a JSON Schema. Takes time in proportion to its size: 9 ms for a thousand characters.

    What its expressions are like is not looked at: other languages than Python's may read them.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    try:
        kind = validator_for(schema, default=Draft202012Validator)
        found = next(kind(kind.META_SCHEMA).iter_errors(schema), None)  # without formats, of which `regex` is Python's
    except RecursionError as err:
        raise BadSchema("it nests too deep") from err
    except Exception as err:  # the library raises whatever it stumbles upon, such as a $schema that is a number
        raise BadSchema(f"it cannot be read: {err!r}"[:1_000]) from err
    if found is not None:
        raise BadSchema(f"{found.json_path}: {found.message}"[:1_000])


def unbounded(schema: Any) -> bool:
    """True if a budget cannot bound what a check against this schema costs."""
    level, outermost = [schema], True
    while level:
        item = level.pop()
        if isinstance(item, dict):
            if _UNBOUNDED & item.keys() or ("$schema" in item and not outermost):  # another dialect has other rules
                return True
            level.extend(item.values())
        elif isinstance(item, list):
            level.extend(item)
        outermost = False
    return False


def problems_of(text: str, schema: Mapping[str, Any], budget: int | None = BUDGET) -> list[str]:
    """What the schema has against the text, at most 20 sentences; empty = valid.

    Raises BadSchema where the schema turns out to be none, TooCostly; without a budget it takes what it takes.
    """
    from referencing.exceptions import Unresolvable

    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as err:
        return [f"the answer is not JSON: {err}"]
    except RecursionError:
        return ["the answer nests too deep"]
    try:
        check_value(value)
    except BadFrame as err:
        return [f"the answer is JSON that no message can carry: {err}"]
    problems: list[str] = []
    try:
        for error in _validator(schema, budget).iter_errors(value):
            problems.append(f"{error.json_path}: {error.message[:500]}")
            if len(problems) == _MAX_FINDINGS:
                break
    except TooCostly:
        raise
    except Unresolvable as err:
        raise BadSchema(f"it refers to something outside of it: {err}"[:1_000]) from err
    except RecursionError as err:
        raise BadSchema("it refers to itself without end") from err
    except Exception as err:  # a reference may lead to what is no schema, which nobody has checked
        raise BadSchema(f"it cannot be followed: {err!r}"[:1_000]) from err
    return problems


def _validator(schema: Mapping[str, Any], budget: int | None) -> Validator:
    """Of the schema's dialect. Its name is taken off: where a reference leads back to it, the library would take its
    own validator of that name, which pays nothing."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    kind = validator_for(schema, default=Draft202012Validator)
    rules: dict[str, _Rule] = {**kind.VALIDATORS}
    for keyword, tolerant in _TOLERANT.items():
        if keyword in rules:
            rules[keyword] = tolerant(rules[keyword])
    if budget is not None:
        purse = [budget]
        rules = {keyword: _paid(rule, keyword, purse) for keyword, rule in rules.items()}
    bare = {keyword: value for keyword, value in schema.items() if keyword != "$schema"}
    made: Validator = extend(kind, rules)(bare, registry=Registry())  # type: ignore[no-untyped-call]
    return made


def _paid(rule: _Rule, keyword: str, purse: list[int]) -> _Rule:
    def apply(validator: Validator, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        purse[0] -= 1 + (len(value) if isinstance(value, list | dict) else 0)
        if keyword == "uniqueItems" and isinstance(instance, list):
            purse[0] -= len(instance) ** 2 // 8  # objects are compared each with each
        if purse[0] < 0:
            raise TooCostly
        return rule(validator, value, instance, schema)

    return apply


def _open_pattern(rule: _Rule) -> _Rule:
    def apply(validator: Validator, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        return rule(validator, value, instance, schema) if _readable(value) else None

    return apply


def _open_properties(rule: _Rule) -> _Rule:
    def apply(validator: Validator, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        return rule(validator, {one: then for one, then in value.items() if _readable(one)}, instance, schema)

    return apply


def _open_rest(rule: _Rule) -> _Rule:
    """What an unreadable expression would have matched is no rest, so that nobody knows the rest."""

    def apply(validator: Validator, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        known = all(_readable(one) for one in schema.get("patternProperties", ()))
        return rule(validator, value, instance, schema) if known else None

    return apply


_TOLERANT: Final[Mapping[str, Callable[[_Rule], _Rule]]] = {
    "pattern": _open_pattern,
    "patternProperties": _open_properties,
    "additionalProperties": _open_rest,
    "unevaluatedProperties": _open_rest,
}


def _readable(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def main() -> None:
    """Read `{schema, text}` from stdin; without a text only the schema is checked. Prints one line of JSON."""
    question = json.load(sys.stdin)
    verdict: dict[str, Any] = {"problems": []}
    try:
        if question["text"] is None:
            check_schema(question["schema"])
        else:
            verdict["problems"] = problems_of(question["text"], question["schema"], budget=None)
    except BadSchema as err:
        verdict = {"bad_schema": str(err)}
    sys.stdout.write(json.dumps(verdict))


if __name__ == "__main__":
    main()
