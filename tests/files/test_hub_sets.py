"""27 popular data sets of the hub, laid out as they are there: the tree, the card, and the columns with their types.

They are served on loopback and read by name, as `graft train --data NAME` does. The texts are made up. Two of them are
nothing but a script, which is never run; all others are read.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.text.dataset import Dataset
from graftlm.text.records import Record
from graftlm.text.template import load_template
from graftlm.training.data import check_records, objectives_for, read_data, with_labels
from hub_mirror import serve

ROWS = {"train": 12}
"""Rows of each file of a split; 3 of any other."""
TAIL = "-00000-of-00001.parquet"
REVIEW = {"text": "review %d", "label": (0, 1)}
NEGATIVE = ("neg", "pos")
GLUE = {"sentence": "sentence %d", "label": (0, 1), "idx": 0}
PAIR = {"premise": "premise %d", "hypothesis": "hypothesis %d", "label": (0, 1, 2), "idx": 0}
ASKED, SAID = {"role": "user", "content": "ask %d"}, {"role": "assistant", "content": "say %d"}
BAD = {"role": "assistant", "content": "mumble %d"}
BINARIZED = {"prompt": "ask %d", "prompt_id": "x", "chosen": [ASKED, SAID], "rejected": [ASKED, BAD]}
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "ask %d"},
    {"from": "gpt", "value": "say %d"},
]
MESSAGE = {
    "message_id": "m%d",
    "parent_id": None,
    "user_id": "u",
    "created_date": "2023",
    "text": "ask %d",
    "role": "prompter",
}
REPLY = {**MESSAGE, "message_id": "r%d", "parent_id": "m%d", "text": "say %d", "role": "assistant"}
LAST = {"rank": None, "message_tree_id": "m%d", "tree_state": "ready_for_export", "lang": "en", "deleted": False}


def splits(folder: str, *names: str, **row: Any) -> dict[str, dict[str, Any]]:
    """One parquet file for each split."""
    return {f"{folder}{name}{TAIL}": row for name in names}


def configs(default: str = "", **folders: str) -> str:
    """The front matter of a card: configurations, and the splits in a folder of the same name."""
    lines = []
    for name, names in folders.items():
        files = ", ".join(f"{{split: {split}, path: {name}/{split}-*}}" for split in names.split())
        lines.append(f"- {{config_name: {name}, data_files: [{files}]{', default: true' * (name == default)}}}")
    return "configs:\n" + "\n".join(lines)


def data(*names: str) -> str:
    """The same with one configuration in data/."""
    return configs(data=" ".join(names)).replace("config_name: data", "config_name: default")


@dataclass(frozen=True)
class Hub:
    """A data set of the hub, and what is read of it."""

    files: dict[str, Any]
    """Rows by path: one, repeated with its number for %d and the next of a tuple's values; or a text."""
    read: str = ""
    """The layout, and the columns that are not read."""
    splits: str = "train validation test"
    """Those of the data set; a missing one is held out, unless it is test."""
    first: Any = None
    """A part of the first record of train."""
    card: str = ""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The names of labels in the schema of parquet files."""
    labels: str = ""
    """The label words that are taken."""
    choose: str = ""
    """What follows the name: a configuration, a kind of splits."""
    flags: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    """The error without `choose`, of which the data set has several parts; alone: it cannot be read."""


MANY = "train validation_matched validation_mismatched test_matched test_mismatched"
HUB = {
    "cornell-movie-review-data/rotten_tomatoes": Hub(
        {f"{name}.parquet": REVIEW for name in ("train", "validation", "test")},
        "labelled (text, label)",
        first="review 0",
        card="dataset_info: {features: [{name: text, dtype: string}]}",
        classes={"label": NEGATIVE},
        labels="negative,positive",
    ),
    "stanfordnlp/imdb": Hub(
        splits("plain_text/", "train", "test", "unsupervised", **REVIEW),
        "labelled (text, label)",
        "train test",
        "review 0",
        configs("plain_text", plain_text="train test unsupervised"),
        {"label": NEGATIVE},
        "negative,positive",
    ),
    "stanfordnlp/sst2": Hub(
        {**splits("data/", "train", "validation", **GLUE), **splits("data/", "test", **{**GLUE, "label": -1})},
        "labelled (sentence, label); columns not read: idx",
        "train validation",
        "sentence 0",
        data("train", "validation", "test"),
        {"label": ("negative", "positive")},
        "negative,positive",
    ),
    "nyu-mll/glue": Hub(
        {
            **{f"mnli/{name}{TAIL}": PAIR if "test" not in name else {**PAIR, "label": -1} for name in MANY.split()},
            **splits("sst2/", "train", "validation", **GLUE),
        },
        "labelled (premise, hypothesis, label); columns not read: idx",
        "train validation",
        "premise: premise 0\nhypothesis: hypothesis 0",
        configs(mnli=MANY, sst2="train validation"),
        {"label": ("entailment", "neutral", "contradiction")},
        "entailment,neutral,contradiction",
        ":mnli:matched",
        refused="nyu-mll/glue: holds several data sets, mnli, sst2: name one, as in NAME:mnli",
    ),
    "fancyzhx/ag_news": Hub(
        splits("data/", "train", "test", text="news %d", label=(0, 1, 2, 3)),
        "labelled (text, label)",
        "train test",
        "news 0",
        data("train", "test"),
        {"label": ("World", "Sports", "Business", "Sci/Tech")},
        "World,Sports,Business,Sci/Tech",
    ),
    "dair-ai/emotion": Hub(
        {
            **splits("split/", "train", "validation", "test", text="i feel %d", label=(0, 1, 2, 3, 4, 5)),
            **splits("unsplit/", "train", text="i feel more %d", label=(0, 1)),
            "data/train.jsonl.gz": {"text": "i felt %d", "label": 0},
        },
        "labelled (text, label)",
        first="i feel 0",
        card=configs("split", split="train validation test", unsplit="train"),
        classes={"label": ("sadness", "joy", "love", "anger", "fear", "surprise")},
        labels="sadness,joy,love,anger,fear,surprise",
    ),
    "cardiffnlp/tweet_eval": Hub(
        {
            **splits("sentiment/", "train", "validation", "test", text="tweet %d", label=(0, 1, 2)),
            **splits("irony/", "train", "test", text="oh %d", label=(0, 1)),
        },
        "labelled (text, label)",
        first="tweet 0",
        card=configs(irony="train test", sentiment="train validation test"),
        classes={"label": ("negative", "neutral", "positive")},
        labels="negative,neutral,positive",
        choose=":sentiment",
        refused="cardiffnlp/tweet_eval: holds several data sets, irony, sentiment: name one, as in NAME:irony",
    ),
    "fancyzhx/yelp_polarity": Hub(
        splits("plain_text/", "train", "test", **REVIEW),
        "labelled (text, label)",
        "train test",
        "review 0",
        configs(plain_text="train test"),
        {"label": ("1", "2")},
        "negative,positive",
    ),
    "PolyAI/banking77": Hub(
        {"banking77.py": "raise SystemExit", "dataset_infos.json": "{}"},
        refused="no train, validation or test file",
    ),
    "CogComp/trec": Hub(
        {"trec.py": "raise SystemExit", "dataset_infos.json": "{}"}, refused="no train, validation or test file"
    ),
    "google/boolq": Hub(
        splits("data/", "train", "validation", question="is it %d", answer=(True, False), passage="It is %d."),
        "question about a text (passage, question, answer)",
        "train validation",
        "Context: It is 0.\nQuestion: is it 0\nAnswer:",
        data("train", "validation"),
    ),
    "rajpurkar/squad": Hub(
        splits(
            "plain_text/",
            "train",
            "validation",
            **{"id": "%d", "title": "Fox", "context": "The fox %d is red.", "question": "What is %d?"},
            answers={"text": ["red"], "answer_start": [13]},
        ),
        "question about a text (context, question, answers); columns not read: id, title",
        "train validation",
        "Context: The fox 0 is red.\nQuestion: What is 0?\nAnswer:",
        configs(plain_text="train validation"),
    ),
    "openai/gsm8k": Hub(
        {
            **splits("main/", "train", "test", question="How many %d?", answer="They are <<%d>>.\n#### 2"),
            **splits("socratic/", "train", "test", question="Why %d?", answer="#### 2"),
        },
        "completion (question, answer)",
        "train test",
        "How many 0?",
        configs(main="train test", socratic="train test"),
        choose=":main",
        refused="openai/gsm8k: holds several data sets, main, socratic: name one, as in NAME:main",
    ),
    "tatsu-lab/alpaca": Hub(
        {
            "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": {
                **{"instruction": "Say %d", "input": "", "output": "say %d", "text": "Below is … %d"},
            }
        },
        "alpaca (instruction, output); columns not read: text",
        "train",
        "### Instruction:\nSay 0\n",
        "dataset_info: {features: [{name: instruction, dtype: string}]}",
    ),
    "yahma/alpaca-cleaned": Hub(
        {"alpaca_data_cleaned.json": [{"instruction": "Say %d", "input": "it %d", "output": "say %d"}]},
        "alpaca (instruction, output)",
        "train",
        "### Input:\nit 0\n",
    ),
    "databricks/databricks-dolly-15k": Hub(
        {
            "databricks-dolly-15k.jsonl": {
                **{"instruction": "Say %d", "context": "", "response": "say %d", "category": "open_qa"}
            }
        },
        "alpaca (instruction, response, context); columns not read: category",
        "train",
        "### Instruction:\nSay 0\n",
    ),
    "OpenAssistant/oasst1": Hub(
        {
            "data/train-00000-of-00001-b42a775f407cee45.parquet": [{**MESSAGE, **LAST}, {**REPLY, **LAST, "rank": 0}],
            "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": [
                {**MESSAGE, **LAST},
                {**REPLY, **LAST, "rank": 0},
            ],
            "2023-04-12_oasst_ready.trees.jsonl.gz": {"message_tree_id": "m%d", "prompt": {}},
        },
        "best branch of OASST's messages (message_id, parent_id, text, role); columns not read: created_date, deleted, "
        "lang, message_tree_id, tree_state, user_id",
        "train validation",
        [("user", "ask 0"), ("assistant", "say 0")],
        data("train", "validation"),
    ),
    "timdettmers/openassistant-guanaco": Hub(
        {
            f"openassistant_best_replies_{name}.jsonl": {"text": "### Human: ask %d### Assistant: say %d"}
            for name in ("train", "eval")
        },
        "guanaco (text)",
        "train test",
        [("user", "ask 0"), ("assistant", "say 0")],
    ),
    "teknium/OpenHermes-2.5": Hub(
        {
            "openhermes2_5.json": [
                {
                    **{"custom_instruction": None, "topic": None, "model": None, "skip_prompt_formatting": False},
                    **{"category": "orca", "conversations": SHAREGPT, "source": "x", "id": None, "hash": None},
                    **{"language": None, "views": None, "title": None, "system_prompt": None, "idx": None},
                }
            ]
        },
        "sharegpt (conversations); columns not read: category, skip_prompt_formatting, source",
        "train",
        [("system", "Be kind."), ("user", "ask 0"), ("assistant", "say 0")],
    ),
    "Open-Orca/SlimOrca": Hub(
        {
            "oo-labeled_correct.gpt4.sharegpt.jsonl": {
                "conversations": [
                    {**turn, "weight": weight} for turn, weight in zip(SHAREGPT, (None, 0.0, 1.0), strict=True)
                ]
            }
        },
        "sharegpt (conversations)",
        "train",
        [("system", "Be kind."), ("user", "ask 0"), ("assistant", "say 0")],
    ),
    "HuggingFaceH4/ultrachat_200k": Hub(
        {
            f"data/{split}_{kind}-00000-of-00001-a3ecf92756993583.parquet": {
                **{"prompt": "ask %d", "prompt_id": "x", "messages": [ASKED, SAID]}
            }
            for split in ("train", "test")
            for kind in ("sft", "gen")
        },
        "chat (messages); columns not read: prompt, prompt_id",
        "train test",
        [("user", "ask 0"), ("assistant", "say 0")],
        data("train_sft", "test_sft", "train_gen", "test_gen"),
        choose=":sft",
        refused="train_sft and train_gen both say they are the train split: name one, as in NAME:sft or NAME:gen",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": Hub(
        {
            f"data/{split}_{kind}{TAIL}": {**BINARIZED, "messages": [ASKED, SAID], "score_chosen": 8.5}
            for split in ("train", "test")
            for kind in ("prefs", "sft", "gen")
        },
        "preference (chosen, rejected); columns not read: messages, prompt_id, score_chosen",
        "train test",
        [("user", "ask 0")],
        data("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
        choose=":prefs",
        refused="train_prefs and train_sft and train_gen both say they are the train split: name one",
    ),
    "Anthropic/hh-rlhf": Hub(
        {
            f"{kind}/{split}.jsonl.gz": {
                "chosen": "\n\nHuman: ask %d\n\nAssistant: say %d",
                "rejected": "\n\nHuman: ask %d\n\nAssistant: mumble %d",
            }
            for kind in ("harmless-base", "helpful-base")
            for split in ("train", "test")
        },
        "preference (chosen, rejected)",
        "train test",
        "\n\nHuman: ask 0\n\nAssistant:",
        choose=":harmless-base",
        refused="holds several data sets, harmless-base, helpful-base: name one, as in NAME:harmless-base",
    ),
    "HuggingFaceH4/no_robots": Hub(
        splits("data/", "train", "test", prompt="ask %d", prompt_id="x", messages=[ASKED, SAID], category="Chat"),
        "chat (messages); columns not read: category, prompt, prompt_id",
        "train test",
        [("user", "ask 0"), ("assistant", "say 0")],
        data("train", "test"),
    ),
    "Salesforce/wikitext": Hub(
        {
            path: row
            for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
            for path, row in splits(f"{name}/", "train", "validation", "test", text=("", " = Fox %d = \n")).items()
        },
        "documents (text)",
        first="",
        card=configs(**dict.fromkeys(("wikitext-103-raw-v1", "wikitext-2-raw-v1"), "train validation test")),
        choose=":wikitext-2-raw-v1",
        refused="Salesforce/wikitext: holds several data sets, wikitext-103-raw-v1, wikitext-2-raw-v1: name one",
    ),
    "roneneldan/TinyStories": Hub(
        {
            "TinyStories-train.txt": "Once.\n<|endoftext|>",
            "TinyStories-valid.txt": "Once.",
            "TinyStoriesV2-GPT4-train.txt": "Twice.",
            "data/train-00000-of-00002-2d5a1467fff1081b.parquet": {"text": "story %d"},
            "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": {"text": "tale %d"},
            "data/validation-00000-of-00001-869c898b519ad725.parquet": {"text": "story %d"},
            "Evaluation prompts.yaml": "- Once",
        },
        "documents (text)",
        "train validation",
        "story 0",
        "license: cdla-sharing-1.0",
    ),
    "abisee/cnn_dailymail": Hub(
        {
            path: row
            for name in ("1.0.0", "3.0.0")
            for path, row in splits(
                f"{name}/", "train", "validation", "test", article="It rains %d.", highlights="Rain %d.", id="x"
            ).items()
        },
        "completion (article, highlights); columns not read: id",
        first="It rains 0.",
        card=configs(**dict.fromkeys(("1.0.0", "3.0.0"), "train validation test")),
        choose=":3.0.0",
        refused="abisee/cnn_dailymail: holds several data sets, 1.0.0, 3.0.0: name one, as in NAME:1.0.0",
    ),
}


# Writing --------------------------------------------------------------------------------------------------------------


def filled(value: Any, number: int) -> Any:
    """A value of a row of this number."""
    if isinstance(value, tuple):
        return filled(value[number % len(value)], number)
    if isinstance(value, dict):
        return {key: filled(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, number) for item in value]
    return value.replace("%d", str(number)) if isinstance(value, str) else value


def content(path: str, rows: Any, classes: dict[str, tuple[str, ...]]) -> bytes:
    """The bytes of a file."""
    if isinstance(rows, str):
        return rows.encode()
    several = rows if isinstance(rows, list) else [rows]
    count = ROWS["train"] if "train" in path or "/" not in path else 3
    every = [filled(row, number) for number in range(count) for row in several]
    if path.endswith(".json"):
        return json.dumps(every).encode()
    if ".jsonl" in path:
        lines = "".join(json.dumps(row) + "\n" for row in every).encode()
        return gzip.compress(lines) if path.endswith(".gz") else lines
    features = {name: {"names": list(names), "_type": "ClassLabel"} for name, names in classes.items()}
    table = pyarrow.Table.from_pylist(every)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of them on a mirror, and an empty cache."""
    root = tmp_path_factory.mktemp("hub")
    for name, one in HUB.items():
        for path, rows in {**one.files, **({"README.md": f"---\n{one.card}\n---\n"} if one.card else {})}.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(content(path, rows, one.classes))
    with serve(datasets={name: root / name for name in HUB}) as mirror, pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.delenv(variable, raising=False)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_ENDPOINT", mirror.url)
        yield
        assert not any(request.endswith((".py", ".yaml")) for request in mirror.requests)


