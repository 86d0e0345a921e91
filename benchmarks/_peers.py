"""The two peers graft's training is measured against, each run in a process of its own by train_vs_peers.py.

    run_trl   TRL's SFTTrainer as a user runs it: bf16, completion-only loss, grouped by length, its defaults otherwise
    run_peft  the strongest peer: a hand-written PEFT loop with every trick that needs no new mathematics

Letters: B rows, T tokens, N target tokens, d model width. Unusual: torch is imported inside functions, because the
strong peer must set the allocator first and because the parent process imports this file for `Job` alone.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from _machine import peak_rss_mb

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "autocast", "autocast-fp32-base", "bf16")
TRL_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Job:
    """What every contender is told; `examples` is a JSON file: split -> [{"prompt", "completion"}, …]."""

    model: str
    eot: int
    examples: str
    steps: int
    batch_size: int
    rank: int
    alpha: int
    lora_dropout: float
    targets: tuple[str, ...]
    lr: float
    warmup: int
    untimed_steps: int
    precision: str
    trl_precision: str
    loss_on: str
    seed: int
    trial: bool = False
    """A few steps, for the fastest number format here or for the memory: no validation behind them."""
    first_layer: int = 0
    """LoRA in the layers from this number on."""
    method: str = "lora"
    """How to adapt, by graft's name of the method; PEFT has lora, dora and prefix."""
    flags: tuple[tuple[str, str], ...] = ()
    """What graft is told of another method than lora."""


class Encoded(NamedTuple):
    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


class Batch(NamedTuple):
    """ids [B, T], right-padded; at [N]: flat positions (b*T + t) that predict a target; targets [N]."""

    ids: "torch.Tensor"
    at: "torch.Tensor"
    targets: "torch.Tensor"


def load_tokenizer(job: Job) -> Any:
    """The folder's own tokenizer.json as it stands, and the end-of-text token that graft uses."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job.model) / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(job.eot)
    return tokenizer


def load_examples(job: Job, split: str) -> list[dict[str, str]]:
    return json.loads(Path(job.examples).read_text(encoding="utf-8"))[split]


def encode(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[Encoded]:
    """Prompt and completion tokenised apart, end-of-text after the completion."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    return [Encoded(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def collate(rows: Sequence[Encoded], loss_on: str = "completion") -> Batch:
    """Pad on the right (causal attention makes that invisible, no mask needed); point at the targets' predecessors.

    The targets are the completion, or with loss_on "all" every token but the first.
    """
    import torch

    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    at: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        ids[b, : row.length] = torch.tensor(row.prompt + row.completion)
        first = len(row.prompt) if loss_on == "completion" else 1
        at.extend(range(b * width + first - 1, b * width + row.length - 1))
        targets.extend((row.prompt + row.completion)[first:])
    return Batch(ids, torch.tensor(at), torch.tensor(targets))


def length_batches(rows: Sequence[Encoded], batch_size: int, loss_on: str = "completion") -> Iterator[Batch]:
    """Batches of similar length, shortest first."""
    ordered = sorted(rows, key=lambda row: row.length)
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], loss_on)


def summed_loss(causal_lm: Any, batch: Batch, past: Any = None) -> "torch.Tensor":
    """Sum of the targets' cross entropies; the head sees only the [N, d] rows that predict a target, not all B*T.

    `past`: the keys and values of a learned prefix, if there is one.
    """
    from torch.nn.functional import cross_entropy

    hidden = causal_lm.model(input_ids=batch.ids, past_key_values=past, use_cache=False).last_hidden_state
    logits = causal_lm.lm_head(hidden.flatten(0, 1)[batch.at])
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def validation_loss(causal_lm: Any, rows: Sequence[Encoded], job: Job, precision: str) -> float:
    """Mean loss of all target tokens of `rows`, in the number format of the training."""
    import torch

    causal_lm.eval()
    batches = list(length_batches(rows, job.batch_size, job.loss_on))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        total = sum(summed_loss(causal_lm, batch).item() for batch in batches)
    return total / sum(len(batch.targets) for batch in batches)


def speed(ends: Sequence[float], job: Job) -> dict[str, float]:
    """Speed from the moments at which the steps ended, without the first `untimed_steps` (at least one).

    What lies between two steps (fetching the batch, logging) counts: a user waits for it too.
    """
    assert len(ends) == job.steps and 1 <= job.untimed_steps < job.steps
    seconds = ends[-1] - ends[job.untimed_steps - 1]
    examples = (job.steps - job.untimed_steps) * job.batch_size
    return {"examples": len(ends) * job.batch_size, "seconds": seconds, "examples_per_s": examples / seconds}


