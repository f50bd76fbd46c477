"""`make check`: forbids code that executes the content of a file: pickle, eval and similar.

ruff has similar rules, but does not check the arguments of torch.load and numpy.load.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("gpt2", "stages", "experiments", "space", "benchmarks", "tools")
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "torch.hub.load"}
ALLOWED_OF_PICKLE = {"UnpicklingError"}


def problems(source: str, name: str) -> Iterator[str]:
    """One line for each forbidden import or call in a source text."""
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.partition(".")[0] in FORBIDDEN_MODULES:
                    yield f"{where}: import of {module}"
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                yield f"{where}: import from pickle"
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "pickle"
            and node.attr not in ALLOWED_OF_PICKLE
        ):
            yield f"{where}: pickle.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{where}: {problem}" for problem in problems_of_call(node))


def problems_of_call(node: ast.Call) -> Iterator[str]:
    """The reasons why a call is forbidden."""
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in FORBIDDEN_CALLS:
        yield f"{called}()"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if given.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    if given.get("shell", "False") != "False":
        yield "shell"
    if given.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"
    if called == "YAML" and given.get("typ") not in ("'safe'", None):
        yield "an unsafe YAML"


def main() -> int:
    """Returns the exit code: 1 if there are problems."""
    found = [
        problem
        for package in PACKAGES
        for path in sorted(Path(package).rglob("*.py"))
        for problem in problems(path.read_text(encoding="utf-8"), str(path))
    ]
    print("\n".join(found) or "no pickles, no eval")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
