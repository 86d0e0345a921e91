"""A method is a file: it is found without being listed, and what its fields are it can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import getdoc
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import graftlm.methods
from graftlm.catalogue import overview
from graftlm.config import MethodFlags, TrainConfig
from graftlm.errors import InputError
from graftlm.methods import METHODS, Method, method_from_flags, method_from_json
from graftlm.methods.accounting import Part
from graftlm.models import CausalLM, Shape


@dataclass(frozen=True)
class Invented(Method):
    """Nothing at all."""

    rank: int = 2
    strength: float = 1.0
    way: str = "plain"
    twice: bool = False
    many: tuple[int, ...] = ()

    name: ClassVar[str] = "invented"
    default_lr: ClassVar[float] = 1e-3
    flags: ClassVar[Mapping[str, str]] = {"rank": "rank"}

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Do nothing."""

    def parts(self, shape: Shape) -> list[Part]:
        """None."""
        return []


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "invented", Invented)


def test_every_method_is_found_in_its_file_and_in_no_list() -> None:
    folder = Path(graftlm.methods.__file__).parent
    said = {path.stem for path in folder.glob("*.py") if "    name: ClassVar[str] = " in path.read_text()}
    assert said == set(METHODS) and list(METHODS) == sorted(METHODS)
    assert "ia3" not in (folder / "__init__.py").read_text().lower()


def test_every_flag_of_a_method_is_a_flag_and_sets_a_field() -> None:
    flags = {f.name for f in fields(MethodFlags)}
    for kind in METHODS.values():
        assert kind.flags.keys() <= flags and set(kind.flags.values()) <= {f.name for f in fields(kind)}


def test_the_help_page_says_of_every_method_what_its_class_says() -> None:
    lines = ["The methods, with what each takes by default:"]
    for kind in METHODS.values():
        own = {f.name: f.default for f in fields(kind)}
        defaults = {"lr": f"{kind.default_lr:g}", **{flag: own[field] for flag, field in kind.flags.items()}}
        shown = {flag: ",".join(value) if isinstance(value, tuple) else value for flag, value in defaults.items()}
        flags = " ".join(f"--{flag} {value}" for flag, value in shown.items() if value != "")
        lines.append(f"{kind.name}: {(getdoc(kind) or '').splitlines()[0]} ({flags})")
    assert overview() == "\n\n".join(lines)


def test_a_methods_file_is_all_that_the_help_page_needs(tmp_path: Path) -> None:
    (tmp_path / "invented.py").write_text(Path(__file__).read_text())
    assert "invented" not in overview()
    assert overview(tmp_path).endswith("\n\ninvented: Nothing at all. (--lr 0.001 --rank 2)")


def test_settings_reach_the_fields_that_no_flag_sets(invented: None) -> None:
    config = TrainConfig(method="invented", rank=4, settings="strength=2, way=other,twice=true")
    method = method_from_flags(config, {"method", "rank", "settings"})
    assert method == Invented(rank=4, strength=2.0, way="other", twice=True)
    assert method_from_json(method.to_json()) == method
    assert method_from_flags(TrainConfig(method="invented"), set()) == Invented()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            "strength",
            "--settings strength: must be name=value, and --method invented: its settings are strength, way, ",
        ),
        ("rank=3", "--settings rank=3: must be name=value"),  # it has a flag
        ("layers=3", "--settings layers=3: must be"),
        ("many=3", "--settings many=3: must be"),
        ("strength=much", "--settings strength=much: not a number"),
        ("twice=maybe", "--settings twice=maybe: not true or false"),
        ("strength=nan", "--settings strength=nan: not a finite number"),
    ],
)
def test_settings_that_cannot_be(settings: str, line: str, invented: None) -> None:
    with pytest.raises(InputError) as caught:
        method_from_flags(TrainConfig(method="invented", settings=settings), {"method", "settings"})
    assert str(caught.value).startswith(line)
