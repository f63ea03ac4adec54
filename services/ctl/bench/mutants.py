"""Small mistakes for working code: a wrong constant, a swapped operator, a removed return. Pure and deterministic.

Whether a mutant behaves differently is not known here; its tests say so.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["constant", "operator", "return"]
KINDS: Final[tuple[Kind, ...]] = ("constant", "operator", "return")

_SWAPS: Final[Mapping[type[ast.AST], type[ast.AST]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.UAdd: ast.USub,
    ast.USub: ast.UAdd,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.BitXor: ast.BitAnd,
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "len": "sum", "sorted": "list"}
"""Functions that stand where other languages have an operator."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake in one source."""

    kind: Kind
    line: int
    source: str


def mutants(source: str) -> list[Mutant]:
    """One mutant of each kind, made in the middle of the places there are.

    Where a kind has no place, another mutant of a kind that has one takes its turn, as long as there are any.
    """
    places = {kind: _all_places(ast.parse(source), kind) for kind in KINDS}
    middle = {kind: sum(1 for _ in _places(ast.parse(source), kind)) // 2 for kind in KINDS}
    chosen: list[Mutant] = []
    taken: set[str] = set()
    for kind in KINDS:
        order = [(kind, middle[kind])] if places[kind] else []
        order += [(other, index) for other in KINDS for index in range(len(places[other]))]
        for other, index in order:
            mutant = _mutant(source, other, index)
            if mutant.source not in taken:
                taken.add(mutant.source)
                chosen.append(mutant)
                break
    return chosen


def _mutant(source: str, kind: Kind, index: int) -> Mutant:
    tree = ast.parse(source)
    line, change = _all_places(tree, kind)[index]
    change()
    return Mutant(kind, line, f"{ast.unparse(ast.fix_missing_locations(tree))}\n")


def _all_places(tree: ast.Module, kind: Kind) -> list[tuple[int, Callable[[], None]]]:
    """The places of a kind, and behind them those for functions that have neither constants nor operators."""
    return [*_places(tree, kind), *_last_resorts(tree, kind)]


def _last_resorts(tree: ast.Module, kind: Kind) -> Iterator[tuple[int, Callable[[], None]]]:
    """What is returned becomes a constant, or is negated."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None and kind != "return":
            value = ast.Constant(0) if kind == "constant" else ast.UnaryOp(ast.Not(), node.value)
            yield node.lineno, lambda node=node, value=value: setattr(node, "value", value)  # type: ignore[misc]


def _places(tree: ast.Module, kind: Kind) -> Iterator[tuple[int, Callable[[], None]]]:
    """Line and change of every place inside functions where this mistake can be made."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for statement in function.body:
            for node in ast.walk(statement):
                if kind == "constant" and isinstance(node, ast.Constant) and id(node) not in docstrings:
                    if isinstance(node.value, bool | int | float | str):
                        yield node.lineno, _wrong(node, 1)
                        yield node.lineno, _wrong(node, -1)
                elif kind == "operator":
                    yield from _swaps(node)
                elif kind == "return":
                    yield from _returns(node)
        if kind == "return":
            yield from _in_block(function.body)


def _wrong(node: ast.Constant, by: int) -> Callable[[], None]:
    def change() -> None:
        value = node.value
        if isinstance(value, bool):
            node.value = not value
        elif isinstance(value, str):
            node.value = f"{value}x" if by > 0 else value[1:] or "y"
        elif isinstance(value, int | float):
            node.value = value + by

    return change


def _swaps(node: ast.AST) -> Iterator[tuple[int, Callable[[], None]]]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in _SWAPS:
        other = _SWAPS[type(node.op)]()
        yield node.lineno, lambda: setattr(node, "op", other)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        first = _SWAPS[type(node.ops[0])]()
        yield node.lineno, lambda: setattr(node, "ops", [first, *node.ops[1:]])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        name = ast.Name(_CALLS[node.func.id], ast.Load())
        yield node.lineno, lambda: setattr(node, "func", name)


def _returns(node: ast.AST) -> Iterator[tuple[int, Callable[[], None]]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield from _in_block(block)


def _in_block(block: list[ast.stmt]) -> Iterator[tuple[int, Callable[[], None]]]:
    """A return becomes the bare expression; the function then goes on, or returns None."""
    for index, statement in enumerate(block):
        if isinstance(statement, ast.Return) and statement.value is not None:
            bare = ast.Expr(statement.value)
            yield statement.lineno, lambda index=index, bare=bare: block.__setitem__(index, bare)  # type: ignore[misc]
