"""Errors that a user can act on: each has a one-line message and an exit code."""


class GPT2Error(Exception):
    """An error whose message says on one line what is wrong and what to do.

    is_shared: all processes of a run raise it at once. is_retried: they may start again, and go on.
    """

    exit_code = 1
    is_shared = False
    is_retried = False


class UserError(GPT2Error):
    """The user's parameters, text or model folder are wrong."""

    exit_code = 2


class DivergedError(GPT2Error):
    """The loss, a gradient or a weight became non-finite. good_steps: number of finite steps before it."""

    exit_code = 3
    is_shared = True

    def __init__(self, message: str, good_steps: int) -> None:
        super().__init__(message)
        self.good_steps = good_steps


class FileError(GPT2Error):
    """A file cannot be read or written, or has the wrong content."""

    exit_code = 74


class OutOfMemoryError(GPT2Error):
    """This machine does not have enough memory."""

    exit_code = 74


class BusyError(GPT2Error):
    """Another process holds a lock. holder: which one."""

    exit_code = 75

    def __init__(self, message: str, holder: str = "another process") -> None:
        super().__init__(message)
        self.holder = holder


class UnreachableError(GPT2Error):
    """The other processes of a run do not answer."""

    exit_code = 75
    is_retried = True


class DifferentError(UserError):
    """The processes of a run have different code, params, tokens or packages."""

    is_shared = True


class MicroBatchError(GPT2Error):
    """A process of several is out of memory. They start again with a smaller micro_batch_size."""

    exit_code = 75
    is_retried = True

    def __init__(self, message: str, micro_batch_size: int) -> None:
        super().__init__(message)
        self.micro_batch_size = micro_batch_size


class Interrupted(GPT2Error):  # noqa: N818 - not an error
    """A signal asked the process to stop. `exit_code` is 128 plus its number, as in a shell."""

    is_shared = True

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error, or its type if it has none, on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: Python's, CUDA's, or that of torch's CPU allocator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in message or "out of memory" in message)
