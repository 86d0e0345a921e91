"""What a model folder's tokenizer does in graft, compared with transformers and lm-evaluation-harness.

    python tests/soak/same_tokens.py qwen3 gemma3 FOLDER ... [--texts 1000] [--talks 50] [--scored 200] [--served 50]

A FOLDER has tokenizer.json and tokenizer_config.json; a name is one of tests/real_tokenizers.py. Compared are

- the tokens of texts, their text again, and what follows a prompt, at once and streamed; those of conversations
  (indentation, line breaks, several turns, thoughts) with `apply_chat_template`'s, when asked and as learned;
- `graft evaluate`, on a tiny random llama with this vocabulary: the labels' scores of --scored texts, with the harness;
- `graft serve`, on the same model: of every text and conversation the number of tokens of the prompt and the next
  token's log-probability; of --served each the greedy answer, token by token; and of as many sampled answers that the
  stream is the whole, and that each token is in the text where its offset says.

Prints what differs, a line for each folder and part; the exit status is 1 if anything does.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1]))
from graftlm import cli
from graftlm.models.config import to_file
from graftlm.text.chat import Chat
from graftlm.text.stream import TextStream
from graftlm.text.template import load_template
from graftlm.text.tokenizer import BROKEN, Tokenizer
from real_tokenizers import SHA256, tokenizer_folder
from tiny import config_json, model_of

PIECES = (
    "Hello", "  indented", "\n\ndef f():\n    return x\n", "<think>\nlet me see\n</think>\n\nanswer", "正面。",
    "日本語のテキスト", "ภาษาไทย", "e\u0301", "é", " 1,600 ", "\t", "🙂👍🏽", "\r\n", "½ … film's", "<b>",
    "   ", "user", "x" * 30,
    "\u3000", "ﬁ", "(A", "don't",
)  # fmt: skip
Prompt = str | list[dict[str, str]]
"""A text, or messages."""
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


# On a model -----------------------------------------------------------------------------------------------------------


def random_folder(folder: Path, target: Path, theirs: Any, ours: Tokenizer) -> Path:
    """A folder of a tiny random llama with this tokenizer."""
    target.mkdir()
    for file in folder.glob("*token*"):
        shutil.copy(file, target)
    for file in folder.glob("chat_template.jinja"):
        shutil.copy(file, target)
    model = model_of("llama", dtype=torch.float32, vocab=max(len(theirs), ours.vocab_size), context=1024)
    ends = {"eos_token_id": theirs.eos_token_id, "bos_token_id": theirs.bos_token_id}
    (target / "config.json").write_text(json.dumps({**config_json(model.config, "llama"), **ends}))
    tensors = to_file(model.config, dict(model.named_parameters()))
    save_file({n: t.detach().clone() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def scores_differ(folder: Path, texts: Sequence[str]) -> tuple[float, int, int]:
    """The largest difference of `graft evaluate`'s scores from lm-evaluation-harness's, and how many were compared.

    Last, how many were left out because a token spans the boundary: there the harness feeds the model other tokens than
    those of the whole text.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness, worst, compared, spanned = HFLM(pretrained=str(folder), dtype="float32", device="cpu"), 0.0, 0, 0
    for number, (spec, labels) in enumerate(PROMPTS):
        template, own = load_template(spec, labels), texts[number :: len(PROMPTS)]
        pairs = [(template.prompt(text), template.completion(n)) for text in own for n in range(len(template.labels))]
        asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        expected = [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]
        found = [row["scores"][label] for row in evaluated(folder, own, spec, labels) for label in template.labels]
        for (prompt, completion), mine, value in zip(pairs, found, expected, strict=True):
            context, continuation = harness._encode_pair(prompt, completion)
            if context + continuation != harness.tok_encode(prompt + completion):
                spanned += 1
                continue
            worst, compared = max(worst, abs(mine - value)), compared + 1
    return worst, compared, spanned


