"""Failures of every call of the save protocol, in every way; then the same run again."""

import shutil
from pathlib import Path

from tests.faults.disk import KILLED, FaultyDisk
from tests.faults.result import Result
from tests.faults.small import forked, outcome_of, warm_up, whole_run

WAYS = ("kill", "lost data", "lost names", "ENOSPC", "EIO")


def calls_of_a_run(folder: Path) -> list[str]:
    """The calls of a run without faults, in order."""
    disk = FaultyDisk()

    def count() -> int:
        code = whole_run(folder, disk)()
        folder.with_suffix(".calls").write_text("\n".join(disk.calls))
        return code

    assert forked(count) == [0]
    return folder.with_suffix(".calls").read_text().split("\n")


def crash_points(folder: Path, first: int = 0, last: int | None = None) -> Result:
    """Injects failures into calls [first, last), one per case."""
    warm_up(folder / "warm")
    calls = calls_of_a_run(folder / "undisturbed")
    expected = outcome_of(folder / "undisturbed")
    result = Result("crash points of the save protocol")
    cases = [(number, way) for number in range(first, min(last or len(calls), len(calls))) for way in WAYS]
    for start in range(0, len(cases), 2):  # two at a time, for two cores
        pair = cases[start : start + 2]
        folders = [folder / f"{number}-{way.replace(' ', '-')}" for number, way in pair]
        runs = [whole_run(f, FaultyDisk(number, way)) for f, (number, way) in zip(folders, pair, strict=True)]
        first_codes = forked(*runs)
        second_codes = forked(*map(whole_run, folders))
        for (number, way), code, again, case in zip(pair, first_codes, second_codes, folders, strict=True):
            may_end = {KILLED} if way in WAYS[:3] else {0, 74}
            problem = None
            if code not in may_end:
                problem = f"ended with {code}"
            elif again != 0:
                problem = f"then could not continue: {again}"
            elif outcome_of(case) != expected:
                problem = "then ended with another result"
            result.add(problem and f"call {number} ({calls[number]}), {way}: {problem}")
            shutil.rmtree(case, ignore_errors=True)
    return result
