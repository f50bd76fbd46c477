"""A stage as a process: exit codes, error messages and signals."""

import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from gpt2.errors import GPT2Error, Interrupted, is_out_of_memory
from gpt2.files import file_lock
from gpt2.progress import ProgressCallback

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
OS_ERROR_EXIT_CODE = 74
PR_SET_PDEATHSIG = 1
DVC_FOLDER = Path(".dvc")
MAX_SIGNALS = 3
SAME_SIGNAL_S = 2.0
SECRETS = (
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),  # user and password in an address
    (re.compile(r"(\w+://[^\s?#]+\?)\S+?(?=[:;,.)'\"]*(\s|$))"), r"\1***"),  # its query
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),  # a token of Hugging Face
)


def redact_secrets(text: str) -> str:
    """A text without secrets: passwords and queries in addresses, tokens of Hugging Face."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text


_is_muted = False


def mute(is_muted: bool = True) -> None:
    """Whether `echo` and `warn` print nothing: one of several processes speaks."""
    global _is_muted
    _is_muted = is_muted


def is_worker() -> bool:
    """Whether this is one of several processes of a stage, which torch's elastic agent started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def echo(message: str) -> None:
    """Prints a line on standard error, like progress bars."""
    if not _is_muted:
        print(redact_secrets(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Prints a warning."""
    echo(f"WARNING: {message}")


class StopSignal:
    """Whether this process should stop. A signal only sets this flag.

    Every loop checks it, and stops at a consistent point. The third signal of a kind ends the process at once.
    """

    def __init__(self) -> None:
        """Handles the stop signals, except those that the process was started to ignore (nohup)."""
        self.signal_number: int | None = None
        self._counts: dict[int, int] = {}
        self._last_s = -math.inf
        self._exits_immediately = False
        self.end: Callable[[int], int] = lambda number: 128 + number
        """What to do before a signal ends the process at once; returns the exit code."""
        self._parent = os.getppid() if is_worker() or "DVC_STAGE" in os.environ else None
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
        now_s = time.monotonic()
        # schedulers and torchrun both pass a signal on to a worker
        if not is_worker() or now_s - self._last_s > SAME_SIGNAL_S:
            self._counts[number] = self._counts.get(number, 0) + 1
        self._last_s = now_s
        if self._exits_immediately and not _is_muted:
            os.write(2, f"error: {_interruption(number)}\n".encode())
        if self._exits_immediately or self._counts[number] >= MAX_SIGNALS:
            os._exit(self.end(number))

    def watch(self) -> None:
        """From now on, `exit_immediately` also ends the process while it waits in C code, for other processes."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def end() -> None:
            while number := os.read(reader, 1):
                if self._exits_immediately and number[0] in STOP_SIGNALS:
                    os._exit(self.end(number[0]))

        threading.Thread(target=end, daemon=True).start()

    def __bool__(self) -> bool:
        if self._parent is not None and _is_gone(self._parent):
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def check(self) -> None:
        """Raises Interrupted if the process should stop."""
        if self:
            assert self.signal_number is not None
            raise Interrupted(_interruption(self.signal_number), self.signal_number)

    @contextmanager
    def exit_immediately(self) -> Iterator[None]:
        """For imports and compilation, which take long and cannot check the flag: a signal ends the process at once."""
        self.check()
        self._exits_immediately = True
        try:
            yield
        finally:
            self._exits_immediately = False

    def wrap(self, progress: ProgressCallback) -> ProgressCallback:
        """A progress callback that also checks the flag."""

        def report(count: int) -> None:
            self.check()
            progress(count)

        return report


def _is_gone(parent: int) -> bool:
    """Whether the parent process has ended: there is another parent now, or one in another session.

    A worker has its own session.
    """
    now = os.getppid()
    return now != parent or (not is_worker() and hasattr(os, "getsid") and os.getsid(now) != os.getsid(0))


def _interruption(number: int) -> str:
    return f"interrupted by {signal.Signals(number).name}; run the same command again"


class _SafeStream:
    """Standard error that ignores a closed terminal or pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_stage(main: Callable[[StopSignal], None]) -> None:
    """Runs a stage, and ends the process with its exit code.

    0 success; 2 invalid params or text; 3 training diverged; 74 files, disk or memory; 75 another process uses this
    folder or run; 129, 130 or 143 interrupted. Each but 0 prints one line.
    """
    stop = StopSignal()
    die_with_parent()
    sys.stderr = _SafeStream(sys.stderr)
    try:
        # two stages in one folder would overwrite each other's results, even if their runs differ
        lock = DVC_FOLDER / "tmp/stage.lock"
        is_locked = DVC_FOLDER.is_dir() and not is_worker()  # its parent holds the lock
        with file_lock(lock, what=str(Path.cwd())) if is_locked else nullcontext():
            main(stop)
            stop.check()
    except GPT2Error as error:
        echo(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        echo(f"error: {error}; check that the folder can be written to and that the disk has free space")
        sys.exit(OS_ERROR_EXIT_CODE)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        echo("error: out of memory; choose a smaller model or batch: `python -m gpt2 info`")
        sys.exit(OS_ERROR_EXIT_CODE)


def die_with_parent() -> None:
    """Requests a SIGTERM from Linux when DVC or the agent is killed; `StopSignal` detects it only when checked."""
    if is_worker() or "DVC_STAGE" in os.environ:
        request_sigterm_with_parent()


def request_sigterm_with_parent() -> None:
    """Requests a SIGTERM from Linux when the parent process ends; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
