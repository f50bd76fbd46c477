import torch

from benchmarks import roofline
from gpt2.config import GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=100, n_layer=3, n_head=2, n_embd=16)


def test_the_flops_of_the_products_are_six_for_each_weight_and_token():
    parts = {part.name: part for part in roofline.parts_of(CONFIG, 2, 8, torch.float32)}
    flops = sum(parts[name].repeats * parts[name].flops for name in ("products of the blocks", "head and loss"))
    weights = CONFIG.n_layer * 12 * CONFIG.n_embd**2 + CONFIG.vocab_size * CONFIG.n_embd
    assert flops == 6 * weights * 2 * 8


def test_a_part_that_took_no_time_is_left_out_of_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "PICTURE", tmp_path / "roofline.png")
    rows = [
        {"part": "products of the blocks", "seconds": 1.0, "flops": 1e11, "bytes": 1e9},
        {"part": "between the products", "seconds": 0.0, "flops": 1e9, "bytes": 1e9},
    ]
    roofline.draw({"peak_flops": 2e11, "bandwidth": 1e10, "dtype": "float32", "cases": {"laptop": rows}})
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_the_bandwidth_is_that_of_a_sum_in_place(monkeypatch):
    runs = []

    def half_a_second(action):
        runs.append(action().sum())
        return 0.5

    monkeypatch.setattr(roofline, "SUMMED_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "seconds_of", half_a_second)
    assert roofline.bandwidth() == 3 * (1 << 20) / 0.5
    assert runs[-1] == len(runs) * (1 << 18)
