"""Validates the settings of a user, runs their requests, and reports progress."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.inference.engine import Completion, Engine
from gpt2.inference.quantization import quantize
from gpt2.inference.request import BLANK_PROMPT, Request, Sampling, Token
from gpt2.model.transformer import GPT

MAX_PROMPT_CHARACTERS = 10_000
MAX_NEW_TOKENS = 500
MAX_TOP_K = 500
MAX_TEMPERATURE = 2.0
MAX_SAMPLES = 4
MAX_STOP_CHARACTERS = 100
MAX_SEED = 2**31 - 1
MAX_DRAWN_SEED = 1_000_000  # short enough to read and type
TIMEOUT_S = 120.0
NUM_TOP_LOGPROBS = 5
UPDATE_S = 0.1
QUIET_S = 0.5
DEFAULTS: dict[str, Any] = {
    "prompt": "",
    "max_new_tokens": 150,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "samples": 1,
    "stop": "",
    "seed": None,
}
"""The settings, in the order of the inputs of the page and of the arguments of the API."""


def validate_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """A number from a client. Raises UserError if it is not a number or out of range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):  # also False for NaN
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {str(value)[:40]!r}; expected {kind} from {low:g} to {high:g}")
    return int(value) if whole else float(value)


def validate_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings from a client, with a random seed if there is none. Raises UserError if one is invalid."""
    prompt, stop = values["prompt"], values["stop"]
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"the prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters")
    if stop is not None and (not isinstance(stop, str) or len(stop) > MAX_STOP_CHARACTERS):
        raise UserError(f"the stop string must be text of at most {MAX_STOP_CHARACTERS} characters")
    seed = values["seed"]
    return {
        "prompt": prompt.encode(errors="replace").decode(),  # replaces lone surrogates by question marks
        "max_new_tokens": validate_number("max new tokens", values["max_new_tokens"], 1, MAX_NEW_TOKENS, whole=True),
        "temperature": validate_number("temperature", values["temperature"], 0, MAX_TEMPERATURE),
        "top_k": validate_number("top-k", values["top_k"], 0, MAX_TOP_K, whole=True),
        "top_p": validate_number("top-p", values["top_p"], 0.01, 1),
        "repetition_penalty": validate_number("repetition penalty", values["repetition_penalty"], 0.5, 2),
        "samples": validate_number("samples", values["samples"], 1, MAX_SAMPLES, whole=True),
        "stop": stop or "",
        "seed": random.randrange(MAX_DRAWN_SEED)  # noqa: S311 - a seed is no secret
        if seed is None
        else validate_number("seed", seed, 0, MAX_SEED, whole=True),
    }


def requests_for(settings: dict[str, Any]) -> list[Request]:
    """One request for each sample, with consecutive seeds."""
    sampling = Sampling(
        temperature=settings["temperature"],
        top_k=settings["top_k"] or None,
        top_p=settings["top_p"],
        repetition_penalty=settings["repetition_penalty"],
    )
    return [
        Request(
            tokenizer.encode(settings["prompt"] or BLANK_PROMPT),
            settings["max_new_tokens"],
            sampling,
            seed=settings["seed"] + number,
            stop=(settings["stop"],) if settings["stop"] else (),
            top_logprobs=NUM_TOP_LOGPROBS,
            timeout_s=TIMEOUT_S,
        )
        for number in range(settings["samples"])
    ]


@dataclass(frozen=True)
class GenerationProgress:
    """The progress of a generation. queue_position: -1 if it has started. reasons: finish reason of each sample."""

    samples: list[list[Token]]
    queue_position: int
    seconds: float
    reasons: list[str | None]

    @property
    def num_tokens(self) -> int:
        """Number of tokens generated so far."""
        return sum(map(len, self.samples))

    def status_line(self) -> str:
        """One line for the user."""
        if self.queue_position >= 0 and not self.num_tokens:
            return f"Queued: position {self.queue_position + 1}"
        rate = f"{self.num_tokens} tokens, {self.num_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        if None in self.reasons:
            return rate
        if "cancelled" in self.reasons:
            return f"Stopped after {rate}"
        late = f"; time limit of {TIMEOUT_S:.0f} s reached" if "timeout" in self.reasons else ""
        return f"Done: {rate}{late}"


Generate = Callable[[Sequence[Request], str | None], Iterator[GenerationProgress]]
"""Generates for requests of a session: yields the progress several times a second, and at the end."""


class RequestRegistry:
    """Runs requests on an engine, and tracks the session of each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._completions: dict[str, list[Completion]] = {}
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[Request], session: str | None = None) -> Iterator[GenerationProgress]:
        """Yields the progress. Raises BusyError if the queue is full. Closing the iterator frees the slots."""
        completions: list[Completion] = []
        try:
            for request in requests:
                completions.append(self.engine.submit(request))
            if session is not None:
                self.stop(session)  # one generation per session
                with self._lock:
                    self._completions[session] = completions
            yield from stream_progress(self.engine, completions)
        finally:
            for completion in completions:
                completion.cancel()
            with self._lock:
                if session is not None and self._completions.get(session) is completions:
                    del self._completions[session]

    def stop(self, session: str | None) -> None:
        """Cancels the generation of a session."""
        with self._lock:
            completions = self._completions.pop(session, []) if session is not None else []
        for completion in completions:
            completion.cancel()


def stream_progress(engine: Engine, completions: Sequence[Completion]) -> Iterator[GenerationProgress]:
    """The progress of completions until all have ended: every UPDATE_S while it changes, every QUIET_S otherwise."""
    samples: list[list[Token]] = [[] for _ in completions]
    started_s: float | None = None
    shown, shown_s = (-2, 0), 0.0
    while True:
        ended = all(completion.finish_reason for completion in completions)  # before taking the last tokens
        for sample, completion in zip(samples, completions, strict=True):
            sample += completion.new_tokens(timeout_s=0)
        if started_s is None and any(samples):
            started_s = min(completion.started_s or math.inf for completion in completions)
        position = max(completion.queue_position for completion in completions)
        reasons = [completion.finish_reason if ended else None for completion in completions]
        now_s = time.monotonic()
        progress = GenerationProgress(samples, position, now_s - started_s if started_s is not None else 0.0, reasons)
        if ended or (position, progress.num_tokens) != shown or now_s > shown_s + QUIET_S:
            shown, shown_s = (position, progress.num_tokens), now_s
            yield progress
        if ended:
            return
        engine.wait(UPDATE_S if any(samples) else UPDATE_S / 4)


def on_zero_gpu(model: GPT, context_length: int) -> Generate:
    """Generation on Hugging Face's ZeroGPU, which lends a GPU to a separate process for each call."""
    import spaces  # only installed on ZeroGPU

    quantized = quantize(model.to("cuda"), "bf16")

    @spaces.GPU(duration=60)  # type: ignore[untyped-decorator, unused-ignore]
    def generate(requests: Sequence[Request], session: str | None = None) -> Iterator[GenerationProgress]:
        engine = Engine(quantized, context_length=context_length, slots=len(requests))
        yield from stream_progress(engine, [engine.submit(request) for request in requests])

    return cast(Generate, generate)
