"""The peers of graft's training, each run in a process of its own.

    run_trl   TRL's SFTTrainer as its documentation shows it: completion-only loss, grouped by length
    run_peft  the strongest PEFT loop we could write: no activation checkpointing, no attention mask, the head at target
              tokens only, batches of similar length, fused AdamW, glibc keeps freed memory

Letters: B rows, T tokens, N target tokens, d model width. torch is imported inside functions, because run_peft must
configure the allocator first and because the parent process imports this file for `Job` alone.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import Run, keep_memory_or_fail, peak_rss_mb, read_rows

if TYPE_CHECKING:
    import torch

PEFT_DTYPES = ("float32", "autocast", "autocast-float32-base", "bfloat16")
TRL_DTYPES = ("float32", "bfloat16")
PREFIX_LENGTH = 20


@dataclass(frozen=True)
class Job:
    """A training run; `data` is a folder of train.jsonl and validation.jsonl with prompt and completion."""

    model: str
    data: str
    eot: int
    steps: int
    batch_size: int
    dtype: str = "float32"
    method: str = "lora"
    """lora, dora, ia3, prefix or full, by graft's names; or rslora."""
    loss_on: str = "completion"
    rank: int = 16
    alpha: int = 64
    lora_dropout: float = 0.05
    targets: str = "q,k,v"
    lr: float = 2.5e-4
    seed: int = 0
    validate: bool = True

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return max(1, round(0.06 * self.steps))

    @property
    def untimed_steps(self) -> int:
        """The first 5% of the steps do not count."""
        return max(1, int(0.05 * self.steps))


class Encoded(NamedTuple):
    """An example's token ids."""

    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.completion)


class Batch(NamedTuple):
    """ids [B, T], right-padded; at [N]: flat positions (b*T + t) that predict a target; targets [N]."""

    ids: "torch.Tensor"
    at: "torch.Tensor"
    targets: "torch.Tensor"


def load_tokenizer(model: str, eot: int) -> Any:
    """The folder's tokenizer.json, with the end-of-text token that graft uses."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eot)
    return tokenizer


def encode(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[Encoded]:
    """Prompt and completion tokenized separately, end-of-text after the completion."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    return [Encoded(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def collate(rows: Sequence[Encoded], loss_on: str = "completion") -> Batch:
    """Pad on the right, which causal attention never sees; `at` points at the positions before the targets."""
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
    """Sum of the targets' cross entropies; the head sees only the [N, d] rows that predict a target.

    past: keys and values of a learned prefix.
    """
    from torch.nn.functional import cross_entropy

    hidden = causal_lm.model(input_ids=batch.ids, past_key_values=past, use_cache=False).last_hidden_state
    logits = causal_lm.lm_head(hidden.flatten(0, 1)[batch.at])
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def validation_loss(causal_lm: Any, rows: Sequence[Encoded], job: Job) -> float:
    """Mean loss per target token, in the dtype of the training."""
    import torch

    causal_lm.eval()
    batches = list(length_batches(rows, job.batch_size, job.loss_on))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=job.dtype != "float32"):
        total = sum(summed_loss(causal_lm, batch).item() for batch in batches)
    return total / sum(len(batch.targets) for batch in batches)


def speed(ends: Sequence[float], untimed_steps: int, batch_size: int) -> float:
    """Examples/s from the times at which the steps ended, without the first `untimed_steps` (at least one)."""
    assert 1 <= untimed_steps < len(ends)
    return (len(ends) - untimed_steps) * batch_size / (ends[-1] - ends[untimed_steps - 1])


def step_timer() -> tuple[Any, list[float]]:
    """A transformers callback, and the list of times at which the steps ended that it fills."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class StepEnds(TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    return StepEnds(), ends


def peft_config(job: Job) -> Any:
    """PEFT's configuration of the job's method."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    if job.method == "prefix":
        return PrefixTuningConfig(num_virtual_tokens=PREFIX_LENGTH, task_type="CAUSAL_LM")
    targets = [f"{target}_proj" for target in job.targets.split(",")]
    if job.method == "ia3":
        return IA3Config(
            target_modules=targets,
            feedforward_modules=[name for name in targets if name == "down_proj"],
            task_type="CAUSAL_LM",
        )
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_dora=job.method == "dora",
        use_rslora=job.method == "rslora",
    )


