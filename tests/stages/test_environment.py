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
    "variables": {"ONEDNN_MAX_CPU_ISA": None},
    "gradient_checkpointing": False,
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
        ({"variables": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, ["ONEDNN_MAX_CPU_ISA AVX2 instead of unset"]),
        ({"gradient_checkpointing": True}, ["gradient checkpointing True instead of False"]),
        ({"new fact": 1}, []),
    ],
)
def test_differences_that_can_change_bits(changes, expected):
    assert environment.differences(HERE, {**HERE, **changes}) == expected


def test_the_compiler_matters_only_to_a_run_that_compiled():
    then, now = {**HERE, "compiler": "c++ 12"}, {**HERE, "compiler": None}
    assert environment.differences(then, now) == ["compiler unset instead of c++ 12"]
    assert environment.differences({**then, "compiled": False}, {**now, "compiled": False}) == []


def test_sessions_in_equal_environments_are_one():
    assert environment.continued([], HERE) == [HERE]
    later = {**HERE, "commit": "def"}
    assert environment.continued([HERE], later) == [later]
    elsewhere = {**HERE, "threads": 1}
    assert environment.continued([HERE], elsewhere) == [HERE, elsewhere]
    assert environment.continued([HERE, elsewhere], HERE) == [HERE, elsewhere, HERE]


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", "\xff"])
def test_a_damaged_file_is_noticed(content):
    with pytest.raises(ValueError):  # noqa: PT011 - any of JSON's messages
        environment.read_sessions(content)
    assert environment.read_sessions(json.dumps([HERE])) == [HERE]
