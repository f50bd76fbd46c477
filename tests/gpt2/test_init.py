import subprocess
import sys

import pytest

import gpt2
from tests.conftest import ROOT


@pytest.mark.parametrize("name", gpt2.__all__)
def test_the_public_names_are_there(name):
    assert getattr(gpt2, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpt2.nothing


@pytest.mark.parametrize("program", ["import gpt2", "import runpy; runpy.run_module('gpt2', run_name='__main__')"])
def test_torch_is_imported_only_when_it_is_needed(program):
    program = f"import sys; sys.argv = ['gpt2', '--help']\ntry: {program}\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
