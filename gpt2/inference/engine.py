"""Generation for many requests at once.

The KV cache is allocated once, with a slot for each running sequence. Prefill processes a prompt in chunks, one between
two tokens of the others (Agrawal et al., Sarathi, https://arxiv.org/abs/2308.16369); decode then extends all running
sequences by one token in one pass over the weights. New requests join between two tokens: continuous batching (Yu et
al., Orca, OSDI 2022).
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from gpt2.errors import BusyError, GPT2Error, UserError, one_line
from gpt2.inference.batch import Batch, RunningSequence
from gpt2.inference.kv_cache import ModelRunner
from gpt2.inference.request import Request, Token
from gpt2.model.transformer import GPT

IDLE_S = 0.5


class Completion:
    """The result of a request. Iterate over it to get its tokens as they are generated.

    arrived_s, started_s: times of time.monotonic(); started_s is None while the request is in the queue.
    finish_reason: None while it runs; then "length", "end_of_text", "stop", "timeout", "cancelled" or "error".
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.error: GPT2Error | None = None
        self.arrived_s = time.monotonic()
        self.started_s: float | None = None
        self._engine = engine
        self._tokens: deque[Token] = deque()

    def cancel(self) -> None:
        """Ends it before the next token, and frees its slot. Does nothing if it has ended."""
        self._engine._cancel(self)

    @property
    def queue_position(self) -> int:
        """Number of requests that start before it; -1 if it has started or ended."""
        return self._engine._queue_position(self)

    def new_tokens(self, timeout_s: float | None = None) -> list[Token]:
        """The tokens since the last call; waits for at least one, up to timeout_s.

        Empty after the last token, or after the timeout. Raises GPT2Error if generation failed.
        """
        return self._engine._new_tokens(self, timeout_s)

    def __iter__(self) -> Iterator[Token]:
        while tokens := self.new_tokens():
            yield from tokens


