"""README and docs: their Python runs, and the files that they name exist. Their commands are in test_commands.py."""

import json
import re
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML

from gpt2.files import write_json
from gpt2.hub.export import save_space_model
from gpt2.model.storage import save_weights
from gpt2.model.transformer import GPT
from tests.conftest import ROOT, TINY, our_text, tokenize, write_documents

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs write, and git ignores.
PRODUCED = ("data/", "models/", "dist/", "checkpoints/", "mlflow-outbox/")


def python_blocks():
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
        if "models:/" not in code  # it needs MLflow's registry: tests/stages/test_mlflow_model.py has one
    ]


@pytest.mark.parametrize("code", python_blocks())
def test_the_python_of_the_docs_runs(code, tmp_path):
    torch.manual_seed(0)
    model = GPT(TINY)
    (tmp_path / "models").mkdir()
    save_weights(model.state_dict(), tmp_path / "models/model.safetensors")
    write_json(tmp_path / "models/config.json", TINY.to_dict())
    (tmp_path / "dist/space").mkdir(parents=True)
    save_space_model(model, tmp_path / "dist/space")
    write_documents(tmp_path / "data", [our_text(50)])
    tokenize(tmp_path / "data")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def paths_in(text):
    """The files and folders that a text names in code: with a folder or an ending. {a,b} is both, <...> is anything."""
    for code in re.findall(r"`([^`\s]+)`", text):
        if re.fullmatch(r"\w[\w.<>{},*/-]+", code) and re.search(r"/|\.(py|md|yaml|json|csv|lock|svg)$", code):
            start, options, end = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", code).groups()
            yield from (f"{start}{option}{end}" for option in (options or "").split(","))


def is_named_rightly(path):
    """Whether a file or folder exists, or is one that runs produce. NAME is for the reader to choose."""
    if path.startswith("MyDrive/"):
        return True
    if path.startswith(PRODUCED):
        return f"/{path.partition('/')[0]}/" in (ROOT / ".gitignore").read_text().replace("/*", "/")
    if "NAME" in path:
        return (ROOT / path).parent.is_dir()
    return any(ROOT.glob(path))


@pytest.mark.parametrize(
    "page", ["architecture.md", "reliability.md", "space.md", "training.md", "index.md", "own-text.md"]
)
def test_each_file_that_the_docs_name_exists(page):
    paths = list(paths_in((ROOT / "docs" / page).read_text()))
    assert paths
    for path in paths:
        assert is_named_rightly(path), path


def test_a_file_that_is_not_there_is_noticed():
    text = "`tests/none.py`, `a/b`, `gpt2/{config,none}.py`, `models/x.json`, `stages/NAME.py` and `int8`"
    assert [path for path in paths_in(text) if not is_named_rightly(path)] == ["tests/none.py", "a/b", "gpt2/none.py"]


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
