import pytest
import torch
import torch.nn.functional as F

from gpt2.training import loss
from gpt2.training.loss import linear_cross_entropy

V, C = 301, 24


def example(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (n,), generator=generator)


def reference(hidden, weight, targets, label_smoothing=0.0):
    """The plain formula in fp64, with its gradients."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    value = F.cross_entropy(h @ w.t(), targets, label_smoothing=label_smoothing)
    value.backward()
    return value.item(), h.grad, w.grad


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 8, 21])  # less than a chunk, one, several and a rest
@pytest.mark.parametrize(  # 4 units of bf16's last place, and of fp16's
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)]
)
def test_loss_and_gradients_match_the_plain_formula(n, label_smoothing, dtype, tolerance):
    hidden, weight, targets = example(n, dtype)
    value, hidden_grad, weight_grad = reference(hidden, weight, targets, label_smoothing)
    ours = linear_cross_entropy(hidden, weight, targets, label_smoothing=label_smoothing)
    (3 * ours).backward()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(value, rel=tolerance)
    assert relative_error(hidden.grad / 3, hidden_grad) < tolerance
    assert relative_error(weight.grad / 3, weight_grad) < tolerance


def test_an_almost_certain_token_keeps_its_small_gradient():
    # softmax - 1 near 1 would be 0 or 2^-8 in bf16
    hidden, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.bfloat16)
    weight[0] = 8.0
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    _, expected, _ = reference(hidden, weight, torch.tensor([0]))
    assert hidden.grad.item() == pytest.approx(expected.item(), rel=0.01)


def test_without_gradients_the_loss_is_the_same_and_nothing_is_stored():
    hidden, weight, targets = example(21)
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    assert value.item() == linear_cross_entropy(hidden, weight, targets).item()


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    widest = 0

    def spy_on(kernel):
        def spy(logits):
            nonlocal widest
            widest = max(widest, logits.size(0))
            return kernel(logits)

        return spy

    monkeypatch.setattr(loss, "KERNELS", (*map(spy_on, loss.KERNELS[:2]), *loss.KERNELS[2:]))
    hidden, weight, targets = example(100)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert widest == 8
    linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    assert widest == 8


def test_small_probabilities_of_a_large_batch_keep_their_gradient_in_fp16():
    # each is 1 / 16384, and the mean over 4096 tokens would make it 2^-26, which is 0 in fp16
    hidden = torch.ones(4096, 1, dtype=torch.float16)
    weight = torch.zeros(16384, 1, dtype=torch.float16).requires_grad_()
    (1024 * linear_cross_entropy(hidden, weight, torch.arange(4096) % 8)).backward()
    assert weight.grad[8:].flatten().tolist() == pytest.approx([1 / 16] * 16376, rel=0.01)
    assert weight.grad[0].item() == pytest.approx(1 / 16 - 128, rel=0.01)


def test_small_gradients_of_hidden_states_are_exact_in_fp16_after_loss_scaling():
    hidden = torch.zeros(4096, 1, dtype=torch.float16).requires_grad_()
    weight = torch.tensor([[0.01], [-0.005]], dtype=torch.float16)
    (4096 * linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64))).backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-0.0075] * 4096, rel=2e-3)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = example(4)
    value = linear_cross_entropy(hidden * 1e4, weight, targets)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(weight.grad).all()


def test_the_weights_gradient_is_summed_in_fp32_over_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)
    hidden, weight = torch.ones(600, 1, dtype=torch.bfloat16), torch.zeros(5, 1, dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.int64)).backward()
    # in bf16, a sum of equal numbers stops growing at 256 of them
    assert weight.grad.flatten().tolist() == pytest.approx([-0.8, 0.2, 0.2, 0.2, 0.2], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_label_smoothing_averages_logits_in_fp32(dtype):
    # each logit is exact in this dtype, and their mean of 80.2 is not
    hidden, weight = torch.ones(3, 1, dtype=dtype), torch.tensor([[80.0], [80.0], [80.0], [80.0], [81.0]], dtype=dtype)
    targets = torch.tensor([0, 1, 4])
    value, _, _ = reference(hidden, weight, targets, label_smoothing=0.5)
    assert linear_cross_entropy(hidden, weight, targets, label_smoothing=0.5).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("with_grad", "requires_grad"), [(False, True), (True, False)])
def test_gradients_are_not_computed_if_nothing_needs_them(monkeypatch, with_grad, requires_grad):
    def refuse(*_):
        raise AssertionError("a gradient is computed")

    log_sum_exp, *_, transposed = loss.KERNELS
    monkeypatch.setattr(loss, "KERNELS", (log_sum_exp, refuse, refuse, refuse, transposed))
    hidden, weight, targets = example(21)
    hidden.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    with torch.set_grad_enabled(with_grad):
        assert linear_cross_entropy(hidden, weight, targets).item() > 0


def test_a_frozen_head_gets_no_gradient_and_passes_on_the_same():
    trained, frozen = example(21), example(21)
    for hidden, weight, targets in (trained, frozen):
        weight.requires_grad_(weight is trained[1])
        linear_cross_entropy(hidden, weight, targets).backward()
    assert trained[1].grad is not None
    assert frozen[1].grad is None
    assert torch.equal(frozen[0].grad, trained[0].grad)


def test_a_loss_without_gradients_has_no_memory_for_them():
    hidden, weight, targets = (x.detach() for x in example(21))
    _, *gradients = loss._loss_and_gradients(hidden, weight, targets, 0.0, 1, False, with_gradients=False)
    assert [gradient.numel() for gradient in gradients] == [0, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernels_are_compiled_if_asked_for(monkeypatch, compiled):
    found = []
    monkeypatch.setattr(loss, "_compiled", lambda kernel: found.append(kernel) or kernel)
    hidden, weight, targets = example(21)
    options = {"compiled": True} if compiled else {}
    linear_cross_entropy(hidden, weight, targets, **options).backward()
    assert set(found) == (set(loss.KERNELS) if compiled else set())


def test_tensors_are_made_on_the_device_of_the_hidden_states():
    hidden, weight, targets = example(21)
    value, _, _ = reference(hidden, weight, targets, label_smoothing=0.1)
    with torch.device("meta"):  # another default device
        ours = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)
    assert ours.is_cpu
    assert ours.item() == pytest.approx(value, rel=1e-5)
