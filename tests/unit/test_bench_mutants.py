"""Mutants are one small mistake each, the same every time."""

from __future__ import annotations

from services.ctl.bench.mutants import mutants

SOURCE = '''
def biggest(numbers):
    """A docstring is not a constant."""
    best = 0
    for number in numbers:
        if number > best:
            best = number
    return best
'''


def test_there_is_one_of_each_kind_with_one_line_changed() -> None:
    found = {mutant.kind: mutant for mutant in mutants(SOURCE)}
    assert set(found) == {"constant", "operator", "return"}
    assert "best = -1" in found["constant"].source
    assert "if number <= best" in found["operator"].source
    assert found["return"].source.rstrip().endswith("\n    best")
    assert all("A docstring is not a constant" in mutant.source for mutant in found.values())
    assert mutants(SOURCE) == mutants(SOURCE)


def test_a_function_with_next_to_nothing_in_it_still_has_three_that_differ() -> None:
    made = mutants("def swapped(text):\n    return text.swapcase()\n")
    assert [mutant.kind for mutant in made] == ["constant", "operator", "return"]
    assert len({mutant.source for mutant in made}) == 3
