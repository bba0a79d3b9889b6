"""What ends a stage other than a bug."""


class UserError(Exception):
    """Something a user can mend. The text names the key, file or object, and what to do."""


class Stopped(Exception):  # noqa: N818 - no error, like KeyboardInterrupt
    """A signal ended the work, which the next run goes on with from `where`."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)
        self.signal = number
        self.where = where
