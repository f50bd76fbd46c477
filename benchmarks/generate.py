r"""Speed and loss of GPT-2 124M: ours in each dtype, and other implementations, side by side.

    python -m benchmarks.generate                   an hour on two cores, with all peers
    python -m benchmarks.generate --only ours       some of the contenders; the others keep their results
    python -m benchmarks.generate --rounds 1        half the time

Tokens/s for one text and for eight at once, at the start and at the end of the context; time to first token; the limit
that memory bandwidth sets; and the losses of a trained model (`--trained`, made by `dvc repro`) in each precision.
Results are kept for each CPU and each limit on its instruction sets (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY).

All use the same weights, the same prompt and greedy decoding. Each runs `--rounds` times in its own process, in turns;
the best result counts. One that fails or takes longer than TIMEOUT_S is skipped. The baseline is the generation loop of
the original project's Space, without a KV cache. Writes reports/benchmarks/generate.{json,md,png}.

Peers that are not installed are skipped. Measured with ctranslate2 4.8.5, gguf 0.19.0, openvino 2026.4.1, nncf 3.4.0,
llama-cpp-python 0.3.36:

    pip install ctranslate2 gguf openvino nncf
    CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8 -DLLAVA_BUILD=OFF" \
        pip install --no-binary llama-cpp-python llama-cpp-python        # a C++ compiler; minutes

    pip install mkl-devel                                                # and llama.cpp again, with MKL as its BLAS
    CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8 -DLLAVA_BUILD=OFF \
        -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=Intel10_64lp -DBLAS_LIBRARIES=$VIRTUAL_ENV/lib/libmkl_rt.so \
        -DBLAS_INCLUDE_DIRS=$VIRTUAL_ENV/include" pip install --no-cache-dir --no-deps --target with-blas \
        --no-binary llama-cpp-python llama-cpp-python
    LLAMA_CPP_BLAS=with-blas/llama_cpp/lib python -m benchmarks.generate

llama.cpp 0.3.36's AMX code crashes in q8_0, so it is built without. BLAS makes its prefill faster, but in 4 bits. On
Intel's CPUs MKL_ENABLE_INSTRUCTIONS limits CTranslate2 and BLAS (AVX512_E3 for AVX512_CORE_BF16). ONNX Runtime GenAI is
left out: its model builder does not know GPT-2, and optimum-onnx needs Transformers before 4.58. So is OpenVINO GenAI:
optimum-intel needs Transformers before 5.6. OpenVINO itself runs our model, with the KV cache in the graph.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.generation import contenders, machine, report

TIMEOUT_S = 600


def main() -> None:
    """Runs the contenders, or a single one in a worker process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contenders with this in their name")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--trained", type=Path, default=Path("models"), help="folder of a trained model, for the losses"
    )
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"), help="folder of its held-out tokens")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, folder = arguments.worker
        print(json.dumps(contenders.work(name, Path(folder))))
        return
    names = [name for name in contenders.CONTENDERS if arguments.only in name]
    with tempfile.TemporaryDirectory() as place:
        has_trained = (arguments.trained / "model.safetensors").exists()
        if not has_trained:
            print(f"{arguments.trained} has no model.safetensors: no losses", flush=True)
        contenders.prepare(Path(place), arguments.trained if has_trained else None, arguments.tokens)
        compare(names, place, arguments.rounds)


def compare(names: list[str], place: str, rounds: int) -> None:
    """Runs contenders in turns, and writes the report after each round."""
    import torch

    cpu, facts = machine.describe(torch.get_num_threads())
    print(cpu, facts, flush=True)
    results: report.Results = {}
    for _ in range(rounds):
        for name in names:
            if found := run(name, place):
                results = report.best(results, name, found)
        names = [name for name in names if name in results]
        report.write(report.merge(report.load(), cpu, facts, results))


def run(name: str, place: str) -> dict[str, Any] | None:
    """One contender in a process of its own; None if it cannot run here."""
    command = [sys.executable, "-m", "benchmarks.generate", "--worker", name, place]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        print(f"{name}: skipped ({error.timeout:.0f} s were not enough)", flush=True)
        return None
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        print(f"{name}: skipped ({reason}, exit code {done.returncode})", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, {task: round(value, 1) for task, value in found.items() if isinstance(value, float)}, flush=True)
    return found


if __name__ == "__main__":
    main()
