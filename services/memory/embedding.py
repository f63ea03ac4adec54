"""Text to unit vectors with wordllama, whose weights and tokenizer lie inside its wheel.

Fails closed: a text that cannot be embedded is an error and never gets a stand-in vector (a hash used as fallback
once gave NaNs and cosines above 0.99 between strangers). Nothing is downloaded, nothing written, not even to HOME.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

DIMENSION: Final = 256
"""Length of every vector."""

MAX_CHARS: Final = 64 * 1024
"""Longest text that is embedded; the same bound as an objective's. Takes 0.03 s on one core."""

_NORM_TOLERANCE: Final = 1e-3

_REMEMBERED: Final = 1_024
"""Texts whose vectors are kept: a task's is asked about, decided about and told of as an episode."""
_REMEMBERED_CHARS: Final = 4_096
"""Longer texts are embedded each time, so that what is kept stays below a few megabytes."""


class Unembeddable(ValueError):
    """This text has no embedding. The message says why and fits behind the name of a field."""


class BadVector(ValueError):
    """A stored or computed vector is not a finite unit vector of the right length."""


class Embedder:
    """Loads the weights (16 MB, 0.4 s) and embeds one text at a time."""

    def __init__(self) -> None:
        import wordllama  # here, since it takes 0.3 s and only the loaded service needs it

        logging.getLogger().setLevel(logging.WARNING)  # importing wordllama makes the root logger print at INFO
        package = Path(wordllama.__file__).parent
        # With the package as cache folder the tokenizer is found in the wheel; otherwise it asks the network for it.
        self._model = wordllama.WordLlama.load(dim=DIMENSION, cache_dir=package, disable_download=True)
        weights = package / "weights" / f"l2_supercat_{DIMENSION}.safetensors"
        self._one_at_a_time = threading.Lock()  # all threads share it; the tokenizer has state
        self._remembered: OrderedDict[str, Vector] = OrderedDict()
        """Text -> vector, the least recently used first."""
        self.name = f"wordllama-{DIMENSION}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
        """Identity of the weights: vectors of different names must never be compared."""

    def embed(self, text: str) -> Vector:
        """Unit vector, float32, shape (256,), read-only. Raises Unembeddable without a word in it, or if too long."""
        with self._one_at_a_time:
            if text in self._remembered:
                self._remembered.move_to_end(text)
                return self._remembered[text]
            vector = self._made(text)
            if len(text) <= _REMEMBERED_CHARS:
                self._remembered[text] = vector
                if len(self._remembered) > _REMEMBERED:
                    self._remembered.popitem(last=False)
            return vector

    def _made(self, text: str) -> Vector:
        if len(text) > MAX_CHARS:
            raise Unembeddable(f"{len(text)} characters, at most {MAX_CHARS} are embedded")
        if not any(char.isalnum() for char in text):
            raise Unembeddable("it holds no letter and no digit, so it resembles nothing")
        raw = self._model.embed([text], norm=False)[0].astype(np.float32)
        norm = float(np.linalg.norm(raw))
        if not np.isfinite(norm) or norm == 0:
            raise Unembeddable(f"its vector has the norm {norm}")
        vector: Vector = checked(raw / np.float32(norm))
        vector.setflags(write=False)  # whoever asks next gets the same one
        return vector


def checked(vector: Vector) -> Vector:
    """The vector itself; raises BadVector unless it is finite, of length 256 and of norm 1."""
    if vector.shape != (DIMENSION,) or vector.dtype != np.float32:
        raise BadVector(f"shape {vector.shape} of {vector.dtype}, expected ({DIMENSION},) of float32")
    norm = float(np.linalg.norm(vector))
    if not abs(norm - 1) <= _NORM_TOLERANCE:  # written so that NaN is refused
        raise BadVector(f"norm {norm}, expected 1")
    return vector


def to_bytes(vector: Vector) -> bytes:
    """Little-endian float32, as kept in the log."""
    return checked(vector).astype("<f4").tobytes()


def from_bytes(data: bytes) -> Vector:
    """Reverse of `to_bytes`; raises BadVector."""
    if len(data) != 4 * DIMENSION:
        raise BadVector(f"{len(data)} bytes, expected {4 * DIMENSION}")
    return checked(np.frombuffer(data, dtype="<f4").astype(np.float32))
