"""The command line as a user meets it: what is read, what is refused with which words, and where output goes."""

import errno
import io
import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from conftest import Graft, child_environment
from graftlm import __version__, cli
from graftlm.cli import display
from graftlm.config import DownloadConfig, ExportConfig, GenerateConfig, ReportConfig, TrainConfig
from graftlm.config.flags import CommonFlags, field_types, parse, parse_columns
from graftlm.config.values import without_none
from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.methods import METHODS, describe

COMMANDS = (
    "train",
    "generate",
    "chat",
    "evaluate",
    "prompt",
    "pairs",
    "compare",
    "report",
    "serve",
    "estimate",
    "data",
    "export",
    "import",
    "download",
    "completion",
)
HANDOUT_TRAIN = [
    "--init_from=gpt2-medium",
    "--out_dir=gpt_lora_default",
    "--device=cuda",
    "--rank=128",
    "--alpha=256",
    "--lr=2e-5",
    "--dropout=0.05",
    "--lora_dropout=0.05",
    "--max_iters=80",
    "--wandb_project=HW3_lora_finetune_handout",
]


def fake(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], name: str = "download") -> None:
    """Put `run` in place of a verb's handler."""
    verb = cli.COMMANDS[name]
    row = cli.Command(verb.config, run, verb.print_result, verb.positional, uses_tensors=False)
    monkeypatch.setitem(cli.COMMANDS, name, row)


