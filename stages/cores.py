"""The cores of a CPU, shared by the stages that compute.

OpenMP's threads wait for each other many times in each step, by default in busy loops. On a busy machine such a loop
takes the core that the awaited thread needs: two trainings on two cores were six times as slow as one after the other.
So threads sleep soon here, and stages that take all cores take turns. Turns change no bits; fewer threads would.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gpt2.errors import BusyError
from gpt2.files import file_lock
from stages import paths
from stages.params import RuntimeConfig
from stages.preflight import may_use_gpu
from stages.process import StopSignal, echo

SPINS = 10_000
"""Turns of a busy loop before a waiting thread sleeps. On a busy machine 3,000 to 30,000 measured alike, and two to
three times as fast as GNU's default, 300,000 (`python -m benchmarks.concurrency` compares the default with ours)."""
POLL_S = 0.2


@contextmanager
def reserve_cores(runtime: RuntimeConfig, stop: StopSignal) -> Iterator[None]:
    """Waits until no other stage of this repository takes all cores, and takes them for the block.

    Does not wait with `runtime.threads` set, or where a GPU may compute. To be entered before torch is imported, whose
    OpenMP reads the environment then. Raises Interrupted if a signal arrives.
    """
    limit_busy_waiting()
    takes_all = runtime.threads is None and not may_use_gpu(runtime)
    with ExitStack() as held:
        if takes_all and (paths.real_root() / ".dvc").is_dir():
            _wait_for_turn(held, stop)
        yield


def limit_busy_waiting() -> None:
    """Sets after how many turns the threads of GNU's OpenMP sleep, unless the environment says how they wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def available() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_lock() -> Path:
    """The lock file of this machine's cores. Other machines may share the folder."""
    return paths.real_root() / f".dvc/tmp/cores-{socket.gethostname()}.lock"


def _wait_for_turn(held: ExitStack, stop: StopSignal) -> None:
    """Puts the lock of the cores into `held`, as soon as no other stage has it."""
    waits = False
    while True:
        stop.check()
        try:
            held.enter_context(file_lock(cores_lock()))
            return
        except BusyError as error:
            if not waits:
                echo(f"waiting for the cores, in use by {error.holder}; a stage with runtime.threads set does not wait")
            waits = True
        time.sleep(POLL_S)
