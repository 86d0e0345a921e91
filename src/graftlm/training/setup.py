"""Everything before step 1: resolve the flags, load, install the method, read and check the data.

Nothing is written here, so a run that cannot start leaves nothing behind. On --resume the flags of the first start
hold; a flag given anew must agree with them (only --max_iters and --epochs may change the end of the run). Files are
recorded by their whole paths, and on another machine they may be named anew: what is in them must be the same.
"""

import math
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config import TrainConfig, parse_columns
from graftlm.errors import InputError
from graftlm.exchange.device import pick_device, pick_dtype
from graftlm.exchange.huggingface import base_hash, load_model, load_weights_into, meta_model
from graftlm.exchange.load import Loaded, check_base, read_run, read_tokenizer, resolve_path
from graftlm.files.locks import LOCK_NAME
from graftlm.methods import Method
from graftlm.methods.mergeable import mergeable_linears
from graftlm.models.base import CausalLM
from graftlm.text.collate import Dataset, Example, encode_rows, label_ids, load_dataset, preflight, subset
from graftlm.text.layouts import Preference, Unpaired
from graftlm.text.template import Template, load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.distributed import DistContext, shard, warmup_fsdp
from graftlm.training.init_from import InitSource, resolve_init, with_layer_range
from graftlm.training.loggers import check_loggers
from graftlm.training.preferences import DEFAULT_BETA, REFERENCE_FREE
from graftlm.training.reference_logps import NAME as REFERENCE
from graftlm.training.reference_logps import read_reference, reference_fingerprint, with_reference
from graftlm.training.run_manifest import run_manifest

CONTENT_CHECKED = {"init_from", "data", "val_data", "test_data"}
"""Flags that name files: given anew, they may stand elsewhere, since what is in them is held against what it was."""
# May differ between a start and its resume; all else decides the numbers.
RESUME_MUTABLE = {*CONTENT_CHECKED, "resume", "plan", "shard", "max_iters", "epochs", "wandb_project", "tensorboard"}

# Tokens of one pass on a CPU: a typical batch of 16 reviews fits, a long one runs in parts. Of 320, 384, 512 and 640
# this was the fastest on an AMD Zen 3 in float32, and took 4% less memory than 640 (--microbatch_tokens).
CPU_TOKENS = 512

PREFERENCE_RATE = 0.2
"""What preference training multiplies a method's default rate by: it starts from a model that is to be kept near."""


@dataclass
class RunContext:
    """A run that is ready to start."""

    config: TrainConfig
    """Resolved: rank, alpha, lr, max_iters, eval_every, warmup, max_length and beta are set."""
    method: Method
    loaded: Loaded
    train: list[Example]
    validation: list[Example]
    label_ids: list[list[int]]
    """The tokens scored for each label; empty where the data has no labels."""
    notes: list[str]
    run: dict[str, Any]
    """What run.json will hold."""
    reference: dict[str, Tensor] | None = None
    """Of pairs, what the start thinks of them, by split, where that is known."""
    world: DistContext = field(default_factory=DistContext)
    """This process among those of the run."""
    not_loaded: InitSource | None = None
    """What the run starts from, while its weights are not read: where they are to be cut over the processes."""

    @property
    def splits(self) -> dict[str, list[Example]]:
        """What is trained on and what is validated on."""
        return {"train": self.train, "validation": self.validation}

    def reference_fingerprint(self) -> dict[str, Any]:
        """What the reference's log-probabilities are of."""
        start = self.run["parent_run"]["sha256"] if self.run["parent_run"] else None
        return reference_fingerprint(self.splits, self.run["base"]["sha256"], start, self.run["dtype"])

    def attach_reference(self, sums: dict[str, Tensor]) -> None:
        """Give every pair what the start thinks of it."""
        self.reference = sums
        self.train = with_reference(self.train, sums["train"])
        self.validation = with_reference(self.validation, sums["validation"])

    @property
    def wants_reference(self) -> bool:
        """Whether its loss looks at the model that it starts from."""
        return self.config.objective == "dpo" and self.config.loss_type not in REFERENCE_FREE

    @property
    def out_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.out_dir)


