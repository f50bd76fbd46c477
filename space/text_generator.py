"""The exported model as MLflow loads it: the file that MLflow calls the code of the model ("models from code").

MLflow copies this file beside the weights and the package's serving part, and runs it where only the requirements of
the model are installed. torch is imported when the model is loaded, so that MLflow can read this file without it.
"""

import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

COMPILE_WAIT_S = 120


class TextGenerator(PythonModel):
    """Continues prompts as `python -m gpt2 generate` does: the same prompt, params and dtype give the same text."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the weights. Raises FileError if they are not the exported ones."""
        from gpt2.device import choose_device, configure_device
        from gpt2.kernels import library
        from space.model_files import load_metadata, load_model

        folder = Path(context.artifacts["model"])
        device = choose_device("auto")
        configure_device(device)
        build = library.start_build() if device.type == "cpu" else None  # beside loading the model
        self._context_length: int = load_metadata(folder)["context"]
        self._model = load_model(folder).to(device)
        if build is not None:
            build.has_ended(COMPILE_WAIT_S)
        self._engines: dict[str, Any] = {}
        self._lock = threading.Lock()  # a server calls predict from several threads

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Each prompt with its continuation. The texts do not depend on each other: each uses the seed.

        model_input: MLflow makes it of a list of prompts: one column. (With list[str] as its type, MLflow would run the
        model each time that it saves one.) params: MLflow fills in the defaults of its signature. Raises
        MlflowException for a value out of range.
        """
        from gpt2 import tokenizer
        from gpt2.errors import UserError
        from gpt2.inference.request import BLANK_PROMPT, Request, Sampling

        chosen = params or {}
        try:
            sampling = Sampling(
                temperature=chosen["temperature"],
                top_k=chosen["top_k"] or None,
                top_p=chosen["top_p"],
                repetition_penalty=chosen["repetition_penalty"],
            )
            with self._lock:
                engine = self._engine(chosen["dtype"])
                texts = []
                for prompt in model_input.iloc[:, 0]:
                    tokens = tokenizer.encode(prompt or BLANK_PROMPT)
                    request = Request(tokens, chosen["max_new_tokens"], sampling, seed=chosen["seed"])
                    texts.append(prompt + "".join(token.text for token in engine.submit(request)))
                return texts
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _engine(self, name: str) -> Any:
        from gpt2.inference.engine import Engine
        from gpt2.inference.quantization import fastest_dtype, quantize

        if name not in self._engines:
            dtype = fastest_dtype(self._model) if name == "auto" else name
            self._engines[name] = Engine(quantize(self._model, dtype), context_length=self._context_length)
        return self._engines[name]


mlflow.models.set_model(TextGenerator())
