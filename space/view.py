"""HTML of the model table and the tokens. Escapes all text from users and files."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gpt2 import tokenizer
from gpt2.inference.request import Token

LOSS_CURVE = "loss.png"
MAX_PICTURE_BYTES = 1_000_000
MAX_LINK_CHARACTERS = 4_000
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  const click = (id) => document.querySelector(id)?.click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); click("#generate"); }
  if (event.key === "Escape") click("#stop");
});
</script>"""
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
.generated textarea {font-family: ui-monospace, monospace; line-height: 1.5}
#status {min-height: 1.6em}
#model, #model a {overflow-wrap: anywhere}
#model table {width: 100%}
#model table, #model tr, #model td {border: 0 !important}
#model td {padding: .15em .5em .15em 0 !important; vertical-align: top}
#model td:first-child {color: var(--body-text-color-subdued); white-space: nowrap}
#model img {width: 100%; border-radius: 6px; background: white}
.tokens {font-family: ui-monospace, monospace; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere}
.tokens span {position: relative; border-radius: 3px;
  background: color-mix(in srgb, var(--primary-500) calc(var(--surprise) * 1%), transparent)}
.tokens span:hover {outline: 1px solid var(--primary-500)}
.tokens span:hover::after {content: attr(data-tip); position: absolute; z-index: 9; left: 0; top: 1.8em;
  white-space: pre; line-height: 1.4; padding: .5em .7em; border-radius: 6px; font-size: .85em; pointer-events: none;
  color: var(--body-text-color); background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); box-shadow: 0 2px 8px rgb(0 0 0 / .25)}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important}
  .tokens span:hover::after {position: fixed; left: 8px; right: 8px; top: auto; bottom: 8px}
}
"""


def model_table(metadata: dict[str, Any], dtype: str, kernels: str, folder: Path) -> str:
    """A table about the model, and its loss curve if there is one. kernels: what processes requests."""
    quantized = " (quantized)" if dtype in ("int8", "int4") else ""
    losses = metadata["dtype_losses"].get(dtype)
    measured = f", loss {losses:.4f}" if isinstance(losses, int | float) and math.isfinite(losses) else ""
    rows = {
        "parameters": f"{metadata['parameters']:,}",
        "layers × heads × width": f"{metadata['n_layer']} × {metadata['n_head']} × {metadata['n_embd']}",
        "corpus": f"{metadata['corpus']}, {metadata['corpus_characters']:,} characters",
        "training": f"{metadata['steps']:,} steps, {metadata['tokens']:,} tokens",
        "validation loss": f"{metadata['validation_loss']} nats per token",
        "perplexity": metadata["perplexity"],
        "bits per byte": metadata["bits_per_byte"],
        "context length": f"{metadata['context']:,} tokens",
        "dtype": dtype + quantized + measured,
        "kernels": kernels,
        "MLflow run": metadata["mlflow_run_id"],
        "git commit": str(metadata["git_commit"])[:12],
    }
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    note = metadata["fallback_reason"]
    warning = f"<p><b>A fallback corpus was used:</b> {escape(note)}</p>" if note else ""
    return f"<h3>This model</h3>{warning}<table>{lines}</table>{_picture(folder / LOSS_CURVE)}"


def _picture(path: Path) -> str:
    """A picture as a data URL: the Space serves no files."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_PICTURE_BYTES else b""
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG"):
        return ""
    encoded = base64.b64encode(data).decode()
    return f'<img alt="Loss on training and on held-out text, by step" src="data:image/png;base64,{encoded}">'


def percent(logprob: float) -> str:
    """A probability, given as its natural logarithm."""
    share = 100 * math.exp(logprob)
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" if share >= 0.1 else "under 0.1 %"


def probabilities_html(samples: Sequence[Sequence[Token]]) -> str:
    """Tokens coloured by probability, with the likeliest alternatives on hover."""
    if not any(samples):
        return ""
    parts = []
    for number, tokens in enumerate(samples, 1):
        heading = f"<p><b>Text {number}</b></p>" if len(samples) > 1 else ""
        parts.append(f'{heading}<div class="tokens">{"".join(map(_token, tokens))}</div>')
    return "".join(parts)


def _token(token: Token) -> str:
    # 0 for a certain token, 70 for a probability of 0.001 or less
    surprise = min(70.0, 70 * token.logprob / math.log(0.001))
    others = "\n".join(f"{percent(logprob):>11}  {_shown(token_id)}" for token_id, logprob in token.top_logprobs)
    tip = f"{_shown(token.id)}: {percent(token.logprob)}\n\nLikeliest tokens:\n{others}"
    text = escape(token.text).replace("\n", "⏎\n") or ("▪" if token.id == tokenizer.END_OF_TEXT else "")
    return f'<span style="--surprise:{surprise:.0f}" data-tip="{escape(tip, quote=True)}">{text}</span>'


def _shown(token_id: int) -> str:
    if token_id == tokenizer.END_OF_TEXT:
        return "(end of text)"
    text = tokenizer.decode([token_id])
    return text.replace(" ", "␣").replace("\n", "⏎") if text.strip(" \n") != text else text


def link(settings: dict[str, Any]) -> str:
    """A link that generates the same text again."""
    address = "?" + urlencode({name: value for name, value in settings.items() if value not in ("", None)})
    if len(address) > MAX_LINK_CHARACTERS:
        return ""
    return f'<a id="repeat" href="{escape(address, quote=True)}">Link to this text</a>'
