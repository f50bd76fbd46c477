"""What tests share: a text of our own, tiny configurations, and a model that fits into milliseconds."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from gpt2.config import GPTConfig, TokenizeConfig, TrainConfig
from gpt2.model.transformer import GPT

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job, and so in all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["GPT2_OPTIMIZE"] = "0"  # tests that measure or compile turn it on, with a cache folder of their own
settings.register_profile("no deadline", deadline=None)  # the first example may load the tokenizer
settings.load_profile("no deadline")
ROOT = Path(__file__).parent.parent
TINY = GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
TINY_TRAIN = TrainConfig(
    init_from="scratch",
    freeze_layers=0,
    seed=7,
    batch_size=4,
    sequence_length=16,
    gradient_accumulation_steps=2,
    max_steps=6,
    optimizer="adamw",
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    muon_learning_rate=2e-2,
    schedule="cosine",
    warmup_steps=2,
    decay_fraction=0.4,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    max_grad_norm=1.0,
    label_smoothing=0.0,
    dropout=0.0,
    mask_documents=False,
    min_token_count=0,
    eval_interval=3,
    patience=None,
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
SUBJECTS = [
    "The miller",
    "A grey heron",
    "My aunt",
    "The last train",
    "Nobody",
    "The lamp",
    "Old Tobias",
    "Every clock",
]
VERBS = ["forgets", "counts", "carries", "mends", "follows", "hides", "remembers", "paints"]
OBJECTS = ["the river", "seven spoons", "a letter", "the long road", "its shadow", "the winter", "a song", "the key"]
ENDINGS = ["before dawn", "again and again", "without a word", "in the rain", "for no reason", "on Sundays"]


def our_text(sentences: int, seed: int = 0) -> str:
    """Some English, always the same."""
    draw = random.Random(seed)
    parts = []
    for number in range(1, sentences + 1):
        words = [draw.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDINGS)]
        parts.append(" ".join(words) + (".\n\n" if number % 5 == 0 else ". "))
    return "".join(parts)


def write_documents(folder: Path, texts: list[str]) -> None:
    """corpus.txt and documents.bin, as the fetch stage writes them."""
    from gpt2.data.documents import DOCUMENT_TYPE, hash_of, new_hash

    folder.mkdir(exist_ok=True)
    data = [text.encode() for text in texts]
    records = np.zeros(len(data), dtype=DOCUMENT_TYPE)
    records["end"] = np.cumsum([len(each) for each in data])
    for record, each in zip(records, data, strict=True):
        digest = new_hash()
        digest.update(each)
        record["hash"] = hash_of(digest)
    (folder / "corpus.txt").write_bytes(b"".join(data))
    (folder / "documents.bin").write_bytes(records.tobytes())


def tokenize(
    folder: Path, fraction: float = 0.1, *, split: Any = "tail", deduplicate: bool = False, **options: Any
) -> Any:
    """Writes the token files of the documents in a folder to `tokens` in it; returns their index."""
    from gpt2.data.tokenizing.shards import write_tokens

    return write_tokens(
        folder / "corpus.txt",
        folder / "documents.bin",
        folder / "tokens",
        TokenizeConfig(fraction, split, deduplicate),
        partial=folder / "tokens.partial",
        **options,
    )


# Two processes take one file at a time. The longest ones come first, so that both end at about the same time.
LONGEST_FIRST = (
    "tests/stages/test_pipeline.py",
    "tests/faults/test_commands.py",
    "tests/gpt2/training/test_trainer.py",
    "tests/gpt2/training/test_mixed_precision.py",
    "tests/stages/test_tracking.py",
    "tests/faults/test_small.py",
    "tests/space/test_served.py",
    "tests/space/test_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    assert all(path.is_file() for path in ranks)
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def text() -> str:
    return our_text(600)


@pytest.fixture
def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY).eval()


@pytest.fixture
def train_config() -> Callable[..., TrainConfig]:
    return lambda **changes: replace(TINY_TRAIN, **changes)


@pytest.fixture
def tokens(tmp_path: Path, text: str) -> Path:
    """A folder with the token files of our text."""
    write_documents(tmp_path, [text])
    tokenize(tmp_path)
    return tmp_path / "tokens"


class NeverStops:
    """In the place of `stages.process.StopSignal`, which takes over the process's signals."""

    def __bool__(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def exit_immediately(self) -> Any:
        return nullcontext()

    def wrap(self, progress: Any) -> Any:
        return progress


@pytest.fixture
def never_stops() -> NeverStops:
    return NeverStops()


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: Any) -> None:
    """No test reports to the developer's own MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