def run_trl(job: Job) -> Run:
    """SFTTrainer with its defaults, activation checkpointing among them; only what the comparison fixes is set."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer, (timer, ends) = load_tokenizer(job.model, job.eot), step_timer()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)),
        args=SFTConfig(
            output_dir="trl-run",
            use_cpu=True,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.steps,
            bf16=job.dtype == "bfloat16",
            completion_only_loss=job.loss_on == "completion",
            train_sampling_strategy="group_by_length",
            learning_rate=job.lr,
            lr_scheduler_type="cosine",
            warmup_steps=job.warmup,
            save_strategy="no",
            report_to="none",
            seed=job.seed,
        ),
        train_dataset=Dataset.from_list(read_rows(Path(job.data) / "train.jsonl")),
        processing_class=tokenizer,
        peft_config=peft_config(job),
        callbacks=[timer],
    )
    trainer.train()
    model: Any = trainer.model
    return figures(job, ends, model.get_base_model(), tokenizer)


class PeftLoop:
    """A PEFT model, or with method full the base itself, and its optimizer.

    The schedule and the order of the batches are its caller's.
    """

    def __init__(self, job: Job) -> None:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(job.seed)
        base_dtype = torch.float32 if job.dtype in ("autocast-float32-base", "float32") else torch.bfloat16
        self.mixed, self.prefix = job.dtype.startswith("autocast"), job.method == "prefix"
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=base_dtype)
        self.model: Any = base
        if job.method != "full":
            self.model = get_peft_model(base, peft_config(job), autocast_adapter_dtype=job.dtype != "bfloat16")
        self.causal_lm = base if job.method == "full" else self.model.get_base_model()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=job.lr, weight_decay=0.0, fused=True)
        self.model.train()

    def past(self, rows: int) -> Any:
        """The keys and values of the prefix for a batch of rows; None without one."""
        return self.model.get_prompt(batch_size=rows) if self.prefix else None

    def step(self, batch: Batch) -> float:
        """One optimizer step; the loss before it, the mean over the targets."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            loss = summed_loss(self.causal_lm, batch, self.past(len(batch.ids))) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def run_peft(job: Job) -> Run:
    """PeftLoop on batches of similar length in random order; timed at the end of every step."""
    keep_memory_or_fail()
    from transformers import get_cosine_schedule_with_warmup

    tokenizer = load_tokenizer(job.model, job.eot)
    rows = encode(read_rows(Path(job.data) / "train.jsonl"), tokenizer)
    batches = list(length_batches(rows, job.batch_size, job.loss_on))
    random.Random(job.seed).shuffle(batches)
    loop = PeftLoop(job)
    schedule = get_cosine_schedule_with_warmup(loop.optimizer, job.warmup, job.steps)
    ends: list[float] = []
    for batch in batches[: job.steps]:
        loop.step(batch)
        schedule.step()
        ends.append(time.perf_counter())
    found = figures(job, ends, loop.causal_lm, tokenizer)
    return {**found, "trainable": sum(p.numel() for p in loop.trained.values())}  # a prefix is not part of the base


def figures(job: Job, ends: Sequence[float], causal_lm: Any, tokenizer: Any) -> Run:
    """A peer's figures. Memory is read before validation, so that a peer is charged for training alone."""
    found: Run = {
        "examples": len(ends) * job.batch_size,
        "examples_per_s": speed(ends, job.untimed_steps, job.batch_size),
        "dtype": job.dtype,
        "peak_rss_mb": peak_rss_mb(),
        "trainable": sum(p.numel() for p in causal_lm.parameters() if p.requires_grad),
    }
    if job.validate:
        validation = encode(read_rows(Path(job.data) / "validation.jsonl"), tokenizer)
        found["val_loss"] = validation_loss(causal_lm, validation, job)
    return found
