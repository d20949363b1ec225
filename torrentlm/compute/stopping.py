"""Text as it grows, token by token, and when to stop. Needs a tokenizer and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torrentlm.records import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a decoder puts where bytes are no (complete) character yet."""

MAX_PENDING = 16  # tokens; no character is that long, so these bytes will never become one


class TextDecoder:
    """Turns tokens into text as they come: the pieces together are the text of all tokens decoded at once.

    What a token becomes may depend on its neighbours (spaces, bytes of one character), so it is decoded together with
    the piece before it. Each token is decoded a bounded number of times, however long the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._before: list[int] = []
        self._pending: list[int] = []
        self.unsure = ""

    def push(self, token: int) -> str:
        """The text that has become sure with this token; ``unsure`` is then what may still change."""
        self._pending.append(token)
        text = self._pending_text()
        if text and (not text.endswith(REPLACEMENT) or len(self._pending) >= MAX_PENDING):
            self._before, self._pending, self.unsure = self._pending, [], ""
            return text
        self.unsure = text
        return ""

    def finish(self) -> str:
        """What was still unsure, as it is."""
        text, self._pending, self.unsure = self._pending_text(), [], ""
        return text

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._before)
        return self._decode(self._before + self._pending)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopChecker:
    """Says after each token of one row whether to stop: ``"stop_token"``, ``"stop_string"`` or None.

    Stop strings are looked for in the text with special tokens, so one may be named by its text. ``tokenizer`` is only
    needed where there are stop strings.
    """

    def __init__(self, stop: Stop, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._tokens = frozenset(stop.tokens)
        self._strings = tuple(text for text in stop.strings if text)
        if self._strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._decoder = TextDecoder(tokenizer, skip_special_tokens=False) if tokenizer and self._strings else None
        self._overlap = max((len(text) for text in self._strings), default=1) - 1
        self._tail = ""

    def push(self, token: int) -> str | None:
        if token in self._tokens:
            return "stop_token"
        if self._decoder is None:
            return None
        text = self._tail + self._decoder.push(token)
        visible = text + self._decoder.unsure.rstrip(REPLACEMENT)
        self._tail = text[-self._overlap :] if self._overlap else ""
        return "stop_string" if any(string in visible for string in self._strings) else None


class TextStream:
    """The text to show, up to the first stop string and without it; what may be the beginning of one is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._strings = tuple(text for text in stop_strings if text)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes sure."""
        return "" if self.stopped else self._release(self._decoder.push(token), at_end=False)

    def finish(self) -> str:
        """The rest, after the last token."""
        return "" if self.stopped else self._release(self._decoder.finish(), at_end=True)

    def _release(self, text: str, at_end: bool) -> str:
        text = self._held + text
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = 0 if at_end else max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of ``text`` that ``string`` begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
