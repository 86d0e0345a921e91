"""Keys and values of texts that were read, by adapter: a prompt that begins like one of them is read from there on.

    known = cache.find("reviews", prompt[:-1])       the longest common beginning, or None
    cache.add("reviews", tokens, row_cache)          after a row has ended

An adapter's keys and values are never used for another one or for the base. Memory is bounded: of more than
`max_tokens` tokens, those that were not used for the longest time are dropped.

Letters: S tokens of a text, K key/value heads, D head dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from graftlm.models import KVCache
from graftlm.text.boundary import common_length

MIN_PREFIX = 8
"""A common beginning of fewer tokens is read again."""


@dataclass(frozen=True, eq=False)
class ReadText:
    """Tokens that were read with an adapter, and their keys and values."""

    adapter: str | None
    tokens: Sequence[int]
    cache: Callable[[], KVCache]
    """Of one row: each tensor [1, K, S, D]."""

    def first(self, length: int) -> KVCache:
        """Keys and values of the first tokens; no copy."""
        cache = self.cache()
        return KVCache([k[:, :, :length] for k in cache.keys], [v[:, :, :length] for v in cache.values])


class PrefixCache:
    """Texts that were read, the last used one at the end."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._texts: list[ReadText] = []

    @property
    def size(self) -> int:
        """The tokens it holds."""
        return sum(len(text.tokens) for text in self._texts)

    def find(self, adapter: str | None, tokens: Sequence[int], running: Iterable[ReadText] = ()) -> KVCache | None:
        """The longest beginning of `tokens` that was read with this adapter; None if it is shorter than MIN_PREFIX.

        running: texts of rows that have not ended.
        """
        best, length = None, MIN_PREFIX - 1
        for text in (*self._texts, *running):
            if text.adapter == adapter and (found := common_length(tokens, text.tokens)) > length:
                best, length = text, found
        if best is None:
            return None
        if best in self._texts:
            self._texts.remove(best)
            self._texts.append(best)
        return best.first(length)

    def add(self, adapter: str | None, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep a text (its keys and values are copied), instead of those that it begins with."""
        new, kept = tuple(tokens), list[ReadText]()
        if not MIN_PREFIX <= len(new) <= self.max_tokens:
            return
        for text in self._texts:
            common = common_length(new, text.tokens) if text.adapter == adapter else -1
            if common == len(new):
                return
            if common < len(text.tokens):
                kept.append(text)
        copy = KVCache([k.clone() for k in cache.keys], [v.clone() for v in cache.values])
        self._texts = [*kept, ReadText(adapter, new, lambda: copy)]
        while self.size > self.max_tokens:
            del self._texts[0]