class Engine:
    """Generates text for many requests with one model.

    Generation runs in the thread that waits for a completion; with `serving_thread`, in the thread that calls `serve`.
    In a process with several threads, `serve` should run in the thread that used torch before: GNU OpenMP
    keeps workers for each thread, and when there are more workers than cores they sleep between operations, which
    doubles the time per token.
    """

    def __init__(
        self,
        model: GPT,
        *,
        context_length: int | None = None,
        slots: int = 1,
        max_queue_size: int | None = None,
        serving_thread: bool = False,
        optimize: bool = True,
        speculate: bool = True,
    ) -> None:
        """model: as `gpt2.inference.quantization.quantize` returns it. context_length: tokens it attends to.

        slots: maximum batch size. max_queue_size: the engine rejects further requests; None is no limit. optimize:
        use the compiled kernels as soon as they are there, and without a compiler measure which of PyTorch's are
        fastest; otherwise the same text comes out on the same machine, whatever it has measured or compiled. speculate:
        use drafts where they save time.
        """
        self.model = model.eval()
        self.context_length = min(context_length or model.config.block_size, model.config.block_size)
        self.max_queue_size = max_queue_size
        self.num_generated_tokens = 0
        self._runner = ModelRunner(model, slots, self.context_length)
        if optimize:
            self._runner.prepare()
        self._batch = Batch(self._runner, self.context_length, speculate=speculate)
        self._free_slots = list(range(slots))
        self._waiting: deque[Completion] = deque()
        self._running: list[tuple[Completion, RunningSequence]] = []
        self._changed = threading.Condition()
        self._has_serving_thread = serving_thread
        self._closed = False

    def submit(self, request: Request) -> Completion:
        """Adds a request to the queue. Raises UserError for unknown token ids, BusyError if the queue is full."""
        if not all(0 <= token < self.model.config.vocab_size for token in request.prompt):
            raise UserError("the prompt has tokens that are not in the model's vocabulary")
        completion = Completion(self, request)
        with self._changed:
            if self.max_queue_size is not None and len(self._waiting) - len(self._free_slots) >= self.max_queue_size:
                raise BusyError(f"{len(self._waiting)} requests are in the queue; try again later")
            self._waiting.append(completion)
            self._changed.notify_all()
        return completion

    def step(self) -> bool:
        """Generates one token for every running sequence. Returns False if there is nothing to do."""
        with self._changed:
            self._end_timed_out()
            while self._free_slots and self._waiting:
                started = self._waiting.popleft()
                started.started_s = time.monotonic()
                self._running.append((started, RunningSequence(started.request, self._free_slots.pop(0))))
            running = list(self._running)
        if not running:
            return False
        try:
            sampled = self._batch.step([sequence for _, sequence in running])
        except Exception as error:
            with self._changed:
                for completion, _ in running:
                    self._end(completion, "error", _as_error(error))
            return True
        with self._changed:
            for completion, sequence in running:
                for result in sampled.get(sequence.slot, []):
                    if sequence.has_ended:
                        break
                    if isinstance(result, GPT2Error):
                        self._end(completion, "error", result)
                    else:
                        self._deliver(completion, sequence, *result)
            self._changed.notify_all()
        return True

    def _deliver(
        self,
        completion: Completion,
        sequence: RunningSequence,
        token: int,
        logprob: float,
        top_logprobs: tuple[tuple[int, float], ...],
    ) -> None:
        request = completion.request
        sequence.num_generated += 1
        self.num_generated_tokens += 1
        reason = "length" if sequence.num_generated == request.max_new_tokens else None
        if token in request.stop_token_ids:
            reason, text = "end_of_text", sequence.detokenizer.flush()
        else:
            sequence.ids.append(token)
            text = sequence.detokenizer.push(token, last=reason is not None)
        if sequence.detokenizer.stopped:
            reason = "stop"
        completion._tokens.append(Token(token, text, logprob, top_logprobs))
        if reason:
            self._end(completion, reason)

    def _end_timed_out(self) -> None:
        now_s = time.monotonic()
        for completion in [*self._waiting, *(completion for completion, _ in self._running)]:
            limit_s = completion.request.timeout_s
            if limit_s is not None and now_s - completion.arrived_s > limit_s:
                self._end(completion, "timeout")

    def _end(self, completion: Completion, reason: str, error: GPT2Error | None = None) -> None:
        if completion.finish_reason is not None:
            return
        completion.finish_reason, completion.error = reason, error
        if completion in self._waiting:
            self._waiting.remove(completion)
        for running in [running for running in self._running if running[0] is completion]:
            self._running.remove(running)
            sequence = running[1]
            sequence.has_ended = True
            self._free_slots.insert(0, sequence.slot)  # its memory is allocated
            if reason in ("timeout", "cancelled") and (rest := sequence.detokenizer.flush()) and completion._tokens:
                last = completion._tokens.pop()
                completion._tokens.append(Token(last.id, last.text + rest, last.logprob, last.top_logprobs))
        self._changed.notify_all()

    def _cancel(self, completion: Completion) -> None:
        with self._changed:
            self._end(completion, "cancelled")

    def _queue_position(self, completion: Completion) -> int:
        with self._changed:
            return self._waiting.index(completion) if completion in self._waiting else -1

    def _new_tokens(self, completion: Completion, timeout_s: float | None) -> list[Token]:
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._changed:
                if completion._tokens:
                    taken = list(completion._tokens)
                    completion._tokens.clear()
                    return taken
                if completion.error is not None:
                    raise completion.error
                if completion.finish_reason is not None or time.monotonic() >= deadline_s:
                    return []
                if self._has_serving_thread:
                    self._changed.wait(min(IDLE_S, max(0.0, deadline_s - time.monotonic())))
                    continue
            self.step()

    def wait(self, seconds: float) -> None:
        """Waits; without a serving thread, generates meanwhile."""
        if self._has_serving_thread:
            time.sleep(seconds)
            return
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and self.step():
            pass

    def warm_up(self) -> None:
        """Allocates the memory of all slots and of the longest prompt, so that no request waits for it."""
        self._runner.warm_up()

    @property
    def path(self) -> str:
        """What processes the next request: "compiled", or "PyTorch" and why."""
        if self._runner.compiled is not None:
            return "compiled"
        return f"PyTorch: {self._runner.problem or 'the kernels are being compiled'}"

    def wait_until_compiled(self, timeout_s: float) -> bool:
        """Waits for the compiled kernels. Returns whether they are in use."""
        return self._runner.poll(timeout_s)

    def serve(self) -> None:
        """Generates until `close`."""
        while not self._closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting, timeout=IDLE_S)

    def close(self) -> None:
        """Cancels all requests and ends `serve`."""
        with self._changed:
            self._closed = True
            for completion in [*self._waiting, *(completion for completion, _ in self._running)]:
                self._end(completion, "cancelled")
            self._changed.notify_all()


def _as_error(error: Exception) -> GPT2Error:
    if isinstance(error, GPT2Error):
        return error
    return GPT2Error(f"generation failed: {one_line(error, 200)}")


def generate(engine: Engine, requests: Sequence[Request]) -> list[list[Token]]:
    """The tokens of each request, generated as one batch."""
    completions = [engine.submit(request) for request in requests]
    return [list(completion) for completion in completions]
