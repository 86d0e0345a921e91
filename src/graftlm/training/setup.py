"""Everything before step 1: resolve the flags, load the model, install the method, read and check the data.

Nothing is written here, so a run that cannot start leaves nothing behind. With --resume the recorded flags apply; an
explicit flag must agree with them, except for those that `run_manifest.RESUME_MUTABLE` names.
"""

import math
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.base_format import choose_format, format_note
from graftlm.exchange.huggingface import (
    base_hash,
    config_json_of,
    fill_with_random,
    load_model,
    load_weights_into,
    meta_model,
    random_weights_model,
)
from graftlm.exchange.load import (
    ModelBundle,
    check_base,
    pick_device,
    pick_dtype,
    read_config,
    read_tokenizer,
    resolve_path,
)
from graftlm.files.assets import cache_home
from graftlm.methods import Method
from graftlm.methods.base import mergeable_linears
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.example_table import Prompts
from graftlm.text.template import Template, load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.batches import BatchLoader, TrainingBatch, TrainingData
from graftlm.training.data import (
    CPU_TOKENS,
    DataRequest,
    chat_flag,
    max_example_tokens,
    training_data,
)
from graftlm.training.distributed import DistContext, shard, warmup_fsdp
from graftlm.training.objectives import Objective, flags_of, make_objective
from graftlm.training.reporting import check_loggers
from graftlm.training.run_manifest import (
    CONTENT_CHECKED,
    InitSource,
    RunManifest,
    check_out_dir,
    explicit_flags,
    new_manifest,
    read_previous,
    resolve_init,
    resumed_config,
)
from graftlm.training.token_cache import TokenCache


@dataclass
class RunContext:
    """A run that is ready to start."""

    config: TrainConfig
    """Resolved: no flag that the run uses is None."""
    method: Method
    objective: Objective
    loaded: ModelBundle
    data: TrainingData
    device: torch.device
    notes: list[str]
    dist: DistContext
    not_loaded: InitSource | None
    """What to start from, while the weights have not been read because they are to be sharded across ranks."""
    manifest: RunManifest

    @property
    def loader(self) -> BatchLoader:
        """The batches of the training split."""
        return BatchLoader(self.data.train, self.objective.collate, self.config, self.dist)

    @property
    def model(self) -> CausalLM:
        """The model, with the method installed."""
        return self.loaded.model

    def batches(self) -> Iterator[TrainingBatch]:
        """The batches of training in its order, without end, whole and on the model's device: for a loop of one's own.

        `objective.loss(model, batch)` is the sum of a batch's losses, and `batch.weight` what to divide it by.
        """
        loader = replace(self.loader, config=replace(self.config, microbatch_tokens=0))
        for rows in loader.stream(0):
            (batch,) = loader.microbatches(rows)
            examples = [loader.examples[row] for row in rows]
            statistics = self.objective.batch_statistics(self.model, examples, self.dist)
            yield batch.with_extra(statistics).to(self.device)


