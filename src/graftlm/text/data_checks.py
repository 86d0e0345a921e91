"""What training will really see, looked at before step 1: what cannot be meant stops the run, the rest is shown."""

from collections import Counter
from collections.abc import Mapping, Sequence

from graftlm.errors import InputError
from graftlm.text.collate import Example, label_ids, too_long
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer


def preflight(
    splits: Mapping[str, Sequence[Example]],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    cut: Mapping[str, int],
) -> list[str]:
    """Look at what a run will read, before its first step.

    Args:
        splits: the encoded examples by split; cut: how many of their texts were cut, by split.

    Returns lines to show: what is unusual but may be meant (texts in two splits, cut texts, one-sided labels), and
    last one example with each target token in ⟦brackets⟧. Raises InputError for what cannot be meant: a split without
    examples, an empty text, an unknown label, label words with equal tokens, a completion that is cut away or too long.
    """
    if any(example.label is not None for examples in splits.values() for example in examples):
        label_ids(template, tokenizer)
    for split, examples in splits.items():
        if not examples:
            raise InputError(f"split {split} has no examples")
        for example in examples:
            _check(example, template, tokenizer.eot, max_length)
    notes = _duplicates(splits)
    for split, examples in splits.items():
        if cut.get(split):
            notes.append(f"{cut[split]} of {len(examples)} texts in {split} are cut to fit {max_length} tokens")
        labels = Counter(example.label for example in examples)
        if len(labels) == 1 and len(examples) > 1 and examples[0].label is not None:
            notes.append(f"every example in {split} is labelled {template.labels[examples[0].label]!r}")
    if "\\n" in template.text:
        notes.append("the template holds a backslash and an n, not a line break: in a shell, write $'…\\n…'")
    shown = next((example for examples in splits.values() for example in examples), None)
    return [*notes, f"example: {show_targets(shown, tokenizer)}"] if shown else notes


def show_targets(example: Example, tokenizer: Tokenizer, width: int = 160) -> str:
    """An example as its tokens say it, in one line: the end of the prompt, then every target token in ⟦brackets⟧."""
    prompt = tokenizer.decode(list(example.prompt_ids), skip_special=False)
    prompt = prompt if len(prompt) <= width else "… " + prompt[-width:].partition(" ")[2]
    answers = [ids for ids in (example.completion_ids, example.rejected_ids) if ids]
    given = set().union(*example.masked_spans)
    targets = " rather than ".join(
        "".join(
            tokenizer.token(token) if place in given else f"⟦{tokenizer.token(token)}⟧"
            for place, token in enumerate(ids)
        )
        for ids in answers
    )
    return (prompt + targets).replace("\r", "\\r").replace("\n", "\\n")


def _check(example: Example, template: Template, eot: int, max_length: int) -> None:
    where, prompt = example.source, len(example.prompt_ids)
    answers = [ids for ids in (example.completion_ids, example.rejected_ids) if ids]
    longest = max(map(len, answers), default=0)
    if not example.text.strip():
        raise InputError(f"{where}: empty text")
    if example.label is not None and not 0 <= example.label < len(template.labels):
        raise InputError(f"{where}: unknown label {example.label}: the labels are {', '.join(template.labels)}")
    if not prompt:
        raise InputError(f"{where}: the prompt has no tokens")
    if not answers or (example.finished and any(len(ids) < 2 or ids[-1] != eot for ids in answers)):
        raise InputError(f"{where}: the completion is cut away, or lacks its end-of-text token")
    if example.completion_ids == example.rejected_ids:
        raise InputError(f"{where}: chosen and rejected have the same tokens: leave the pair out")
    if prompt + longest > max_length:
        raise InputError(f"{where}: {too_long(prompt, max_length - longest)}")


def _duplicates(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    notes, names = [], list(splits)
    texts = {split: {example.text for example in examples} for split, examples in splits.items()}
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            if both := len(texts[first] & texts[second]):
                notes.append(f"{_texts(both)} in both {first} and {second}")
    for split, examples in splits.items():
        seen: dict[str, set[object]] = {}
        for example in examples:
            if not example.rejected_ids:  # of one prompt there may be many pairs
                seen.setdefault(example.text, set()).add(example.completion_ids)
        if both := sum(len(answers) > 1 for answers in seen.values()):
            notes.append(f"{_texts(both)} in {split} with different answers")
        pairs = {(e.text, e.completion_ids, e.rejected_ids) for e in examples if e.rejected_ids}
        if turned := sum((text, rejected, chosen) in pairs for text, chosen, rejected in pairs) // 2:
            what = "pair stands" if turned == 1 else "pairs stand"
            notes.append(f"{turned} {what} in {split} the other way round too")
    return notes


def _texts(count: int) -> str:
    return "1 text is" if count == 1 else f"{count} texts are"
