"""Errors a user can act on. The command line prints each as one line and exits with a non-zero status."""

from collections.abc import Iterator
from contextlib import contextmanager


class Notice(UserWarning):
    """Something the user should know, although the work goes on. The command line prints it as one line."""


class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, where, what to do."""

    exit_code = 2
    # Whether every training process ends with it; then one of them says so.
    everywhere = False


class StoreError(UserError):
    """The store refuses: damaged, foreign, of a newer format, or not there."""


class NoStore(StoreError):
    """There is nothing where the store should be."""


class SpaceMismatch(StoreError):
    """A feature space was asked for and only others exist; the message names each differing field and both values."""


class SeveralSpaces(SpaceMismatch):
    """Several feature spaces fit what was asked for, and none may be taken unasked."""


class MissingStates(StoreError):
    """Samples or hidden states that were asked for are not in the store.

    `samples` is the number of keys not stored at all, `states` the names absent for some stored key.
    """

    def __init__(self, message: str, samples: int = 0, states: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.samples = samples
        self.states = states


class TooLarge(StoreError):
    """A file of a store is larger than what it may hold, and was not read."""


class NonFinite(UserError):
    """A hidden state holds NaN or infinity. `row` is the first offending row of the array that was encoded."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row


@contextmanager
def within(where: str) -> Iterator[None]:
    """An error that passes through says first that it is of `where`; its type stays."""
    try:
        yield
    except UserError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise
