import os
from contextlib import suppress

import numpy as np
import pytest

from benchmarks.generation import contenders, llama_cpp, openvino, peers
from gpt2.config import PRESETS
from gpt2.evaluation.scores import score
from gpt2.model.storage import load_folder
from tests.conftest import TINY

PROMPT = [5, 17, 300]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.device.configure_device", lambda device: None)  # it changes the allocator of this process
    monkeypatch.setitem(PRESETS, "gpt2", TINY)
    contenders.prepare(tmp_path)
    return tmp_path


def test_all_contenders_generate_the_same_tokens(prepared):
    ours = contenders.ours(prepared, "fp32")
    expected = peers.transformers(prepared, "float32").generate(PROMPT, 2, 6)
    assert ours.generate(PROMPT, 2, 6) == expected
    assert [token.id for token in ours.stream(PROMPT, 6)] == expected[0]


def test_llama_cpp_generates_the_same_tokens_for_one_text_and_for_several(prepared):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    expected = contenders.ours(prepared, "fp32").generate(PROMPT, 2, 6)
    theirs = peers.llama_cpp(prepared, "f32")
    assert theirs.generate(PROMPT, 2, 6) == expected
    assert theirs.generate(PROMPT, 1, 6) == expected[:1]
    assert [ids for (ids,) in theirs.stream(PROMPT, 6)] == expected[0]


def test_openvino_generates_the_same_tokens(prepared):
    pytest.importorskip("openvino")
    expected = contenders.ours(prepared, "fp32").generate(PROMPT, 2, 6)
    theirs = peers.openvino(prepared, "fp32")
    assert theirs.generate(PROMPT, 2, 6) == expected
    assert theirs.generate(PROMPT, 1, 6) == expected[:1]  # the KV cache starts empty again
    assert theirs.facts["weight_bytes"] == pytest.approx(4 * contenders.matrix_weights(prepared), rel=0.05)


def test_openvino_runs_with_each_setting_or_says_that_it_cannot(prepared):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    for precision in ("int8", "int8, bf16 hint", "bf16, not fused"):
        with suppress(RuntimeError):  # a CPU without bf16
            model = peers.openvino(prepared, precision)
            assert [len(ids) for ids in model.generate(PROMPT, 2, 3)] == [3, 3]
            assert model.facts["weight_bytes"] < 2.2 * contenders.matrix_weights(prepared)


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16, not fused", False)])
def test_openvino_fuses_attention_and_kv_cache(prepared, precision, fused):
    pytest.importorskip("openvino")
    compiled = openvino.Decoder(load_folder(prepared), precision).request.get_compiled_model()
    types = {op.get_rt_info()["layerType"].value for op in compiled.get_runtime_model().get_ops()}
    assert ("ScaledDotProductAttention" in types) == fused


def test_all_contenders_can_be_made():
    assert {kind for kind, _ in contenders.CONTENDERS.values()} == contenders.MAKERS.keys()
    assert {precision for kind, precision in contenders.CONTENDERS.values() if kind == "openvino"} == {
        *openvino.SETTINGS
    }


def test_llama_cpp_with_blas_needs_a_folder_with_blas(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv(peers.BLAS, raising=False)
    with pytest.raises(RuntimeError, match="LLAMA_CPP_BLAS"):
        peers.llama_cpp_with_blas(prepared, "f32")
    monkeypatch.setenv(peers.BLAS, str(tmp_path))
    with pytest.raises(RuntimeError, match="libggml-blas"):
        peers.llama_cpp_with_blas(prepared, "f32")


def test_llama_cpp_with_blas_loads_the_libraries_of_that_folder(prepared, tmp_path, monkeypatch):
    (tmp_path / "libggml-blas.so").touch()
    monkeypatch.setenv(peers.BLAS, str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/another")

    def load(folder, precision):
        return peers.Model(lambda *_: [], facts={"version": os.environ["LLAMA_CPP_LIB_PATH"]})

    monkeypatch.setattr(peers, "llama_cpp", load)
    assert peers.llama_cpp_with_blas(prepared, "f32").facts["version"] == f"{tmp_path} with BLAS"


def test_the_products_of_as_many_tokens_are_timed():
    done = []
    assert contenders.seconds_of_products(lambda: done.append(1)) > 0
    assert len(done) == 2 * contenders.AROUND


def test_the_baseline_loop_generates_all_tokens(prepared):
    model = peers.loop(prepared, "float32")
    assert len(model.generate([1, 2], 1, 4)[0]) == 4
    assert not model.batched


def test_weights_are_counted_once(prepared, tiny_model):
    linear = sum(p.numel() for name, p in tiny_model.named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert contenders.matrix_weights(prepared) == linear


def test_the_speed_at_a_position_leaves_out_the_prompt(monkeypatch):
    now_s = [0.0]

    def stream(prompt, tokens):
        for number in range(tokens):
            now_s[0] += 0.5 if number else 100  # the first takes the prefill
            yield number

    monkeypatch.setattr(contenders.time, "perf_counter", lambda: now_s[0])
    assert contenders.seconds_around(stream, [1, 2]) == 0.5 * 2 * contenders.AROUND


def test_the_loss_is_that_of_the_evaluation(prepared, tiny_model):
    tokens = np.arange(1, 80, dtype=np.uint16)
    expected = score(tiny_model, tokens, sequence_length=TINY.block_size, batch_size=1).loss
    tokens.tofile(prepared / "tokens.bin")
    assert contenders.trained_loss(contenders.our_loss, prepared, "fp32") == pytest.approx(expected)


def test_llama_cpp_has_the_same_loss(prepared, tiny_model):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    tokens = np.arange(1, 80, dtype=np.uint16)
    expected = contenders.our_loss(prepared, "fp32", tokens, TINY.block_size)
    assert llama_cpp.loss(prepared, "f32", tokens, TINY.block_size) == pytest.approx(expected, abs=1e-4)
