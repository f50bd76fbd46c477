"""Incremental detokenization."""

import codecs
from collections.abc import Sequence

from gpt2.tokenizer import token_bytes


class Detokenizer:
    """Incremental text of tokens. Holds back incomplete characters, and text that may be a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that a token adds; with `last`, also the text held back. Sets `stopped` at a stop string."""
        return self._release(self._decoder.decode(token_bytes(token), final=last), last)

    def flush(self) -> str:
        """The text held back so far, when no more tokens follow."""
        return self._release(self._decoder.decode(b"", final=True), True)

    def _release(self, new: str, last: bool) -> str:
        text, self._held = self._held + new, ""
        if found := [position for stop in self.stop if (position := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        if not last:
            longest = max((len(stop) - 1 for stop in self.stop), default=0)
            for length in range(min(longest, len(text)), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self.stop):
                    self._held = text[-length:]
                    return text[:-length]
        return text
