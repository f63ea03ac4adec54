"""Sizes and versions that both ends of the bus agree on.

Why here: a limit that is checked in two places with two values is a hole. Every bound on what one peer may send
to another stands in this file; policies of a single service (timeouts, retries) do not.
"""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Version this code speaks. HELLO offers a range; the hub picks one or rejects."""

MAX_HEADER_BYTES: Final = 8 * 1024
"""A header is routing information; anything larger is an error or an attack."""

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""Largest body the hub reads. A larger one is answered with `error`, the connection stays."""

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""Tripwire on the socket: libzmq cuts the connection of a peer that sends a larger frame."""

MAX_ARTEFACT_CHARS: Final = 1024 * 1024
"""Largest artefact carried inside a message, in characters."""

MAX_GRAMMAR_CHARS: Final = 64 * 1024
"""Largest GBNF grammar, in characters."""

MAX_BATCH_PROMPTS: Final = 1_000
"""Most prompts of one batch; their bytes together are bounded by MAX_BODY_BYTES."""

MAX_BATCH_ANSWER_BYTES: Final = 6 * 1024 * 1024
"""Answers of one batch together, as UTF-8, so that its final can be read; a further one fails by itself."""

MAX_STEPS: Final = 5_000
"""Hard bound on the steps of one plan; `budget.max_steps` is usually lower."""

MAX_NESTING: Final = 32
"""Deepest nesting of a body. Ours have fewer than ten levels; hostile ones have thousands."""
