"""Where the random draws of a run come from: what they are for, not what was drawn before."""

from __future__ import annotations

import hashlib


def draw_seed(*key: object) -> int:
    """63 bits that depend on the key alone, the same on every machine and in every release of Python and numpy."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
