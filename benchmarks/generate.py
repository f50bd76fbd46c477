"""Tokens/s and time to first token of GPT-2 124M: ours in each dtype, and other implementations, side by side.

    python -m benchmarks.generate                   about a quarter of an hour on two cores
    python -m benchmarks.generate --only ours       some of the contenders; the others keep their results

All use the same random weights, the same prompt and greedy decoding. Each runs ROUNDS times in its own process, in
turns; the best result counts. Peers that are not installed are skipped: pip install ctranslate2 gguf llama-cpp-python
(the last one needs a C++ compiler). The baseline is the generation loop of the original project's Space, without a
KV cache. Writes reports/benchmarks/generate.{json,md,png}.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPORT = Path("reports/benchmarks")
ROUNDS = 2
PROMPT = list(range(100, 116))
LONG_PROMPT = 512
TASKS = {
    "1 x 100": (1, 100),
    "1 x 400": (1, 400),
    "8 x 100": (8, 100),
    "8 x 400": (8, 400),
}
FIRST = f"time to first token after {LONG_PROMPT}, ms"
CONTENDERS = {
    "ours, fp32": ("ours", "fp32"),
    "ours, bf16": ("ours", "bf16"),
    "ours, int8": ("ours", "int8"),
    "Transformers, fp32": ("transformers", "float32"),
    "Transformers, bf16": ("transformers", "bfloat16"),
    "CTranslate2, fp32": ("ctranslate2", "float32"),
    "CTranslate2, int8": ("ctranslate2", "int8"),
    "llama.cpp, f32": ("llama_cpp", "f32"),
    "llama.cpp, bf16": ("llama_cpp", "bf16"),
    "llama.cpp, q8_0": ("llama_cpp", "q8_0"),
    "baseline loop, fp32": ("loop", "float32"),
}
Generate = Callable[[list[int], int, int], Any]
"""Arguments: a prompt, a batch size, and a number of tokens per sequence."""


def main() -> None:
    """Runs the contenders, or a single one in a worker process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contenders with this in their name")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(*arguments.worker)))
        return
    path = REPORT / "generate.json"
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    names = [name for name in CONTENDERS if arguments.only in name]
    results: dict[str, dict[str, float]] = {name: known[name] for name in known if name not in names}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for round_ in range(ROUNDS):
            for name in names:
                command = [sys.executable, "-m", "benchmarks.generate", "--worker", name, place]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    reason = (done.stderr.strip() or "no output").splitlines()[-1]
                    print(f"{name}: skipped ({reason}, exit code {done.returncode})", flush=True)
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                best = results.setdefault(name, {})
                for task, value in found.items():
                    choose = min if task == FIRST else max
                    best[task] = choose(best.get(task, value), value) if round_ else value
                print(name, {task: round(value, 1) for task, value in found.items()}, flush=True)
            report({name: results[name] for name in CONTENDERS if name in results})


def report(results: dict[str, dict[str, float]]) -> None:
    """Writes the results so far."""
    import torch

    from gpt2.device import device_name

    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    content = {"machine": machine, "results": results}
    (REPORT / "generate.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_table(machine, results)
    draw(results)


def prepare(folder: Path) -> None:
    """Writes the weights that all contenders load."""
    import torch

    from gpt2.config import PRESETS
    from gpt2.hub.export import save_pretrained
    from gpt2.model.storage import save_weights
    from gpt2.model.transformer import GPT

    torch.manual_seed(0)
    model = GPT(PRESETS["gpt2"])
    (folder / "hf").mkdir()
    save_pretrained(model, folder / "hf")
    save_weights(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")


def work(name: str, place: str) -> dict[str, float]:
    """The results of one contender."""
    kind, precision = CONTENDERS[name]
    generate, batched = MAKERS[kind](Path(place), precision)
    long_prompt = [(7919 * i) % 50_000 for i in range(LONG_PROMPT)]
    found = {}
    for task, (batch, tokens) in TASKS.items():
        if (batch > 1 and not batched) or (kind == "loop" and tokens > 100):
            continue
        generate(PROMPT, batch, 8)
        found[task] = batch * tokens / fastest(lambda batch=batch, tokens=tokens: generate(PROMPT, batch, tokens))  # type: ignore[misc]
    found[FIRST] = 1000 * fastest(lambda: generate(long_prompt, 1, 1))
    return found


def fastest(action: Callable[[], Any]) -> float:
    """Seconds, the best of up to five runs in about five seconds."""
    seconds: list[float] = []
    while sum(seconds) < 5 and len(seconds) < 5:
        start_s = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)


def ours(folder: Path, precision: str) -> tuple[Generate, bool]:
    """Our engine."""
    import torch

    from gpt2 import device
    from gpt2.inference import engine as inference
    from gpt2.inference.quantization import quantize
    from gpt2.inference.request import Request, Sampling
    from gpt2.model.storage import load_folder

    device.configure_device(torch.device("cpu"))
    engine = inference.Engine(quantize(load_folder(folder), precision), slots=8)

    def generate(prompt: list[int], batch: int, tokens: int) -> Any:
        request = Request(prompt, tokens, Sampling(temperature=0), stop_token_ids=frozenset())
        generated = inference.generate(engine, [request] * batch)
        assert [len(each) for each in generated] == [tokens] * batch
        return generated

    return generate, True


def transformers(folder: Path, precision: str) -> tuple[Generate, bool]:
    """`generate` of Hugging Face's Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"), dtype=getattr(torch, precision))

    def generate(prompt: list[int], batch: int, tokens: int) -> Any:
        idx = torch.tensor([prompt] * batch)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return model.generate(idx, attention_mask=torch.ones_like(idx), **options)

    return generate, True


def ctranslate2(folder: Path, precision: str) -> tuple[Generate, bool]:
    """OpenNMT's CTranslate2."""
    import ctranslate2 as ct2
    import torch
    from ctranslate2.converters import TransformersConverter

    from gpt2.tokenizer import vocabulary_files

    if not (folder / "ct2").is_dir():
        TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    threads = torch.get_num_threads()
    model = ct2.Generator(str(folder / "ct2"), compute_type=precision, intra_threads=threads, inter_threads=1)
    names = {i: name for name, i in json.loads(vocabulary_files()[1].read_text(encoding="utf-8")).items()}

    def generate(prompt: list[int], batch: int, tokens: int) -> Any:
        prompts = [[names[i] for i in prompt]] * batch
        options = {"max_length": tokens, "min_length": tokens, "beam_size": 1, "sampling_topk": 1}
        return model.generate_batch(prompts, include_prompt_in_result=False, **options)

    return generate, True


def llama_cpp(folder: Path, precision: str) -> tuple[Generate, bool]:
    """llama.cpp, through llama-cpp-python, which processes one request at a time."""
    import numpy as np
    import torch
    from llama_cpp import Llama

    path = folder / f"{precision}.gguf"
    if not path.is_file():
        write_gguf(folder, path, precision)
    threads = torch.get_num_threads()
    options = {"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 1024, "n_threads": threads, "n_threads_batch": threads}
    model = Llama(str(path), verbose=False, **options)

    def generate(prompt: list[int], batch: int, tokens: int) -> Any:
        model.reset()
        model.eval(prompt)
        for _ in range(tokens - 1):
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(50257,))
            model.eval([int(logits.argmax())])
        return int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(50257,)).argmax())

    return generate, False


