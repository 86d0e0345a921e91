"""Documents: every token is in one window, and the loss is the plain one on the same tokens, as nanoGPT has it."""

import contextlib
import io
import json
import math
import shlex
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console

from graftlm import cli
from graftlm.cli import display
from graftlm.config import DataConfig, TrainConfig
from graftlm.errors import InputError, Interrupted
from graftlm.exchange.load import load
from graftlm.files.formats import read_json
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import fingerprint, load_dataset
from graftlm.text.preflight import show_targets
from graftlm.text.records import Document
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.windows import windows
from graftlm.training import trainer as trainer_module
from graftlm.training.batches import CollateOptions
from graftlm.training.data_report import describe_data
from graftlm.training.objectives.sft import SFT
from graftlm.training.train import train
from tiny import model_folder, piece_tokenizer

TEMPLATE = load_template("sentiment")
TEXTS = ["a document that is longer than three windows are", "short", "", "ein Text: äöü €", " \n", "the last one"]
EOT = 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("documents") / "model", "gpt2")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(*texts: str) -> list[Document]:
    return [Document(text, f"corpus.txt:{n}") for n, text in enumerate(texts, 1)]


def plain_tokens(base: Path, texts: list[str]) -> list[int]:
    """All documents as nanoGPT's prepare.py writes them, by transformers' tokenizer."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    return [token for text in texts if text.strip() for token in (*tokenizer(text)["input_ids"], EOT)]


def examples(base: Path, max_length: int, *texts: str) -> list[Example]:
    return encode_rows(documents(*texts), TEMPLATE, Tokenizer.from_folder(base), max_length)[0]


def ids_of(example: Example) -> list[int]:
    return [*example.prompt_ids, *example.completion_ids]


@pytest.mark.parametrize("max_length", [3, 7, 13, 16, 40, 500])
def test_every_token_is_in_one_window_and_all_but_its_first_are_learned(base: Path, max_length: int) -> None:
    expected, found = plain_tokens(base, TEXTS), examples(base, max_length, *TEXTS)
    assert [token for example in found for token in ids_of(example)] == expected
    lengths = [example.length for example in found]
    assert all(length == max_length for length in lengths[:-2]) and 2 <= lengths[-1] <= max_length
    if len(lengths) > 1:  # a token on its own would have nothing that predicts it
        assert lengths[-2] == max_length - (len(expected) % max_length == 1)
    assert all(len(example.loss_positions) == example.length - 1 for example in found)


def test_a_last_window_of_one_token_takes_one_from_the_window_before(base: Path) -> None:
    found = list(windows(documents("123456", "89"), Tokenizer.from_folder(base), 9))
    assert [len(window.ids) for window in found] == [8, 2] and found[1].ids[-1] == EOT
    assert [window.source for window in found] == ["corpus.txt:1", "corpus.txt:2"]


def test_begin_of_text_stands_before_documents_and_not_before_windows(tmp_path: Path) -> None:
    piece_tokenizer(tmp_path, "first", ["one two three four"], eos_token="</s>", bos_token="<s>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    whole = [token for text in ("one two three", "four") for token in (*reference(text)["input_ids"], tokenizer.eot)]
    bos = tokenizer.encode_prompt("")[0]
    found = list(windows(documents("one two three", "four"), tokenizer, 4))
    assert [token for window in found for token in window.ids] == whole
    assert sum(window.ids.count(bos) for window in found) == 2 < len(found)


def test_the_loss_per_token_is_that_of_a_plain_loop_over_the_same_windows(base: Path) -> None:
    """nanoGPT's: cross entropy of the next token at every position, on the logits of transformers' model."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    tokens, total, count = torch.tensor(plain_tokens(base, TEXTS)), torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for window in tokens.split(16):
            total += F.cross_entropy(reference(window[None, :-1]).logits[0], window[1:], reduction="sum")
            count += len(window) - 1
    model = load(str(base), dtype="float32", device="cpu").model.double()
    found = examples(base, 16, *TEXTS)
    for loss_on in ("completion", "all"):
        batch = SFT(loss_on).collate(found, CollateOptions())
        loss, _ = SFT(loss_on).loss(model, batch)
        assert batch.weight == count
        assert abs(loss.item() / count - total.item() / count) <= 1e-9


@pytest.mark.parametrize("max_length", [3, 7, 40])
def test_with_packing_no_window_holds_tokens_of_two_documents(base: Path, max_length: int) -> None:
    some = documents(*TEXTS, "a", "123456")
    found = list(windows(some, Tokenizer.from_folder(base), max_length, isolated=True))
    for document in some:
        own = [window.ids for window in found if window.source == document.source]
        assert [token for ids in own for token in ids] == plain_tokens(base, [document.text])
        assert all(len(ids) == max_length for ids in own[:-2]) and (not own or 2 <= len(own[-1]) <= max_length)
    if max_length == 3:  # of the 7 tokens of "123456", which would leave one alone, the second window gives one
        assert [len(window.ids) for window in found[-4:]] == [2, 3, 2, 2]


