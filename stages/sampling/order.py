"""Random order that depends on a seed and on ids alone: not on library, machine or row order."""

import hashlib
from collections.abc import Iterable


def shuffled(ids: Iterable[str], purpose: str, seed: int) -> list[str]:
    """The ids in the order of SHA-256 of purpose, seed and id.

    An id that is added or removed moves no other. `purpose` keeps draws with the same seed
    independent of each other.
    """
    return sorted(
        ids, key=lambda name: hashlib.sha256(f"{purpose}:{seed}:{name}".encode()).digest()
    )
