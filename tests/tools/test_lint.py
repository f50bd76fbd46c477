import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools.audit import audit_findings
from tools.lint import problems


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(data)",
        "import pickle as p\nfrom pickle import loads",
        "import joblib",
        "from dill import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "exec(code)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "YAML(typ='unsafe')",
        "yaml.load(text)",
    ],
)
def test_forbidden_code_is_found(source):
    assert list(problems(source, "x.py"))


def test_harmless_code_is_allowed():
    harmless = "import pickle\ntry: torch.load(path, weights_only=True)\nexcept pickle.UnpicklingError: model.eval()"
    assert list(problems(harmless, "x.py")) == []


def test_the_project_has_no_forbidden_code():
    done = subprocess.run([sys.executable, "-m", "tools.lint"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no pickles, no eval\n")


def test_findings_and_unaudited_packages_are_separate():
    packages = [
        {"name": "good", "version": "1", "vulns": []},
        {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]},
        {"name": "unknown", "skip_reason": "not found"},
    ]
    assert audit_findings(packages) == (["bad 2: CVE-1, fixed in 2.1; `make lock`"], ["unknown"])
