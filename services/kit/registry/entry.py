"""The base of everything that an operator writes, and the kinds of text in it."""

from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints

NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,31}$"
"""Names become parts of process names, file names and log fields, hence so narrow."""

Name: TypeAlias = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=16_000, strip_whitespace=True)]


class Entry(BaseModel):
    """Base of everything an operator writes: frozen, and a misspelt field is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
