"""The embedded engine: llama.cpp from the xllamacpp wheel, serving the HTTP API of llama-server in its own process.

Started by `services.inference` only, which also arranges that this process dies with it. A process of its own, so
that a crash of llama.cpp is the death of a child and not of the service. It reads the flags of llama-server that
`SETTINGS` lists; among those it lacks are kv overrides: models that need them need the native engine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

API_KEY_VARIABLE: Final = "LLAMA_API_KEY"
"""The key travels in the environment: an argument would be readable for every user of the machine."""

Setting = Callable[[Any, str], None]
"""Puts the value of a flag into xllamacpp's CommonParams, which has no types."""


def _number(*path: str, kind: type[int] | type[float] = int) -> Setting:
    def put(params: Any, value: str) -> None:
        for name in path[:-1]:
            params = getattr(params, name)
        setattr(params, path[-1], kind(value))

    return put


def _choice(enum: str, prefix: str, *path: str) -> Setting:
    """A value of one of the wheel's enums, whose members are named like the values of the flag."""

    def put(params: Any, value: str) -> None:
        import xllamacpp

        for name in path[:-1]:
            params = getattr(params, name)
        member = prefix + value.upper().replace("-", "_").replace("+", "_")
        setattr(params, path[-1], getattr(xllamacpp, enum)[member])

    return put


def _flash_attention(params: Any, value: str) -> None:
    words = {"on": "enabled", "off": "disabled", "auto": "auto"}
    _choice("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", "flash_attn_type")(params, words[value])


def _speculation(params: Any, value: str) -> None:
    import xllamacpp

    members = xllamacpp.common_speculative_type
    names = [f"COMMON_SPECULATIVE_TYPE_{kind.upper().replace('-', '_')}" for kind in value.split(",")]
    params.speculative.types = [members[name] for name in names]


def _draft_model(params: Any, value: str) -> None:
    params.speculative.draft.mparams.path = value


def _model(params: Any, value: str) -> None:
    params.model.path = value


def _alias(params: Any, value: str) -> None:
    params.model_alias = {value}


def _host(params: Any, value: str) -> None:
    params.hostnames = [value]


def _slot_folder(params: Any, value: str) -> None:
    params.slot_save_path = value


def _switch(name: str, on: bool = True) -> Setting:
    return lambda params, _value: setattr(params, name, on)


def _draft(field: str, kind: type[int] | type[float] = int) -> Setting:
    return _number("speculative", "draft", field, kind=kind)


#: Flags of llama-server that this engine reads. One that is not here is refused before a start, by name.
SETTINGS: Final[Mapping[str, Setting]] = {
    "--model": _model,
    "--alias": _alias,
    "--host": _host,
    "--port": _number("port"),
    "--ctx-size": _number("n_ctx"),
    "--parallel": _number("n_parallel"),
    "--no-kv-unified": _switch("kv_unified", on=False),
    "--threads": _number("cpuparams", "n_threads"),
    "--threads-batch": _number("cpuparams_batch", "n_threads"),
    "--batch-size": _number("n_batch"),
    "--ubatch-size": _number("n_ubatch"),
    "--load-mode": _choice("llama_load_mode", "LLAMA_LOAD_MODE_", "load_mode"),
    "--numa": _choice("ggml_numa_strategy", "GGML_NUMA_STRATEGY_", "numa"),
    "--flash-attn": _flash_attention,
    "--cache-type-k": _choice("ggml_type", "GGML_TYPE_", "cache_type_k"),
    "--cache-type-v": _choice("ggml_type", "GGML_TYPE_", "cache_type_v"),
    "--cache-reuse": _number("n_cache_reuse"),
    "--spec-type": _speculation,
    "--spec-draft-model": _draft_model,
    "--spec-draft-n-max": _draft("n_max"),
    "--spec-draft-n-min": _draft("n_min"),
    "--spec-draft-p-min": _draft("p_min", float),
    "--spec-draft-p-split": _draft("p_split", float),
    "--spec-draft-threads": _number("speculative", "draft", "cpuparams", "n_threads"),
    "--spec-draft-type-k": _choice("ggml_type", "GGML_TYPE_", "speculative", "draft", "cache_type_k"),
    "--spec-draft-type-v": _choice("ggml_type", "GGML_TYPE_", "speculative", "draft", "cache_type_v"),
    **{
        f"--spec-{kind}-size-{letter}": _number("speculative", kind.replace("-", "_"), f"size_{letter}")
        for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v")
        for letter in ("n", "m")
    },
    "--spec-ngram-mod-n-match": _number("speculative", "ngram_mod", "n_match"),
    "--spec-ngram-mod-n-max": _number("speculative", "ngram_mod", "n_max"),
    "--spec-ngram-mod-n-min": _number("speculative", "ngram_mod", "n_min"),
    "--cache-ram": _number("cache_ram_mib"),
    "--no-cache-idle-slots": _switch("cache_idle_slots", on=False),
    "--slot-save-path": _slot_folder,
    "--log-verbosity": _number("verbosity"),
    "--metrics": _switch("endpoint_metrics"),
    "--slots": _switch("endpoint_slots"),
    "--offline": _switch("offline"),
}

SWITCHES: Final = frozenset({"--no-kv-unified", "--no-cache-idle-slots", "--metrics", "--slots", "--offline"})
"""Those without a value."""


def main() -> int:
    """Serve until killed; 1 if the server cannot start."""
    parser = argparse.ArgumentParser(prog="python -m services.inference.embedded", description=__doc__)
    for flag in SETTINGS:
        if flag in SWITCHES:
            parser.add_argument(flag, action="store_const", const="", dest=flag)
        else:
            parser.add_argument(flag, dest=flag, required=flag in ("--model", "--port"))
    options = vars(parser.parse_args())

    import xllamacpp  # after the options, so that --help works without the wheel

    params = xllamacpp.CommonParams()
    for flag, put in SETTINGS.items():
        if options[flag] is not None:
            put(params, options[flag])
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
