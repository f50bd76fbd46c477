"""What can go wrong for a reason that the user can act on: each error is one line, and knows its exit code."""


class GPT2Error(Exception):
    """An error whose message says in one line what is wrong and what to do."""

    exit_code = 1


class UserError(GPT2Error):
    """The user's parameters, text or model folder are wrong."""

    exit_code = 2


class DivergedError(GPT2Error):
    """Training reached a loss or a gradient that is not finite."""

    exit_code = 3


class FileError(GPT2Error):
    """A file cannot be read or written, or does not hold what it should."""

    exit_code = 74


class BusyError(GPT2Error):
    """Another process holds the same run."""

    exit_code = 75


class Interrupted(GPT2Error):  # noqa: N818 - an interruption is no error of anybody's
    """A signal asked the process to stop; `exit_code` is 128 plus its number, as a shell reports it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
