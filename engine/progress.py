"""How far a long operation has come, told to whoever asked for it."""

from typing import Protocol


class Progress(Protocol):
    """Called now and then, from one thread at a time.

    With how many things are done, how many there are (None while that is not known; what they are
    says the operation), and how many bytes of contents have gone through by now. 0 bytes: that is
    not known. What it raises ends the operation like an interrupt.
    """

    def __call__(self, done: int, total: int | None, size: int = 0, /) -> None:
        """Takes note of it; returns soon."""


def unheard(done: int, total: int | None, size: int = 0, /) -> None:
    """Takes no note."""
