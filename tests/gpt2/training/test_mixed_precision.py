import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from gpt2.config import END_OF_TEXT
from gpt2.model.transformer import GPT, GPTConfig
from gpt2.training.mixed_precision import CompileError, MixedPrecisionModel, _choose_cache
from tests.conftest import ROOT, TINY, needs_compiler

SMALL = GPTConfig(block_size=32, vocab_size=1000, n_layer=2, n_head=2, n_embd=64)
DOCUMENTS = replace(SMALL, vocab_size=50257)


def batch(config, size=(16, 32)):
    generator = torch.Generator().manual_seed(1)
    draw = (torch.randint(0, config.vocab_size, size, generator=generator) for _ in range(2))
    return tuple(draw)


def model_of(config):
    torch.manual_seed(3)
    return GPT(config)


def plain(config, inputs, targets, precision=torch.float32):
    """Loss and gradients of the model as it stands, with whole logits, in fp32."""
    model = model_of(config)
    _, loss = model(inputs, targets)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def gradients(compute, inputs, targets, parts=1):
    compute.cast_weights()
    losses = []
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        loss = compute.loss(x, y) / parts
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {name: p.grad for name, p in compute.master.named_parameters()}


def worst_error(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(g.dtype == torch.float32 for g in ours.values())
    # the bias of the keys has no gradient but rounding: it shifts all scores of a token alike
    return max(((ours[n] - theirs[n]).norm() / (theirs[n].norm() + 1e-3)).item() for n in ours)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 0.03), (torch.float16, 3e-4, 0.01)],
)
def test_every_dtype_matches_loss_and_gradients_of_plain_fp32(
    precision, loss_tolerance, gradient_tolerance, checkpointing
):
    inputs, targets = batch(SMALL)
    loss, expected = plain(SMALL, inputs, targets)
    compute = MixedPrecisionModel(model_of(SMALL), precision, gradient_checkpointing=checkpointing)
    for parts in (1, 4):
        compute.master.zero_grad()
        ours, found = gradients(compute, inputs, targets, parts)
        assert ours == pytest.approx(loss, rel=loss_tolerance)
        assert worst_error(found, expected) < gradient_tolerance


def documents(size=(16, 32)):
    """Inputs with a border of documents every nine tokens or so, and their targets."""
    tokens = torch.randint(0, 1000, (size[0], size[1] + 1), generator=torch.Generator().manual_seed(5))
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(6)) < 1 / 9] = END_OF_TEXT
    return tokens[:, :-1], tokens[:, 1:]


def masked(config, precision, **options):
    model = model_of(config)
    model.mask_documents = True
    return MixedPrecisionModel(model, precision, **options)


