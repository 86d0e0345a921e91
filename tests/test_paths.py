"""Whatever names a file is read in one way: `~`, suffixes in any case, byte order marks, line ends of Windows."""

import codecs
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pyarrow
import pyarrow.parquet as parquet
import pytest

import graftlm
from graftlm.cli.main import COMMANDS, run
from graftlm.config import TrainConfig
from graftlm.config.flags import CommonFlags, parse
from graftlm.config.paths import PATH_FLAGS
from graftlm.errors import InputError
from graftlm.files import assets, fetch
from graftlm.files.formats import read_json
from graftlm.studies import sweep
from graftlm.studies.sweep import read_sweep
from graftlm.text.dataset import load_dataset
from graftlm.text.tasks import load_task
from graftlm.text.template import load_template
from graftlm.text.tokenizer import FILES, Tokenizer
from tiny import data_folder, model_folder

NOT_PATHS = {  # texts that are words, numbers or names, never files
    *("checkpoint", "device", "dtype", "split", "method", "targets", "prefix_init", "train_layers", "method_args"),
    *("columns", "labels", "prompt", "ray", "style", "wandb_project", "prompt_words", "target_label", "mlp_widths"),
    *(
        "logit_bias",
        "reward_command",
        "title",
        "host",
        "api_key",
        "allowed_hosts",
        "stop",
        "system",
        "completion",
        "messages",
    ),
}
CONFIGS = [pytest.param(name, command.config, command.positional, id=name) for name, command in COMMANDS.items()]
NEEDED = {
    "pairs": {"reward_command": "cat", "prompts": "p"},
    "export": {"to": "t"},
    "import": {"folder": "f"},
    "report": {"folders": "f"},
    "download": {"name": "n"},
    "evaluate": {"data": "d"},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(config: type) -> list[str]:
    """The fields that hold any text."""
    hints = get_type_hints(config)
    return [
        f.name
        for f in (*fields(config), *fields(CommonFlags))
        if hints.get(f.name, str) in (str, str | None, tuple[str, ...])
    ]


@pytest.mark.parametrize(("command", "config", "positional"), CONFIGS)
def test_each_flag_that_takes_text_is_a_path_or_is_not(command: str, config: type, positional: str) -> None:
    for name in set(texts(config)) - {"json", "debug"}:
        assert (name in PATH_FLAGS) != (name in NOT_PATHS), f"--{name} of graft {command}: may it name a file?"


@pytest.mark.parametrize(("command", "config", "positional"), CONFIGS)
def test_the_home_is_expanded_in_each_path_flag(command: str, config: type, positional: str, home: Path) -> None:
    for name in sorted(PATH_FLAGS & {f.name for f in fields(config)}):
        needed = {
            key: value for key, value in NEEDED.get(command, {}).items() if name + key != "reward_modelreward_command"
        }
        given = needed | {name: "~/runs/x.jsonl" if name != "out" or command == "pairs" else "~/runs/x.html"}
        value = getattr(parse(command, config, [f"--{k}={v}" for k, v in given.items()], positional).config, name)
        value = value[0] if isinstance(value, tuple) else value
        assert value == str(home / "runs" / Path(given[name]).name), name
        with pytest.raises(InputError, match=rf"--{name} ~nosuchuser/x: there is no user 'nosuchuser'; "):
            parse(command, config, [f"--{k}={v}" for k, v in {**given, name: "~nosuchuser/x"}.items()], positional)


def test_the_home_in_recipes_sweeps_and_names(home: Path) -> None:
    (home / "recipe.toml").write_text('out_dir = "~/runs/a"\ntemplate = "~ {text}"\n')
    config = parse("train", TrainConfig, ["--config=~/recipe.toml", "--data=~/d"]).config
    assert (config.out_dir, config.template, config.data) == (str(home / "runs/a"), "~ {text}", str(home / "d"))
    serve = parse("serve", COMMANDS["serve"].config, ["--adapters=mine=~/a", "--adapters=~/b"]).config
    assert serve.adapters == (f"mine={home}/a", f"{home}/b")
    (home / "t.txt").write_text("a {text}")
    (home / "sweep.toml").write_text('[train]\ntemplate = "~/t.txt"\n')
    before = read_sweep("~/sweep.toml", {}, {})[0].id
    sweep._file_hashes.cache_clear()
    (home / "t.txt").write_text("b {text}")
    assert read_sweep("~/sweep.toml", {}, {})[0].id != before  # the file behind ~ is part of the trial's identity


def test_the_home_from_python(home: Path) -> None:
    model_folder(home / "base")
    data_folder(home / "data")
    assert graftlm.load("~/base", device="cpu").folder == home / "base"
    assert len(load_dataset("~/data", labels=("no", "yes")).splits["train"]) == 48
    (home / "t.txt").write_text("Q {text}")
    assert load_template("~/t.txt").prompt("x") == "Q x"
    assert TrainConfig(out_dir=Path("~/run")).out_dir == str(home / "run")  # type: ignore[arg-type]
    for read in (graftlm.load, load_dataset, load_template, load_task):
        with pytest.raises(InputError, match="there is no user 'nosuchuser'"):
            read("~nosuchuser/x.toml")


@pytest.mark.parametrize("variable", ["GRAFT_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"])
def test_the_home_in_environment_variables(variable: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRAFT_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    folder = fetch._cache if variable.startswith("HF") else assets.cache_home
    monkeypatch.setenv(variable, "~/cache")
    assert Path(str(folder())).is_relative_to(home / "cache")
    monkeypatch.setenv(variable, "~nosuchuser")
    with pytest.raises(InputError, match=f"{variable} ~nosuchuser: there is no user"):
        folder()


def test_a_run_in_the_home_leaves_no_folder_named_tilde(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model_folder(home / "m/base")
    data_folder(home / "m/data")
    (home / "work").mkdir()
    words = ["--init_from=~/m/base", "--data=~/m/data", "--rank=4", "--max_iters=1", "--template=R:{text}"]
    assert run(["train", *words, "--out_dir=~/m/run", "--device=cpu", "--dtype=float32"]) == 0
    assert run(["evaluate", "~/m/run", "--limit=4", "--mode=score", "--predictions=~/m/p.jsonl"]) == 0
    assert run(["export", "~/m/run", "--to=~/m/peft"]) == 0
    assert run(["import", "~/m/peft", "--out_dir=~/m/again", "--template=R:{text}"]) == 0
    assert run(["report", "~/m/run", "--out=~/m/page.html"]) == 0
    assert run(["evaluate", "--init_from=~nosuchuser/m"]) == 2
    assert {"run", "peft", "again", "p.jsonl", "page.html"} <= {path.name for path in (home / "m").iterdir()}
    assert not [path for path in home.rglob("*") if path.name == "~"]


def test_only_one_module_expands_the_home() -> None:
    files = Path(graftlm.__file__).parent.rglob("*.py")
    assert [path.name for path in files if "expanduser" in path.read_text()] == ["paths.py"]


# Text -----------------------------------------------------------------------------------------------------------------

ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-be", "utf-32")


def written(text: str, encoding: str) -> bytes:
    """With a byte order mark and the line ends of Windows."""
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    return mark + text.replace("\n", "\r\n").encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_text_file_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    def file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(written(text, encoding))
        return str(path)

    recipe = file("recipe.TOML", 'max_iters = 2\nlabels = "schlecht,größer"\n')
    config = parse("train", TrainConfig, [f"--config={recipe}"]).config
    assert (config.max_iters, config.labels) == (2, "schlecht,größer")
    assert len(read_sweep(file("sweep.toml", "[grid]\nlr = [1e-4, 2e-4]\n"), {}, {})) == 2
    assert load_template(file("t.txt", "Ist {text}\ngut?\n")).text == "Ist {text}\ngut?"
    rows = [{"text": f"schön {n}", "label": n % 2} for n in range(20)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    for name, text in (("a.JSONL", lines), ("a.CSV", table), ("a.JSON", json.dumps(rows))):
        splits = load_dataset(file(name, text), labels=("no", "yes")).splits
        assert {record.text for split in splits.values() for record in split} == {row["text"] for row in rows}
    questions = '[[questions]]\nquestion = "größer?"\nanswer = "4"\n'
    assert load_task(file("task.TOML", questions))[0].questions[0].question == "größer?"
    assert read_json(Path(file("x.json", '{"ä": 1}'))) == {"ä": 1}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_folder_saved_by_an_editor_is_the_same_model(encoding: str, tmp_path: Path) -> None:
    plain, edited = model_folder(tmp_path / "plain"), tmp_path / "edited"
    (plain / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor %}")
    shutil.copytree(plain, edited)
    for path in edited.iterdir():
        if path.suffix != ".safetensors":
            path.write_bytes(written(path.read_text(), encoding))
    one, other = (graftlm.load(str(folder), device="cpu", dtype="float32") for folder in (plain, edited))
    assert other.tokenizer.encode("hello\nthere") == one.tokenizer.encode("hello\nthere")
    assert (other.tokenizer.chat_template or "").replace("\r\n", "\n") == one.tokenizer.chat_template
    other.tokenizer.save(tmp_path)  # the saved files have no mark, so that transformers reads them
    saved = [tmp_path / name for name in FILES if (tmp_path / name).is_file()]
    assert len(saved) == 3 and not [path for path in saved if path.read_bytes().decode("utf-8").startswith("\ufeff")]


@pytest.mark.parametrize("pair", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_merges_with_other_line_ends_and_a_mark(pair: tuple[str, str], tmp_path: Path) -> None:
    vocab = ["t", "h", "e", "th", "the", "<|endoftext|>"]
    (tmp_path / pair[0]).write_bytes(written(json.dumps({token: n for n, token in enumerate(vocab)}), "utf-8-sig"))
    (tmp_path / pair[1]).write_bytes(written("#version: 0.2\nt h\nth e\n", "utf-8-sig"))
    assert Tokenizer.from_folder(tmp_path).encode("the") == [4]


def test_utf16_without_a_mark_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes("max_iters = 2\n".encode("utf-16-le"))
    with pytest.raises(
        InputError, match=r"r\.toml:1: byte 2 is not UTF-8 \(it looks like UTF-16\); save the file as UTF-8"
    ):
        parse("train", TrainConfig, [f"--config={tmp_path / 'r.toml'}"])


# Suffixes -------------------------------------------------------------------------------------------------------------


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}), folder / "TRAIN.PARQUET")
    (folder / "Test.Jsonl").write_text('{"text": "e", "label": 1}\n')
    splits = load_dataset(str(folder), labels=("no", "yes")).splits
    assert len(splits["test"]) == 1 and len(splits["train"]) + len(splits["validation"]) == 4
    (tmp_path / "R.CSV").write_text("text,label\na,0\nb,1\nc,0\n")
    assert sum(map(len, load_dataset(str(tmp_path / "R.CSV"), labels=("no", "yes")).splits.values())) == 3
    (tmp_path / "M.GGUF").write_bytes(b"no gguf")
    with pytest.raises(InputError, match="GGUF"):
        assets.model_folder(str(tmp_path / "M.GGUF"))
    assert {"*.csv", "*.CSV"} <= set(fetch.DATA_FILES)