def prepare(config: TrainConfig, given: Set[str] | None = None, world: DistContext | None = None) -> RunContext:
    """Check and load everything a run needs; `given` are the flags typed, None for those that differ from defaults."""
    world = world or DistContext()
    out_dir = Path(config.out_dir)
    config, previous = _resume_config(config, out_dir, given)
    check_loggers(config)
    origin = resolve_init(
        config, set() if previous is not None else _explicit_flags(config, given), previous is not None
    )
    template = _template(config, previous)
    device = pick_device(config.device if world.size == 1 else world.device_flag)
    _check_processes(config, origin, world)
    dtype, reason = _dtype(config, previous, device)
    folder = origin.folder
    data = load_dataset(config.data, config.val_data, config.test_data, parse_columns(config.columns), template.labels)
    _check_kind(data, config)
    tokenizer = read_tokenizer(folder)
    if previous is not None:
        check_base(folder, previous, out_dir)
        _check_data(data.fingerprint, previous, out_dir)
    with ThreadPoolExecutor(1) as beside:  # hashing takes one core, loading mostly the other
        hashing = beside.submit(lambda: previous["base"]["sha256"] if previous else base_hash(folder))
        several = world.size > 1 and (origin.method.is_full_finetune or config.shard)
        model = meta_model(folder, dtype) if several else load_model(folder, device, dtype)
    max_length = _max_example_tokens(config, model, origin.method)
    examples, notes = _examples(data, config, template, tokenizer, max_length)
    method = _method(config, origin, model, examples["train"], tokenizer)
    origin = replace(origin, method=method)
    method.install(model, torch.Generator().manual_seed(config.seed))
    if not several:
        origin.load_initial_adapter(model)
    start = _start(origin, model, previous, out_dir)
    model.set_dropout(config.dropout)
    model.use_fused_ops(config.fused)
    config = _resolved(config, method, len(examples["train"]), max_length, device)
    labelled = all(e.label is not None for some in examples.values() for e in some)
    loaded = Loaded(model, tokenizer, origin.base, folder, reason, template)
    run = run_manifest(
        config,
        method,
        loaded,
        data,
        examples,
        base_sha256=hashing.result(),
        start=start,
        device=device,
        dtype=dtype,
        notes=notes,
        previous=previous,
        world=world,
    )
    ids = label_ids(template, tokenizer) if labelled else []
    sets = examples["train"], examples["validation"]
    prepared = RunContext(
        config, method, loaded, *sets, ids, notes, run, world=world, not_loaded=origin if several else None
    )
    source = out_dir if previous else Path(config.reference) if config.reference else None
    if prepared.wants_reference and source is not None:
        prepared.attach_reference(read_reference(source, prepared.splits, prepared.reference_fingerprint()))
    return prepared


