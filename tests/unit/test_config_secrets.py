"""Keys of servers elsewhere: where they are looked for, and that no error repeats one."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.kit.config import Home, SecretUnusableError, load_home, load_secret


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = load_home({"TIERLINE_HOME": str(tmp_path)})
    home.secrets.mkdir()
    return home


def key_file(home: Home, text: str, mode: int = 0o600) -> None:
    (home.secrets / "GPU_KEY").write_text(text)
    (home.secrets / "GPU_KEY").chmod(mode)


def test_the_environment_comes_first_then_the_file(home: Home) -> None:
    key_file(home, "from-file\n")
    assert load_secret(home, "GPU_KEY", {"GPU_KEY": "from-env"}) == "from-env"
    assert load_secret(home, "GPU_KEY", {}) == "from-file"
    key_file(home, "rotated\n")
    assert load_secret(home, "GPU_KEY", {}) == "rotated"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(home: Home, mode: int) -> None:
    key_file(home, "s3cret", mode)
    with pytest.raises(SecretUnusableError, match=r"chmod 600 .*GPU_KEY") as refused:
        load_secret(home, "GPU_KEY", {})
    assert "s3cret" not in str(refused.value)


def test_a_missing_key_says_where_it_is_looked_for(home: Home) -> None:
    with pytest.raises(SecretUnusableError, match=r"no environment variable GPU_KEY and no file .*secrets/GPU_KEY"):
        load_secret(home, "GPU_KEY", {})


@pytest.mark.parametrize("text", ["", "two words", "line\nline", "umläut", "x" * 5_000])
def test_what_is_no_key_is_refused_without_repeating_it(home: Home, text: str) -> None:
    (home.secrets / "GPU_KEY").write_text(text, encoding="utf-8")
    (home.secrets / "GPU_KEY").chmod(0o600)
    with pytest.raises(SecretUnusableError) as refused:
        load_secret(home, "GPU_KEY", {})
    assert not text or text not in str(refused.value)
    assert refused.value.__cause__ is None or text not in repr(refused.value.__cause__)
