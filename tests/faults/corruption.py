"""Corruption of the newest checkpoint."""

import random
import shutil
from contextlib import suppress
from pathlib import Path

from gpt2.errors import FileError
from gpt2.files import MANIFEST_FILE
from gpt2.training.checkpoints import CHECKPOINT_FILE
from tests.faults.result import Result
from tests.faults.small import Session

ALONE = ("flip", "flip", "flip", "truncate", "zero", "extend", "missing", "empty")
WITH_ANOTHER = ("swap", "mix")


def damage(draw: random.Random, newest: Path, older: Path | None = None) -> str:
    """Damages the newest checkpoint, perhaps with files of an older one. Returns a description."""
    file = newest / draw.choice([CHECKPOINT_FILE, CHECKPOINT_FILE, MANIFEST_FILE])
    data = bytearray(file.read_bytes())
    way = draw.choice((*ALONE, *WITH_ANOTHER) if older else ALONE)
    place = draw.randrange(len(data))
    match way:
        case "flip":
            data[place] ^= 1 << draw.randrange(8)
        case "truncate":
            del data[place:]
        case "zero":
            end = min(len(data), place + draw.randrange(1, 5000))
            if not any(data[place:end]):
                data[place] = 1
            else:
                data[place:end] = bytes(end - place)
        case "extend":
            data += draw.randbytes(draw.randrange(1, 100))
        case "swap":  # the whole checkpoint is that of another step
            for name in (CHECKPOINT_FILE, MANIFEST_FILE):
                shutil.copyfile(older / name, newest / name)
            return "swap"
        case "mix":  # one file is that of another step
            data = bytearray((older / file.name).read_bytes())
        case "missing":
            file.unlink()
            return f"{file.name} missing"
        case "empty":
            data = bytearray()
    file.write_bytes(data)
    return f"{file.name}: {way} at {place}"


def corruption(folder: Path, cases: int, seed: int = 0) -> Result:
    """The store must report each damage and load the older checkpoint; if both are damaged, it must raise."""
    session = Session(folder / "whole", max_steps=3)
    session.train()
    older, newest = (session.store.path(step) for step in session.store.steps())
    intact = {path: {file: file.read_bytes() for file in path.iterdir()} for path in (older, newest)}
    draw = random.Random(seed)
    result = Result("corrupted checkpoints detected")
    for _ in range(cases):
        description = damage(draw, newest, older)
        warnings: list[str] = []
        content = session.store.load_newest(warnings.append)
        is_right = content is not None and content["state"]["step"] == 2
        is_reported = len(warnings) == 1 and newest.name in warnings[0] and "\n" not in warnings[0]
        result.add(None if is_right and is_reported else f"{description}: {warnings}")
        description += "; " + damage(draw, older)
        with suppress(FileError):
            session.store.load_newest(lambda _: None)
            result.failures.append(f"{description}: loaded nevertheless")
        for path, files in intact.items():
            path.mkdir(exist_ok=True)
            for file, data in files.items():
                file.write_bytes(data)
    return result
