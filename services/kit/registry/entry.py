"""The base of everything that an operator writes, and the kinds of text in it."""

from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from protocol.messages.base import REGISTRY_NAME_PATTERN

Name: TypeAlias = Annotated[str, StringConstraints(pattern=REGISTRY_NAME_PATTERN)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=16_000, strip_whitespace=True)]


def a_path(path: Path) -> Path:
    """Return a path as it was written. Raises ValueError where no file can have that name, which `open` would not say
    as OSError."""
    if "\0" in str(path):
        raise ValueError("the name of a file has no NUL character")
    try:
        path.expanduser()
    except RuntimeError as err:
        raise ValueError(f"the home folder of {path.parts[0]} is not known; write the whole path") from err
    return path


FilePath: TypeAlias = Annotated[Path, AfterValidator(a_path)]
"""A file that an operator names; `~` is the home folder. Whether it is there the rules look up."""


class Entry(BaseModel):
    """Base of everything an operator writes: frozen, and a misspelt field is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