def evaluated(folder: Path, texts: Sequence[str], template: str, labels: str) -> list[dict[str, Any]]:
    """The rows of `graft evaluate --predictions`."""
    with tempfile.TemporaryDirectory() as scratch:
        data, predictions = Path(scratch) / "data.jsonl", Path(scratch) / "predictions.jsonl"
        data.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts))
        words = [f"--init_from={folder}", f"--data={data}", f"--template={template}", f"--labels={labels}"]
        words += ["--mode=score", "--dtype=float32", "--device=cpu", f"--predictions={predictions}", "--json"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = cli.run(["evaluate", *words])
        assert status == 0, errors.getvalue()
        return [json.loads(line) for line in predictions.read_text().splitlines()]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a running `graft serve`."""
    words = ["serve", f"--init_from={folder}", "--dtype=float32", "--device=cpu", "--port=0", "--json"]
    command = [sys.executable, "-m", "graftlm", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@dataclass(frozen=True)
class Answer:
    """A choice of the server: its text, tokens, and the numbers of tokens."""

    text: str
    tokens: list[tuple[str, float, Any]]
    """Text, log-probability, and in completions the offset, in chats the bytes."""
    usage: tuple[int, int]

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]]) -> "Answer":
        """parts: a whole answer, or the events of a stream."""
        text, tokens = "", []
        for choice in (part["choices"][0] for part in parts if part["choices"]):
            message = choice.get("message") or choice.get("delta") or choice
            text += message.get("text") or message.get("content") or ""
            found = choice.get("logprobs") or {}
            tokens += [(each["token"], each["logprob"], each["bytes"]) for each in found.get("content") or ()]
            tokens += zip(*(found.get(key) or () for key in ("tokens", "token_logprobs", "text_offset")), strict=True)
        usage = parts[-1]["usage"]
        return cls(text, tokens, (usage["prompt_tokens"], usage["completion_tokens"]))


def ask(url: str, prompt: Prompt, limit: int, **settings: Any) -> Answer:
    """What the server says to a text, or to messages; with stream=True in a stream."""
    chat = not isinstance(prompt, str)
    body = {"messages": prompt, "logprobs": True} if chat else {"prompt": prompt, "logprobs": 0}
    more = {"stream_options": {"include_usage": True}} if settings.get("stream") else {}
    content = json.dumps({"model": "model", "max_tokens": limit, **body, **settings, **more}).encode()
    address = f"{url}/v1/{'chat/completions' if chat else 'completions'}"
    request = urllib.request.Request(address, content, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")][:-1] or lines
    return Answer.of([json.loads(event) for event in events])


@dataclass(frozen=True)
class Served:
    """Compares `graft serve` with transformers' own model of the same folder."""

    url: str
    theirs: Any
    model: Any
    stops: list[int]

    def differs(self, prompt: Prompt, limit: int) -> bool:
        """Whether the greedy answer, its tokens' log-probabilities or the numbers of tokens are others."""
        ids = self._ids(prompt)
        with torch.no_grad():
            made = self.model.generate(
                torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=self.stops, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        new = made.sequences[0, len(ids) :].tolist()
        values = [row[0].log_softmax(-1)[token].item() for row, token in zip(made.logits, new, strict=True)]
        if new[-1] in self.stops:
            new, values = new[:-1], values[:-1]
        before, whole, alone = (self.theirs.decode(part, skip_special_tokens=True) for part in (ids, ids + new, new))
        found = ask(self.url, prompt, limit, temperature=0)
        # Bytes that break the last characters of the prompt: byte fallback decodes neighbouring bytes together.
        text = whole[len(before) :] if whole.startswith(before) else alone
        same = found.text == text and found.usage == (len(ids), len(new))
        same &= len(found.tokens) == len(values)
        return not (same and all(abs(a[1] - b) < 1e-3 for a, b in zip(found.tokens, values, strict=True)))

    def stream_differs(self, prompt: Prompt, seed: int) -> bool:
        """Whether a sampled answer is another in a stream, or a token is not at its offset."""
        settings = {"temperature": 2, "seed": seed}
        whole, streamed = ask(self.url, prompt, 24, **settings), ask(self.url, prompt, 24, stream=True, **settings)
        if isinstance(prompt, str):
            places = [place for _, _, place in whole.tokens]
            in_place = all(
                token.startswith("bytes:") or self._is_special(token) or whole.text[place:].startswith((token, BROKEN))
                for token, _, place in whole.tokens
            )
            in_place &= places == sorted(places)
        else:
            written = b"".join(bytes(each or ()) for _, _, each in whole.tokens)
            in_place = BROKEN in whole.text or written.decode() == whole.text
        return whole != streamed or not in_place

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.theirs(prompt).input_ids)
        options = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
        return list(self.theirs.apply_chat_template(prompt, **options))

    def _is_special(self, token: str) -> bool:
        return token in self.theirs.all_special_tokens or token in self.theirs.get_added_vocab()


def served_differ(
    folder: Path, tokenizers: tuple[Tokenizer, Any], kinds: Sequence[Sequence[Prompt]], full: int
) -> tuple[int, int]:
    """How many prompts are answered otherwise, and how many answers are others in a stream.

    tokenizers: ours and theirs. kinds: texts, and conversations. full: of how many of each whole answers are compared.
    """
    ours, theirs = tokenizers
    stops = ours.stop_tokens | (Chat(ours).stop_tokens if ours.chat_template is not None else frozenset())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers, streams = 0, 0
    with server(folder) as url:
        served = Served(url, theirs, model, sorted(stops))
        for prompts in kinds:
            answers += sum(served.differs(prompt, 12 if n < full else 1) for n, prompt in enumerate(prompts))
            streams += sum(served.stream_differs(prompt, n) for n, prompt in enumerate(prompts[:full]))
    return answers, streams


# Everything -----------------------------------------------------------------------------------------------------------


def compare(name: str, flags: argparse.Namespace) -> bool:
    """Compare one tokenizer, and say what differs. Returns whether anything does."""
    source = tokenizer_folder(name) if name in SHA256 else Path(name)
    chance, ours, theirs = random.Random(0), Tokenizer.from_folder(source), AutoTokenizer.from_pretrained(source)
    texts = [written(chance, 8) for _ in range(flags.texts)]
    talks = [conversation(chance) for _ in range(flags.talks if ours.chat_template is not None else 0)]
    wrong = [texts_differ(ours, theirs, texts), talks_differ(ours, theirs, talks) if talks else 0]
    lines = [f"{wrong[0]} of {len(texts)} texts and {wrong[1]} of {len(talks)} conversations differ"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_folder(source, Path(scratch) / "model", theirs, ours)
        if flags.scored:
            worst, compared, spanned = scores_differ(folder, texts[: flags.scored])
            left = f" ({spanned} left out: a token spans the boundary)" if spanned else ""
            lines.append(f"evaluate: {compared} label scores differ by {worst:.1e} at most{left}")
            wrong.append(worst > 1e-3)
        if flags.served:
            asked: list[list[Prompt]] = [
                [text.rstrip() for text in texts],
                [[{"role": role, "content": content} for role, content in talk[:-1]] for talk in talks],
            ]
            answers, streams = served_differ(folder, (ours, theirs), asked, flags.served)
            lines.append(f"serve: {answers} of {len(texts)} + {len(talks)} answers differ, {streams} streams")
            wrong += [answers, streams]
    print("\n".join(f"{name}: {line}" for line in lines), flush=True)
    return any(wrong)


def main(words: list[str]) -> int:
    """Compare each tokenizer; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    for name, default in (("texts", 1000), ("talks", 50), ("scored", 200), ("served", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(words)
    disable_progress_bar()
    return int(sum(compare(name, flags) for name in flags.folders) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
