"""Words in any script: one normal form, and where a word may begin and end.

Chinese, Japanese, Thai, Lao, Khmer and Burmese write words without spaces between them, so there a word may begin and
end next to any letter. Elsewhere it may not begin or end inside a run of letters, digits and marks.
"""

import re
import unicodedata

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3040-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces between words, as ranges of a regular expression."""
MARKS = "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
"""Combining marks, which continue a word (`\\w` lacks them), with the letters between them."""
WORD = f"[{UNSPACED}]|[^\\W{UNSPACED}]+"
"""A word, or one letter of a script without spaces."""


def normalize(text: str) -> str:
    """The form in which texts are compared: without case, and with composed characters (NFC)."""
    if text.isascii():
        return text.lower()  # the same, at once
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def word_pattern(word: str, whole: bool = False) -> str:
    """A regular expression for a normalized word where a word may begin; if `whole`, also only where one may end."""
    unspaced = f"[{UNSPACED}]"
    begin = (whole or word[0].isalnum()) and not re.match(unspaced, word[0])
    end = whole and not re.match(unspaced, word[-1])
    return (
        (f"(?<![^\\W{UNSPACED}])(?<![{MARKS}])" if begin else "")
        + re.escape(word)
        + (f"(?![^\\W{UNSPACED}])" if end else "")
    )
