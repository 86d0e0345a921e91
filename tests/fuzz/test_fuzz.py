"""The short form of run.py, and by name what its long form has found."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import child_environment
from fuzz import run
from graftlm.config import TrainConfig
from graftlm.config.flags import parse
from graftlm.errors import InputError
from graftlm.exchange.huggingface import from_foreign_peft
from graftlm.files.formats import read_json, save_safetensors
from graftlm.methods import method_from_json
from graftlm.models.config import read_model_config
from graftlm.text.dataset import load_dataset
from tiny import config_json, shape_of


@pytest.fixture(scope="module")
def fuzzed() -> dict[str, dict[str, Any]]:
    """What the command says of a hundred inputs of each target."""
    words = [sys.executable, run.__file__, "--inputs", "100"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=child_environment(OMP_NUM_THREADS="1"))
    return {each["target"]: each for each in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", run.TARGETS)
def test_a_few_hundred_inputs_give_a_result_or_one_line(name: str, fuzzed: dict[str, dict[str, Any]]) -> None:
    found = fuzzed[name]
    assert found["inputs"] >= 100 and found["tracebacks"] == 0, found
    assert found["results"] > 0 and found["errors"] > 0, "a fuzzer that meets only one of them tests nothing"


DEEP = "[" * 100_000


def test_brackets_without_end_and_numbers_without_end(tmp_path: Path) -> None:
    for text in (DEEP, "9" * 5000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match="broken JSON"):
            read_json(tmp_path / "x.json")
        (tmp_path / "x.toml").write_text(f"seed = {text}")
        with pytest.raises(InputError, match="not a TOML file"):
            parse("train", TrainConfig, ["--config", str(tmp_path / "x.toml")])


def test_a_parquet_file_with_text_that_is_no_utf_8(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["plain text"] * 9, "label": [0] * 9}), out, compression="none")
    (tmp_path / "x.parquet").write_bytes(out.getvalue().replace(b"plain text", b"plain\xe3text"))
    with pytest.raises(InputError, match="not a whole parquet file"):
        load_dataset(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_size": 2**31}, "hidden_size = 2147483648 is more than any model has"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is more than any model has"),
        ({"rope_theta": {"a": 1}}, "rope_theta = .* is not understood; it must be a number above 0"),
        ({"rope_scaling": [1]}, "rope_scaling = .* is not understood; it must be an object"),
    ],
)
def test_a_config_that_asks_for_all_memory_or_says_nonsense(change: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        read_model_config({**config_json(shape_of("llama"), "llama"), **change}, "config.json")


@pytest.mark.parametrize(
    "said",
    [{"method": {"a": []}}, {"method": "adapter", "layers": {"b": -1}}, {"method": "adapter", "rank": 10**30}, []],
)
def test_a_method_that_is_none(said: object) -> None:
    with pytest.raises(InputError, match=r"^run\.json: (names no method of ours|its method is not understood)"):
        method_from_json(said)


def test_an_adapter_s_pattern_cannot_keep_us_for_ever(tmp_path: Path) -> None:
    """PEFT's target_modules may be a regular expression; this one would take years on "transformer.h.0.attn"."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "([a-z.0-9_]+)+Z"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_safetensors(tmp_path / "adapter_model.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(InputError, match="repeats a group"):
        from_foreign_peft(tmp_path, shape_of("gpt2"))
