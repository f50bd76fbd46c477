"""Starts the Space: loads the model, builds the page, serves both.

Needs only the files beside it: gpt_model.pt, gpt_config.pt, manifest.json and the inference part of gpt2/.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import LRUCache

from gpt2.config import DTYPES
from gpt2.device import configure_device
from gpt2.errors import GPT2Error
from gpt2.inference.engine import Engine
from gpt2.inference.quantization import fastest_dtype, quantize
from gpt2.kernels import library
from gpt2.model.transformer import GPT
from space import view
from space.guard import Guard
from space.handlers import Handlers
from space.model_files import load_metadata, load_model
from space.page import build_page, error_page
from space.service import RequestRegistry, on_zero_gpu

HERE = Path(__file__).resolve().parent.parent
SLOTS = 8
MAX_QUEUE_SIZE = 32
MAX_SESSIONS = 128  # Gradio keeps 90 kB for each
MAX_GRADIO_QUEUE_SIZE = 16  # calls that wait for a place in the engine's queue
MAX_LOSS_INCREASE = 0.005
COMPILE_WAIT_S = 5


def choose_dtype(model: GPT, metadata: dict[str, Any]) -> str:
    """The fastest dtype on this machine, of those for which the export measured that they cost little loss."""
    losses = metadata["dtype_losses"]
    limit = (1 + MAX_LOSS_INCREASE) * losses.get("fp32", -1)
    allowed = (name for name in DTYPES if name == "fp32" or losses.get(name, limit + 1) <= limit)
    return fastest_dtype(model, tuple(allowed))


def build(folder: Path = HERE) -> tuple[gr.Blocks, Engine | None]:
    """The page for the model in a folder, and its engine, whose `serve` has to be called.

    If the model cannot be loaded: a page that shows why, and no engine. On ZeroGPU there is no engine either.
    """
    engine, build_process = None, library.start_build()
    try:
        metadata, model = load_metadata(folder), load_model(folder)
        if metadata["target"] == "zerogpu":
            dtype, handlers = "bf16", Handlers(metadata, on_zero_gpu(model, metadata["context"]))
        else:
            configure_device(model.device)
            if build_process is not None:  # it began when the app did
                build_process.has_ended(COMPILE_WAIT_S)
            dtype = choose_dtype(model, metadata)
            engine = Engine(
                quantize(model, dtype),
                context_length=metadata["context"],
                slots=SLOTS,
                max_queue_size=MAX_QUEUE_SIZE,
                serving_thread=True,
            )
            registry = RequestRegistry(engine)
            handlers = Handlers(metadata, registry.generate, registry.stop)
    except GPT2Error as error:
        return error_page(str(error)), None
    table = view.model_table(metadata, dtype, engine.path if engine else "PyTorch", folder)
    return build_page(metadata, table, handlers, concurrency_limit=SLOTS + MAX_QUEUE_SIZE), engine


def main(folder: Path = HERE) -> None:
    """Serves the page for a folder, on 127.0.0.1 unless GRADIO_SERVER_NAME is set, as it is on a Space."""
    page, engine = build(folder)
    num_inputs: dict[int | str | None, int] = {number: len(function.inputs) for number, function in page.fns.items()}
    num_inputs |= {str(function.api_name): len(function.inputs) for function in page.fns.values()}
    page.queue(max_size=MAX_GRADIO_QUEUE_SIZE)
    # results that no client reads are kept for this many sessions, rather than for 2000
    page._queue.pending_messages_per_session = LRUCache(MAX_SESSIONS)
    page.launch(
        theme=gr.themes.Soft(),
        css=view.CSS,
        head=view.KEYS,
        max_threads=SLOTS + MAX_QUEUE_SIZE + MAX_GRADIO_QUEUE_SIZE,
        app_kwargs={"middleware": [(Guard, (num_inputs,), {})]},
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        state_session_capacity=MAX_SESSIONS,
        footer_links=["api"],
        prevent_thread_lock=True,
    )
    try:
        if engine is None:
            page.block_thread()
        else:  # in the thread that loaded the model: see Engine
            engine.warm_up()
            engine.serve()
    except KeyboardInterrupt:
        page.close()
