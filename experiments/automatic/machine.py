"""How fast this machine trains: a few seconds of the real training, measured once for each shape and remembered."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from experiments.automatic.probe import RESULT, Speed
from gpt2.errors import GPT2Error, Interrupted
from gpt2.files import write_text
from stages import paths
from stages.params import Params

QUICK_S, THOROUGH_S = 3.0, 8.0
"""Seconds of steps: to compare shapes, and to plan the run with."""
NOT_MEASURED = (
    *("max_steps", "warmup_steps", "eval_interval", "seed", "init_from", "patience"),
    *("learning_rate", "muon_learning_rate", "weight_decay", "beta1", "decay_fraction"),
)
"""Params of training that a step's time does not depend on."""


class Machine:
    """Measures trainings of the text in a folder."""

    def __init__(self, folder: Path, distinct_tokens: int) -> None:
        """folder: with data/tokens, for the files of a measurement. distinct_tokens: of the text."""
        self.folder, self.distinct_tokens = folder, distinct_tokens
        self.cache = paths.real_root() / "checkpoints/preset-auto.json"

    def speed(self, params: Params, text: str, *, thorough: bool) -> Speed:
        """The speed of a training. text: params.yaml with these params.

        thorough: compiled, if the run would be, and measured for longer. Raises GPT2Error if it cannot run.
        """
        import torch

        from gpt2.device import choose_device, device_name, remembered

        train = {key: value for key, value in asdict(params.train).items() if key not in NOT_MEASURED}
        runtime = {key: getattr(params.runtime, key) for key in ("precision", "compile", "gradient_checkpointing")}
        names = [field.name for field in fields(Speed)]
        options = {"distinct": self.distinct_tokens, "thorough": thorough, "measured": names}
        shape = {**params.model.to_dict(), **train, **runtime, **options}
        threads = params.runtime.threads or torch.get_num_threads()
        device = choose_device(params.runtime.device)
        key = f"{device_name(device)}, {threads} threads, torch {torch.__version__}, {json.dumps(shape)}"
        measured = remembered(self.cache, key, lambda: self._measure(text, THOROUGH_S if thorough else QUICK_S))
        values = json.loads(measured)
        return Speed(**{name: values[name] for name in names})

    def _measure(self, text: str, seconds: float) -> str:
        """The content of the file that the measurement writes."""
        root = paths.real_root()
        write_text(self.folder / paths.PARAMS, text)
        result = self.folder / RESULT
        result.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "DVC_ROOT": str(root)}
        command = [sys.executable, "-m", "experiments.automatic.probe", str(seconds)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode in (129, 130, 143):
            raise Interrupted("interrupted; params.yaml is as it was", signal.SIGINT)
        if done.returncode or not result.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise GPT2Error(f"measuring a training failed: {lines[-1].removeprefix('error: ')}")
        return result.read_text(encoding="utf-8")
