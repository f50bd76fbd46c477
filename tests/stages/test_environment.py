import json
import subprocess
import sys

import pytest

from stages import environment
from tests.conftest import ROOT

HERE = {
    "commit": "abc",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "instruction_sets": ["avx2", "avx512f"],
    "threads": 2,
    "compiled": True,
}


def test_the_machine_is_described_without_torch_and_without_names():
    program = "import json, sys, stages.environment as e; print(json.dumps([e.machine(), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    machine, imports_torch = json.loads(done.stdout)
    assert not imports_torch
    assert machine.keys() == environment.machine().keys()
    assert machine["versions"]["torch"].startswith("2.")
    assert machine["cpu"]
    text = json.dumps(machine)
    assert "/" not in text.replace("N/A", "")  # no paths
    import getpass
    import socket

    for name in (getpass.getuser(), socket.gethostname()):
        assert f'"{name}' not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"commit": "def", "run_id": "1"}, []),
        ({"threads": 1}, ["threads 1 instead of 2"]),
        ({"versions": {"python": "3.11.7", "torch": "2.14.0"}}, ["torch 2.14.0 instead of 2.13.0"]),
        ({"instruction_sets": ["avx2", "amx_bf16"]}, ["instruction sets without avx512f, with amx_bf16"]),
        ({"new fact": 1}, []),
    ],
)
def test_differences_that_can_change_bits(changes, expected):
    assert environment.differences(HERE, {**HERE, **changes}) == expected


def test_a_run_that_goes_on_elsewhere_keeps_what_changed():
    assert environment.continued({}, HERE) == HERE
    assert environment.continued(HERE, HERE) == HERE
    second = environment.continued(HERE, {**HERE, "threads": 1})
    third = environment.continued(second, {**HERE, "threads": 4, "commit": "def"})
    assert second["changed"] == {"threads": [2, 1]}
    assert third == {**HERE, "threads": 4, "commit": "def", "changed": {"threads": [2, 1, 4]}}
