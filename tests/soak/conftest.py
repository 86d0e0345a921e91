"""The small cases and what they come to without a fault, once for all tests of this folder."""

import pytest

from soak.forks import Forks
from soak.kills import Soak


@pytest.fixture(scope="session")
def soak(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return Soak(forks, tmp_path_factory.mktemp("soak"))
