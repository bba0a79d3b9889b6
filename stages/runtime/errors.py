"""What ends a stage other than a bug."""


class UserError(Exception):
    """Something a user can fix. The text names the key, file or object, and what to do.

    It may repeat text of a stranger, like an object's key: characters that a terminal would obey
    are replaced by their escapes.
    """

    def __init__(self, text: str) -> None:
        super().__init__(
            "".join(
                letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                for letter in text
            )
        )


class Stopped(Exception):  # noqa: N818 - not an error, like KeyboardInterrupt
    """A signal ended the work; the next run continues from `where`."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)
        self.signal = number
        self.where = where
