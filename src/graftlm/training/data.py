"""The data of a run: read, checked and tokenized; `graft train` and `graft data` share these functions."""

from collections.abc import Set
from dataclasses import dataclass, replace

from graftlm.config import TrainConfig
from graftlm.config.flags import ChatFlag
from graftlm.config.training import OBJECTIVES
from graftlm.errors import InputError
from graftlm.exchange.load import is_chat_tuned
from graftlm.inference.decoder import MAX_PASS_TOKENS
from graftlm.methods import Method
from graftlm.models.config import ModelConfig
from graftlm.text.boundary import label_ids
from graftlm.text.collate import subset
from graftlm.text.dataset import Dataset, default_labels, load_dataset
from graftlm.text.example_table import ExampleTable, ExampleWriter
from graftlm.text.labels import taken_from_data
from graftlm.text.parts import encode_parts
from graftlm.text.preflight import BACKSLASH, ControlTokens, JoinedWords, Preflight, conversation_notes, document_notes
from graftlm.text.records import Document, Labelled, Record, as_messages, has_texts, is_chat, is_finished
from graftlm.text.template import AUTO_LABELS, DEFAULT, DEFAULT_LABELS, Template, load_template, read_columns
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.batches import TrainingData
from graftlm.training.objectives import objective_class
from graftlm.training.run_manifest import InitSource
from graftlm.training.token_cache import DataKey, PreparedData, TokenCache

# Maximum tokens per micro-batch on a CPU: a typical batch of 16 reviews fits. Of 320, 384, 512 and 640 this was the
# fastest on an AMD Zen 3 in float32, with 4% less memory than 640 (--microbatch_tokens).
CPU_TOKENS = 512
MAX_ASKED = 6  # labels that a note names


def with_labels(config: TrainConfig, explicit: Set[str]) -> TrainConfig:
    """The config with the label words that the data names, unless --labels is given (auto: as if it is not)."""
    if "labels" in explicit and config.labels != AUTO_LABELS:
        return config
    columns = read_columns(config, load_template(config.template))
    return replace(config, labels=default_labels(config.data, columns))


def read_data(config: TrainConfig, explicit: Set[str], template: Template) -> Dataset:
    """The records, with notes on flags that are not used; an InputError if there is no train split."""
    dataset = load_dataset(
        config.data,
        config.val_data,
        config.test_data,
        read_columns(config, template),
        template.label_values,
        config.bad_rows,
        on_disk=True,
    )
    if "train" not in dataset.splits:
        raise InputError(f"--data {dataset.name}: has no train split; it has {', '.join(dataset.splits)}")
    unused = sorted({"template", "labels"} & explicit)
    if unused and not isinstance(dataset.splits["train"][0], Labelled):
        dataset.notes.append(f"--{' and --'.join(unused)} not used: only texts with labels are put into a template")
    labelled = isinstance(dataset.splits["train"][0], Labelled)
    if labelled and "labels" not in explicit and template.labels != tuple(DEFAULT_LABELS.split(",")):
        dataset.notes.append(taken_from_data(template.labels))
    if "\\n" in config.prompt + config.completion:
        dataset.notes.append("--prompt or --completion " + BACKSLASH)
    reviews = any(name in str(config.data) for name in ("tomatoes", "imdb"))
    if labelled and config.template == DEFAULT and "template" not in explicit and not reviews:
        asked = " or ".join((*template.labels[:MAX_ASKED], *["…"] * (len(template.labels) > MAX_ASKED)))
        dataset.notes.append(
            f"each text is put into the default template, which asks whether a movie review is {asked}: if it is no "
            "review, give --template and --labels"
        )
    return dataset


def objectives_for(record: Record) -> list[str]:
    """The objectives that train on this kind of record."""
    return [name for name in OBJECTIVES if isinstance(record, objective_class(name).records)]


def check_records(dataset: Dataset, objective: str) -> None:
    """Raise InputError if the objective does not train on the data's kind of record."""
    for record in (dataset.splits["train"][0], dataset.splits["validation"][0]):
        users = objectives_for(record)
        if objective not in users:
            raise InputError(
                f"--objective {objective}: {dataset.name} holds records for --objective {' or '.join(users)}; "
                f"{objective} needs {objective_class(objective).needs}"
            )


def chat_flag(flag: ChatFlag, source: InitSource, tokenizer: Tokenizer) -> ChatFlag:
    """--chat, where auto is off unless the model that training starts from is tuned for chat."""
    if flag != "auto":
        return flag
    learned = source.learned_chat
    tuned = is_chat_tuned(source.folder, tokenizer) if learned is None else learned
    return "auto" if tuned and tokenizer.chat_template is not None else "off"


def with_chat(flag: ChatFlag, dataset: Dataset, template: Template, tokenizer: Tokenizer) -> Template:
    """The template, in the model's chat template if --chat says so, with a note. flag: as of `chat_flag`.

    auto is on for prompts with answers, all of them texts that end. Raises InputError for on without a chat template.
    """
    record = dataset.splits["train"][0]
    if flag == "off" or is_chat(record) or (flag == "auto" and not has_texts(record)):
        return replace(template, chat=False)
    if flag == "auto":
        rows = (row for split in ("train", "validation") for row in dataset.splits[split])
        if count := sum(not is_finished(row) for row in rows):
            dataset.notes.append(f"--chat auto: off, as {count} answers are not finished, and a message ends its turn")
            return replace(template, chat=False)
    elif tokenizer.chat_template is None:
        raise InputError("--chat on: the base model has no chat template: use --chat off")
    elif isinstance(record, Document):
        raise InputError("--chat on: documents are learned as they are: leave --chat out")
    asked, said = ("texts", "labels") if isinstance(record, Labelled) else ("prompts", "answers")
    dataset.notes.append(
        f"{asked} are a user's and {said} the assistant's messages in the model's chat template (--chat {flag}); "
        "--chat off trains on plain text"
    )
    return replace(template, chat=True)


