"""Execute notebooks/run_in_colab.ipynb from top to bottom and store its outputs in it: part of `make pictures`.

    python docs/_notebook.py [--out notebooks/run_in_colab.ipynb]

It runs in an empty folder; on a CPU it takes 420 training steps of 6 reviews. Needs the extra dev.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "run_in_colab.ipynb"


def main() -> None:
    """Execute it, and write it without what only this machine has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NOTEBOOK)
    flags = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    language = notebook.metadata["language_info"]
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata["language_info"] = language
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if output.output_type == "stream":
            output.text = output.text.replace("\r\n", "\n")  # of the terminal in which `!` runs a command
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    notebook.metadata["executed"] = {"sha256": hashlib.sha256(code.encode()).hexdigest()}  # a test compares it
    nbformat.write(notebook, flags.out)


if __name__ == "__main__":
    main()
