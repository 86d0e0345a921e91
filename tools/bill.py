"""What a graftlm is made of: a bill of materials (CycloneDX 1.5, JSON) and a page of licences, from what is installed.

    python tools/bill.py --extras serve --out dist/graftlm.cdx.json     # for a release
    python tools/bill.py --extras dev,peers --page docs/licences.md     # the page

It follows graftlm's own requirements through the packages' metadata, so what merely lies in the same environment is
not in it. A licence is what the package says of itself: its License-Expression, else its classifiers, else its License
field; nobody has read the texts for you. What is required and not installed is an error. Same environment and same
SOURCE_DATE_EPOCH (default: today), same bytes.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Found = dict[str, tuple[Distribution, set[str]]]
"""By canonical name: the package, and the names of those it requires."""


def closure(name: str, extras: Iterable[str]) -> Found:
    """A package and all that it requires here. Raises SystemExit with one line for what is not installed."""
    found: Found = {}
    done: set[tuple[str, str]] = set()
    line = [(name, extra) for extra in ("", *extras)]
    while line:
        each, extra = line.pop()
        key = canonicalize_name(each)
        if (key, extra) in done:
            continue
        done.add((key, extra))
        try:
            package = found[key][0] if key in found else distribution(each)
        except PackageNotFoundError:
            raise SystemExit(f"bill.py: {each} is required and not installed here") from None
        found.setdefault(key, (package, set()))
        for text in package.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                if canonicalize_name(need.name) != key:
                    found[key][1].add(canonicalize_name(need.name))
                line += [(need.name, more) for more in ("", *need.extras)]
    return found


def licence(package: Distribution) -> str:
    """One line, in the package's own words."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [text for text in about.get_all("Classifier") or () if text.startswith("License ::")]
    if names := sorted({text.rpartition(" :: ")[2] for text in classifiers} - {"OSI Approved"}):
        return ", ".join(names)
    said = (about.get("License") or "").strip()
    return said.splitlines()[0][:80] if said else "not stated"


def moment() -> datetime:
    """When it is written."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC).replace(hour=0, minute=0, second=0)


def component(package: Distribution) -> dict[str, Any]:
    """A package as CycloneDX has it."""
    name, version = canonicalize_name(package.metadata["Name"]), package.version
    expression = package.metadata.get("License-Expression")
    said = {"expression": expression} if expression else {"license": {"name": licence(package)}}
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{version}",
        "name": name,
        "version": version,
        "licenses": [said],
        "purl": f"pkg:pypi/{name}@{version}",
    }


def bill(found: Found, name: str) -> dict[str, Any]:
    """The whole bill; `name` is what it is the bill of."""
    refs = {key: component(package)["bom-ref"] for key, (package, _) in found.items()}
    own = {**component(found[name][0]), "type": "application"}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": moment().strftime("%Y-%m-%dT%H:%M:%SZ"), "component": own},
        "components": [component(package) for key, (package, _) in sorted(found.items()) if key != name],
        "dependencies": [
            {"ref": refs[key], "dependsOn": sorted(refs[need] for need in needs)}
            for key, (_, needs) in sorted(found.items())
        ],
    }


def page(found: Found, name: str, extras: str) -> str:
    """The licences as a page: what graftlm itself needs, then what the extras bring."""
    core = closure(name, ())
    lines = [
        "# Licences",
        "",
        f"graftlm is {licence(found[name][0])}. It contains no code of others; these are the packages that it is "
        "installed with, and",
        f"what each says of its own licence. Written by `python tools/bill.py --extras {extras} --page "
        f"docs/licences.md`, {moment():%Y-%m-%d}.",
    ]
    for title, keys in (
        ("What graftlm needs", sorted(core.keys() - {name})),
        ("What the extras bring besides", sorted(found.keys() - core.keys())),
    ):
        lines += ["", f"## {title}", "", "| package | version | licence |", "|---|---|---|"]
        lines += [f"| {key} | {found[key][0].version} | {licence(found[key][0]).replace('|', '/')} |" for key in keys]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--extras", default="", help="of graftlm, between commas")
    parser.add_argument("--out", type=Path, help="the bill of materials")
    parser.add_argument("--page", type=Path, help="the page of licences")
    given = parser.parse_args()
    found = closure("graftlm", filter(None, given.extras.split(",")))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(bill(found, "graftlm"), indent=1) + "\n", encoding="utf-8")
    if given.page:
        given.page.write_text(page(found, "graftlm", given.extras), encoding="utf-8")
    sys.stderr.write(f"{len(found) - 1} packages besides graftlm\n")


if __name__ == "__main__":
    main()
