"""Import of Hugging Face weights, and conversion between their layout and ours."""

import torch
from torch import Tensor

from gpt2.config import PRESETS, GPTConfig
from gpt2.errors import UserError
from gpt2.model.transformer import GPT

CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_pretrained(source: str) -> GPT:
    """Loads a GPT-2 with `transformers`.

    source: a name on the Hub (`gpt2` ... `gpt2-xl`, or any other GPT-2) or a local folder. Raises UserError if the
    package transformers or the network is missing, or if the model is not a GPT-2.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise UserError(
            "loading Hugging Face weights needs the package transformers: pip install 'transformers>=5,<6'"
        ) from None
    # OpenAI's models by their full name: transformers would load a local folder gpt2, such as this package, instead
    location = f"openai-community/{source}" if source in PRESETS else source
    try:
        theirs = GPT2LMHeadModel.from_pretrained(location, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load GPT-2 from {source!r} (a name on the Hugging Face Hub, which needs a network, "
            f"or a local folder): {reason}"
        ) from None
    c = theirs.config
    if c.activation_function != "gelu_new" or c.layer_norm_epsilon != 1e-5 or not c.tie_word_embeddings:
        raise UserError(f"{source!r} differs from GPT-2 in its activation, its LayerNorm or its head")
    config = GPTConfig(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd
    )
    model = GPT(config)
    model.load_state_dict(swap_conv1d_layout(theirs.state_dict()))
    return model


def swap_conv1d_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts weights from our layout to Hugging Face's, or back.

    OpenAI's `Conv1D` stores (in, out) where `nn.Linear` stores (out, in).
    """
    return {
        name: weight.t().contiguous() if name.endswith(CONV1D_WEIGHTS) else weight
        for name, weight in state_dict.items()
    }
