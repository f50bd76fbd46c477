"""What can go wrong for a reason that the user can act on: each error is one line, and knows its exit code."""


class GPT2Error(Exception):
    """An error whose message says in one line what is wrong and what to do."""

    exit_code = 1


class UserError(GPT2Error):
    """The user's parameters, text or model folder are wrong."""

    exit_code = 2


class DivergedError(GPT2Error):
    """Training reached a number that is not finite, after so many good steps."""

    exit_code = 3

    def __init__(self, message: str, good_steps: int) -> None:
        super().__init__(message)
        self.good_steps = good_steps


class FileError(GPT2Error):
    """A file cannot be read or written, or does not hold what it should."""

    exit_code = 74


class OutOfMemoryError(GPT2Error):
    """The memory of this machine is not enough."""

    exit_code = 74


class BusyError(GPT2Error):
    """Another process holds the same run."""

    exit_code = 75


class Interrupted(GPT2Error):  # noqa: N818 - an interruption is no error of anybody's
    """A signal asked the process to stop; `exit_code` is 128 plus its number, as a shell reports it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, CUDA's, or that of torch's allocator on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in told or "out of memory" in told)