def write_gguf(folder: Path, path: Path, precision: str) -> None:
    """The model as a GGUF file. (For your own models use llama.cpp's converter on dist/hf.)"""
    import gguf
    import numpy as np

    from gpt2.model.storage import load_folder
    from gpt2.tokenizer import END_OF_TEXT, vocabulary_files

    model = load_folder(folder)
    merges, vocabulary = vocabulary_files()
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    types = {
        "f32": gguf.GGMLQuantizationType.F32,
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(model.config.n_layer)
    writer.add_context_length(model.config.block_size)
    writer.add_embedding_length(model.config.n_embd)
    writer.add_feed_forward_length(4 * model.config.n_embd)
    writer.add_head_count(model.config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges.read_text(encoding="utf-8").split("\n")[1:-1])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        data = weight.numpy().astype(np.float32)
        kind = types[precision] if data.ndim == 2 and "wpe" not in name else types["f32"]
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quants.quantize(data, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loop(folder: Path, precision: str) -> tuple[Generate, bool]:
    """The baseline: all logits of the whole context for each token, top-k 50."""
    import torch

    from gpt2.model.storage import load_folder

    model = load_folder(folder)

    def generate(prompt: list[int], batch: int, tokens: int) -> Any:
        idx = torch.tensor([prompt] * batch)
        with torch.no_grad():
            for _ in range(tokens):
                probs = model(idx)[0][:, -1].softmax(-1)
                values, ids = probs.topk(50, dim=-1)
                idx = torch.cat([idx, ids.gather(1, torch.multinomial(values, 1))], dim=1)
        return idx

    return generate, False


MAKERS = {"ours": ours, "transformers": transformers, "ctranslate2": ctranslate2, "llama_cpp": llama_cpp, "loop": loop}


def write_table(machine: str, results: dict[str, dict[str, float]]) -> None:
    """Writes reports/benchmarks/generate.md."""
    columns = [*TASKS, FIRST]
    lines = [
        "# Generation with GPT-2 124M, side by side",
        "",
        "Made by `python -m benchmarks.generate`; the numbers are in generate.json.",
        "",
        f"{machine}. New tokens/s after a prompt of {len(PROMPT)} tokens, prefill included; `8 x 100` is "
        "a batch of eight, 100 tokens each, all eight counted. Random weights, greedy decoding.",
        "",
        "| | " + " | ".join(columns) + " | to ours, int8 (1 x 100) |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    best = results.get("ours, int8", {}).get("1 x 100")
    for name, found in results.items():
        cells = [f"{found[column]:,.0f}" if column in found else "" for column in columns]
        ratio = f"{found['1 x 100'] / best:.2f}" if best else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    (REPORT / "generate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(results: dict[str, dict[str, float]]) -> None:
    """Writes reports/benchmarks/generate.png."""
    from matplotlib.figure import Figure

    from benchmarks import charts

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    names = list(reversed(results))
    for axes, task in zip(figure.subplots(1, 2, sharey=True), ("1 x 100", "8 x 100"), strict=True):
        values = [results[name].get(task, 0) for name in names]
        labels = [f"{value:,.0f}" if value else "" for value in values]
        colors = [charts.OURS if name.startswith("ours") else charts.PEER for name in names]
        charts.draw_bars(axes, names, values, labels, colors, f"{task} tokens: tokens/s")
    figure.savefig(REPORT / "generate.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
