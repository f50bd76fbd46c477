"""docs/coverage.md: the share of lines and branches that the tests run, by package. Run by `make coverage`.

python -m tools.coverage
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

MEASURED = Path(".coverage.json")
PAGE = Path("docs/coverage.md")


def main() -> None:
    """Reads coverage.py's JSON report, writes the page."""
    files = json.loads(MEASURED.read_text(encoding="utf-8"))["files"]
    PAGE.write_text(page({name: file["summary"] for name, file in files.items()}), encoding="utf-8")


def page(summaries: dict[str, dict[str, Any]]) -> str:
    """The page, given coverage.py's summary of each file."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for name, summary in summaries.items():
        packages.setdefault(PurePosixPath(name).parent.as_posix(), []).append(summary)
    rows = [row(f"`{package}/`", packages[package]) for package in sorted(packages)]
    return "\n".join(
        [
            "# Coverage",
            "",
            "    make coverage     # runs the tests, with the processes that they start, and writes this page",
            "",
            "The share of statements and of branches that `make test` runs. `make coverage` fails below the",
            "`fail_under` of `pyproject.toml`. Processes that a test kills do not report what they ran. The tests in a",
            "browser need a Chromium.",
            "",
            "| package | statements | branches | statements and branches covered |",
            "|---|---:|---:|---:|",
            *rows,
            row("total", list(summaries.values())),
            "",
        ]
    )


def row(title: str, summaries: list[dict[str, Any]]) -> str:
    """A row of the table."""
    sums = {
        key: sum(summary[key] for summary in summaries)
        for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")
    }
    covered = sums["covered_lines"] + sums["covered_branches"]
    share = covered / max(1, sums["num_statements"] + sums["num_branches"])
    return f"| {title} | {sums['num_statements']:,} | {sums['num_branches']:,} | {share:.1%} |"


if __name__ == "__main__":
    main()
