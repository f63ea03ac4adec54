"""The package aiohttp for engines of this machine, which speak plain HTTP: imported without the system's certificates.

When it is imported it reads all of them, for connections that nobody makes here; that took 45 ms of the start of each
inference service. A connection over TLS made with it all the same would trust nobody and fail. Servers elsewhere are
the business of `openai_http`, whose library reads the certificates itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["aiohttp"]

_VARIABLE: Final = "SSL_CERT_FILE"
"""Where OpenSSL looks for the file of certificates that it trusts."""


@contextmanager
def _without_certificates() -> Iterator[None]:
    named = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = os.devnull
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if named is not None:
            os.environ[_VARIABLE] = named


with _without_certificates():
    import aiohttp
