"""Turning a stream of tokens into text as it grows. Decides when the bytes seen so far are whole characters."""

from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 16  # tokens; a character has at most 4 bytes, so longer runs are not one character


class TextStream:
    """Incremental detokeniser: the pieces it returns, joined, are the decoded text.

    Tokens may hold parts of characters, and tokenizers may decode a token differently behind another, so a window of
    tokens is decoded before and after each new one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was returned
        self._context = 0  # first token of the window

    def push(self, token_id: int) -> str:
        """Take a token and return the text it completes, which may be empty. Modifies."""
        self._ids.append(token_id)
        before, after = self._decode(self._context, self._shown), self._decode(self._context, len(self._ids))
        if after.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _MAX_PENDING:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def end(self) -> str:
        """Return the text of tokens still held back. Modifies."""
        before, after = self._decode(self._context, self._shown), self._decode(self._context, len(self._ids))
        self._shown = len(self._ids)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
