"""Text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes tokens one by one. Text that may be the beginning of a stop text is held back until that is known."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """`tokenizer`: of transformers, a fast one."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0  # characters
        self._stop, self._held = tuple(stop), ""
        self.stopped = False  # by a stop text

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        new = self._decoder.step(self._tokenizer, token) or ""
        self._decoded += len(new)
        self._held += new
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            done, self._held = self._held[: min(found)], ""
            return done
        kept = max((_overlap(self._held, text) for text in self._stop), default=0)
        done, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return done

    def end(self) -> str:
        """The text that was held back, at the end of an answer; incomplete characters are U+FFFD, as ever."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        done, self._held = self._held + whole[self._decoded :], ""
        self._decoded = len(whole)
        return done


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
