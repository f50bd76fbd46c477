import os
import shutil
import subprocess
import sys

import pytest
import torch

from gpt2.config import GPTConfig
from gpt2.inference.engine import Engine, generate
from gpt2.inference.quantization import quantize
from gpt2.inference.request import Request
from gpt2.kernels import library, linear
from gpt2.kernels.library import CompileError
from gpt2.model.transformer import GPT
from tests.conftest import ROOT, needs_compiler


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2_OPTIMIZE", raising=False)
    library.start_build.cache_clear()
    return tmp_path


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    return quantize(GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=128)), "int8")


def compiler(folder, script):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_pytorch_generates(fresh, quantized, monkeypatch):
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert not library.is_possible()
    engine = Engine(quantized)
    assert engine.path == "PyTorch: there is no compiler, or it is turned off"
    assert len(generate(engine, [Request([1], 5)])[0]) == 5
    with pytest.raises(CompileError, match="no C\\+\\+ compiler; install g\\+\\+ for faster generation"):
        library.compile_source(fresh / "decode.so")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'decode.cpp:1: error: no such thing' >&2; exit 1",
            "compiler failed: decode.cpp:1: error: no such thing",
        ),
        ("exit 0", "cannot be loaded"),  # it writes nothing
    ],
)
def test_a_compiler_that_fails_leaves_pytorch(fresh, quantized, monkeypatch, script, reason):
    monkeypatch.setenv("CXX", compiler(fresh, script))
    engine = Engine(quantized)
    assert engine.path == "PyTorch: the kernels are being compiled"
    assert not engine.wait_until_compiled(60)
    assert reason in engine.path
    assert not list((fresh / "cache" / "gpt2").glob("*.so"))
    assert len(generate(engine, [Request([1], 5)])[0]) == 5


def test_a_build_that_fails_beside_a_text_does_not_change_it(fresh, quantized, monkeypatch):
    (fresh / "cache").write_text("a file")  # nothing that is measured can be kept
    monkeypatch.setenv("CXX", compiler(fresh, "exit 1"))
    request = Request([1, 2, 3], 12, stop_token_ids=frozenset())
    monkeypatch.setattr(linear, "_fastest", lambda layers, names, rows: type(layers[0].kernel).__name__)
    (expected,) = generate(Engine(quantized, optimize=False), [request])
    engine = Engine(quantized)
    assert engine.path == "PyTorch: the kernels are being compiled"
    completion = engine.submit(request)
    while not completion._tokens:
        engine.step()
    assert not engine.wait_until_compiled(60)
    assert engine.path.startswith("PyTorch: ")
    assert [token.id for token in completion] == [token.id for token in expected]


def test_a_compiler_that_hangs_holds_nothing_up(fresh, quantized, monkeypatch):
    monkeypatch.setenv("CXX", compiler(fresh, "exec sleep 20"))
    engine = Engine(quantized)
    assert len(generate(engine, [Request([1], 5)])[0]) == 5
    assert engine.path == "PyTorch: the kernels are being compiled"


def test_a_damaged_library_leaves_pytorch(fresh, quantized):
    path = library.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    engine = Engine(quantized)
    assert "cannot be loaded" in engine.path
    assert len(generate(engine, [Request([1], 5)])[0]) == 5


def test_an_unwritable_cache_folder_leaves_pytorch(fresh, quantized):
    (fresh / "cache").write_text("a file")
    engine = Engine(quantized)
    assert not engine.wait_until_compiled(60)
    assert engine.path.startswith("PyTorch: ")
    assert len(generate(engine, [Request([1], 5)])[0]) == 5


def test_the_library_has_another_name_for_another_cpu_limit_or_source(monkeypatch, tmp_path):
    names = [library.library_path()]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    names.append(library.library_path())
    monkeypatch.setattr(library, "cpu_identity", lambda: "another")
    names.append(library.library_path())
    for name in (*library.SOURCES, *library.HEADERS):
        shutil.copytree(library.FOLDER, tmp_path / name)
        with open(tmp_path / name / name, "a") as file:
            file.write("// a line more")
        with monkeypatch.context() as patch:
            patch.setattr(library, "FOLDER", tmp_path / name)
            names.append(library.library_path())
    assert len(set(names)) == 3 + len(library.SOURCES) + len(library.HEADERS)


def test_the_switch_turns_it_off(fresh, quantized, monkeypatch):
    monkeypatch.setenv("GPT2_OPTIMIZE", "0")
    assert not library.is_possible()
    assert Engine(quantized).path.startswith("PyTorch")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    ],
)
def test_it_is_compiled_and_right_with_fewer_instruction_sets(fresh, limit):
    env = {**os.environ, **limit}
    done = subprocess.run([sys.executable, "-m", "gpt2.kernels"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # it has compared each dtype with PyTorch
    assert len(list((fresh / "cache" / "gpt2").glob("*.so"))) == 1