# Reading --------------------------------------------------------------------------------------------------------------


def read(name: str, flags: dict[str, str]) -> tuple[Dataset, str]:
    """The records, and the label words: as `graft train` reads them."""
    config = with_labels(TrainConfig(data=name, **flags), {*flags})
    dataset = read_data(config, {*flags}, load_template(config.template, config.labels))
    check_records(dataset, next(iter(objectives_for(dataset.splits["train"][0])), config.objective))
    return dataset, config.labels


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", HUB)
def test_a_data_set_of_the_hub(name: str) -> None:
    one = HUB[name]
    if one.refused:
        with pytest.raises(InputError) as error:
            read(name, one.flags)
        assert one.refused in str(error.value)
    if not one.read:
        return
    dataset, labels = read(name + one.choose, one.flags)
    note = next(note for note in dataset.notes if ": read as " in note)
    assert note.removeprefix(f"{name}{one.choose}: read as ") == one.read
    assert labels == (one.labels or "negative,positive")
    held_out = {"train": {"validation", "test"}, "train test": {"validation"}}.get(one.splits, set())
    assert dataset.splits.keys() == {*one.splits.split()} | held_out
    records = [record for split in ("train", *held_out) for record in dataset.splits[split]]
    assert len(records) == ROWS["train"] * (1 + (name == "roneneldan/TinyStories"))
    assert any(one.first == said(record) or str(one.first) in str(said(record)) for record in records)


def said(record: Record) -> Any:
    """The text, prompt or messages of a record."""
    given = getattr(record, "messages", getattr(record, "prompt", record.text))
    return given if isinstance(given, str) else [*given]


def test_at_least_25_of_27_are_read() -> None:
    assert len(HUB) == 27 and sum(bool(one.read) for one in HUB.values()) >= 25
