"""What must hold for an entry whose model a server elsewhere has: complete, reachable by its URL, and without a secret.

Part of `rules`. Whether the server answers and has the model is seen at run time, by the service of the entry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from services.kit.registry.entries import ModelEntry, RemoteLimits
from services.kit.registry.problems import Problem

if TYPE_CHECKING:
    from services.kit.registry.rules import Scene

#: Fields that mean something for a server elsewhere only.
_REMOTE: Final = ("base_url", "remote_model", "api_key_env", "remote")
#: Fields of a process of ours.
_LOCAL: Final = (
    *("path", "threads", "threads_batch", "batch_tokens", "ubatch_tokens", "experts", "port", "numa", "load_mode"),
    *("speculation", "speculation_on_recurrent", "flash_attention", "kv_type_k", "kv_type_v", "cache_reuse"),
    *("declared", "memory_bytes", "prefix_disk_bytes"),
)
#: Sampling that a server with the standard API alone knows nothing of -> the value that says the same as silence.
_EXTRA_SAMPLING: Final = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
_NUMBERS: Final = re.compile(r"[0-9.]+")


def remote_entries(scene: Scene) -> Iterator[Problem]:
    """Errors in entries with engine openai, and fields of it in others."""
    problem = scene.draft.problem
    for name, model in scene.models.items():
        at = ("models", name)
        foreign = _LOCAL if model.engine == "openai" else _REMOTE
        for field in foreign:
            if field in model.model_fields_set:
                whose = "a process of ours" if model.engine == "openai" else "engine openai"
                message = f"belongs to {whose}, and this is engine {model.engine}; remove it"
                yield problem((*at, field), "remote-fields", message)
        if model.engine == "openai":
            yield from _complete(scene, name, model)


def _complete(scene: Scene, name: str, model: ModelEntry) -> Iterator[Problem]:
    problem = scene.draft.problem
    at = ("models", name)
    if model.base_url is None:
        yield problem(at, "remote-fields", "engine openai needs base_url, such as https://gpu1.example:8000/v1")
    elif (wrong := _url_trouble(model.base_url)) is not None:
        yield problem((*at, "base_url"), "remote-url", wrong)
    if model.remote_model is None:
        yield problem(at, "remote-fields", "engine openai needs remote_model: the name of the model on that server")
    if model.tier == "D":
        yield problem((*at, "tier"), "remote-tier", "a draft works inside a process of ours; choose tier A to C")
    limits = model.remote
    if limits.probe_max_s < limits.probe_after_s:
        message = f"is less than probe_after_s ({limits.probe_after_s:g}), the first pause; raise it"
        yield problem((*at, "remote", "probe_max_s"), "remote-probe", message)
    yield from _connection(scene, name, limits)


def _connection(scene: Scene, name: str, limits: RemoteLimits) -> Iterator[Problem]:
    at = ("models", name, "remote")
    if limits.proxy is not None and (wrong := _url_trouble(limits.proxy)) is not None:
        yield scene.draft.problem((*at, "proxy"), "remote-url", wrong)
    if limits.ca_file is None:
        return
    path = limits.ca_file.expanduser()
    if not path.is_absolute():
        yield scene.draft.problem(
            (*at, "ca_file"), "remote-ca", f"must be an absolute path, got {str(limits.ca_file)!r}"
        )
    elif scene.check_files and not (path.is_file() and os.access(path, os.R_OK)):
        yield scene.draft.problem((*at, "ca_file"), "remote-ca", f"{path} cannot be read; repair the path")


def _url_trouble(url: str) -> str | None:
    """What is wrong with a URL, without repeating it: it may hold a secret by mistake."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as err:
        return f"is no URL: {err}"
    if parts.scheme not in ("http", "https"):
        return "must begin with http:// or https://"
    if "@" in parts.netloc:
        return "must not hold a user or a password; name a variable or file in api_key_env instead"
    if not parts.hostname or port == 0 or not url.isprintable() or any(char.isspace() for char in url):
        return "names no host, as in https://gpu1.example:8000/v1"
    if _NUMBERS.fullmatch(parts.hostname) and not _is_address(parts.hostname):
        return f"names a host of numbers that is no IPv4 address: {parts.hostname[:60]}"
    if parts.query or parts.fragment:
        return "must end before '?' or '#'; a key belongs into the variable or file that api_key_env names"
    return None


def _is_address(host: str) -> bool:
    try:
        IPv4Address(host)
    except AddressValueError:
        return False
    return True


def remote_sampling(scene: Scene) -> Iterator[Problem]:
    """A note where a role sets what its remote server will not be told."""
    for name, role in scene.roles.items():
        model = scene.models.get(role.model)
        if model is None or model.engine != "openai" or model.remote.dialect != "openai":
            continue
        lost = [
            field
            for field, off in _EXTRA_SAMPLING.items()
            if field in role.sampling.model_fields_set and getattr(role.sampling, field) != off
        ]
        if lost:
            message = (
                f"{', '.join(lost)} cannot be said in dialect openai and will not reach {role.model!r}; set its "
                "remote.dialect to what the server is, or remove them"
            )
            yield scene.draft.problem(("roles", name, "sampling"), "remote-sampling", message)
