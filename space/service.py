"""What a visitor may ask, and the answer as it comes: settings that are checked, requests, and how far they are."""

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
MAX_DRAWN_SEED = 1_000_000  # short enough to be read out
DEADLINE_S = 120.0
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
"""What a visitor may say, in the order of the page's inputs and of the API's arguments."""


def validate_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """A number that arrived from outside. Raises UserError if it is none, or out of range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):  # a NaN is in no range
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {str(value)[:40]!r}; expected {kind} from {low:g} to {high:g}")
    return int(value) if whole else float(value)


def validate_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that arrived from outside, with a seed. Raises UserError for what is wrong."""
    prompt, stop = values["prompt"], values["stop"]
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"the prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters")
    if stop is not None and (not isinstance(stop, str) or len(stop) > MAX_STOP_CHARACTERS):
        raise UserError(f"the text to stop at must be text of at most {MAX_STOP_CHARACTERS} characters")
    seed = values["seed"]
    return {
        "prompt": prompt.encode(errors="replace").decode(),  # half a character becomes a question mark
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
    """A request for each sample; their seeds follow each other."""
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
            timeout_s=DEADLINE_S,
        )
        for number in range(settings["samples"])
    ]


@dataclass(frozen=True)
class Progress:
    """How far an answer is. queue_position: 0 is next; -1 if it has started. reasons: why each sample ended."""

    samples: list[list[Token]]
    queue_position: int
    seconds: float
    reasons: list[str | None]

    @property
    def num_tokens(self) -> int:
        """All tokens so far."""
        return sum(map(len, self.samples))

    def told(self) -> str:
        """A line for people."""
        if self.queue_position >= 0 and not self.num_tokens:
            return f"In line: {self.queue_position + 1}. to be answered"
        rate = f"{self.num_tokens} tokens, {self.num_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        if None in self.reasons:
            return rate
        if "cancelled" in self.reasons:
            return f"Stopped after {rate}"
        late = f"; it took longer than {DEADLINE_S:.0f} s" if "timeout" in self.reasons else ""
        return f"Done: {rate}{late}"


Generate = Callable[[Sequence[Request], str | None], Iterator[Progress]]
"""Answers requests: how far it is, several times a second, and at the end. Given with whose session it is for."""


class RequestRegistry:
    """Answers visitors with an engine, and knows what is being written for whom."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._replies: dict[str, list[Completion]] = {}
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request], session: str | None = None) -> Iterator[Progress]:
        """Raises BusyError if the line is full. Whoever stops listening frees the slots."""
        replies: list[Completion] = []
        try:
            for request in requests:
                replies.append(self.engine.submit(request))
            if session is not None:
                self.stop(session)  # a visitor writes one thing at a time
                with self._lock:
                    self._replies[session] = replies
            yield from stream_progress(self.engine, replies)
        finally:
            for reply in replies:
                reply.cancel()
            with self._lock:
                if session is not None and self._replies.get(session) is replies:
                    del self._replies[session]

    def stop(self, session: str | None) -> None:
        """Ends what is being written for a session."""
        with self._lock:
            replies = self._replies.pop(session, []) if session is not None else []
        for reply in replies:
            reply.cancel()


def stream_progress(engine: Engine, replies: Sequence[Completion]) -> Iterator[Progress]:
    """How far replies are, every UPDATE_S while they change and every QUIET_S otherwise, until all have ended."""
    samples: list[list[Token]] = [[] for _ in replies]
    started_s: float | None = None
    shown, shown_s = (-2, 0), 0.0
    while True:
        ended = all(reply.finish_reason for reply in replies)  # before their last tokens are taken
        for sample, reply in zip(samples, replies, strict=True):
            sample += reply.new_tokens(timeout_s=0)
        if started_s is None and any(samples):
            started_s = min(reply.started_s or math.inf for reply in replies)
        place = max(reply.queue_position for reply in replies)
        reasons = [reply.finish_reason if ended else None for reply in replies]
        now_s = time.monotonic()
        progress = Progress(samples, place, now_s - started_s if started_s is not None else 0.0, reasons)
        if ended or (place, progress.num_tokens) != shown or now_s > shown_s + QUIET_S:
            shown, shown_s = (place, progress.num_tokens), now_s
            yield progress
        if ended:
            return
        engine.wait(UPDATE_S if any(samples) else UPDATE_S / 4)


def on_zero_gpu(model: GPT, context: int) -> Generate:
    """Answers on Hugging Face's ZeroGPU, where a GPU is lent to a process of its own for each call."""
    import spaces  # only there

    writer = quantize(model.to("cuda"), "bf16")

    @spaces.GPU(duration=60)  # type: ignore[untyped-decorator, unused-ignore]
    def answer(requests: Sequence[Request], session: str | None = None) -> Iterator[Progress]:
        engine = Engine(writer, context_length=context, slots=len(requests))
        yield from stream_progress(engine, [engine.submit(request) for request in requests])

    return cast(Generate, answer)