def _result(job: Job, ends: Sequence[float], causal_lm: Any, tokenizer: Any, precision: str) -> dict[str, Any]:
    """Memory is read before validation, so that a peer is charged for training alone."""
    figures: dict[str, Any] = {**speed(ends, job), "precision": precision, "peak_rss_mb": peak_rss_mb()}
    if not job.trial:
        validation = encode(load_examples(job, "validation"), tokenizer)
        figures["val_loss"] = validation_loss(causal_lm, validation, job, precision)
    figures["trainable"] = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
    return figures


PREFIX_LENGTH = 20


def _adapter(job: Job) -> Any:
    from peft import LoraConfig, PrefixTuningConfig

    if job.method == "prefix":
        return PrefixTuningConfig(num_virtual_tokens=PREFIX_LENGTH, task_type="CAUSAL_LM")
    layers = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.lora_dropout,
        target_modules=[f"{target}_proj" for target in job.targets],
        layers_to_transform=list(range(job.first_layer, layers)) if job.first_layer else None,
        task_type="CAUSAL_LM",
        use_dora=job.method == "dora",
    )


def run_trl(job: Job) -> dict[str, Any]:
    """SFTTrainer as its documentation has a user run it; only what the comparison fixes is set, the rest is default.

    Defaults include activation checkpointing and bf16 mixed precision; the latter is switched off where float32 is
    faster on this machine. Timed by a callback at the end of every step.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    ends: list[float] = []

    class StepEnds(TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    tokenizer = load_tokenizer(job)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.bfloat16 if job.trl_precision == "bf16" else torch.float32
        ),
        args=SFTConfig(
            output_dir="trl-run",
            use_cpu=True,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.steps,
            bf16=job.trl_precision == "bf16",
            completion_only_loss=job.loss_on == "completion",
            train_sampling_strategy="group_by_length",
            learning_rate=job.lr,
            lr_scheduler_type="cosine",
            warmup_steps=job.warmup,
            save_strategy="no",
            report_to="none",
            seed=job.seed,
        ),
        train_dataset=Dataset.from_list(load_examples(job, "train")),
        processing_class=tokenizer,
        peft_config=_adapter(job),
        callbacks=[StepEnds()],
    )
    trainer.train()
    model: Any = trainer.model
    return _result(job, ends, model.get_base_model(), tokenizer, job.trl_precision)


class StrongPeer:
    """A PEFT model and its optimiser, with what makes a step fast on a CPU; the process must keep its memory.

    No activation checkpointing, no attention mask, the head at target tokens only, fused AdamW, clipping. The schedule
    and the order of the batches are its caller's.
    """

    def __init__(self, job: Job) -> None:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(job.seed)
        base_dtype = torch.float32 if job.precision in ("autocast-fp32-base", "fp32") else torch.bfloat16
        self.mixed, self.prefixed = job.precision.startswith("autocast"), job.method == "prefix"
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=base_dtype)
        self.model: Any = get_peft_model(base, _adapter(job), autocast_adapter_dtype=job.precision != "bf16")
        self.causal_lm = self.model.get_base_model()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=job.lr, weight_decay=0.0, fused=True)
        self.model.train()

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            past = self.model.get_prompt(batch_size=len(batch.ids)) if self.prefixed else None
            loss = summed_loss(self.causal_lm, batch, past) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def keep_memory_or_fail() -> None:
    """Tell glibc to keep its memory, before torch is imported: without, the peer would not be the strongest."""
    from graftlm.process import keep_memory

    if not keep_memory():
        raise RuntimeError("the C library refused to keep memory: this would be a weaker peer than the one promised")


def run_peft(job: Job) -> dict[str, Any]:
    """The strong peer on batches cut from all examples sorted by length, in random order; timed at every step's end."""
    keep_memory_or_fail()
    from transformers import get_cosine_schedule_with_warmup

    tokenizer = load_tokenizer(job)
    batches = list(length_batches(encode(load_examples(job, "train"), tokenizer), job.batch_size, job.loss_on))
    random.Random(job.seed).shuffle(batches)
    peer = StrongPeer(job)
    schedule = get_cosine_schedule_with_warmup(peer.optimizer, job.warmup, job.steps)
    ends: list[float] = []
    for batch in batches[: job.steps]:
        peer.step(batch)
        schedule.step()
        ends.append(time.perf_counter())
    figures = _result(job, ends, peer.causal_lm, tokenizer, job.precision)
    return {**figures, "trainable": sum(p.numel() for p in peer.trained.values())}  # a prefix stands outside the model
