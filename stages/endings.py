"""How the workers of a stage end: with one voice, whichever of them fails."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import GPT2Error, is_out_of_memory, one_line
from gpt2.files import write_json
from stages.params import RuntimeConfig
from stages.process import OS_ERROR_EXIT_CODE, StopSignal, echo, mute, warn

if TYPE_CHECKING:
    from gpt2.world import World

ENDING = "GPT2_ENDING"
"""Environment variable with the path of the file for an ending that is not to be repeated."""
PATIENCE_S, CLOSED_PATIENCE_S = 10.0, 2.0
"""How long processes wait for the words of others: after a timeout, and after a connection was closed."""
RETRY_EXIT_CODE = 75


def read_ending(path: Path) -> dict[str, Any] | None:
    """The ending that a worker wrote; None if there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def run_worker(body: Callable[["World"], None], runtime: RuntimeConfig, stop: StopSignal) -> None:
    """Joins the other workers and runs `body`. Ends the process, with the exit code for its parent."""
    ending = Path(os.environ[ENDING]) if ENDING in os.environ else None
    if ending is not None and ending.exists():  # it came while this worker was started
        os._exit(0)
    if os.environ["RANK"] != "0":
        mute()
    if ending is not None:
        stop.end = lambda number: _note(ending, 128 + number)
    stop.watch()
    world = None
    try:
        with stop.exit_immediately():
            import torch

            from gpt2.world import join

            uses_cuda = runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available())
            world = join("cuda" if uses_cuda else "cpu")
        body(world)
        code = 0
    except BaseException as error:
        code = Endings(world, ending).report(error)
    sys.stderr.flush()
    os._exit(code)  # threads may wait for processes that are gone


class Endings:
    """Lets one of the processes that fail speak for all."""

    def __init__(self, world: "World | None", ending: Path | None) -> None:
        self.world, self.ending = world, ending

    def report(self, error: BaseException) -> int:
        """Tells an error, unless another process has told one. Returns the exit code."""
        code, text = _explain(error)
        if isinstance(error, GPT2Error) and error.is_shared:
            self._is_first(code)  # others may still wait for this one
            if self.world is None or self.world.rank == 0:
                return self._end(code, text)
            return 0 if self.ending is not None else code
        if self._is_lost(error):
            return self._report_lost(error)
        if not self._is_first(code):
            return self._code_of_first()
        name = self.world.name if self.world is not None else f"rank {os.environ['RANK']}"
        if code == 1:
            traceback.print_exception(error)
        if isinstance(error, GPT2Error) and error.is_retried:
            mute(False)
            warn(f"{name}: {text}")
            return code
        return self._end(code, f"{name}: {text}")

    def _end(self, code: int, text: str) -> int:
        mute(False)
        echo(f"error: {text}")
        if self.ending is None:
            return code
        return _note(self.ending, code)

    def _is_lost(self, error: BaseException) -> bool:
        """Whether the error only says that another process is gone, or silent."""
        if self.world is None or not isinstance(error, RuntimeError) or is_out_of_memory(error):
            return False
        words = ("gloo", "nccl", "connection", "timed out", "timeout", "process group", "recv", "socket")
        return any(word in f"{type(error).__name__} {error}".lower() for word in words)

    def _report_lost(self, error: BaseException) -> int:
        """Finds out which processes do not answer; one of the others names them."""
        assert self.world is not None
        store, rank = self.world.store, self.world.rank
        patience_s = CLOSED_PATIENCE_S if "connection" in str(error).lower() else PATIENCE_S
        try:
            store.set(f"waits/{rank}", "1")
            for _ in range(round(patience_s / 0.1)):
                if self.ending is not None and self.ending.exists():
                    return 0
                if store.check(["first"]):
                    return self._code_of_first()
                silent = [r for r in range(self.world.size) if not store.check([f"waits/{r}"])]
                if not silent:
                    break
                time.sleep(0.1)
            if self._is_first(RETRY_EXIT_CODE):
                hosts = [f"rank {r} on {store.get(f'host/{r}').decode()}" for r in silent]
                who = (
                    f"{', '.join(hosts)} {'does' if len(hosts) == 1 else 'do'} not answer" if hosts else one_line(error)
                )
                mute(False)
                warn(f"{who}; training goes on from the newest checkpoint when all processes start again")
        except RuntimeError:  # the store is gone too
            pass
        return RETRY_EXIT_CODE

    def _is_first(self, code: int) -> bool:
        """Whether no other process has spoken."""
        if self.world is None:
            return True
        mine = f"{self.world.rank} {code}"
        try:
            return bool(self.world.store.compare_set("first", "", mine).decode() == mine)
        except RuntimeError:
            return True

    def _code_of_first(self) -> int:
        assert self.world is not None
        code = int(self.world.store.get("first").decode().split()[1])
        return 0 if self.ending is not None and code != RETRY_EXIT_CODE else code


def _note(ending: Path, code: int) -> int:
    """Writes down an ending that was told. Returns the exit code of a worker."""
    write_json(ending, {"exit_code": code, "said": True})
    return 0


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, GPT2Error):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return OS_ERROR_EXIT_CODE, f"{error}; check that the folder can be written to and that the disk has free space"
    if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
        return OS_ERROR_EXIT_CODE, "out of memory; choose a smaller model or batch: `python -m gpt2 info`"
    return 1, f"{type(error).__name__}: {one_line(error)}"
