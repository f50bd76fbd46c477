"""Checkpoints damaged in every way, the newest of three each time."""

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
    """Damages the newest checkpoint, perhaps by what belongs to an older one; says how."""
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
    """Each damage has to be recognised and named, and the older checkpoint taken; with both damaged, none."""
    session = Session(folder / "whole", max_steps=3)
    session.train()
    older, newest = (session.store.path(step) for step in session.store.steps())
    sound = {path: {file: file.read_bytes() for file in path.iterdir()} for path in (older, newest)}
    draw = random.Random(seed)
    result = Result("corrupted checkpoints recognised")
    for _ in range(cases):
        told = damage(draw, newest, older)
        warnings: list[str] = []
        content = session.store.load_newest(warnings.append)
        is_right = content is not None and content["state"]["step"] == 2
        is_told = len(warnings) == 1 and newest.name in warnings[0] and "\n" not in warnings[0]
        result.add(None if is_right and is_told else f"{told}: {warnings}")
        told += "; " + damage(draw, older)
        with suppress(FileError):
            session.store.load_newest(lambda _: None)
            result.failures.append(f"{told}: taken nevertheless")
        for path, files in sound.items():
            path.mkdir(exist_ok=True)
            for file, data in files.items():
                file.write_bytes(data)
    return result