def prepare(
    config: TrainConfig,
    given: Set[str] | None = None,
    dist: DistContext | None = None,
    previous: dict[str, Any] | None = None,
    writes: bool = True,
) -> RunContext:
    """Check and load everything a run needs.

    given: the explicit flags; None: those that differ from their defaults. previous: run.json of the run that --resume
    names; None: read it. writes: whether --out_dir will be written to, and must be free.
    """
    dist = dist or DistContext()
    out_dir = Path(config.out_dir)
    previous = previous or read_previous(config)
    explicit: Set[str] = frozenset()
    if previous is None:
        if writes:
            check_out_dir(out_dir)
        explicit = explicit_flags(config, given)
    else:
        config = resumed_config(config, previous["config"], given)
    check_loggers(config)
    objective = make_objective(config, explicit)
    device = pick_device(config.device if dist.size == 1 else dist.device_flag)
    dtype, reason = _dtype(config, previous, device)
    select_format = partial(_base_format, config, device, dtype, dist)
    source = resolve_init(config, explicit, previous is not None, select_format=select_format)
    _check_ranks(config, objective, source, dist)
    tokenizer = read_tokenizer(source.folder)
    tokenizer.date = previous.get("date") if previous else date.today().isoformat()
    if previous is not None and not config.plan:
        check_base(source.folder, previous, out_dir)
    max_length = max_example_tokens(config, read_config(source.folder), source.method)
    # Of a resumed run the recorded template, wherever its file may be now.
    recorded = Template.of_run(previous) if previous else None
    chat = chat_flag(config.chat if previous is None or "chat" in previous["config"] else "off", source, tokenizer)
    request = DataRequest(replace(config, chat=chat), explicit, recorded, tokenizer, max_length)
    cached_as = previous["data"].get("tokens", "") if previous else ""
    prepared = request.cached(TokenCache(cache_home() / "tokens"), cached_as, dist.is_main)
    config = replace(config, labels=prepared.labels)
    template = replace(recorded or load_template(config.template, config.labels), chat=prepared.in_chat)
    if previous is not None and prepared.fingerprint != (before := previous["data"]["fingerprint"]):
        raise InputError(
            f"{out_dir}: was trained on other data (fingerprint {before[:12]}, now {prepared.fingerprint[:12]}); "
            "restore the data, or start a new run"
        )
    sharded = dist.size > 1 and (source.method.is_full_finetune or config.shard)
    with ThreadPoolExecutor(1) as background:  # hashing uses one core, loading mostly another
        hashing = background.submit(_base_sha256, config, previous, source.folder)
        model = _base_model(config, source, device, dtype, sharded)
    data, notes = training_data(prepared, config, tokenizer), list(prepared.notes)
    source = replace(source, method=_method(config, source, model, data.train, tokenizer))
    source.method.install(model, torch.Generator().manual_seed(config.seed))
    notes += [*format_note(model), *_export_notes(model, source.folder)]
    if not sharded:
        source.load_initial_adapter(model)
    start = _initial_adapter(source, model, previous, out_dir)
    model.set_dropout(config.dropout)
    model.use_fused_ops(config.fused)
    chosen: dict[str, Any] = {"base_format": source.base_format}
    config = replace(config, **chosen)
    config = _resolved(config, source.method, objective, len(data.train), max_length, device)
    run = RunContext(
        config,
        source.method,
        objective,
        ModelBundle(model, tokenizer, source.base, source.folder, reason, template),
        data,
        device,
        notes,
        dist,
        not_loaded=source if sharded else None,
        manifest=RunManifest(out_dir, {}),
    )
    run.manifest = new_manifest(run, prepared, hashing.result(), start, previous)
    base = hashing.result()
    if source.base_format not in ("dense", "stored"):
        base += f", {source.base_format}"  # other numbers than the folder's
    origin = {"base": base, "start": start["sha256"] if start else None}
    objective.load(data, {**origin, "dtype": run.manifest.values["dtype"]}, out_dir if previous else None)
    return run


def _export_notes(model: CausalLM, base: Path) -> list[str]:
    """That the trained model cannot be exported as a whole, if no config.json describes it."""
    try:
        config_json_of(model.config, base)
    except InputError as error:
        return [str(error)]
    return []


def shard_and_load(run: RunContext) -> None:
    """Shard the weights across ranks, each of which reads only its part; nothing if every rank holds the model."""
    if run.not_loaded is None:
        return
    model, method = run.loaded.model, run.method
    created = [p for p in model.parameters() if p.device.type != "meta"]
    trained = [] if method.is_full_finetune else [p for p in model.parameters() if p.requires_grad]
    for p in created:
        p.data = p.data.to(run.device)
    shard(model, run.dist, {*created, *trained})
    for linear in mergeable_linears(model):
        linear.merge_on_eval = False  # no rank has the full weight
    with run.dist.same_error_on_all_ranks():
        load = fill_with_random if run.config.plan else load_weights_into
        load(model, run.loaded.folder, run.device, model.dtype)
    method.init_from_base_weights(model)
    warmup_fsdp(model)
    run.not_loaded.load_initial_adapter(model)
    run.not_loaded = None


# Flags ----------------------------------------------------------------------------------------------------------------


