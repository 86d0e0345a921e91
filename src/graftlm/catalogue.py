"""The methods as their files declare them, for `graft train --help`: read with `ast`, so that no torch is imported.

What is unusual here: nothing is listed and nothing is run. Of a class under `methods/` what stands there as a literal
is taken (name, learning rate, flags, defaults of fields), and what it inherits of that from other classes there.
"""

import ast
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

METHODS_FOLDER = Path(__file__).parent / "methods"

Classes = Mapping[str, ast.ClassDef]


def overview(folder: Path = METHODS_FOLDER) -> str:
    """Every method, a line each: what it is, its default learning rate, its flags with their defaults."""
    files = [ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in sorted(folder.glob("*.py"))]
    classes = {node.name: node for file in files for node in file.body if isinstance(node, ast.ClassDef)}
    lines = {said["name"]: _line(node, said) for node in classes.values() if _is_method(said := _said(node, classes))}
    return "\n\n".join(["The methods, with what each takes by default:", *(lines[name] for name in sorted(lines))])


def _is_method(said: Mapping[str, Any]) -> bool:
    return {"name", "default_lr", "flags"} <= said.keys()


def _line(node: ast.ClassDef, said: Mapping[str, Any]) -> str:
    defaults = {"lr": f"{said['default_lr']:g}", **{flag: said[field] for flag, field in said["flags"].items()}}
    shown = {flag: ",".join(value) if isinstance(value, tuple) else value for flag, value in defaults.items()}
    flags = " ".join(f"--{flag} {value}" for flag, value in shown.items() if value != "")
    return f"{said['name']}: {(ast.get_docstring(node) or '').partition(chr(10))[0]} ({flags})"


def _said(node: ast.ClassDef, classes: Classes) -> dict[str, Any]:
    """Name -> value of all literals in a class's body and, before them, in those of its bases."""
    found: dict[str, Any] = {}
    for base in reversed(node.bases):
        if (name := ast.unparse(base)) in classes:
            found |= _said(classes[name], classes)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            with suppress(ValueError):  # no literal
                found[line.target.id] = ast.literal_eval(line.value)
    return found
