"""Whole texts, labels and conversations of a model folder's tokenizer, compared with transformers' and the harness's.

    python tests/soak/same_tokens.py FOLDER ... [--texts 1000] [--talks 50]

Compared are the tokens of texts, their text again, and what follows a prompt, at once and streamed; label scores with
those of lm-evaluation-harness's rule on a random model, to 1e-3; and the tokens of conversations (indentation, line
breaks, several turns, thoughts) with `apply_chat_template`'s, when asked and as learned. A folder needs tokenizer.json
and tokenizer_config.json. Prints one line for each folder; the exit status is 1 if anything differs.
"""

import argparse
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from graftlm.inference.scoring import score_labels
from graftlm.text.boundary import label_ids
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows
from graftlm.text.layouts import Labelled
from graftlm.text.stream import TextStream
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from tiny import model_of

PIECES = (
    "Hello", "  indented", "\n\ndef f():\n    return x\n", "<think>\nlet me see\n</think>\n\nanswer", "正面。",
    "日本語のテキスト", "ภาษาไทย", "e\u0301", "é", " 1,600 ", "\t", "🙂👍🏽", "\r\n", "½ … film's", "<b>",
    "   ", "user", "x" * 30,
    "\u3000", "ﬁ", "(A", "don't",
)  # fmt: skip
PROMPTS = (
    ("Review: {text}\nSentiment:", "negative,positive"),
    ("影评:{text}\n情感:", "负面,正面"),
    ("{text}情感是{label}", "正面,负面"),
    ("Q: {text}?\nA: ", "no,yes"),
    ("รีวิว: {text}. คือ", "แย่,ดี"),
)


def written(chance: random.Random, most: int) -> str:
    text = "".join(chance.choice(PIECES) + chance.choice(["", " ", "\n"]) for _ in range(chance.randint(1, most)))
    return text if text.strip() else "text"


def conversation(chance: random.Random) -> list[tuple[str, str]]:
    talk = [("system", written(chance, 3))] if chance.random() < 0.3 else []
    for _ in range(chance.randint(1, 4)):
        talk += [("user", written(chance, 5)), ("assistant", written(chance, 5))]
    return talk


def texts_differ(ours: Tokenizer, theirs: Any, texts: list[str]) -> int:
    """How many texts have other tokens or another decoded text, or a continuation that decoding changes."""
    differ = 0
    for text, more in zip(texts, [*texts[1:], texts[0]], strict=True):
        ids, whole = ours.encode_prompt(text), ours.encode_prompt(text + more)
        bare = theirs(text, add_special_tokens=False).input_ids
        same = ids == theirs(text).input_ids and ours.decode(ids) == theirs.decode(bare, skip_special_tokens=True)
        if whole[: len(ids)] == ids:
            stream = TextStream(ours, ids)
            streamed = "".join([*map(stream.add, whole[len(ids) :]), stream.finish()])
            forms = {unicodedata.normalize("NFC", s) for s in (more, streamed, ours.decode(whole[len(ids) :], ids))}
            same &= len(forms) == 1
        differ += not same
    return differ


def scores_differ(ours: Tokenizer, theirs: Any, texts: list[str]) -> float:
    """The largest difference from the harness's label scores, of prompts whose last token no label changes."""
    model, worst = model_of("llama", dtype=torch.float32, vocab=max(len(theirs), ours.vocab_size), context=512), 0.0
    for spec, labels in PROMPTS:
        template = load_template(spec, labels)
        examples, _ = encode_rows([Labelled(text, 0) for text in texts], template, ours, 512)
        found = score_labels(model, examples, label_ids(template, ours)).tolist()
        for example, row in zip(examples, found, strict=True):
            for number, own in enumerate(row):
                prompt = template.prompt(example.text)
                context = theirs(prompt).input_ids
                whole = theirs(prompt + template.completion(number)).input_ids
                if whole[: len(context)] != context or len(example.label_ids[number]) != len(whole) - len(context):
                    continue
                with torch.no_grad():
                    log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
                expected = sum(log_p[n - 1, whole[n]].item() for n in range(len(context), len(whole)))
                worst = max(worst, abs(own - expected))
    return worst


def talks_differ(ours: Tokenizer, theirs: Any, talks: list[list[tuple[str, str]]]) -> int:
    """How many conversations have other tokens than transformers', as a whole, as prompts, or as learned."""
    chat, differ = Chat(ours), 0
    for talk in talks:
        messages = [{"role": role, "content": content} for role, content in talk]

        def rendered(stop: int, messages: list[dict[str, str]] = messages, **options: bool) -> list[int]:
            return list(theirs.apply_chat_template(messages[:stop], tokenize=True, return_dict=False, **options))

        answers = [number for number, (role, _) in enumerate(talk) if role == "assistant"]
        parts = chat.conversations(talk)
        ends = [len(talk)] if len(parts) == 1 else [number + 1 for number in answers]
        same = [part.ids for part in parts] == [rendered(end) for end in ends]
        same &= sum(len(part.answers) for part in parts) == len(answers)
        for number in answers:
            same &= chat.encode(talk[:number]) == rendered(number, add_generation_prompt=True)
        differ += not same
    return differ


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--talks", type=int, default=50)
    flags, failed = parser.parse_args(words), False
    for folder in flags.folders:
        chance, ours, theirs = random.Random(0), Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
        texts = [written(chance, 8) for _ in range(flags.texts)]
        wrong, worst, line = texts_differ(ours, theirs, texts), scores_differ(ours, theirs, texts[:20]), ""
        if ours.chat_template is not None:
            talks = talks_differ(ours, theirs, [conversation(chance) for _ in range(flags.talks)])
            line, wrong = f", {talks} of {flags.talks} conversations differ", wrong + talks
        print(f"{folder}: {wrong} of {flags.texts} texts differ, label scores by {worst:.1e} at most{line}")
        failed |= wrong > 0 or worst > 1e-3
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
