"""reports/evaluate/segment_losses.json: the loss of each segment of the held-out text.

Two runs with the same held-out tokens have the same segments, whatever their sequence length, so that their losses can
be compared in pairs.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gpt2.evaluation.bootstrap import SegmentSums

DECIMALS = 5
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SegmentLosses:
    """The losses of the segments of a held-out text, in its order.

    sha256: of the held-out tokens. tokens: predicted ones, all but the first. segment_tokens: of each segment but the
    last. losses: mean nats per token of each. byte_counts: of its text. bits_per_byte: of its text, without
    `<|endoftext|>`; 0 for a segment without text. Arrays are (number of segments,).
    """

    sha256: str
    tokens: int
    segment_tokens: int
    losses: Column
    bits_per_byte: Column
    byte_counts: Column

    @property
    def lengths(self) -> Column:
        """The tokens of each segment."""
        starts = np.arange(len(self.losses)) * self.segment_tokens
        return np.minimum(self.segment_tokens, self.tokens - starts).astype(np.float64)

    @classmethod
    def of(cls, sums: "SegmentSums", sha256: str) -> "SegmentLosses":
        """The losses of a model. sha256: of the held-out tokens."""
        starts = np.arange(len(sums.nats)) * sums.segment_tokens
        lengths = np.minimum(sums.segment_tokens, sums.num_targets - starts)
        bits = sums.text_nats / np.log(2) / np.maximum(1, sums.byte_counts)
        return cls(sha256, sums.num_targets, sums.segment_tokens, sums.nats / lengths, bits, sums.byte_counts)

    def to_json(self) -> str:
        """The content of the file: an array is a line."""
        rows = {
            "sha256": self.sha256,
            "tokens": self.tokens,
            "segment_tokens": self.segment_tokens,
            "losses": [round(loss, DECIMALS) for loss in self.losses.tolist()],
            "bits_per_byte": [round(bits, DECIMALS) for bits in self.bits_per_byte.tolist()],
            "bytes": self.byte_counts.astype(np.int64).tolist(),
        }
        lines = [
            f'  "{key}": {json.dumps(value, separators=(",", ":"), allow_nan=False)}' for key, value in rows.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: bytes | str) -> "SegmentLosses":
        """Reads the content of the file. Raises ValueError if it is damaged."""
        content = json.loads(text)
        try:
            columns = [np.array(content[key], dtype=np.float64) for key in ("losses", "bits_per_byte", "bytes")]
            found = cls(str(content["sha256"]), int(content["tokens"]), int(content["segment_tokens"]), *columns)
        except (KeyError, TypeError) as error:
            raise ValueError(f"segment losses without {error}") from None
        if found.tokens < 1 or found.segment_tokens < 1:
            raise ValueError("segment losses without tokens")
        shape = (-(-found.tokens // found.segment_tokens),)
        if any(column.shape != shape or not np.isfinite(column).all() for column in columns):
            raise ValueError("segment losses of another number of segments, or not finite")
        return found