def _resume_config(
    config: TrainConfig, out_dir: Path, given: Set[str] | None
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The flags that hold, and what run.json says of the run that is gone on with; None: of a first start."""
    if not config.resume:
        check_out_dir(out_dir)
        return config, None
    previous = read_run(out_dir)
    if "imported" in previous:
        raise InputError(
            f"{out_dir}: was imported, without the state of an optimiser, so there is no training to go on with; "
            f"merge it (graft export --out_dir {out_dir} --merged --to FOLDER) and train that (--init_from FOLDER)"
        )
    return _resumed(config, previous["config"], given), previous


def _dtype(config: TrainConfig, previous: dict[str, Any] | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format, and why; of a resumed run what auto found then, so that the bits go on."""
    if previous is not None and config.dtype == "auto":
        return pick_dtype(previous["dtype"], device)[0], previous["dtype_reason"]
    return pick_dtype(config.dtype, device)


def _method(
    config: TrainConfig, origin: InitSource, model: CausalLM, train: Sequence[Example], tokenizer: Tokenizer
) -> Method:
    """The method, with what it takes from the model's depth and the run's prompts decided."""
    method = with_layer_range(config, origin, model.config.num_layers)
    if origin.adapter is not None:
        return method
    return method.resolve_init([e.prompt_ids for e in train], lambda text: tokenizer.encode_prompt(text))


def _max_example_tokens(config: TrainConfig, model: CausalLM, method: Method) -> int:
    """How many tokens an example may have, beside the positions that the method takes."""
    room = model.config.max_positions - method.positions
    if room < 1:
        raise InputError(
            f"--prefix_length {config.prefix_length}: the model reads at most "
            f"{model.config.max_positions} tokens; shorten it"
        )
    return min(config.max_length or room, room)


def _examples(
    data: Dataset, config: TrainConfig, template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[dict[str, list[Example]], list[str]]:
    """What is trained on and what is validated on, looked at, and the lines to show of it."""
    rows = {"train": data.splits["train"], "validation": subset(data.splits["validation"], config.val_limit)}
    encoded = {split: encode_rows(some, template, tokenizer, max_length) for split, some in rows.items()}
    examples = {split: some for split, (some, _) in encoded.items()}
    cut = {split: n for split, (_, n) in encoded.items()}
    return examples, [*data.notes, *preflight(examples, template, tokenizer, max_length, cut)]


def shard_and_load(prepared: RunContext) -> None:
    """Cut the weights over the processes, each of which reads what it holds; nothing where each holds the model."""
    if prepared.not_loaded is None:
        return
    model, method, world = prepared.loaded.model, prepared.method, prepared.world
    device, made = torch.device(prepared.run["device"]), [p for p in model.parameters() if p.device.type != "meta"]
    trained = [] if method.is_full_finetune else [p for p in model.parameters() if p.requires_grad]
    for p in made:
        p.data = p.data.to(device)
    shard(model, world, {*made, *trained})
    for linear in mergeable_linears(model):
        linear.merge_on_eval = False  # no rank has the full weight
    with world.same_error_on_all_ranks():
        load_weights_into(model, prepared.loaded.folder, device, model.dtype)
    method.init_from_base_weights(model)
    warmup_fsdp(model)
    prepared.not_loaded.load_initial_adapter(model)
    prepared.not_loaded = None


def _template(config: TrainConfig, previous: dict[str, Any] | None) -> Template:
    """Of a resumed run the one it was started with, wherever the file that held it may be now."""
    if previous is None:
        return load_template(config.template, config.labels)
    said = previous["template"]
    return Template(said["name"], said["text"], tuple(said["labels"]))


def _explicit_flags(config: TrainConfig, given: Set[str] | None) -> Set[str]:
    """The flags that were typed; where that is not known, those that differ from their defaults."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default} if given is None else given


def _check_kind(data: Dataset, config: TrainConfig) -> None:
    """An InputError where the data is pairs and the objective is not, or the other way round."""
    record = data.splits["train"][0]
    if isinstance(record, Unpaired):
        raise InputError(f"{data.name}: has one answer and true or false a row, which only --objective kto reads")
    if isinstance(record, Preference) == (config.objective == "dpo"):
        return
    if config.objective == "dpo":
        raise InputError(
            f"--objective dpo: {data.name} holds no pairs; give files with the fields prompt, chosen and rejected "
            "(graft pairs makes them)"
        )
    raise InputError(f"--objective {config.objective}: {data.name} holds pairs; train on them with --objective dpo")


def _start(
    origin: InitSource, model: CausalLM, previous: dict[str, Any] | None, out_dir: Path
) -> dict[str, str | None] | None:
    """What run.json says of the adapter that the run started from; None: it started from a base."""
    if origin.adapter is None:
        return None
    sha256 = origin.sha256(model.config)
    if previous is not None and previous["parent_run"]["sha256"] != sha256:
        raise InputError(
            f"{out_dir}: was started from {previous['parent_run']['run']}, which has changed since; restore it to go on"
        )
    return {"run": str(origin.adapter.resolve()), "sha256": sha256}


def check_out_dir(out_dir: Path) -> None:
    """An InputError unless a run can start there."""
    if (out_dir / "run.json").exists():
        raise InputError(f"--out_dir {out_dir}: holds a run already; add --resume to go on with it, or name another")
    if out_dir.is_file():
        raise InputError(f"--out_dir {out_dir}: is a file; name a folder")
    # By a first start that was killed before run.json stood:
    left = (LOCK_NAME, ".run.json.tmp-", REFERENCE, f".{REFERENCE}")
    if out_dir.is_dir() and any(not p.name.startswith(left) for p in out_dir.iterdir()):
        raise InputError(f"--out_dir {out_dir}: holds other files; name a folder that is empty or does not exist")


def _resumed(config: TrainConfig, recorded: dict[str, Any], given: Set[str] | None) -> TrainConfig:
    """The recorded flags with the new end of the run; an InputError if a flag given anew contradicts them."""
    changes: dict[str, Any] = {"resume": True}
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        was = recorded.get(f.name, None if f.default is MISSING else f.default)
        said = value != f.default if given is None else f.name in given
        if f.name in RESUME_MUTABLE:
            if f.name != "resume" and said:
                changes[f.name] = value
        elif said and f.name != "out_dir" and value != was:
            raise InputError(f"--resume with --{f.name} {value}: the run has {was}; leave it out, or start a new run")
    if "epochs" in changes and "max_iters" not in changes:
        changes["max_iters"] = None
    kept = {f.name: recorded[f.name] for f in fields(TrainConfig) if f.name in recorded}
    return replace(TrainConfig(**{**kept, "out_dir": config.out_dir}), **changes)


def _check_processes(config: TrainConfig, origin: InitSource, world: DistContext) -> None:
    """An InputError for what works in one process alone, or in several alone."""
    if world.size == 1 and config.shard and not config.resume:
        raise InputError("--shard: cuts the base over several processes: start with torchrun, or leave it out")
    if world.size == 1 or not origin.method.is_full_finetune:
        return
    several = "full fine-tuning in several processes cuts its weights over them, and then there is none of this"
    if config.train_layers:
        raise InputError(f"--train_layers {config.train_layers}: {several}: leave it out, or start without torchrun")
    if config.objective == "dpo" and config.kl_samples:
        raise InputError(f"--kl_samples {config.kl_samples}: {several}: give 0, or start without torchrun")


def _check_data(fingerprint: str, previous: dict[str, Any], out_dir: Path) -> None:
    if fingerprint != previous["data"]["fingerprint"]:
        raise InputError(
            f"{out_dir}: was trained on other data (fingerprint {previous['data']['fingerprint'][:12]}, "
            f"now {fingerprint[:12]}); restore the data, or start a new run"
        )


def _resolved(config: TrainConfig, method: Method, examples: int, max_length: int, device: torch.device) -> TrainConfig:
    """Every None decided, and the whole paths of files."""
    per_epoch = math.ceil(examples / config.batch_size)
    epochs = config.epochs
    if config.max_iters is None:
        epochs = 2.0 if epochs is None else epochs
        steps = max(1, math.ceil(epochs * per_epoch / config.grad_accum))
    else:
        steps = config.max_iters
    decided = {flag: getattr(method, field) for flag, field in method.flags.items()}
    decided |= {"targets": ",".join(decided["targets"])} if "targets" in decided else {}
    decided |= {"rank": 0} if method.is_full_finetune else {}
    microbatch_tokens = config.microbatch_tokens
    if microbatch_tokens is None:
        microbatch_tokens = CPU_TOKENS if device.type == "cpu" else 0
    # An error, until here, names a file as it was typed.
    places: dict[str, Any] = {name: resolve_path(getattr(config, name)) for name in CONTENT_CHECKED}
    return replace(
        config,
        **{"method": method.name, **decided},
        lr=config.lr if config.lr is not None else method.default_lr * PREFERENCE_RATE ** (config.objective == "dpo"),
        beta=DEFAULT_BETA.get(config.loss_type, 0.1) if config.beta is None else config.beta,
        microbatch_tokens=microbatch_tokens,
        max_iters=steps,
        epochs=epochs,
        eval_every=config.eval_every or max(1, math.ceil(steps / 10)),
        warmup_steps=min(100, math.ceil(0.06 * steps)) if config.warmup_steps is None else config.warmup_steps,
        max_length=max_length,
        **places,
    )