def max_example_tokens(config: TrainConfig, model: ModelConfig, method: Method) -> int:
    """Maximum tokens of an example: the model's context without the positions that the method takes."""
    limit = model.max_positions - method.positions
    if limit < 1:
        raise InputError(
            f"--prefix_length {config.prefix_length}: the model reads at most {model.max_positions} tokens; shorten it"
        )
    return min(config.max_length or limit, limit)


@dataclass(frozen=True)
class EncodedSplits:
    """The tokenized and checked records that a run reads, by split."""

    examples: dict[str, ExampleTable]
    truncated: dict[str, int]
    """How many of the texts are truncated."""
    notes: list[str]


def encode_splits(
    dataset: Dataset, val_limit: int, template: Template, tokenizer: Tokenizer, max_length: int, packing: bool = False
) -> EncodedSplits:
    """Tokenize and check train and `val_limit` rows of validation (0: all)."""
    records = {"train": dataset.splits["train"], "validation": subset(dataset.splits["validation"], val_limit)}
    checks, controls, joined = Preflight(template, tokenizer, max_length), ControlTokens(tokenizer), JoinedWords()
    examples, truncated = dict[str, ExampleTable](), dict[str, int]()
    for split, rows in records.items():
        writer, truncated[split] = ExampleWriter(), 0
        flags = {"score_labels": split == "validation", "packing": packing}
        for part, encoded, cut in encode_parts(rows, template, tokenizer, max_length, **flags):
            controls.add(split, as_messages(part) if template.chat else part)
            joined.add(() if template.chat else part)
            checks.add(split, encoded)
            writer.add(encoded)
            truncated[split] += cut
        examples[split] = writer.table()
    notes = [*dataset.notes, *joined.notes(), *conversation_notes(records, examples, tokenizer)]
    notes += document_notes(records, examples, max_length, packing)
    notes += [*controls.notes(), *checks.notes(truncated)]
    return EncodedSplits(examples, truncated, notes)


@dataclass(frozen=True)
class DataRequest:
    """What a run wants to read."""

    config: TrainConfig
    """Its flag chat is as of `chat_flag`."""
    explicit: Set[str]
    """The flags that were given."""
    recorded: Template | None
    """The template of the run that is resumed."""
    tokenizer: Tokenizer
    max_length: int
    """Tokens of an example."""

    def prepare(self) -> PreparedData:
        """Read, check and tokenize the data. Raises InputError for data that cannot be used."""
        config, template = self.config, self.recorded
        if template is None:
            config = with_labels(config, self.explicit)
            template = load_template(config.template, config.labels)
        dataset = read_data(config, self.explicit, template)
        check_records(dataset, config.objective)
        template = with_chat(config.chat, dataset, template, self.tokenizer)
        encoded = encode_splits(dataset, config.val_limit, template, self.tokenizer, self.max_length, config.packing)
        labelled = all(isinstance(dataset.splits[split][0], Labelled) for split in encoded.examples)
        return PreparedData(
            name=dataset.name,
            fingerprint=dataset.fingerprint,
            is_chat=is_chat(dataset.splits["train"][0]) or template.chat,
            in_chat=template.chat,
            labels=config.labels,
            label_ids=tuple(label_ids(template, self.tokenizer)) if labelled else (),
            notes=tuple(encoded.notes),
            examples=encoded.examples,
        )

    def cached(self, cache: TokenCache, recorded: str = "", is_writer: bool = True) -> PreparedData:
        """The data from the cache, or prepared and stored there.

        recorded: the name in the cache that the resumed run recorded, "" for another run.
        """
        key, notes = DataKey.of(self.config, self.explicit, self.tokenizer, self.max_length), list[str]()
        for name in dict.fromkeys(filter(None, (recorded, key.name))):
            try:
                if (found := cache.read(name, key)) is not None:
                    return found
            except InputError as error:
                notes.append(str(error))
        data = self.prepare()
        try:
            if is_writer:
                cache.write(key, data)
        except InputError as error:
            notes.append(f"tokens are not cached for a later start: {error}")
        return replace(data, cached_as=key.name, notes=(*data.notes, *notes))


def training_data(data: PreparedData, config: TrainConfig, tokenizer: Tokenizer) -> TrainingData:
    """The splits that a run reads."""
    # Passes without gradient keep one layer's activations, so they may have more tokens than a micro-batch.
    max_tokens = min(MAX_PASS_TOKENS, MAX_PASS_TOKENS // CPU_TOKENS * (config.microbatch_tokens or CPU_TOKENS))
    train, validation = data.examples["train"], data.examples["validation"]
    return TrainingData(train, validation, list(data.label_ids), tokenizer.stop_tokens, max_tokens)
