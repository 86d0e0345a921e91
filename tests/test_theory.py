"""docs/theory/: both sides of every equation agree, a flipped sign is noticed, and the pages show what is computed."""

import importlib
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from graftlm.config import TrainConfig
from graftlm.methods import LoRA
from graftlm.training.trainer import make_optimizer
from tiny import model_of

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "theory"
PAGES = [page for page in sorted(FOLDER.glob("*.md")) if page.name != "README.md"]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
NUMBERS = [number for text in TEXTS.values() for number in re.findall(r"\\tag\{(.+?)\}", text)]


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("checks")


def test_every_display_equation_has_one_check_and_every_check_its_equation(checks: ModuleType) -> None:
    assert sorted(checks.PAGES) == sorted(TEXTS)
    assert len(NUMBERS) == len(set(NUMBERS)) and sorted(NUMBERS) == sorted(checks.EQUATIONS)
    for name, text in TEXTS.items():
        blocks = re.findall(r"```math\n(.*?)```", text, re.DOTALL)
        assert blocks and all(block.count("\\tag{") == 1 for block in blocks), name
        assert "$$" not in text and "\\[" not in text, f"{name}: an equation that has no number"
        shown = [mark for mark in re.findall(r"<!-- (\S+) -->", text) if mark != "end"]
        numbers = re.findall(r"\\tag\{(.+?)\}", text)
        assert shown == numbers == sorted(numbers), name
        own = importlib.import_module(name.removesuffix(".md"))
        assert all(checks.EQUATIONS[number].check.__module__ == own.__name__ for number in numbers)


@pytest.mark.parametrize("number", NUMBERS)
def test_both_sides_agree(number: str, checks: ModuleType) -> None:
    rows = checks.EQUATIONS[number].check()
    assert rows
    for row in rows:
        assert row.holds, row


@pytest.mark.parametrize("number", NUMBERS)
def test_a_flipped_sign_fails(number: str, checks: ModuleType) -> None:
    equation = checks.EQUATIONS[number]
    assert equation.signs, "a check needs a sign that can be flipped"
    for sign in equation.signs:
        assert not all(row.holds for row in equation.check(**{sign: -1.0})), f"{sign} flipped, and nothing noticed"


def test_a_row_can_fail(checks: ModuleType) -> None:
    row = importlib.import_module("_equation").Row
    assert row("", 1.0, 1.0 + 1e-10).holds and not row("", 1.0, 1.0 + 1e-8).holds
    assert row("", 1.0, 2.0, "<").holds and not row("", 1.0, 2.0, ">").holds and not row("", 1.0, 1.0, "<").holds
    assert not row("", float("nan"), float("nan")).holds and not row("", True, False).holds


def test_the_pages_show_what_is_computed_now(checks: ModuleType) -> None:
    found = checks.computed()
    for name, text in TEXTS.items():
        assert checks.fill(text, found) == text, f"{name}: run python docs/theory/checks.py"
        assert "<!-- end -->" in text and not re.search(r"-->\n<!-- end", text), f"{name}: an empty block"


def test_the_command_puts_a_wrong_number_right(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in PAGES:
        shutil.copy(page, tmp_path)
    counting = tmp_path / "counting.md"
    counting.write_text(TEXTS["counting.md"].replace("| 700,073 |", "| 700,074 |"))
    assert counting.read_text() != TEXTS["counting.md"]
    monkeypatch.setattr(checks, "FOLDER", tmp_path)
    assert checks.main([]) == 0
    assert {page.name: page.read_text() for page in tmp_path.iterdir()} == TEXTS
    assert f"{len(NUMBERS)} equations hold" in capsys.readouterr().err


def test_the_command_writes_nothing_where_an_equation_does_not_hold(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("_equation")
    wrong = module.Equation(lambda: [module.Row("one", 1.0, 2.0)], "", "")
    monkeypatch.setattr(checks, "FOLDER", tmp_path)  # empty: a page would have to be there to be written
    monkeypatch.setitem(checks.EQUATIONS, "9.9", wrong)
    assert checks.main([]) == 1
    assert capsys.readouterr().err == "error: does not hold: (9.9) one\n"


def test_alpha_is_bs_learning_rate_in_a_model_too() -> None:
    """What low_rank.md says of --alpha and --lora_plus_ratio, with the run's own optimizer, epsilon and all."""
    ids, updates = torch.tensor([[3, 9, 4, 9, 2, 17, 30, 8]]), []
    for alpha, ratio, lr in ((18.0, 1.0, 1e-3), (6.0, 3.0, 1e-3), (6.0, 1.0, 3e-3)):
        model, method = model_of("llama").train(), LoRA(rank=3, alpha=alpha, dropout=0.0, plus_ratio=ratio)
        method.install(model, torch.Generator().manual_seed(3))
        optimizer = make_optimizer(model, TrainConfig(lr=lr), method)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
            optimizer.step()
        updates.append(torch.cat([m.scale * (m.lora_B @ m.lora_A).detach().flatten() for m in model.modules()
                                  if hasattr(m, "lora_B")]))  # fmt: skip
    scaled, by_ratio, by_rate = updates
    assert (scaled - by_ratio).norm() < 1e-4 * scaled.norm()
    assert (scaled - by_rate).norm() > 1e-2 * scaled.norm()


def test_the_formulas_are_written_as_github_reads_them() -> None:
    """In a line GitHub reads backslash and punctuation as Markdown, before it reads mathematics; dollars pair up."""
    for page in FOLDER.glob("*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for paragraph in re.split(r"\n\n|\n\| |\n- ", prose):
            assert paragraph.count("$") % 2 == 0, f"{page.name}: {paragraph}"
        for formula in re.findall(r"\$([^$]+)\$", prose):
            assert not re.search(r"\\[^A-Za-z]|[*|<]", formula), f"{page.name}: {formula}"
            assert formula == formula.strip()


def test_links_lead_somewhere() -> None:
    for page in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