def test_documents_without_a_token_and_windows_that_are_too_short_are_refused(base: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    with pytest.raises(InputError, match="the documents have no text: write some"):
        list(windows(documents("", " \n"), tokenizer, 16))
    with pytest.raises(InputError, match="--max_length 2: windows of documents take at least 3 tokens"):
        list(windows(documents("text"), tokenizer, 2))


def test_columns_about_documents_are_named_and_others_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "url": "u", "id": n} for n in range(20)]
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(str(path))
    assert dataset.splits["train"][0] == Document("text 0", f"{path}:1")
    assert dataset.notes[-1] == f"{path}: read as documents (text); columns not read: id, url"
    path.write_text("".join(json.dumps({**row, "mark": 1}) + "\n" for row in rows))
    with pytest.raises(InputError, match="no column 'label': "):
        load_dataset(str(path))


def test_the_fingerprint_is_that_of_the_texts() -> None:
    one, other = documents("a", "b"), documents("b", "a")
    assert fingerprint({"train": one}) != fingerprint({"train": other})
    assert fingerprint({"train": one}) == fingerprint({"train": [Document(d.text, "elsewhere") for d in one]})


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {n:2} of a book\n" for n in range(100))
    dataset = load_dataset(str(write(tmp_path / "book.jsonl", [text])))
    parts = [dataset.splits[split][0].text for split in ("train", "validation", "test")]
    assert "".join(parts) == text and [len(part.splitlines()) for part in parts] == [80, 10, 10]
    assert any("held out from train at a text's end (train 1, validation 1, test 1 rows)" in n for n in dataset.notes)
    unbroken = load_dataset(str(write(tmp_path / "line.jsonl", ["abcdefghij" * 10])))
    assert unbroken.splits["validation"][0].text == "abcdefghij"
    for texts in ([text, text], ["short"]):
        with pytest.raises(InputError, match=r"too few different texts \(1\) to hold out"):
            load_dataset(str(write(tmp_path / "few.jsonl", texts)))


# Runs -----------------------------------------------------------------------------------------------------------------


def config(base: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    corpus = str(write(data / "train.jsonl", [f"text {n}: {'x' * n}" for n in range(30)] + [""]))
    val = str(write(data / "validation.jsonl", ["text 3: xxx", "another one"]))
    settings: dict[str, Any] = {
        "max_iters": 4,
        "eval_every": 2,
        "batch_size": 4,
        "rank": 4,
        "max_length": 16,
        "seed": 3,
    }
    return TrainConfig(
        init_from=str(base), data=corpus, val_data=val, out_dir=str(out), device="cpu", **{**settings, **more}
    )


@pytest.mark.parametrize("packing", [False, True])
def test_training_is_that_of_a_plain_loop_over_the_stream(base: Path, tmp_path: Path, packing: bool) -> None:
    """nanoGPT's loop: x = ids[i : i + 15], y = ids[i + 1 : i + 16], clip, AdamW, on transformers' model.

    One step sees the whole corpus, so that the order of windows does not matter. With packing there is a stream for
    each document.
    """
    flags = config(
        base,
        tmp_path,
        tmp_path / "run",
        rank=0,
        lr=1e-2,
        batch_size=100,
        dtype="float32",
        packing=packing,
        eval_every=4,
    )
    train(flags)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in Path(flags.data).read_text().splitlines()]
    streams = [plain_tokens(base, [text]) for text in texts if text] if packing else [plain_tokens(base, texts)]
    inputs, targets = list[torch.Tensor](), list[torch.Tensor]()
    for ids in map(torch.tensor, streams):
        starts = list(range(0, len(ids), 16))
        starts[-1] -= len(ids) - starts[-1] == 1  # nothing predicts a token on its own
        for start, stop in pairwise([*starts, len(ids)]):
            inputs.append(ids[start : stop - 1])
            targets.append(ids[start + 1 : stop])
    x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    y = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)  # not counted
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for row in rows:
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert row["train_loss"] == pytest.approx(loss.item(), rel=2e-5)
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"]


