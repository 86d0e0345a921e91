"""What a config.json may say, and what is refused rather than ignored."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.formats import LazyTensors, open_safetensors, save_safetensors
from graftlm.methods.cost_model import parameters
from graftlm.models import CausalLM
from graftlm.models.config import check_names, read_model_config, tensor_mapping, to_file
from tiny import FAMILIES, config_json, model_of, shape_of


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shape_survives_its_config(kind: str) -> None:
    shape = shape_of(kind)
    assert read_model_config(config_json(shape, kind), "config.json") == shape


@pytest.mark.parametrize("kind", FAMILIES)
def test_to_file_and_back_is_the_same_to_the_bit(kind: str) -> None:
    model = model_of(kind)
    state = dict(model.named_parameters())
    stored = to_file(model.config, state)
    check_names(model.config, stored, "here")
    mappings = tensor_mapping(model.config)
    assert mappings.keys() == state.keys()
    for name, mapping in mappings.items():
        assert mapping.read(stored[mapping.name]).equal(state[name])


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_read_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a process holds, whatever the file fuses, turns or orders otherwise; and hardly more is read."""
    model = model_of(kind)
    save_safetensors(tmp_path / "model.safetensors", to_file(model.config, dict(model.named_parameters())))
    stored, largest = open_safetensors(tmp_path / "model.safetensors"), 0
    part = LazyTensors.part

    def counted(self: LazyTensors, name: str, *index: slice) -> Tensor:
        nonlocal largest
        found = part(self, name, *index)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(LazyTensors, "part", counted)
    for name, place in tensor_mapping(model.config).items():
        whole = model.get_parameter(name)
        for rows in (range(1), range(len(whole) // 3, len(whole)), range(len(whole))):
            assert place.part(stored, place.name, rows).equal(whole[rows.start : rows.stop])
            fused = place.rows is not None and not isinstance(place.rows, slice)
            assert largest <= (3 if fused else 1) * len(rows) * whole[0].numel()
            largest = 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"activation_function": "elu"}, "activation_function = 'elu' is not understood"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
    ("llama", {"hidden_act": "elu"}, "hidden_act = 'elu'"),
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type = 'ntk' is not understood"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope setting 'beta'"),
    ("llama", {"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0 is no size"),
    ("neox", {"hidden_act": "elu"}, "hidden_act = 'elu' is not understood"),
    ("neox", {"rotary_pct": 0.9}, "rotary_pct = 0.9 rotates 7 of 8 dimensions"),
    ("neox", {"hidden_size": 36}, "hidden_size 36 gives 4 heads no even width"),
    ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not supported, and none that is comes near"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_a_setting_that_is_not_understood_is_an_error(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model_config({**config_json(shape_of(kind), kind), **change}, "m/config.json")
    assert str(caught.value).startswith("m/config.json: ") and message in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    config = config_json(shape_of("llama"), "llama")
    del config["hidden_size"]
    with pytest.raises(InputError, match="the setting 'hidden_size' is missing"):
        read_model_config(config, "config.json")


def test_tensors_missing_or_too_many_are_named() -> None:
    model = model_of("gpt2")
    stored = dict(to_file(model.config, dict(model.named_parameters())))
    stored["transformer.h.0.attn.bias"] = stored["transformer.wte.weight"]  # an old file's mask: no error
    check_names(model.config, stored, "here")
    with pytest.raises(InputError, match=r"here: the tensor extra\.weight belongs to no part of this gpt2 model"):
        check_names(model.config, [*stored, "extra.weight"], "here")
    del stored["transformer.h.1.ln_2.bias"]
    with pytest.raises(InputError, match=r"here: the tensor transformer\.h\.1\.ln_2\.bias is missing \(1 of"):
        check_names(model.config, stored, "here")


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_in_closed_form(kind: str) -> None:
    shape = shape_of(kind)
    assert parameters(shape) == sum(p.numel() for p in CausalLM(shape).parameters())


@pytest.mark.parametrize(
    ("layers", "heads", "width", "count"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_sizes(layers: int, heads: int, width: int, count: int) -> None:
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "vocab_size": 50257}
    assert parameters(read_model_config({**config, "n_positions": 1024}, "config.json")) == count
