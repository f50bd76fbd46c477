"""Text for many requests at once.

The keys and values that attention needs stay in buffers allocated once, a slot for each request. A prompt is read in
one pass; then all requests that are being answered get their next token together, in one pass over the weights. A new
request joins at the next token ("continuous batching", Yu et al., Orca, OSDI 2022).
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import BusyError, GPT2Error, UserError
from gpt2.generation import Request, TextStream, Token, context_start, draw, penalised
from gpt2.model import GPT

IDLE_S = 0.5


class KeyValueCache:
    """Keys and values of each slot's tokens, (slots, n_layer, 2, n_head, context, head_size)."""

    def __init__(self, config: GPTConfig, slots: int, context: int, like: Tensor) -> None:
        """Buffers in the format and on the device of `like`; memory is taken as they fill."""
        self.buffer = like.new_empty(slots, config.n_layer, 2, config.n_head, context, config.head_size)
        self.lengths = [0] * slots


class _ReadingPrompt:
    """A layer's memory while one slot reads its prompt, from the beginning."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # (2, n_head, context, head_size)

    def attend(self, qkv: Tensor) -> Tensor:
        self.buffer[:, :, : qkv.size(3)] = qkv[1:, 0]
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _NextTokens:
    """A layer's memory while slots of different lengths each get one token.

    Each attends to exactly its own tokens, so that what it computes does not depend on the others.
    """

    def __init__(self, slots: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.slots = slots  # keys and values with room for the new token, (1, n_head, length, head_size), and that room

    def attend(self, qkv: Tensor) -> Tensor:
        outputs = []
        for row, (keys, values, new) in enumerate(self.slots):
            new.copy_(qkv[1:, row, :, 0])
            outputs.append(F.scaled_dot_product_attention(qkv[0, row : row + 1], keys, values))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class Decoder:
    """A model and the key-value cache of its slots: logits in, one request's prompt or everybody's next token."""

    def __init__(self, model: GPT, slots: int, context: int) -> None:
        self.model = model
        blocks: Any = model.transformer["h"]
        c_attn = blocks[0].attn.c_attn
        # the layers of gpt2/formats.py say what comes out of them
        like = torch.empty(0, dtype=getattr(c_attn, "out_dtype", c_attn.weight.dtype), device=model.device)
        self.cache = KeyValueCache(model.config, slots, context, like)

    def read(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Logits, (V,), for the token after ids, with which the slot begins anew."""
        memory = [_ReadingPrompt(layer) for layer in self.cache.buffer[slot].unbind(0)]
        hidden = self.model.hidden(self._on_device([list(ids)]), memory)
        self.cache.lengths[slot] = len(ids)
        return cast(Tensor, self.model.lm_head(hidden[0, -1:]))[0]

    def next(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits, (len(slots), V), after each slot's next token."""
        lengths = self.cache.lengths
        per_slot = []
        for slot in slots:
            keys, values = self.cache.buffer[slot, :, :, None, :, : lengths[slot] + 1].unbind(1)
            new = self.cache.buffer[slot, :, :, :, lengths[slot]]
            per_slot.append(list(zip(keys.unbind(0), values.unbind(0), new.unbind(0), strict=True)))
        memory = [_NextTokens(list(layer)) for layer in zip(*per_slot, strict=True)]
        positions = self._on_device([[lengths[slot]] for slot in slots])
        hidden = self.model.hidden(self._on_device([[token] for token in tokens]), memory, positions)
        for slot in slots:
            lengths[slot] += 1
        return cast(Tensor, self.model.lm_head(hidden[:, 0]))

    def _on_device(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)


class Reply:
    """What comes back for a request: iterate over it for its tokens as they come.

    arrived_s, begun_s: times of time.monotonic(); begun_s is None as long as it waits in line.
    finish_reason: None as long as it goes on; then "length", "end_of_text", "stop", "deadline", "cancelled" or "error".
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.error: GPT2Error | None = None
        self.arrived_s = time.monotonic()
        self.begun_s: float | None = None
        self._engine = engine
        self._tokens: deque[Token] = deque()

    def cancel(self) -> None:
        """Ends it at the next token, and frees its slot. Does nothing if it has ended."""
        self._engine._cancel(self)

    @property
    def place(self) -> int:
        """How many requests will be begun before it; 0 is next, -1 if it has begun or ended."""
        return self._engine._place(self)

    def take(self, timeout_s: float | None = None) -> list[Token]:
        """The tokens that came since the last time; waits for at least one, up to timeout_s.

        Empty after the last one, or if none came in time. Raises what went wrong, as GPT2Error.
        """
        return self._engine._take(self, timeout_s)

    def __iter__(self) -> Iterator[Token]:
        while tokens := self.take():
            yield from tokens


class _Running:
    """A request in a slot."""

    def __init__(self, reply: Reply, slot: int) -> None:
        self.reply, self.slot, self.request = reply, slot, reply.request
        self.ids = list(reply.request.prompt)
        self.start = -1  # of the model's view in ids; -1 before it has seen anything
        self.written = 0
        self.random = torch.Generator().manual_seed(reply.request.seed)
        self.text = TextStream(reply.request.stop)


class Engine:
    """Answers requests with one model.

    Whoever waits for a reply does the work, token by token; or, if it is `served`, the thread that calls `serve`. In a
    process with several threads, that should be the one that did all of torch's work before: GNU's OpenMP counts the
    workers of each thread, and once they are more than the cores, they sleep between products rather than wait for the
    next, which makes a token take twice as long.
    """

    def __init__(
        self,
        model: GPT,
        *,
        context: int | None = None,
        slots: int = 1,
        max_waiting: int | None = None,
        served: bool = False,
    ) -> None:
        """model: in the format to answer in (gpt2/formats.py). context: how many tokens it may look back on.

        slots: requests answered at a time. max_waiting: more than that in line are refused; None refuses none.
        """
        self.model = model.eval()
        self.context = min(context or model.config.block_size, model.config.block_size)
        self.max_waiting = max_waiting
        self.tokens_written = 0
        self._decoder = Decoder(model, slots, self.context)
        self._free = list(range(slots))
        self._waiting: deque[Reply] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._served = served
        self._closed = False

    def submit(self, request: Request) -> Reply:
        """Puts a request in line. Raises UserError if the model cannot read it, BusyError if the line is full."""
        if not all(0 <= token < self.model.config.vocab_size for token in request.prompt):
            raise UserError("the prompt has tokens that are not in the model's vocabulary")
        reply = Reply(self, request)
        with self._changed:
            if self.max_waiting is not None and len(self._waiting) - len(self._free) >= self.max_waiting:
                raise BusyError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(reply)
            self._changed.notify_all()
        return reply

    def step(self) -> bool:
        """One token for everybody who is being answered; False if there is nothing to do."""
        with self._changed:
            self._end_overdue()
            while self._free and self._waiting:
                begun = self._waiting.popleft()
                begun.begun_s = time.monotonic()
                self._running.append(_Running(begun, self._free.pop(0)))
            running = list(self._running)
        if not running:
            return False
        try:
            results = self._compute(running)
        except Exception as error:
            with self._changed:
                for each in running:
                    self._end(each.reply, "error", _told(error))
            return True
        with self._changed:
            for each, result in results:
                if each.reply.finish_reason is None:
                    if isinstance(result, GPT2Error):
                        self._end(each.reply, "error", result)
                    else:
                        self._deliver(each, *result)
            self._changed.notify_all()
        return True

    @torch.inference_mode()
    def _compute(
        self, running: list[_Running]
    ) -> list[tuple[_Running, GPT2Error | tuple[int, float, tuple[tuple[int, float], ...]]]]:
        logits: dict[int, Tensor] = {}
        goes_on = []
        for each in running:
            start = context_start(len(each.ids), self.context)
            if start == each.start:
                goes_on.append(each)
            else:
                each.start = start
                logits[each.slot] = self._decoder.read(each.slot, each.ids[start:])
        if goes_on:
            rows = self._decoder.next([each.slot for each in goes_on], [each.ids[-1] for each in goes_on])
            logits.update(zip((each.slot for each in goes_on), rows, strict=True))
        return [(each, _chosen(each, logits[each.slot].float().cpu())) for each in running]

    def _deliver(self, each: _Running, token: int, logprob: float, alternatives: tuple[tuple[int, float], ...]) -> None:
        each.written += 1
        self.tokens_written += 1
        reason = "length" if each.written == each.request.max_new_tokens else None
        if token in each.request.stop_tokens:
            reason, text = "end_of_text", each.text.rest()
        else:
            each.ids.append(token)
            text = each.text.push(token, last=reason is not None)
        if each.text.stopped:
            reason = "stop"
        each.reply._tokens.append(Token(token, text, logprob, alternatives))
        if reason:
            self._end(each.reply, reason)

    def _end_overdue(self) -> None:
        now_s = time.monotonic()
        for reply in [*self._waiting, *(each.reply for each in self._running)]:
            limit_s = reply.request.deadline_s
            if limit_s is not None and now_s - reply.arrived_s > limit_s:
                self._end(reply, "deadline")

    def _end(self, reply: Reply, reason: str, error: GPT2Error | None = None) -> None:
        if reply.finish_reason is not None:
            return
        reply.finish_reason, reply.error = reason, error
        if reply in self._waiting:
            self._waiting.remove(reply)
        for each in [each for each in self._running if each.reply is reply]:
            self._running.remove(each)
            self._free.append(each.slot)
            if reason in ("deadline", "cancelled") and (rest := each.text.rest()) and reply._tokens:
                last = reply._tokens.pop()
                reply._tokens.append(Token(last.id, last.text + rest, last.logprob, last.alternatives))
        self._changed.notify_all()

    def _cancel(self, reply: Reply) -> None:
        with self._changed:
            self._end(reply, "cancelled")

    def _place(self, reply: Reply) -> int:
        with self._changed:
            return self._waiting.index(reply) if reply in self._waiting else -1

    def _take(self, reply: Reply, timeout_s: float | None) -> list[Token]:
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._changed:
                if reply._tokens:
                    taken = list(reply._tokens)
                    reply._tokens.clear()
                    return taken
                if reply.error is not None:
                    raise reply.error
                if reply.finish_reason is not None or time.monotonic() >= deadline_s:
                    return []
                if self._served:
                    self._changed.wait(min(IDLE_S, max(0.0, deadline_s - time.monotonic())))
                    continue
            self.step()

    def wait(self, seconds: float) -> None:
        """Lets this time pass; if nobody serves, it goes into work."""
        if self._served:
            time.sleep(seconds)
            return
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and self.step():
            pass

    @property
    def num_running(self) -> int:
        """How many requests are being answered."""
        with self._changed:
            return len(self._running)

    def warm_up(self) -> None:
        """Takes all the memory that the slots and the longest prompt will need, so that nobody waits for it later."""
        self._decoder.cache.buffer.zero_()
        with torch.inference_mode():
            self._decoder.read(0, [0] * self.context)

    def serve(self) -> None:
        """Does the work until `close`."""
        while not self._closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting, timeout=IDLE_S)

    def close(self) -> None:
        """Ends what is going on, and `serve`."""
        with self._changed:
            self._closed = True
            for reply in [*self._waiting, *(each.reply for each in self._running)]:
                self._end(reply, "cancelled")
            self._changed.notify_all()


def _chosen(each: _Running, logits: Tensor) -> GPT2Error | tuple[int, float, tuple[tuple[int, float], ...]]:
    """The token, its log-probability and the likeliest others, by logits (V,)."""
    total = float(logits.logsumexp(0))
    if not math.isfinite(total):
        return GPT2Error("the model gives numbers that are not finite; its weights are damaged")
    adjusted = penalised(logits, each.ids[each.start :], each.request.sampling.repetition_penalty)
    token = draw(adjusted, each.request.sampling, each.random)
    alternatives: tuple[tuple[int, float], ...] = ()
    if count := min(each.request.alternatives, logits.numel()):
        values, ids = logits.topk(count)
        alternatives = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return token, float(logits[token]) - total, alternatives


def _told(error: Exception) -> GPT2Error:
    if isinstance(error, GPT2Error):
        return error
    return GPT2Error(f"the model could not go on: {' '.join(str(error).split())[:200] or type(error).__name__}")


def write(engine: Engine, requests: Sequence[Request]) -> list[list[Token]]:
    """The tokens that an engine writes for each request, all at once."""
    replies = [engine.submit(request) for request in requests]
    return [list(reply) for reply in replies]
