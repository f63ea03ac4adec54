"""Which waiting calls nobody will work on for a while, though another model could. Pure; `engine.move` decides, and
`batches.move` for the prompts of a batch.

Only the model changes, never the role: prompt, sampling, attempts and escalations stay as they are, so that going
sideways is neither an escalation nor a word about quality, and cannot hand a step back and forth between roles.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.kit.registry import Registry
from services.scheduler.broker import Broker
from services.scheduler.calls import Call


def strandings(broker: Broker, registry: Registry, at_ms: int) -> Iterator[tuple[Call, str]]:
    """Calls of the hub's own, of attempts and of batches, whose model is not served, each with the reason."""
    after_ms = registry.failures.caps.lateral_after_ms
    with_lateral = [role for role in registry.roles.values() if role.lateral is not None]
    for model in sorted({name for role in with_lateral for name in (role.model, role.lateral) if name is not None}):
        target = f"infer.{model}"
        reason = broker.why_unserved(target, after_ms, at_ms)
        if reason is not None:
            yield from ((call, reason) for call in broker.lines.waiting(target) if call.requester is None)
