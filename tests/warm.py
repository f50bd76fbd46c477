"""Stages of the tests' projects in forks of a process that has imported torch, MLflow and the rest already.

Importing is most of what a tiny stage does, and the same each time. The forks import the code of their own project.
Where processes are killed, and once for the whole pipeline, tests start real ones.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from itertools import filterfalse
from pathlib import Path

from experiments.sweeping.preload import MODULES, run_stage, serve, write_client

ROOT = Path(__file__).parent.parent
OURS = ("gpt2", "stages", "experiments", "tests")
MORE = (
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt2.tokenization_gpt2",
)
"""Besides those of a sweep's stages: for several processes, and for the export."""


def is_ours(module):
    return module.partition(".")[0] in OURS


@cache
def warm_python():
    """The program `python` that asks for a fork. None where there is none: not on Linux, or coverage is measured."""
    if sys.platform != "linux" or "COVERAGE_PROCESS_CONFIG" in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(prefix="gpt2-warm-"))
    client = write_client(folder / "bin", folder / "socket") / "python"
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", folder / "socket", client],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(stop, server, folder)
    assert server.stdout.readline() == "ready\n"
    return client


def stop(server, folder):
    server.terminate()
    server.wait(timeout=30)
    shutil.rmtree(folder)


def main():
    path, client = sys.argv[1:]
    arguments = serve(Path(path), [*filterfalse(is_ours, MODULES), *MORE])
    if arguments is None:
        return
    for name in filter(is_ours, list(sys.modules)):
        del sys.modules[name]
    run_stage(arguments, client)


if __name__ == "__main__":
    main()
