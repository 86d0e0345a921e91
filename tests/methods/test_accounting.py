"""Closed forms against the model itself and against the figures that are published."""

import pytest

from graftlm.files.assets import model_folder
from graftlm.files.formats import read_json
from graftlm.methods.accounting import block_parameters, layer_weights, needed_flops, parameters
from graftlm.models.names import read_shape
from tiny import FAMILIES, model_of


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_layers_matrices_are_those_of_the_model(kind: str) -> None:
    model = model_of(kind)
    assert layer_weights(model.shape) == sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    assert block_parameters(model.shape) == sum(p.numel() for p in model.blocks[0].parameters())
    assert parameters(model.shape) == sum(p.numel() for p in model.parameters())


def test_smollm2_needs_12_4_gflop_for_a_review() -> None:
    """47 tokens of which 19 are shared by 16: 29.2 tokens, 4 operations for each of 106 million weights."""
    path = model_folder("smollm2-135m") / "config.json"
    shape = read_shape(read_json(path), str(path))
    batch = 16 * (47 - 19) + 19
    assert 30 * layer_weights(shape) == 106_168_320
    assert needed_flops(shape, batch) / 16 / 1e9 == pytest.approx(12.4, abs=0.05)
    assert needed_flops(shape, batch, weights_trained=True) == 1.5 * needed_flops(shape, batch)
    upper = needed_flops(shape, batch, first_trained=20, below_kept=True)
    assert upper * 3 == needed_flops(shape, batch)  # 10 of 30 layers
    assert needed_flops(shape, batch, first_trained=20) == 2 * upper  # and 20 forward only
