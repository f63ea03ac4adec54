"""The embedded engine: llama.cpp from the xllamacpp wheel, serving the HTTP API of llama-server in its own process.

Started by `services.inference` only, which also arranges that this process dies with it. A process of its own, so
that a crash of llama.cpp is the death of a child and not of the service. It has no kv overrides: models that need
them need the native engine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from services.inference.engines import API_KEY_VARIABLE, CACHE_RAM_MIB, HOST, LOG_VERBOSITY


def main() -> int:
    """Serve until killed; 1 if the server cannot start."""
    parser = argparse.ArgumentParser(prog="python -m services.inference.embedded", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="GGUF file")
    parser.add_argument("--alias", required=True, help="name in answers")
    parser.add_argument("--port", required=True, type=int, help="port on 127.0.0.1")
    parser.add_argument("--slots", required=True, type=int, help="requests decoded at once")
    parser.add_argument("--context-tokens", required=True, type=int, help="context of one slot")
    parser.add_argument("--threads", required=True, type=int, help="cores to decode with")
    options = parser.parse_args()

    import xllamacpp  # after the options, so that --help works without the wheel

    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias}
    params.hostnames = [HOST]
    params.port = options.port
    params.n_ctx = options.context_tokens * options.slots
    params.n_parallel = options.slots
    params.kv_unified = False
    params.cpuparams.n_threads = options.threads
    params.cache_ram_mib = CACHE_RAM_MIB
    params.verbosity = LOG_VERBOSITY
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.ui = False
    params.api_keys = [os.environ[API_KEY_VARIABLE]]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as err:
        sys.stderr.write(f"the embedded engine cannot start: {err}\n")
        return 1
    sys.stderr.write(f"listening on {server.listening_address}\n")
    while True:
        signal.pause()  # the server works in threads of its own; SIGTERM ends the process


if __name__ == "__main__":
    sys.exit(main())
