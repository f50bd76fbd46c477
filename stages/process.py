"""A stage as a process: its exit code, its one line when something is wrong, and the signals it hears."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from gpt2.errors import GPT2Error, Interrupted

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
OS_ERROR_EXIT_CODE = 74
PR_SET_PDEATHSIG = 1


def say(message: str) -> None:
    """A line for the person at the terminal; beside progress bars, on standard error."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A line that should not be overlooked."""
    say(f"WARNING: {message}")


def run_stage(main: Callable[[], None]) -> None:
    """Runs a stage and ends the process with the exit code that says how it went.

    0 done; 2 the user's params or text are wrong; 3 training diverged; 74 files or disk; 75 another run holds this
    one; 130 or 143 interrupted. Each but 0 comes with one line.
    """
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        main()
    except GPT2Error as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        say(f"error: {error}; check that the folder can be written to and that the disk has room")
        sys.exit(OS_ERROR_EXIT_CODE)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"interrupted by {signal.Signals(number).name}; run the same command again", number)


class StopFlag:
    """Set by a signal instead of interrupting, for work that ends at a moment of its own choice."""

    def __init__(self) -> None:
        """From now on the stop signals set this flag."""
        self.signal_number: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number

    def __bool__(self) -> bool:
        return self.signal_number is not None


def die_with_parent() -> None:
    """Asks Linux for a SIGTERM when DVC, our parent, is killed; else we would train on, unseen."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it was killed in between
            os.kill(os.getpid(), signal.SIGTERM)
