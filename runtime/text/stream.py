"""Incremental detokenization, and stop strings.

Byte-level tokenizers may split a character over several tokens; the first part alone decodes to a replacement character
that the next token changes. `TextStream` holds back text that may still change, so that the joined deltas equal the
text that decoding all ids at once gives. `StopStrings` ends the text before the first stop string, and holds back text
that may begin one. Neither knows of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most three bytes are ever left unfinished at the end of the text.
_MAX_UNFINISHED = 3


class TextStream:
    """Incremental detokenizer of one answer.

    Args:
        tokenizer: anything with the `decode` of a transformers tokenizer. Special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A last settled token, for tokenizers whose spaces depend on it, and what is unsettled.
        self._ids: list[int] = []
        self._sent = 0  # characters of their text that were returned already

    def push(self, token: int) -> str:
        """Add one id; returns the text that is now final, often a word, sometimes nothing."""
        self._ids.append(token)
        text = self._decode(self._ids)
        unfinished = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_UNFINISHED)
        settled = max(self._sent, len(text) - unfinished)
        delta, self._sent = text[self._sent : settled], settled
        if not unfinished:
            self._forget()
        return delta

    def finish(self) -> str:
        """The text held back, at the end of the answer; resets the stream."""
        delta = self._decode(self._ids)[self._sent :]
        self._ids, self._sent = [], 0
        return delta

    def _forget(self) -> None:
        """Keep only the last token, so that the cost per token does not grow with the answer."""
        context = self._decode(self._ids[-1:])
        if context:  # a special token has no text, so it gives no context
            self._ids, self._sent = self._ids[-1:], len(context)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Ends a text before the first stop string; the joined result does not depend on how the text is split.

    Args:
        stops: non-empty strings. The first to be complete ends the text; of several, the longest.

    Attributes:
        found: whether a stop string was found; no text follows then.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # text that may begin a stop string
        self.found = False

    def push(self, text: str) -> str:
        """Add some text; returns what is certainly not part of a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        complete = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if complete:
            self.found = True
            settled, self._held = self._held[: min(complete)[1]], ""
            return settled
        keep = max(map(self._begun, self._stops))
        settled, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return settled

    def finish(self) -> str:
        """The text held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
