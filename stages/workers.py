"""Several processes of the train stage: how many, and how they start.

`launch` starts torch's elastic agent in a thread of the stage, and the agent starts a worker for each rank. On several
nodes `torchrun` does that, without `launch`. If a worker dies, the agent starts all of them again, from the newest
checkpoint.

An ending that is not to be repeated (an error of the user, a signal) is written to a file by one of the workers, and
all workers exit with 0, so that the agent is content. Where `torchrun` is the parent, they exit with the code itself.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import BusyError, DifferentError, UserError, one_line
from gpt2.files import write_json
from stages.endings import ENDING, read_ending
from stages.params import Params
from stages.preflight import may_use_gpu
from stages.process import StopSignal

if TYPE_CHECKING:
    from gpt2.world import World

MAX_RESTARTS = 3
PATIENCE_S = 10.0
"""How long workers may live after an ending."""


def count(params: Params) -> int:
    """How many processes train on this machine. Raises UserError if the params do not allow it."""
    runtime, wanted = params.runtime, params.runtime.processes
    devices = 0
    if may_use_gpu(runtime):
        import torch

        devices = torch.cuda.device_count()
        if wanted != "auto" and wanted > 1 and not devices and runtime.device != "cpu":
            raise UserError(
                f"runtime.processes is {wanted}, and there is no CUDA device; set runtime.device: cpu to use the CPU"
            )
        if wanted != "auto" and wanted > devices > 0:
            raise UserError(f"runtime.processes is {wanted}, and the CUDA devices here are {devices}")
    processes = max(1, devices) if wanted == "auto" else wanted
    check_number(params, processes)
    return processes


def check_number(params: Params, processes: int) -> None:
    """Raises UserError if that many processes cannot train together."""
    params.train.share(processes)
    if params.runtime.strategy == "fsdp" and processes == 1:
        raise UserError(
            "runtime.strategy is 'fsdp', which divides the model among processes, and one process trains here; set "
            "runtime.processes, or strategy: auto"
        )


def require_same(world: "World", identity: Mapping[str, Any]) -> None:
    """Raises DifferentError, in all processes, if one of them would train something else than rank 0.

    identity: params and checksums, in sections or not.
    """
    import torch

    mine = {"torch": str(torch.__version__), "Python": ".".join(map(str, sys.version_info[:2]))}
    for section, content in identity.items():
        if isinstance(content, Mapping):
            mine |= {f"{section}.{key}": str(value) for key, value in content.items()}
        else:
            mine[section] = str(content)
    (first, expected), *others = world.gather((world.name, mine))
    for name, theirs in others:
        differing = [key for key in {**expected, **theirs} if theirs.get(key) != expected.get(key)]
        if differing:
            short = [
                f"{key} ({theirs.get(key)} instead of {expected.get(key)})" if len(str(theirs.get(key))) < 20 else key
                for key in differing
            ]
            raise DifferentError(
                f"{name} differs from {first} in {', '.join(short)}; use the same commit, params.yaml, tokens and "
                "packages on all nodes"
            )


def launch(processes: int, stop: StopSignal) -> None:
    """Runs the train stage in that many processes. Ends this process if they end with an error.

    Raises BusyError if they cannot go on, and Interrupted.
    """
    with stop.exit_immediately():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what the agent says of workers that fail, they have said in one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="gpt2-") as folder:
        ending = Path(folder) / "ending.json"
        os.environ[ENDING] = str(ending)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=MAX_RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        failures: list[Exception] = []

        def run_agent() -> None:
            try:
                elastic_launch(config, sys.executable)("-m", "stages.train")
            except Exception as error:  # most are ChildFailedError
                failures.append(error)

        agent = threading.Thread(target=run_agent, daemon=True)  # in a thread, it leaves the signals to us
        agent.start()
        _watch(agent, ending, stop)
        found = read_ending(ending)
    if found is not None:
        if not found["said"]:
            stop.check()
        sys.exit(found["exit_code"])
    if failures:
        raise BusyError(f"{_describe(failures[0])}; run the same command again to go on from the newest checkpoint")


def _watch(agent: threading.Thread, ending: Path, stop: StopSignal) -> None:
    """Passes signals on to the workers, and ends those that stay behind after an ending."""
    signalled: set[int] = set()
    deadline = None
    while agent.is_alive():
        agent.join(0.05)
        if stop:
            assert stop.signal_number is not None
            if not ending.exists():  # workers that start now end at once
                write_json(ending, {"exit_code": 128 + stop.signal_number, "said": False})
            for pid in _workers() - signalled:
                signalled.add(pid)
                _signal(pid, stop.signal_number)
        found = read_ending(ending)
        if found is not None and found["said"]:
            deadline = deadline or time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                for pid in _workers():
                    _signal(pid, signal.SIGKILL)


def _workers() -> set[int]:
    import psutil

    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "stages.train" in child.cmdline():
                found.add(child.pid)
    return found


def _signal(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)


def _describe(error: Exception) -> str:
    """What the agent knows of a worker that failed."""
    causes: dict[int, Any] = getattr(error, "failures", {})
    if not causes:
        return f"cannot start the processes ({one_line(error, 200)})"
    rank, cause = min(causes.items(), key=lambda item: item[1].timestamp)
    code = cause.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} {how}, after {MAX_RESTARTS} restarts"
