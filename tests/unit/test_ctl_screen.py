from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from services.ctl.screen import Screen, aligned, grid, one_line, printable, seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colour_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tempts libraries to colour a pipe."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


def write_everything(screen: Screen) -> None:
    screen.line("a state", style="red")
    screen.heading("heading")
    screen.table(("name", "state"), [("S1", "done"), ("S2", "failed")])


def test_a_pipe_gets_no_escape_codes_even_where_colour_is_forced() -> None:
    out = io.StringIO()
    write_everything(Screen(out, io.StringIO(), as_json=False))
    assert "\x1b" not in out.getvalue()
    assert "S2    failed" in out.getvalue()


def test_a_terminal_gets_colour() -> None:
    out = Terminal()
    write_everything(Screen(out, io.StringIO(), as_json=False))
    assert "\x1b[" in out.getvalue()


def test_a_dumb_terminal_is_treated_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    write_everything(Screen(out, io.StringIO(), as_json=False))
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "\u202egnp.exe", "\r"])
@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_text_from_a_model_cannot_drive_the_terminal(hostile: str, out: io.StringIO) -> None:
    Screen(out, io.StringIO(), as_json=False).line(f"before{hostile}after")
    assert hostile not in out.getvalue()
    assert "before" in out.getvalue()


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    out = Terminal()
    Screen(out, io.StringIO(), as_json=False).line("[red]not a colour[/red] :smile:")
    assert "[red]not a colour[/red] :smile:" in out.getvalue()


def test_json_holds_any_text_and_no_escape_byte() -> None:
    out = io.StringIO()
    Screen(out, io.StringIO(), as_json=True).document({"text": "\x1b[31m ü"})
    assert json.loads(out.getvalue()) == {"text": "\x1b[31m ü"}
    assert "\x1b" not in out.getvalue()


def test_notes_do_not_mix_with_results() -> None:
    out, err = io.StringIO(), io.StringIO()
    Screen(out, err, as_json=True).note("working")
    assert (out.getvalue(), err.getvalue()) == ("", "working\n")


def test_every_row_of_a_plain_table_has_every_field() -> None:
    rows = aligned(("a", "b", "c"), [("1", "", "three"), ("", "2", "")])
    assert [row.split() for row in rows] == [["a", "b", "c"], ["1", "-", "three"], ["-", "2", "-"]]


def test_long_and_broken_text_fits_on_one_line() -> None:
    assert one_line("one\n two\tthree", 20) == "one two three"
    assert one_line("x" * 50, 10) == "xxxxxxx..."
    assert printable("a\tb\nc") == "a\tb\nc"


@pytest.mark.parametrize(
    ("ms", "text"), [(None, ""), (0, "0.00 s"), (420, "0.42 s"), (12_340, "12.3 s"), (200_000, "3 min 20 s")]
)
def test_durations_are_readable(ms: int | None, text: str) -> None:
    assert seconds(ms) == text


def test_a_row_of_a_live_table_stays_one_line() -> None:
    console = Console(file=io.StringIO(), width=30, force_terminal=True)
    console.print(grid(("step", "action"), [("S1", "many words that do not fit into the width")], live=True))
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2
