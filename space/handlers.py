"""Event handlers of the page and the API."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from gpt2.errors import GPT2Error, UserError
from space import view
from space.service import DEFAULTS, MAX_SAMPLES, QUIET_S, Generate, requests_for, validate_settings

READY = "Ready."


class Handlers:
    """The event handlers of one model."""

    def __init__(
        self, metadata: dict[str, Any], generate: Generate, stop: Callable[[str | None], None] = lambda session: None
    ) -> None:
        """metadata: of the model, from manifest.json. stop: cancels the generation of a session."""
        self.metadata, self._generate, self._stop = metadata, generate, stop

    def generate_for_page(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields the content of the text boxes, the status line, the token probabilities and the link."""
        try:
            settings = validate_settings(dict(zip(DEFAULTS, values, strict=True)))
            unchanged = gr.skip()
            for progress in self._generate(requests_for(settings), request.session_hash):
                texts = [settings["prompt"] + "".join(token.text for token in tokens) for tokens in progress.samples]
                boxes = [texts[i] if i < len(texts) else "" for i in range(MAX_SAMPLES)]
                if None in progress.reasons:
                    yield (*boxes, progress.status_line(), unchanged, unchanged)
                else:
                    status = f"{progress.status_line()}, seed {settings['seed']}"
                    yield (*boxes, status, view.probabilities_html(progress.samples), view.link(settings))
        except GPT2Error as error:
            raise gr.Error(str(error), print_exception=False) from None

    def generate_for_api(
        self,
        prompt: str,
        max_new_tokens: float = DEFAULTS["max_new_tokens"],
        temperature: float = DEFAULTS["temperature"],
        top_k: float = DEFAULTS["top_k"],
        top_p: float = DEFAULTS["top_p"],
        repetition_penalty: float = DEFAULTS["repetition_penalty"],
        samples: float = DEFAULTS["samples"],
        stop: str = DEFAULTS["stop"],
        seed: float | None = DEFAULTS["seed"],
    ) -> Iterator[dict[str, Any]]:
        """Continues a prompt. Yields the text so far every half second; the last result has the log probabilities.

        prompt: at most 10,000 characters. max_new_tokens: 1 to 500. temperature: 0 (greedy) to 2. top_k: up to 500; 0
        is off. top_p: 0.01 to 1; 1 is off. repetition_penalty: 0.5 to 2; 1 is off. samples: 1 to 4. stop: generation
        ends before this text. seed: None draws one.
        """
        values = (prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, samples, stop, seed)
        try:
            settings = validate_settings(dict(zip(DEFAULTS, values, strict=True)))
            next_s, has_text = 0.0, False
            for progress in self._generate(requests_for(settings), None):
                is_first, has_text = progress.num_tokens > 0 and not has_text, progress.num_tokens > 0
                if None in progress.reasons and not is_first and time.monotonic() < next_s:
                    continue  # Gradio keeps every result until a client reads it
                next_s = time.monotonic() + QUIET_S
                logprobs = [[round(token.logprob, 4) for token in tokens] for tokens in progress.samples]
                yield {
                    "texts": ["".join(token.text for token in tokens) for tokens in progress.samples],
                    "logprobs": None if None in progress.reasons else logprobs,
                    "finish_reasons": progress.reasons,
                    "seed": settings["seed"],
                    "status": progress.status_line(),
                }
        except GPT2Error as error:
            raise gr.Error(str(error), print_exception=False) from None

    def cancel(self, request: gr.Request) -> None:
        """Ends the generation of this session; the text so far stays."""
        self._stop(request.session_hash)

    def settings_from_url(self, request: gr.Request) -> list[Any]:
        """The settings in the query of the page's URL, or the defaults, and a status line."""
        given = dict(request.query_params)
        values, status = {**DEFAULTS, "prompt": self.metadata["examples"][0]}, READY
        if given.keys() & DEFAULTS.keys():
            try:
                numbers = {name: float(given[name]) for name in given.keys() & DEFAULTS.keys() - {"prompt", "stop"}}
                texts = {name: given[name] for name in given.keys() & {"prompt", "stop"}}
                values = validate_settings({**DEFAULTS, **numbers, **texts})
            except (UserError, ValueError, OverflowError) as error:
                status = f"The link cannot be read ({error}). These are the default settings."
        return [*values.values(), status]
