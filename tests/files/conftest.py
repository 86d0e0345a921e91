"""Python in a process of its own, for what needs one: limits, locks, kills and imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).parents[2] / "src"

Child = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def child() -> Child:
    """Start `python -c CODE WORDS…` with this checkout's package; keyword arguments are environment variables."""

    def start(code: str, *words: Any, **environment: Any) -> Any:
        path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in environment.items()}}
        command = [sys.executable, "-c", code, *map(str, words)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