def refuse(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which wrong input is refused."""
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("graft: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("graft: ").rstrip("\n")


# Reading flags


def test_the_handouts_flags_are_read_as_it_prints_them() -> None:
    config = parse("train", TrainConfig, HANDOUT_TRAIN).config
    assert config == TrainConfig(
        init_from="gpt2-medium",
        out_dir="gpt_lora_default",
        device="cuda",
        rank=128,
        alpha=256.0,
        lr=2e-5,
        dropout=0.05,
        lora_dropout=0.05,
        max_iters=80,
        wandb_project="HW3_lora_finetune_handout",
    )
    words = ["--init-from=resume", "--out_dir=gpt_lora_default", "--device=cuda", "--max_new_tokens=5"]
    config = parse("generate", GenerateConfig, [*words, "--temperature=0.6", "--top_k=200"]).config
    assert config == GenerateConfig(
        out_dir="gpt_lora_default", device="cuda", max_new_tokens=5, temperature=0.6, top_k=200
    )


@pytest.mark.parametrize("words", [["--lora_dropout", "0.5"], ["--lora-dropout", "0.5"], ["--lora-dropout=0.5"]])
def test_underscores_and_hyphens_blank_and_equals_sign_read_the_same(words: list[str]) -> None:
    parsed = parse("train", TrainConfig, words)
    assert parsed.config.lora_dropout == 0.5
    assert parsed.explicit == {"lora_dropout"}


def test_switches_turn_on_and_off_and_the_last_word_wins() -> None:
    def read(*words: str) -> tuple[bool, bool]:
        config = parse("train", TrainConfig, words).config
        return config.resume, config.shared_prefix

    assert read() == (False, True)
    assert read("--resume", "--no-shared_prefix") == (True, False)
    assert read("--resume=true", "--shared-prefix=False") == (True, False)
    assert read("--resume", "--no_resume") == (False, True)


def test_values_may_look_like_anything_a_user_types() -> None:
    words = ["--prompt=--debug", "--data", "-", "--out_dir", "a=b c", "--top_k=1", "--top_k", "2"]
    parsed = parse("generate", GenerateConfig, words)
    assert (parsed.config.prompt, parsed.config.data, parsed.config.out_dir) == ("--debug", "-", "a=b c")
    assert parsed.config.top_k == 2
    assert not parsed.common.debug
    assert parse("train", TrainConfig, ["--rank", "none"]).config.rank is None


def test_fetch_takes_its_name_with_and_without_the_flag() -> None:
    assert parse("download", DownloadConfig, ["gpt2", "--json"], "name").config.name == "gpt2"
    assert parse("download", DownloadConfig, ["--json", "--name", "gpt2"], "name").config.name == "gpt2"


@pytest.mark.parametrize("name", ["generate", "evaluate", "export"])
def test_the_run_folder_may_be_given_without_its_flag(name: str) -> None:
    command = cli.COMMANDS[name]
    to = ["--to=x"] if name == "export" else []
    by_flag = parse(name, command.config, ["--out_dir", "runs/a", *to], command.positional)
    assert parse(name, command.config, ["runs/a", *to], command.positional) == by_flag
    assert by_flag.config.out_dir == "runs/a" and "out_dir" in by_flag.explicit


def test_columns_are_read_and_checked() -> None:
    assert parse_columns(" text=body, label = stars ,") == {"text": "body", "label": "stars"}
    for wrong in ("text", "text=", "text=a,text=b"):
        with pytest.raises(InputError, match=r"^--columns text.*: must be FIELD=COLUMN, each field once"):
            parse("train", TrainConfig, [f"--columns={wrong}"])


def test_report_takes_any_number_of_folders_with_and_without_the_flag() -> None:
    def read(*words: str) -> tuple[str, ...]:
        folders: tuple[str, ...] = parse("report", ReportConfig, words, "folders").config.folders
        return folders

    assert read("a", "--out", "b.html", "c") == read("--folders=a", "--folders", "c") == read("a", "--folders=c")
    assert read("a", "c", "a") == ("a", "c", "a")


# Refusing


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trian"],
            f"unknown subcommand 'trian': did you mean 'train'? known are {', '.join(COMMANDS)}",
        ),
        (
            ["--rank", "4"],
            f"--rank: a subcommand comes first: graft {' | '.join(COMMANDS)} (see graft --help)",
        ),
        (["train", "--rnak", "4"], "unknown flag --rnak: did you mean --rank? see graft train --help"),
        (["train", "--zzz=4"], "unknown flag --zzz: see graft train --help"),
        (["train", "--no-rank"], "unknown flag --no-rank: did you mean --rank? see graft train --help"),
        (["train", "more"], "unexpected 'more': flags begin with two dashes (see graft train --help)"),
        (["train", "--rank", "abc"], "--rank abc: not a whole number"),
        (["train", "--rank", "1.5"], "--rank 1.5: not a whole number"),
        (["train", "--rank="], "--rank : not a whole number"),
        (["train", "--lr", "fast"], "--lr fast: not a number"),
        (["train", "--lr=nan"], "--lr nan: not a finite number"),
        (["train", "--grad_clip=inf"], "--grad_clip inf: not a finite number"),
        (["train", "--resume=maybe"], "--resume maybe: not true or false"),
        (["train", "--dtype", "float8"], "--dtype float8: not one of auto, float32, bfloat16, float16"),
        (["train", "--rank"], "--rank needs a value"),
        (
            ["generate", "--prompt", "--seed=1"],
            "--prompt needs a value (a value that begins with dashes is written --prompt=--seed=1)",
        ),
        (["train", "--rank", "-3"], "--rank -3: must be 0 (full fine-tuning) or more"),
        (["train", "--batch-size=0"], "--batch_size 0: must be 1 or more"),
        (
            ["train", "--rank=0", "--method=lora"],
            "--rank 0 means full fine-tuning and contradicts --method lora: leave one out",
        ),
        (["completion"], "graft completion needs SHELL (see graft completion --help)"),
        (["completion", "tcsh"], "--shell tcsh: not one of bash, zsh, fish"),
        (["download"], "graft download needs NAME (see graft download --help)"),
        (["report"], "graft report needs RUN (see graft report --help)"),
        (["pairs"], "graft pairs needs PROMPTS (see graft pairs --help)"),
        (["pairs", "--prompts= "], "--prompts ' ': must be a data set's name, a folder or a file"),
        (["pairs", "--prompts=a"], "--reward_model: name a classifier's run folder, or give --reward_command"),
        (
            ["pairs", "--prompts=a", "--reward_model=b", "--reward_command=c"],
            "--reward_model and --reward_command: name one of the two",
        ),
        (
            ["pairs", "--prompts=a", "--reward_command=c", "--target_label=positive"],
            "--target_label positive: a label of --reward_model; --reward_command has no labels",
        ),
        (
            ["pairs", "--prompts=a", "--reward_model=b", "--num_samples=1"],
            "--num_samples 1: must be 2 or more, as a pair needs two answers",
        ),
        (
            ["pairs", "--prompts=a", "--reward_model=b", "--temperature=0"],
            "--temperature 0.0: must be above 0, or all answers would be equal",
        ),
        (["pairs", "--prompts=a", "--reward_model=b", "--top_p=0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["pairs", "--prompts=a", "--reward_model=b", "--min_margin=-1"], "--min_margin -1.0: must be 0 or more"),
        (["pairs", "--prompts=a", "--reward_model=b", "--prompt_words=-1"], "--prompt_words -1: must be 0 or more"),
        (["pairs", "--prompts=a", "--reward_model=b", "--max_new_tokens=0"], "--max_new_tokens 0: must be 1 or more"),
        (["pairs", "--prompts=a", "--reward_model=b", "--pairing=some"], "--pairing some: not one of best, all"),
        (
            ["pairs", "--prompts=a", "--reward_model=b", "--out=p.json"],
            "--out 'p.json': must be a file's name that ends in .jsonl",
        ),
        (["export"], "--to: name the folder to create, as in --to my-model"),
        (["export", "--to= "], "--to: name the folder to create, as in --to my-model"),
        (["export", "--to=a", "--dtype=float64"], "--dtype float64: not one of float32, bfloat16, float16"),
        (["import"], "graft import needs FOLDER (see graft import --help)"),
        (["import", "a", "--out_dir="], "--out_dir '': must be a folder's name"),
        (["report", "a", "--out=page.txt"], "--out 'page.txt': must be a file's name that ends in .html"),
        (["report", "a", ""], "--folders '': must be folders' names"),
        (["download", "gpt2", "more"], "unexpected 'more': flags begin with two dashes (see graft download --help)"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(words, capsys) == line


def test_a_choice_is_read_in_any_case(tmp_path: Path) -> None:
    for name, command in cli.COMMANDS.items():
        for field in fields(command.config):
            choices = get_args(without_none(field_types(command.config)[field.name])[0])
            assert all(choice == choice.lower() for choice in choices if isinstance(choice, str)), (name, field.name)
    words = ["--to=m.gguf", "--format=GGUF", "--quantization", "Q8_0"]
    config = parse("export", ExportConfig, words).config
    assert (config.format, config.quantization) == ("gguf", "q8_0")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('base_format = "Q4_0"\n')
    assert parse("train", TrainConfig, [f"--config={recipe}"]).config.base_format == "q4_0"
    assert TrainConfig(base_format="Q4_1").base_format == "q4_1"


# Recipes


def test_a_recipe_sets_flags_and_flags_beside_it_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('rank = 4\nlr = 1\nlora-dropout = 0.5\nresume = true\ndtype = "float32"\ntemplate = "a {text}"\n')
    parsed = parse("train", TrainConfig, ["--rank=8", "--config", str(recipe), "--no-resume"])
    assert parsed.config == TrainConfig(rank=8, lr=1.0, lora_dropout=0.5, dtype="float32", template="a {text}")
    assert type(parsed.config.lr) is float
    assert parsed.explicit == {"rank", "lr", "lora_dropout", "resume", "dtype", "template"}


def test_a_recipe_can_name_what_fetch_needs(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "gpt2"\n')
    assert parse("download", DownloadConfig, [f"--config={recipe}"], "name").config.name == "gpt2"


def test_a_recipe_lists_the_folders_of_a_report_and_words_beside_it_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('folders = ["a", "b"]\n')
    words = [f"--config={recipe}"]
    assert parse("report", ReportConfig, words, "folders").config.folders == ("a", "b")
    assert parse("report", ReportConfig, [*words, "c"], "folders").config.folders == ("c",)
    for wrong in ('"a"', "[1]", "[]"):
        recipe.write_text(f"folders = {wrong}\n")
        with pytest.raises(InputError, match=r"recipe\.toml: folders"):
            parse("report", ReportConfig, words, "folders")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"rnak = 4\n", "{file}: unknown key 'rnak': did you mean rank? keys are flags of graft train"),
        (b"[zzz]\nrank = 4\n", "{file}: unknown key 'zzz': keys are flags of graft train"),
        (b"json = true\n", "{file}: unknown key 'json': keys are flags of graft train"),
        (b'rank = "4"\n', "{file}: rank = '4': not a whole number"),
        (b"rank = 4.0\n", "{file}: rank = 4.0: not a whole number"),
        (b"rank = true\n", "{file}: rank = True: not a whole number"),
        (b"lr = '1'\n", "{file}: lr = '1': not a number"),
        (b"lr = inf\n", "{file}: lr = inf: not a finite number"),
        (b"resume = 1\n", "{file}: resume = 1: not true or false"),
        (b"data = 3\n", "{file}: data = 3: not a text in quotes"),
        (b'targets = ["q"]\n', "{file}: targets = ['q']: not a text in quotes"),
        (b'dtype = "half"\n', "{file}: dtype = 'half': not one of auto, float32, bfloat16, float16"),
        (b"rank = -3\n", "{file}: rank -3: must be 0 (full fine-tuning) or more"),
        (b"rank = \n", "{file}: not a TOML file: Invalid value (at line 1, column 8)"),
        (
            b'data = "\xff"\n',
            "--config {file}:1: byte 9 is not UTF-8 (0xff); save the file as UTF-8",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(
    content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    assert refuse(["train", "--config", str(file)], capsys) == line.format(file=file)


def test_a_recipe_that_is_not_there_or_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "cannot read it: No such file or directory"
    assert refuse(["train", "--config", "no.toml"], capsys) == f"--config no.toml: {reason}"
    assert refuse(["train", f"--config={tmp_path}"], capsys) == f"--config {tmp_path}: cannot read it: Is a directory"


def test_a_wrong_flag_is_not_blamed_on_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("rank = 4\n")
    line = refuse(["train", "--config", str(file), "--rank=-1"], capsys)
    assert line == "--rank -1: must be 0 (full fine-tuning) or more"


# Output and exit status


def test_json_is_exactly_one_object_on_the_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(parsed: Any, notes: Any) -> dict[str, Any]:
        print("a library that prints")
        notes.print("a note")
        logging.getLogger("graftlm.files").info("fetching")
        return {"name": parsed.config.name, "path": "/größe"}

    fake(monkeypatch, chatty)
    assert cli.run(["download", "gpt2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == '{"name": "gpt2", "path": "/größe"}\n'
    assert err == "a library that prints\na note\ngraft: fetching\n"


def test_without_json_the_result_is_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, lambda parsed, notes: {"name": "x", "path": "/a/" + "long/" * 60})
    assert cli.run(["download", "x"]) == 0
    assert capsys.readouterr().out == "/a/" + "long/" * 60 + "\n"


def test_a_table_is_never_cut_however_narrow_the_window() -> None:
    file = io.StringIO()
    display._table(Console(file=file, width=20), ["name", "figures"], [["n" * 30, "f" * 40]])
    assert f"  {'n' * 30}   {'f' * 40}  " in file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("data.csv: empty\n file"), 2, "graft: data.csv: empty file"),
        (GraftError("step 3: the loss is nan"), 1, "graft: step 3: the loss is nan"),
        (Interrupted("interrupted; step 3 is saved"), 130, "graft: interrupted; step 3 is saved"),
        (KeyboardInterrupt(), 130, "graft: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "graft: disk full: a/b could not be written"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "graft: disk full: the output could not be written"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "graft: a/b: permission denied"),
    ],
)
def test_an_error_is_one_line_and_its_exit_status(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(parsed: Any, notes: Any) -> dict[str, Any]:
        raise error

    fake(monkeypatch, fail)
    assert cli.run(["download", "x", "--json"]) == status
    assert capsys.readouterr() == ("", line + "\n")
    assert cli.run(["download", "x", "--debug"]) == status
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(line + "\n")


FAKE_FETCH = """
import sys, time
from graftlm import __main__, cli
def handler(parsed, notes):
    {body}
verb = cli.COMMANDS["download"]
cli.COMMANDS["download"] = cli.Command(verb.config, handler, verb.print_result, verb.positional, uses_tensors=False)
sys.argv = ["graft", "download", "x", *sys.argv[1:]]
sys.exit(__main__.main())
"""


def test_an_exception_nobody_expected_is_one_line_without_debug() -> None:
    def broken(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", FAKE_FETCH.format(body='raise ZeroDivisionError("by\\nzero")'), *words]
        return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60)

    done = broken()
    assert done.returncode == 1
    line = "graft: internal error: ZeroDivisionError: by zero (run again with --debug for the traceback)\n"
    assert (done.stdout, done.stderr) == ("", line)
    done = broken("--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "in handler" in done.stderr


def test_a_reader_who_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "graftlm", "train", "--help"]
    with subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 1


def test_ctrl_c_ends_with_130() -> None:
    command = [sys.executable, "-c", FAKE_FETCH.format(body='print("ready", flush=True); time.sleep(60)')]
    with subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == "graft: interrupted\n"
        assert child.wait(60) == 130


# Help


def test_the_verbs_are_those_promised() -> None:
    assert tuple(cli.COMMANDS) == COMMANDS


def test_help_lists_the_verbs_and_every_verb_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    page = capsys.readouterr().out
    assert cli.run([]) == 0
    assert capsys.readouterr().out == page
    for name, verb in cli.COMMANDS.items():
        assert f"  {name}" in page and verb.summary in " ".join(page.split())
        assert cli.run([name, "--help", "all"]) == 0
        help_page = capsys.readouterr().out
        assert help_page.startswith(f"usage: graft {name} ")
        flags = {field.name for field in (*fields(verb.config), *fields(CommonFlags))}
        assert all(flag == verb.positional or f"--{flag}" in help_page for flag in flags)
        assert "The base model: a built-in name" in help_page or name != "train"
        assert cli.run([name, "--help"]) == 0
        main_page = capsys.readouterr().out
        listed = {*re.findall(r"^  --(\w+)", main_page, re.MULTILINE)}
        main = {*getattr(verb.config, "MAIN", flags)} | {field.name for field in fields(CommonFlags)}
        assert listed == main <= flags
        assert f"{len(flags - main)} more flags: graft {name} --help all" in main_page or main == flags


def test_the_help_page_of_train_lists_the_methods_and_with_method_the_defaults_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["train", "--help"]) == 0
    page = capsys.readouterr().out.partition("\nmethods (")[2]
    assert {line.split()[0] for line in page.splitlines() if line[:3].strip()} >= set(METHODS)
    assert cli.run(["train", "--method=dora", "-h"]) == 0
    assert capsys.readouterr().out.endswith(f"\n{describe('dora')}\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"graft {__version__}\n"


def test_help_answers_within_a_third_of_a_second_of_cpu_time(graft_process: Graft) -> None:
    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    graft_process("--help")  # compiles the modules' bytecode, once
    times = []
    for _ in range(3):
        before = seconds()
        assert graft_process("--help").returncode == 0
        times.append(seconds() - before)
    assert min(times) <= 0.3


def test_json_of_a_real_fetch_is_one_object(graft_process: Graft, tmp_path: Path) -> None:
    done = graft_process("download", "--json", "no-such-thing", GRAFT_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no-such-thing" in done.stderr
    done = graft_process("download", "rotten-tomatoes-pypi", "--json")
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["path"], "train.jsonl").is_file()


def test_the_help_page_reads_nothing_that_it_does_not_need() -> None:
    """Half of its time is imports: of what computes, of what reads files, of recipes."""
    look = (
        "import sys; before = set(sys.modules); from graftlm import cli; cli.run(['--help']); "
        "print(*set(sys.modules) - before, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, env=child_environment()
    )
    read = set(done.stderr.split())
    assert "graftlm.cli.main" in read and "usage: graft SUBCOMMAND" in done.stdout
    heavy = {
        "torch",
        "numpy",
        "rich",
        "hashlib",
        "socket",
        "tomllib",
        "graftlm.files",
        "graftlm.methods",
    }
    assert not read & heavy
