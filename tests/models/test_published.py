"""The settings of published models, with what else their config.json has, and their numbers of parameters."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.methods.cost_model import parameters
from graftlm.models.config import read_model_config

PUBLISHED = [json.loads(line) for line in (Path(__file__).parent / "published.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model["name"])
def test_a_published_model_is_read_and_has_its_number_of_parameters(model: dict[str, Any]) -> None:
    assert parameters(read_model_config(model["config"], "config.json")) == model["parameters"]


def test_the_context_of_longrope_is_the_original_one() -> None:
    phi_4 = next(model["config"] for model in PUBLISHED if model["name"] == "Phi-4-mini-instruct")
    config = read_model_config(phi_4, "config.json")
    assert (config.max_positions, config.layers[0].window) == (4096, None)
    plain = phi_4 | {"rope_scaling": None}
    assert read_model_config(plain, "config.json").max_positions == 131072
