"""The classes of bins: counts of items, the highest of which may stand for all above it."""

from collections.abc import Iterable


class AndMore(int):
    """A count that stands for itself and all higher ones; as text it is like 6+.

    In arithmetic it is the lowest of these counts.
    """

    def __repr__(self) -> str:
        return f"{int(self)}+"


def parse_label(text: str) -> int:
    """The label whose text this is: 5, or 6+. Raises ValueError if it is none."""
    return AndMore(text[:-1]) if text.endswith("+") else int(text)


def open_label(labels: Iterable[int]) -> AndMore | None:
    """The label that stands for itself and all higher counts, if there is one."""
    return next((label for label in labels if isinstance(label, AndMore)), None)
