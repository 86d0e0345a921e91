"""The floor plan, held by reading every import and call in src (with `ast`: nothing is imported, so this is fast)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
FILES = sorted((SRC / "graftlm").rglob("*.py"))

ORDER = ("files", "text", "models", "methods", "exchange", "inference", "training", "studies", "serving")
FOR_ALL = {"config": 0, "errors": 0}
COMMAND = {"__init__", "__main__", "cli", "library"}
MAY_PRINT = {"graftlm.cli.main", "graftlm.cli.display", "graftlm.cli.chat"}
MAY_EXIT = {"graftlm.cli.main", "graftlm.__main__"}
UNSAFE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def module(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    """Every node; those behind `if TYPE_CHECKING` only when asked for."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child, for_types)


def imports(name: str, for_types: bool = True) -> Iterator[str]:
    """The modules of graftlm that a module imports, also inside functions."""
    package = MODULES[name].name == "__init__.py"
    for node in nodes(TREES[name], for_types):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = name.split(".")[: len(name.split(".")) - node.level + package]
                base = ".".join([*up, *filter(None, [node.module])])
            # `from graftlm.models import gpt2` names a module, `from graftlm.errors import InputError` does not.
            found = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from (target for target in found if target.split(".")[0] == "graftlm")


def room(name: str) -> str:
    """The folder under graftlm a module is in, or its own name when it lies beside the folders."""
    return name.split(".")[1] if "." in name else "__init__"


def floor(name: str) -> int:
    """The place in the one-way order: what everyone may use is 0, the command is the top."""
    here = room(name)
    if here in ORDER:
        return 1 + ORDER.index(here)
    assert here in FOR_ALL or here in COMMAND, f"{name}: a file in no room of the floor plan"
    return FOR_ALL.get(here, 1 + len(ORDER))


def calls(name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module calls or raises."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield node.lineno, ast.unparse(node.exc)


def test_the_files_are_found() -> None:
    assert {"graftlm", "graftlm.cli", "graftlm.config", "graftlm.files.formats"} <= set(MODULES)
    assert "graftlm.errors" in imports("graftlm.config.flags")
    assert "graftlm.training.train" in imports("graftlm.cli.main")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    wrong = sorted({target for target in imports(name) if floor(target) > floor(name)})
    assert not wrong, f"{name} is below what it imports: {wrong}"


def test_there_are_no_cycles() -> None:
    """Between modules of one room too; an import for types only, and a lazy name of graftlm/__init__.py, is none."""
    graph = {name: set(imports(name, for_types=False)) - {name} for name in MODULES if name != "graftlm"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_command_prints_and_exits() -> None:
    exits = {"sys.exit", "exit", "quit", "os._exit", "os.abort"}
    for name, path in MODULES.items():
        for line, call in calls(name):
            where = f"{path.relative_to(SRC)}:{line}: {call}"
            assert call not in ("print", "sys.stdout.write", "sys.stderr.write") or name in MAY_PRINT, where
            leaves = call in exits or call.startswith("SystemExit")
            assert not leaves or name in MAY_EXIT, where


def test_nothing_is_read_through_pickle() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not UNSAFE & {part.split(".")[0] for part in named}, f"{path}:{node.lineno}"
        for line, call in calls(name):
            assert call not in ("torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"), f"{path}:{line}"


def test_only_the_command_changes_settings_of_the_process() -> None:
    settings = ("torch.set_num_threads", "torch.set_num_interop_threads", "torch.set_default_dtype", "faulthandler.")
    for name, path in MODULES.items():
        if room(name) in COMMAND:
            continue
        for line, call in calls(name):
            assert not call.startswith(settings) and not call.endswith(".mallopt"), f"{path}:{line}: {call}"


def test_no_exception_is_swallowed_whole_and_no_check_is_silenced() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ExceptHandler):
                caught = "everything" if node.type is None else ast.unparse(node.type)
                # What another's logger raises may be anything: it is told of, and the run goes on.
                loggers = name.endswith("training.reporting") and caught == "Exception"
                assert loggers or caught not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}"
        assert "type: ignore" not in path.read_text(encoding="utf-8"), path
