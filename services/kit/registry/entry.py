"""The base of everything that an operator writes, and the kinds of text in it."""

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints

from protocol.messages.base import REGISTRY_NAME_PATTERN

Name: TypeAlias = Annotated[str, StringConstraints(pattern=REGISTRY_NAME_PATTERN)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=16_000, strip_whitespace=True)]


class Entry(BaseModel):
    """Base of everything an operator writes: frozen, and a misspelt field is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
