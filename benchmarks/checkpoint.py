"""Times saving and loading a checkpoint, with and without SHA-256 sums: `python -m benchmarks.checkpoint`.

Writes reports/benchmarks/checkpoint.json. The share of training time assumes the default interval: the longer of 60 s
and 50 times the duration of the last save.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from gpt2.config import GPT2_VOCAB_SIZE, PRESETS, GPTConfig
from gpt2.files import write_json

MODELS = {
    "laptop, 16M": GPTConfig(block_size=128, vocab_size=GPT2_VOCAB_SIZE, n_layer=4, n_head=4, n_embd=256),
    "GPT-2, 124M": PRESETS["gpt2"],
}
REPORT = Path("reports/benchmarks/checkpoint.json")


def main() -> None:
    """Times all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder here)")
    arguments = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd()) as folder:
        for name, config in MODELS.items():
            row = measure(config, Path(folder) / name.replace(" ", "-"), arguments.repeats)
            report[name] = row
            print(
                f"{name}: {row['megabytes']:,.0f} MB, {row['seconds']:.2f} s, {row['sums_add']:+.0%} for the sums; "
                f"reading and checking {row['load_s']:.2f} s; {row['share_of_training']:.2%} of training"
            )
    write_json(REPORT, report)


def measure(config: GPTConfig, folder: Path, repeats: int) -> dict[str, float]:
    """Median durations for a model with AdamW's moments; saves with and without sums alternate."""
    import torch

    from gpt2 import files
    from gpt2.model.transformer import GPT
    from gpt2.optimizers.optimizer import Optimizer
    from gpt2.training.checkpoints import MIN_SAVE_INTERVAL_S, SAVE_INTERVAL_IN_SAVES, CheckpointStore
    from gpt2.training.state import TrainState, checkpoint_content
    from stages.params import load_params

    train = load_params(Path("presets/seed.yaml")).train
    model = GPT(config)
    optimizer = Optimizer(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = TrainState.initial(torch.float32, train.batch_size)
    state.best_step, state.best_weights = 1, {name: p.detach().clone() for name, p in model.named_parameters()}
    store = CheckpointStore(folder)

    def save() -> None:
        state.step += 1 if state.step != 0 else 2
        store.save(state.step, checkpoint_content(model, optimizer, state))

    def save_without_sums() -> None:
        with mock.patch.object(files, "sha256_of", return_value="0" * 64):
            save()

    with_sums, without = [], []
    for _ in range(repeats + 1):  # the first round warms up
        with_sums.append(seconds_of(save))
        without.append(seconds_of(save_without_sums))
    save()
    load_s = statistics.median(seconds_of(lambda: store.load(state.step)) for _ in range(3))
    cost_s, without_s = statistics.median(with_sums[1:]), statistics.median(without[1:])
    size = sum(path.stat().st_size for path in store.path(state.step).iterdir())
    return {
        "megabytes": size / 1e6,
        "seconds": cost_s,
        "without_sums_s": without_s,
        "sums_add": cost_s / without_s - 1,
        "load_s": load_s,
        "share_of_training": cost_s / max(MIN_SAVE_INTERVAL_S, SAVE_INTERVAL_IN_SAVES * cost_s),
    }


def seconds_of(action: Callable[[], object]) -> float:
    """The duration of a call."""
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
