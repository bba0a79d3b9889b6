"""What ends a stage other than a bug."""


class UserError(Exception):
    """Something a user can mend. The text names the key, file or object, and what to do.

    It may repeat what a stranger wrote, like an object's key: what a terminal would obey in it is
    shown as its escape.
    """

    def __init__(self, text: str) -> None:
        super().__init__(
            "".join(
                letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                for letter in text
            )
        )


class Stopped(Exception):  # noqa: N818 - no error, like KeyboardInterrupt
    """A signal ended the work, which the next run goes on with from `where`."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)
        self.signal = number
        self.where = where