def one_by_one(config, inputs, targets):
    """Loss and gradients if each document of each window is computed alone."""
    model, total = model_of(config), 0.0
    for row, row_targets in zip(inputs, targets, strict=True):
        borders = [0, *(row == END_OF_TEXT).nonzero().flatten().tolist(), len(row)]
        for begin, end in pairwise(borders):
            if begin < end:
                embedded = model.embed(row[None, begin:end], torch.arange(begin, end)[None])
                logits = model.lm_head(model.blocks(embedded))[0]
                total = total + F.cross_entropy(logits, row_targets[begin:end], reduction="sum")
    loss = total / targets.numel()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "gradient_tolerance"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 0.03)]
)
def test_masked_documents_train_as_if_each_were_alone(precision, loss_tolerance, gradient_tolerance, checkpointing):
    inputs, targets = documents()
    loss, expected = one_by_one(DOCUMENTS, inputs, targets)
    compute = masked(DOCUMENTS, precision, gradient_checkpointing=checkpointing)
    ours, found = gradients(compute, inputs, targets)
    assert ours == pytest.approx(loss, rel=loss_tolerance)
    assert worst_error(found, expected) < gradient_tolerance


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [32, 300])  # with bf16 on a CPU, attention over more than 256 tokens is PyTorch's
def test_masked_documents_compile(precision, length):
    config = replace(DOCUMENTS, block_size=length)
    inputs, targets = documents((2, length))
    loss, expected = one_by_one(config, inputs, targets)
    compute = masked(config, precision)
    compute.compile(*inputs.shape)
    ours, found = gradients(compute, inputs, targets)
    assert ours == pytest.approx(loss, rel=1e-5 if precision == torch.float32 else 2e-3)
    assert worst_error(found, expected) < (1e-4 if precision == torch.float32 else 0.03)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def compiled(request):
    """A compiled model that computes with two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    compute = MixedPrecisionModel(model_of(SMALL), request.param)
    before = {name: p.clone() for name, p in compute.master.named_parameters()}
    assert compute.compile(*batch(SMALL)[0].shape) > 0
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in compute.master.named_parameters())
    yield compute
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.slow
def test_compiled_matches_loss_and_gradients_of_plain_fp32(compiled):
    loss_tolerance, gradient_tolerance = (2e-3, 0.03) if compiled.compute is not compiled.master else (1e-6, 1e-5)
    inputs, targets = batch(SMALL)
    loss, expected = plain(SMALL, inputs, targets)
    compiled.master.zero_grad()
    ours, found = gradients(compiled, inputs, targets)
    assert ours == pytest.approx(loss, rel=loss_tolerance)
    assert worst_error(found, expected) < gradient_tolerance
    with torch.no_grad():
        assert compiled.loss(inputs, targets).item() == pytest.approx(loss, rel=loss_tolerance)
        other = compiled.loss(inputs[:1, :9], targets[:1, :9]).item()  # a shape that was not compiled for
        eager = compiled.compute(inputs[:1, :9], targets[:1, :9])[1].item()
        assert other == pytest.approx(eager, rel=loss_tolerance)


@needs_compiler
@pytest.mark.slow
def test_compiled_gradients_are_deterministic(compiled):
    shape = batch(SMALL)[0].shape
    inputs, targets = torch.randint(0, 5, (2, *shape))  # many of each token, so that threads meet in its gradient
    seen = []
    for _ in range(20):
        compiled.master.zero_grad()
        compiled.loss(inputs, targets).backward()
        seen.append(torch.cat([p.grad.flatten() for p in compiled.master.parameters()]))
    assert all(torch.equal(each, seen[0]) for each in seen)


@needs_compiler
@pytest.mark.slow
def test_all_blocks_share_one_graph_and_evaluation_uses_it_too():
    from torch._dynamo.utils import counters  # takes seconds to import

    torch._dynamo.reset()
    counters.clear()
    inputs, targets = batch(SMALL)
    compute = MixedPrecisionModel(model_of(replace(SMALL, n_layer=5)), torch.float32, gradient_checkpointing=True)
    compute.compile(*inputs.shape)
    assert counters["stats"]["unique_graphs"] == 1 + 2  # a block; the head has two kernels in fp32
    plain_model = MixedPrecisionModel(model_of(replace(SMALL, n_layer=5)), torch.float32)
    expected, gradients_expected = gradients(plain_model, inputs, targets)
    loss, found = gradients(compute, inputs, targets)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert worst_error(found, gradients_expected) < 1e-5
    with torch.no_grad():
        evaluated = compute.loss(inputs, targets)
    assert evaluated.item() == pytest.approx(expected, rel=1e-6)
    assert not evaluated.requires_grad


@needs_compiler
@pytest.mark.slow
def test_the_backward_pass_recomputes_what_is_cheap_and_stores_the_rest():
    config = replace(SMALL, n_layer=1)
    inputs, _ = batch(config)
    compute = MixedPrecisionModel(model_of(config), torch.float32)
    compute.compile(*inputs.shape)
    weights, sizes = {p.data_ptr() for p in compute.master.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(*inputs.shape, config.n_embd, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute.compute.transformer["h"][0](x)
    widths = sum(sizes.values()) / (4 * x.numel())
    # input, queries, keys, values, attention before and after its projection, MLP before GELU (4); a few numbers
    assert 10 <= widths < 11


@pytest.mark.parametrize("chosen", ["mine", "torch's", None])
def test_compiled_kernels_outlive_the_temporary_folder(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "mine" if chosen == "mine" else default_cache_dir()  # torch sets its own, once imported
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    if not chosen:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    _choose_cache()
    _choose_cache()
    folder = tmp_path / "mine" if chosen == "mine" else tmp_path / "home/gpt2/torch"
    name = torch.backends.cpu.get_cpu_capability().lower()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / name)


def test_a_cache_that_cannot_be_written_is_a_compile_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    with pytest.raises(CompileError, match="Not a directory"):
        MixedPrecisionModel(model_of(SMALL), torch.float32).compile(2, 8)


def test_without_a_compiler_the_model_stays_uncompiled(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

    inputs, targets = batch(SMALL)
    compute = MixedPrecisionModel(model_of(SMALL), torch.float32)
    expected = compute.loss(inputs, targets).item()
    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    with pytest.raises(CompileError, match=r"^InvalidCxxCompiler: No working C\+\+ compiler found$"):
        compute.compile(*inputs.shape)
    assert not compute.compiled
    assert compute.loss(inputs, targets).item() == expected
    assert all(p.grad is None for p in compute.master.parameters())


def test_compute_copies_follow_the_master_weights_and_share_layer_norm():
    compute = MixedPrecisionModel(model_of(TINY), torch.bfloat16)
    wide, narrow = compute.master, compute.compute
    assert narrow.lm_head.weight is narrow.transformer["wte"].weight  # still tied
    assert narrow.transformer["ln_f"].weight is wide.transformer["ln_f"].weight
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter += 1.0
    assert not torch.equal(narrow.lm_head.weight, wide.lm_head.weight.bfloat16())
    compute.cast_weights()
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert all(p.dtype == torch.float32 for p in wide.parameters())


def test_gradients_add_up_in_fp32():
    # 256 + 1 is 256 in bf16
    compute = MixedPrecisionModel(model_of(TINY), torch.bfloat16)
    narrow = compute.compute.transformer["wpe"].weight
    for value in (256.0, 1.0, 1.0):
        (narrow.float().sum() * value).backward()
    assert torch.all(compute.master.transformer["wpe"].weight.grad == 258.0)
    assert narrow.grad is None


@needs_compiler
@pytest.mark.slow
def test_kernels_of_another_instruction_set_are_not_reused(tmp_path):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has one instruction set")
    program = (
        "from tests.gpt2.training.test_mixed_precision import *\n"
        "inputs, targets = batch(SMALL)\n"
        "model = MixedPrecisionModel(model_of(SMALL), torch.float32)\n"
        "model.compile(*inputs.shape)\n"
        "print(model.loss(inputs, targets).item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    losses = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment | instruction_set,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for instruction_set in ({}, {"ATEN_CPU_CAPABILITY": "default"}, {})
    ]
    assert [float(loss) for loss in losses] == pytest.approx([float(losses[0])] * 3, rel=1e-5)
