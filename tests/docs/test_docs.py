"""README and docs: their Python runs, and their commands exist."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML

from gpt2.files import write_json
from gpt2.hub.export import save_space_model
from gpt2.model.storage import save_weights
from gpt2.model.transformer import GPT
from tests.conftest import ROOT, TINY

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that start with these words, and the test that runs them or their like.
COVERED = {
    "dvc repro": "tests/stages/test_pipeline.py",
    "dvc exp run": "tests/stages/test_pipeline.py",
    "dvc exp": "tests/stages/test_pipeline.py",
    "dvc queue": "tests/stages/test_pipeline.py",
    "dvc metrics": "tests/stages/test_pipeline.py",
    "dvc plots": "tests/stages/test_pipeline.py",
    "python -m gpt2 generate": "tests/gpt2/test_main.py",
    "python -m gpt2 info": "tests/gpt2/test_main.py",
    "python -m gpt2 publish": "tests/gpt2/hub/test_publish.py",
}


def python_blocks():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{number}")


def commands():
    """The shell commands in indented blocks, without their comments."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            if match := re.match(r"    ((?:make|dvc|python) .*)", line):
                for command in match[1].split(" && "):
                    yield page, shlex.split(command, comments=True)


@pytest.mark.parametrize("code", python_blocks())
def test_the_python_of_the_docs_runs(code, tmp_path):
    torch.manual_seed(0)
    model = GPT(TINY)
    (tmp_path / "models").mkdir()
    save_weights(model.state_dict(), tmp_path / "models/model.safetensors")
    write_json(tmp_path / "models/config.json", TINY.to_dict())
    (tmp_path / "dist/space").mkdir(parents=True)
    save_space_model(model, tmp_path / "dist/space")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_docs_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = list(commands())
    assert len(found) > 20
    for page, words in found:
        if words[0] == "make":
            assert words[1] in targets, (page, words)
        else:
            (test, *_) = [test for start, test in COVERED.items() if " ".join(words).startswith(start)] or [None]
            assert test is not None, (page, words)
            assert (ROOT / test).is_file(), test


def test_the_files_around_the_project_are_valid_and_name_what_there_is():
    yaml = YAML(typ="safe", pure=True)
    workflow = yaml.load(ROOT / ".github/workflows/test.yml")
    assert workflow["jobs"]["test"]["steps"][-1]["run"] == "bash .ci/run"
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.load(path).keys()
    (local,) = yaml.load(ROOT / ".pre-commit-config.yaml")["repos"]
    check = (ROOT / "Makefile").read_text()
    for hook in local["hooks"]:
        assert hook["entry"] in check, hook
    assert json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())["postCreateCommand"] == "make setup"
