"""The public names are a promise: they are listed here a second time, each resolves, and the versions agree."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import graftlm
from conftest import child_environment
from graftlm.cli import COMMANDS

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "EvaluateConfig",
    "GenerateConfig",
    "GraftError",
    "InputError",
    "LoRALinear",
    "PairsConfig",
    "StopTraining",
    "TrainConfig",
    "__version__",
    "adapt",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "get_sentiment_prompt",
    "load",
    "mark_only_lora_as_trainable",
    "predict_labels",
    "make_preferences",
    "prepare",
    "report",
    "train",
}


def test_the_public_names_are_those_promised() -> None:
    assert set(graftlm.__all__) == PUBLIC
    assert dir(graftlm) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(graftlm, name)
    assert thing.__name__ == name
    assert thing.__doc__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        graftlm.lora  # noqa: B018


def test_importing_graftlm_imports_nothing_heavy() -> None:
    program = (
        "import sys, graftlm, graftlm.cli\n"
        "assert graftlm.cli.run(['--help']) == 0 and graftlm.cli.run(['--version']) == 0\n"
        "print({'torch', 'numpy', 'rich', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n"), done.stdout + done.stderr


@pytest.mark.parametrize("verb", COMMANDS)
def test_no_help_page_imports_torch(verb: str) -> None:
    program = (
        "import sys, graftlm.cli\n"
        f"assert graftlm.cli.run([{verb!r}, '--help']) == 0\n"
        "print({'torch', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert done.stdout.startswith("usage: graft") and done.stdout.endswith("\nset()\n"), done.stdout + done.stderr


def test_the_versions_of_package_code_and_changelog_agree() -> None:
    newest = re.search(r"^## (?:Unreleased )?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == graftlm.__version__
    assert version("graftlm") == graftlm.__version__
