"""The text of params.yaml with other values, and a comment on each; all else stays as it is."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2.errors import UserError

PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
"""Texts that YAML needs no quotes for."""
KEYWORDS = ("null", "true", "false", "yes", "no", "on", "off")
Changes = Mapping[tuple[str, str], tuple[Any, str]]
"""Values and comments by section and key. An empty comment keeps the one that is there."""


def with_changes(text: str, changes: Changes, header: list[str] | None = None) -> str:
    """A params file with other values. header: lines of comment, in place of those above the first section.

    Keys that the file does not have are left out: they are params of other versions.
    Raises UserError if a section is not written as in presets/, one line for each key.
    """
    lines = text.splitlines()
    if header is not None:
        first = next((i for i, line in enumerate(lines) if line and line[0] not in "# "), len(lines))
        lines = [*(f"# {line}" for line in header), "", *lines[first:]]
    for (section, key), (value, comment) in changes.items():
        _change(lines, section, key, value, comment)
    return "\n".join(lines) + "\n"


def _change(lines: list[str], section: str, key: str, value: Any, comment: str) -> None:
    if f"{section}:" not in lines:
        raise UserError(f"params.yaml has no line `{section}:`; begin with a preset: make preset NAME=laptop")
    place = lines.index(f"{section}:") + 1
    while place < len(lines) and (not lines[place] or lines[place][0] in " #"):
        if match := re.match(rf"( +){key}:", lines[place]):
            end = place + 1  # of a list, which goes on below
            while end < len(lines) and re.match(rf"{match[1]}[ -]", lines[end]):
                end += 1
            known = re.search(r" # (.*)", lines[place])
            comment = comment or (known[1] if known else "")
            lines[place:end] = [f"{match[1]}{key}: {as_yaml(value)}" + (f" # {comment}" if comment else "")]
            return
        place += 1


def as_yaml(value: Any) -> str:
    """A value as params.yaml has it: 6.0e-3, null, true, a text."""
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+") if 0 < value < 0.01 else repr(value)
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in KEYWORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def keep(path: Path) -> Path | None:
    """Copies a params file that is neither in git's last commit nor a preset. Returns the copy."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if any(content == preset.read_bytes() for preset in Path("presets").glob("*.yaml")):
        return None
    committed = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True)
    if committed.returncode == 0 and committed.stdout == content:
        return None
    number = 1
    while (copy := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    shutil.copyfile(path, copy)
    return copy
