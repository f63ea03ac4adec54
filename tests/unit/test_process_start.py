"""What processes do not load before they have to: a user waits for the start of each command and each service."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from services.kit.config import CHECKOUT

_PROGRAM = """
import os, ssl, sys
loaded = []
for method in ("set_default_verify_paths", "load_verify_locations"):
    def counted(context, *args, method=method, original=getattr(ssl.SSLContext, method), **kwargs):
        original(context, *args, **kwargs)
        loaded.append(context.cert_store_stats()["x509"])
    setattr(ssl.SSLContext, method, counted)
import services.inference.__main__
print(sum(loaded), sorted({"jsonschema", "numpy", "xllamacpp"} & set(sys.modules)), os.environ.get("SSL_CERT_FILE"))
"""


def said_at_start(**env: str) -> str:
    """Certificates read, costly modules loaded and the variable with the name of the certificates afterwards."""
    inherited = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    program = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(program, cwd=CHECKOUT, env=inherited | env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_a_service_reads_no_certificates_and_loads_no_schema_library_before_it_needs_them() -> None:
    assert said_at_start() == "0 [] None"


def test_certificates_named_by_the_operator_stay_named_for_servers_elsewhere() -> None:
    assert said_at_start(SSL_CERT_FILE="/etc/mine.pem") == "0 [] /etc/mine.pem"


@pytest.mark.parametrize(
    "module",
    ["services.scheduler.__main__", "services.planner.__main__", "services.gates.__main__", "services.ctl.run"],
)
def test_a_process_starts_without_numpy_and_the_schema_library(module: str) -> None:
    costly = {"jsonschema", "numpy", "matplotlib", "aiohttp"}
    program = f"import sys, {module}; print(sorted({costly} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
