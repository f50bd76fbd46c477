"""The curves of a run: loss and other measurements against steps, tokens, seconds and FLOPs."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.report.numbers import is_number
from experiments.runs import Run
from gpt2.config import GPTConfig
from gpt2.errors import UserError

MAX_POINTS = 400
"""Of each curve. A longer history becomes means of so many parts."""

BUDGETS = ("step", "tokens", "seconds", "flops")
MEASURED = ("train_loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_bytes")
Column = npt.NDArray[np.float64]


def curves(run: Run) -> dict[str, Any] | None:
    """The curves as lists of numbers, null where there is none: budgets and measurements of the logged steps.

    "held_out" has the budgets at the evaluations, and their losses. None without a history.
    """
    table = history(run)
    if table is None:
        return None
    evaluated = table.dropna(subset=["val_loss"])
    if len(evaluated) > MAX_POINTS:
        evaluated = evaluated.iloc[np.linspace(0, len(evaluated) - 1, MAX_POINTS).round().astype(int)]
    parts = min(MAX_POINTS, len(table))
    ends = np.linspace(0, len(table), parts + 1).astype(int)
    thinned = {name: _numbers(table[name].to_numpy()[ends[1:] - 1]) for name in BUDGETS}
    thinned |= {name: _numbers(_means(table[name].to_numpy(), ends)) for name in MEASURED}
    held_out = {name: _numbers(evaluated[name].to_numpy()) for name in (*BUDGETS, "val_loss")} if len(evaluated) else {}
    return {**thinned, "held_out": held_out, "rows_in_a_point": -(-len(table) // parts)}


def history(run: Run) -> pd.DataFrame | None:
    """The history with the columns of BUDGETS, MEASURED and val_loss, all numbers. None if there is no row."""
    table = run.history
    if table is None or "step" not in table or not len(table):
        return None
    names = {"step": "step", "tokens": "tokens", "elapsed_s": "seconds", "val_loss": "val_loss"}
    names |= {name: name for name in MEASURED}
    found = pd.DataFrame(
        {new: pd.to_numeric(table[old], errors="coerce") if old in table else np.nan for old, new in names.items()},
        dtype=np.float64,
    ).replace([np.inf, -np.inf], np.nan)
    found = found.dropna(subset=["step"])
    found["flops"] = found["tokens"] * (flops_per_token(run) or np.nan)
    return found if len(found) else None


def flops_per_token(run: Run) -> float | None:
    """Of training, as `GPTConfig.flops_per_token` counts; None if the params do not say."""
    train = run.params.get("train", {})
    try:
        length, frozen = int(train["sequence_length"]), int(train.get("freeze_layers", 0))
        return float(GPTConfig.from_dict(run.params["model"]).flops_per_token(length, frozen))
    except (KeyError, TypeError, ValueError, UserError):
        return None


def measurements(table: pd.DataFrame | None) -> dict[str, float | None]:
    """What the curves of learning rate, gradient norm and speed come to; None where nothing was logged."""

    def known(value: float) -> float | None:
        return value if is_number(value) else None

    if table is None:
        return {}
    norms, speeds = table["grad_norm"], table["tokens_per_s"]
    return {
        "peak_learning_rate": known(float(table["learning_rate"].max())),
        "median_grad_norm": known(float(norms.median())),
        "largest_grad_norm": known(float(norms.max())),
        "slow_tokens_per_s": known(float(speeds.quantile(0.1))),
        "fast_tokens_per_s": known(float(speeds.quantile(0.9))),
        "last_train_loss": known(float(table["train_loss"].iloc[-1])),
    }


def losses_at_equal_budget(tables: list[pd.DataFrame | None]) -> dict[str, tuple[float, list[float | None]]]:
    """The largest budget of each kind that all runs with evaluations reached, and the held-out loss of each there.

    Between two evaluations, the loss is interpolated linearly; before a run's first, there is none.
    """
    evaluated = [None if table is None else table.dropna(subset=["val_loss"]) for table in tables]
    found = {}
    for budget in BUDGETS:
        rows = [None if table is None else table.dropna(subset=[budget]) for table in evaluated]
        ends = [float(table[budget].max()) for table in rows if table is not None and len(table)]
        if not ends:
            continue
        end = min(ends)
        losses: list[float | None] = []
        for table in rows:
            if table is None or not len(table) or end < table[budget].iloc[0]:
                losses.append(None)
            else:
                losses.append(float(np.interp(end, table[budget], table["val_loss"])))
        found[budget] = (end, losses)
    return found


def _means(values: Column, ends: npt.NDArray[np.int64]) -> Column:
    """The mean of each part, without gaps in it."""
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), ends[:-1])
    counts = np.add.reduceat(known, ends[:-1], dtype=np.float64)
    means: Column = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def _numbers(values: Column) -> list[float | None]:
    rounded = (float(f"{value:.6g}") for value in values.tolist())
    return [(int(value) if value.is_integer() else value) if is_number(value) else None for value in rounded]
