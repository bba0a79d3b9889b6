"""A random order that depends only on a seed and on ids, not on library, machine or row order."""

import hashlib
from collections.abc import Iterable


def shuffled(ids: Iterable[str], purpose: str, seed: int) -> list[str]:
    """The ids in the order of SHA-256 of purpose, seed and id.

    Adding or removing an id does not move the others. `purpose` keeps orders with the same seed
    independent of each other.
    """
    return sorted(
        ids, key=lambda name: hashlib.sha256(f"{purpose}:{seed}:{name}".encode()).digest()
    )
