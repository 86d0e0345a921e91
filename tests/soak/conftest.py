"""The server that forks commands, once for all tests of this folder."""

from collections.abc import Iterator

import pytest

from soak.forks import Forks
from soak.kills import Soak


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("f")) as server:
        yield server


@pytest.fixture(scope="session")
def soak(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return Soak(forks, tmp_path_factory.mktemp("soak"))
