"""Where a prompt ends and its answer begins: the one rule for training, label scores, generation, pairs and the server.

The tokens are those of the whole text, prompt and answer together, and the answer begins after as many of them as the
prompt alone has (the rule of lm-evaluation-harness). White space at the end of a prompt, other than line breaks,
belongs to the answer: tokenizers keep the space before a word in the word's token, so a prompt that ends in a space
ends in a token that does not occur before a word.

    "Answer: " + "Paris"     ["Answer", ":"] + [" Paris"]

Where a token spans the boundary, the whole text has other tokens than the prompt before it, and a model that is given
the prompt is not given what was learned: `preflight` counts these. It is avoided by an answer that begins with a space,
or a prompt that ends in a line break.

    "A:\\n(" + "B"            ["A", ":\\n", "(B"], where the prompt alone is ["A", ":\\n", "("] in Qwen's tokenizer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from graftlm.errors import InputError
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """The tokens of a prompt and of one or several answers to it."""

    prompt: Tokens
    """What precedes every answer: all of the prompt's tokens, unless a token spans the boundary."""
    rest: Tokens
    """The other tokens of the prompt alone."""
    answers: tuple[Tokens, ...]
    """What follows `prompt` in each whole text."""
    skip: int
    """How many first tokens of every answer belong to the prompt: they are neither learned nor scored."""


def split_prompt(text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """A prompt, and the white space at its end that belongs to the answer: all but line breaks.

    Indentation goes with its line break where the tokenizer has tokens of both. A prompt of nothing but white space
    stays as it is.
    """
    if not text.strip():
        return text, ""
    end = len(text)
    while text[end - 1].isspace() and text[end - 1] not in "\r\n":  # an expression would take quadratic time
        end -= 1
    prompt = text[:end]
    if prompt != text and prompt.endswith(("\n", "\r")):
        alone, whole = tokenizer.encode(prompt), tokenizer.encode(text + "x")
        prompt = prompt if whole[: len(alone)] == alone else text.rstrip()
    return prompt, text[len(prompt) :]


def encode_answers(
    prompts: Sequence[tuple[str, list[int]]], answers: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> list[list[list[int]]]:
    """The tokens of each prompt, a text and its tokens, with each of its answers, as one text."""

    def is_separate(prompt: str, answer: str) -> bool:
        return tokenizer.splits_at_spaces and answer.startswith(" ") and prompt[-1:].strip() != ""

    pairs = [(prompt, answer) for (prompt, _), own in zip(prompts, answers, strict=True) for answer in own]
    separate = list(dict.fromkeys(answer for prompt, answer in pairs if is_separate(prompt, answer)))
    wholes = list(dict.fromkeys(prompt + answer for prompt, answer in pairs if not is_separate(prompt, answer)))
    own_ids = dict(zip(separate, tokenizer.encode_batch(separate), strict=True))
    whole_ids = dict(zip(wholes, tokenizer.encode_prompts(wholes), strict=True))
    return [
        [ids + own_ids[answer] if is_separate(prompt, answer) else whole_ids[prompt + answer] for answer in own]
        for (prompt, ids), own in zip(prompts, answers, strict=True)
    ]


def split_tokens(prompt: Sequence[int], wholes: Sequence[Sequence[int]]) -> Split:
    """The tokens of a prompt and of its answers, from those of the prompt alone and of each whole text.

    Where a whole text has no token after the prompt's ("(" and "(B" are one token each), the answers begin with the
    first token that the texts do not share.
    """
    shared = common_length(prompt, *wholes)
    answers = tuple(tuple(whole[shared:]) for whole in wholes)
    skip = len(prompt) - shared if all(len(whole) > len(prompt) for whole in wholes) else 0
    return Split(tuple(prompt[:shared]), tuple(prompt[shared:]), answers, skip)


def without_space(text: str, space: str) -> str:
    """A completion without the white space at its beginning that ends its prompt already."""
    return text[common_length(text, space) :]


def common_length(*items: Sequence[object]) -> int:
    """How many first elements all have in common."""
    shortest = min(items, key=len)
    if all(item[: len(shortest)] == shortest for item in items):  # nearly always
        return len(shortest)
    return sum(1 for _ in takewhile(lambda column: all(one == column[0] for one in column), zip(*items, strict=False)))


# Labels ---------------------------------------------------------------------------------------------------------------


def label_ids(template: Template, tokenizer: Tokenizer) -> list[Tokens]:
    """The tokens to score for each label after a short text; `Example.label_ids` has those after the example's own.

    Raises InputError if a label has no tokens, or two labels have equal ones.
    """
    ids = _label_split(template, tokenizer).answers
    for n, own in enumerate(ids):
        if not own:
            raise InputError(f"label word {template.labels[n]!r} has no tokens for this model: choose other --labels")
        for m, other in enumerate(ids[:n]):
            if own == other:
                pair = f"{template.labels[m]!r} and {template.labels[n]!r}"
                raise InputError(f"label words {pair} have equal tokens for this model: choose other --labels")
    return list(scored_labels(ids, tokenizer.eot))


def _label_split(template: Template, tokenizer: Tokenizer) -> Split:
    """A short text in the template, and every label after it."""
    prompt, space = split_prompt(template.prompt("a"), tokenizer)
    words = [template.completion(number) for number in range(len(template.labels))]
    prompt_ids, *wholes = tokenizer.encode_prompts([prompt, *(prompt + space + word for word in words)])
    return split_tokens(prompt_ids, wholes)


def scored_labels(labels: Sequence[Tokens], eot: int) -> tuple[Tokens, ...]:
    """The tokens to score for each label: its own, without end-of-text.

    If one label's tokens begin with another's ("good enough", "good") the longer one could never win, so end-of-text is
    scored too, for all labels.
    """
    is_prefix = any(b[: len(a)] == a for a, b in pairwise(sorted(labels)))
    return tuple(ids + (eot,) * is_prefix for ids in labels)


def longest_label(template: Template, tokenizer: Tokenizer, max_length: int) -> int:
    """Tokens of the longest label's completion. Raises InputError unless it and the template leave room for a text."""
    instruction = len(tokenizer.encode_prompt(template.head.rstrip(" ") + template.tail))
    words = [template.completion(number) for number in range(len(template.labels))]
    longest, word = max(
        (len(ids) + 1, word) for word, ids in zip(words, _label_split(template, tokenizer).answers, strict=True)
    )
    if longest >= max_length:
        raise InputError(
            f"completion longer than the context: {word!r} and end-of-text take {longest} tokens, and {max_length} "
            "fit with the prompt: use a shorter label word, or raise --max_length"
        )
    if instruction + longest >= max_length:
        raise InputError(
            f"no room for the text: template {template.name!r} takes {instruction} tokens and its completion "
            f"{longest}, and {max_length} fit: use a shorter template, or raise --max_length"
        )
    return longest
