"""Progress callbacks."""

from collections.abc import Callable

ProgressCallback = Callable[[int], object]
"""Called with the number of bytes or tokens since the last call, like the `update` of a progress bar."""


def no_progress(_: int) -> None:
    """Ignores progress."""