def test_a_run_says_what_the_windows_hold_and_prints_perplexity(base: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    train(config(base, tmp_path, tmp_path / "run"), console=Console(file=printed, width=200))
    notes = read_json(tmp_path / "run" / "run.json")["notes"]
    tokens = [len(f"text {n}: {'x' * n}") + 1 for n in range(30)]
    windows_of = -(-sum(tokens) // 16)
    assert (
        f"windows of at most 16 tokens, all but the first learned: train 30 documents, {sum(tokens)} tokens, "
        f"{windows_of} windows; validation 2 documents, 24 tokens, 2 windows"
    ) in notes
    assert "1 of 31 documents in train are empty, and left out" in notes
    assert [note for note in notes if "in both" in note] == ["1 text is in both train and validation"]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    loss = row["val_loss"]
    assert f"val loss {loss:.4f} (perplexity {math.exp(loss):.4g})" in printed.getvalue()


def test_an_interrupted_run_on_documents_resumes_to_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(base, tmp_path, tmp_path / "whole", dropout=0.1))

    def interrupt(*arguments: Any, **options: Any) -> None:
        printed(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    printed = trainer_module.print_eval
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer_module, "print_eval", interrupt)
        train(config(base, tmp_path, tmp_path / "parts", dropout=0.1))
    with pytest.raises(InputError, match="--resume with --max_length 12: the run has 16"):
        train(config(base, tmp_path, tmp_path / "parts", dropout=0.1, max_length=12, resume=True))
    train(config(base, tmp_path, tmp_path / "parts", dropout=0.1, resume=True))
    (weights,) = (tmp_path / "whole" / "last").glob("adapter_model.safetensors")
    assert (tmp_path / "parts" / "last" / weights.name).read_bytes() == weights.read_bytes()


def test_a_tokenizer_without_end_of_text_is_one_clear_error(base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text("{}")
    tokens = (base / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(tokens.replace("<|endoftext|>", "<|other|>"))
    values = read_json(broken / "config.json")
    (broken / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token_id"}))
    with pytest.raises(InputError, match="names no token that ends a text: add eos_token_id"):
        train(config(broken, tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_graft_data_shows_the_beginning_of_windows(base: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [f"text {n}: {'x' * n}" for n in range(90)])
    report = describe_data(DataConfig(data=str(corpus), init_from=str(base)), {"data", "init_from"})
    assert (report["objective"], report["layouts"]) == ("sft", ["documents (text)"])
    sizes = report["splits"]["train"]
    assert sizes["targets"] == sizes["tokens_per_epoch"] - sizes["examples"]
    shown = report["examples"][0]["text"]
    assert shown.startswith("t⟦e⟧⟦x⟧") and shown.endswith("… and 56 more tokens") and shown.count("⟦") == 39
    flags = DataConfig(data=str(corpus), init_from=str(base), packing=True)
    isolated = describe_data(flags, {"data", "init_from", "packing"})["splits"]["train"]
    assert isolated["examples"] >= isolated["rows"] > sizes["examples"]
    assert isolated["targets"] == isolated["tokens_per_epoch"] - isolated["examples"]


def test_a_short_window_is_shown_whole(base: Path) -> None:
    (one,) = examples(base, 16, "abc")
    assert show_targets(one, Tokenizer.from_folder(base)) == "a⟦b⟧⟦c⟧⟦<|endoftext|>⟧"


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluated(*words: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.run(["evaluate", *words, "--json", "--device=cpu"]) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_documents_are_evaluated_by_their_loss_per_token(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "held-out.jsonl", TEXTS)
    found = evaluated(f"--init_from={base}", f"--data={file}", "--max_length=16", "--dtype=float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for window in torch.tensor(plain_tokens(base, TEXTS)).split(16):
            total += F.cross_entropy(reference(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
            count += len(window) - 1
    assert found.keys() == {"n", "windows", "tokens", "loss", "perplexity", "tokens_per_s"}
    assert (found["n"], found["tokens"]) == (4, count)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    few = evaluated(f"--init_from={base}", f"--data={file}", "--max_length=16", "--limit=3")
    assert few["n"] <= 3 and few["tokens"] < count


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_is_evaluated_in_its_own_windows(base: Path, tmp_path: Path, packing: bool) -> None:
    flags = config(base, tmp_path, tmp_path / "run", dtype="float32", packing=packing)
    result = train(flags)
    found = evaluated(f"--out_dir={tmp_path / 'run'}", "--split=validation", "--checkpoint=last", "--dtype=float32")
    assert found["n"] == 2 and found["windows"] == 2
    assert found["loss"] == pytest.approx(result["last"]["val_loss"], rel=1e-6)


def test_train_names_the_commands_that_follow(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(config(base, tmp_path, tmp_path / "run"))
    display.train(Console(width=300), result)
    follow = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert [line.split()[1] for line in follow] == ["evaluate", "generate", "report", "export"]
    assert cli.run(shlex.split(follow[0])[1:]) == 0 and "perplexity" in capsys.readouterr().out


def test_the_loss_is_shown_as_a_table(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "held-out.jsonl", TEXTS)
    assert cli.run(["evaluate", f"--init_from={base}", f"--data={file}", "--max_length=16"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:5] == ["documents", "windows", "predicted", "tokens", "loss"]
    assert words[-6] == "4"


def test_flags_about_labels_are_refused_for_documents(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "held-out.jsonl", TEXTS)
    assert cli.run(["evaluate", f"--init_from={base}", f"--data={file}", "--shots=2", "--split=test"]) == 2
    assert "--shots 2: is for texts with labels, and these are documents: drop it" in capsys.readouterr().err