def _dtype(config: TrainConfig, previous: dict[str, Any] | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype and the reason; a resumed run takes the recorded one for auto, so that the bits stay the same."""
    if previous is not None and config.dtype == "auto":
        return pick_dtype(previous["dtype"], device)[0], previous["dtype_reason"]
    return pick_dtype(config.dtype, device)


def _check_ranks(config: TrainConfig, objective: Objective, source: InitSource, dist: DistContext) -> None:
    """An InputError for what works only in a single process, or only in several."""
    if dist.size == 1 and config.shard and not config.resume:
        raise InputError("--shard: shards the base across processes: launch with torchrun, or leave it out")
    if dist.size > 1 and config.shard and source.base_format != "dense":
        raise InputError(
            f"--shard: {config.init_from} was trained on a packed base, which is not sharded; leave it out"
        )
    if dist.size == 1 or not source.method.is_full_finetune:
        return
    if config.train_layers:
        raise InputError(
            f"--train_layers {config.train_layers}: not supported with sharded full fine-tuning; drop it, or run in a "
            "single process"
        )
    objective.check_sharded()


def _resolved(
    config: TrainConfig, method: Method, objective: Objective, examples: int, max_length: int, device: torch.device
) -> TrainConfig:
    """Every None decided, and absolute paths of files."""
    epochs, steps = config.epochs, config.max_iters
    if steps is None:
        epochs = 2.0 if epochs is None else epochs
        steps = max(1, math.ceil(epochs * math.ceil(examples / config.batch_size) / config.grad_accum))
    decided: dict[str, Any] = {flag: getattr(method, field) for flag, field in method.flags.items()}
    decided |= {"targets": ",".join(decided["targets"])} if "targets" in decided else {}
    decided |= {"rank": 0} if method.is_full_finetune else {}
    decided |= {flag: getattr(objective, flag) for flag in flags_of(type(objective))}
    microbatch_tokens = config.microbatch_tokens
    if microbatch_tokens is None:
        microbatch_tokens = CPU_TOKENS if device.type == "cpu" else 0
    # Until here an error names a file as it was typed.
    decided |= {name: resolve_path(getattr(config, name)) for name in CONTENT_CHECKED}
    return replace(
        config,
        **{"method": method.name, **decided},
        lr=config.lr if config.lr is not None else method.default_lr * objective.lr_multiplier,
        microbatch_tokens=microbatch_tokens,
        max_iters=steps,
        epochs=epochs,
        eval_every=config.eval_every or max(1, math.ceil(steps / 10)),
        warmup_steps=min(100, math.ceil(0.06 * steps)) if config.warmup_steps is None else config.warmup_steps,
        max_length=max_length,
    )


# Model ----------------------------------------------------------------------------------------------------------------


def _base_sha256(config: TrainConfig, previous: dict[str, Any] | None, folder: Path) -> str:
    """The hash of the base's weights; empty for an estimate, which reads none."""
    if previous is not None:
        return str(previous["base"]["sha256"])
    return "" if config.plan else base_hash(folder)


def _base_format(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, dist: DistContext, name: str, method: Method
) -> str:
    """The format of the base's weights; an InputError where they must be dense and another one is asked for."""
    sharded = dist.size > 1 and config.shard
    if not method.is_full_finetune and not sharded:
        with dist.same_error_on_all_ranks():
            chosen = choose_format(config.base_format, name, device, dtype)
        return str(dist.broadcast_object(chosen))  # ranks may have different amounts of memory
    if config.base_format not in ("auto", "dense"):
        what = "--shard: shards dense weights" if sharded else "--method full: trains the base's own weights"
        raise InputError(f"--base_format {config.base_format} with {what}; leave it out, or use another method")
    return "dense"


def _base_model(
    config: TrainConfig, source: InitSource, device: torch.device, dtype: torch.dtype, sharded: bool
) -> CausalLM:
    """The base: without weights yet if they are to be sharded, with random ones for an estimate."""
    if sharded:
        return meta_model(source.folder, dtype)
    make = random_weights_model if config.plan else load_model
    return make(source.folder, device, dtype, source.base_format)


def _method(
    config: TrainConfig, source: InitSource, model: CausalLM, train: Sequence[Example], tokenizer: Tokenizer
) -> Method:
    """The method, with what depends on the model's depth and the run's prompts decided."""
    if source.adapter is not None:
        return source.method
    method = source.method.for_model(model.config, config.train_layers)
    return method.resolve_init(Prompts(train), lambda text: tokenizer.encode_prompt(text))


def _initial_adapter(
    source: InitSource, model: CausalLM, previous: dict[str, Any] | None, out_dir: Path
) -> dict[str, str | None] | None:
    """What run.json records of the adapter that the run starts from; None if it starts from a base."""
    if source.adapter is None:
        return None
    sha256 = source.sha256(model.config)
    if previous is not None and previous["parent_run"]["sha256"] != sha256:
        raise InputError(
            f"{out_dir}: was started from {previous['parent_run']['run']}, which has changed since; restore it"
        )
    return {"run": str(source.adapter.resolve()), "sha256": sha256}
