"""Names of version 0.1: refused on the command line by a line that names the new one, and translated in run folders."""

from collections.abc import Mapping
from typing import Any

COMMANDS = {"prefer": "pairs", "account": "estimate", "fetch": "download"}

ENVIRONMENT = {"GRAFT_SERVE_KEY": "GRAFT_API_KEY", "GRAFT_WHEELS": "GRAFT_WHEEL_DIR"}

FLAGS = {
    "allow_hosts": "allowed_hosts",
    "buckets": "group_by_length",
    "choose": "demo_selection",
    "clip": "grad_clip",
    "compile": "kernels",
    "ffn": "mlp_widths",
    "frozen_cache_gb": "activation_cache_gb",
    "gflops": "device_gflops",
    "grace": "shutdown_timeout",
    "judge": "reward_model",
    "judge_command": "reward_command",
    "key": "api_key",
    "label_field": "columns",
    "link_gbs": "bandwidth_gbs",
    "margin": "min_margin",
    "max_rows": "max_batch_size",
    "merged": "format",
    "micro_tokens": "microbatch_tokens",
    "n": "num_samples",
    "opening": "prompt_words",
    "orders": "num_permutations",
    "pairs": "pairing",
    "placement": "adapter_placement",
    "processes": "world_size",
    "rate": "rate_limit",
    "ray_cpus": "cpus_per_task",
    "ray_gpus": "gpus_per_task",
    "read": "mode",
    "samples": "num_samples",
    "settings": "method_args",
    "show": "show_prompts",
    "test": "test_data",
    "text_field": "columns",
    "val": "val_data",
    "want": "target_label",
    "warmup": "warmup_steps",
}

_KERNELS = {"on": "cpp", "off": "torch"}
_EXAMPLES = {
    "compile": " (auto, cpp for on, torch for off)",
    "merged": " merged",
    "text_field": ", as in --columns text=NAME",
    "label_field": ", as in --columns label=NAME",
}
_RUN_KEYS = {
    "compile": "cpp_kernels",
    "start": "parent_run",
    "resumed": "resume_history",
    "processes": "distributed",
    "size": "world_size",
    "from_step": "start_step",
    "bytes_sent": "comm_bytes",
    "needed_tflop": "model_tflop",
    "needed_gflops": "model_gflops_per_s",
    "matrix_peak_gflops": "peak_gflops",
    "share_of_peak": "mfu",
    "share_trained": "trainable_fraction",
    "planned": "predicted",
    "proof": "verification",
    "largest_logit": "max_abs_logit",
}
_STATE_KEYS = {
    "stale": "evals_since_best",
    "clean_steps": "steps_since_overflow",
    "timed_needed": "timed_model_tokens",
}


def new_flag(name: str, kinds: Mapping[str, Any]) -> str:
    """What replaces a flag's old name in a subcommand with these flags, for an error; empty: it is no old name."""
    return f"--{FLAGS[name]}{_EXAMPLES.get(name, '')}" if FLAGS.get(name) in kinds else ""


def upgrade_run(run: dict[str, Any]) -> dict[str, Any]:
    """A run.json with the names of this version; one that has them is returned as it is."""
    if not isinstance(run.get("config"), dict) or not isinstance(run.get("resumed"), list):
        return run
    nested = {
        key: _renamed(value, _RUN_KEYS) for key, value in run.items() if key not in ("config", "method", "resumed")
    }
    history = [{FLAGS.get(flag, flag): change for flag, change in resume.items()} for resume in run.get("resumed", [])]
    config = upgrade_config(run["config"]) if isinstance(run.get("config"), dict) else run.get("config")
    upgraded = {**nested, "config": config, "method": run.get("method"), "resumed": history}
    return {_RUN_KEYS.get(key, key): value for key, value in upgraded.items()}


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run with the names of this version."""
    new = {FLAGS.get(flag, flag): value for flag, value in config.items() if flag not in ("text_field", "label_field")}
    if "compile" in config:
        new["kernels"] = _KERNELS.get(config["compile"], config["compile"])
    if "text_field" in config and "columns" not in config:
        named = {field: config.get(f"{field}_field", field) for field in ("text", "label")}
        new["columns"] = ",".join(f"{field}={column}" for field, column in named.items() if column != field)
    return new


def upgrade_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint with the names of this version."""
    return {_STATE_KEYS.get(key, key): value for key, value in state.items()}


def upgrade_test(test: dict[str, Any]) -> dict[str, Any]:
    """What `graft compare` wrote of an evaluation, with the names of this version."""
    names = {"asked": "eval_config", "read": "mode", "low": "ci_low", "high": "ci_high"}
    return {names.get(key, key): _renamed(value, names) for key, value in test.items()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(inner, names) for key, inner in value.items()}
    return value
