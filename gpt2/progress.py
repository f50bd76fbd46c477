"""How long work tells how far it is."""

from collections.abc import Callable

ProgressCallback = Callable[[int], object]
"""Called with the number of bytes, or tokens, that have just been done; a progress bar's `update`."""


def no_progress(_: int) -> None:
    """Nobody looks."""
