"""README.md of an exported model: how to load it, its origin, and the verification of the export.

The template is `model_card.md`; the Hugging Face hub reads the YAML block at its top.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from graftlm.files.fetch import HUB_NAME


def card(title: str, record: dict[str, Any]) -> str:
    """The model card; `record` is the contents of export.json."""
    base, data, verification = record["base"], record["data"], record["verification"]
    on_hub = HUB_NAME.fullmatch(base["name"]) is not None and "/" in base["name"]
    base_name = base["name"] if on_hub else Path(base["name"]).name  # a local path is private
    method, *settings = (value for value in record["method"].items() if value[1] is not None)
    fields = ", ".join(f"{key} {'+'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for key, v in settings)
    checkpoint, metrics = record["checkpoint"], record["val_metrics"]
    if metrics:
        checkpoint += f": validation loss {metrics['val_loss']:.4f}"
        checkpoint += "" if metrics.get("val_accuracy") is None else f", accuracy {metrics['val_accuracy']:.4f}"
    rows = {
        "base": base_name,
        "base weights": f"sha256 {base['sha256']}",
        "method": f"{method[1]} ({fields})" if fields else method[1],
        "data": f"{Path(data['name']).name}, fingerprint {data['fingerprint']}" if data.get("name") else "not known",
        "checkpoint": checkpoint,
        "dtype": record["dtype"],
        "made with": f"graftlm {record['graftlm']}, {record['date']}",
        "verification": f"loaded back from these files, the largest difference of a logit from the adapted base is "
        f"{verification['max_abs_logit_diff']:.1e} ({verification['tolerance']:.1e} is accepted; the largest logit is "
        f"{verification['max_abs_logit']:.0f}), on {verification['prompts']}",
    }
    cells = {key: " ".join(text.replace("|", "\\|").split()) for key, text in rows.items()}
    template = (resources.files("graftlm.exchange") / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        base_model=f"base_model: {base['name'].partition('@')[0]}\n" if on_hub else "",
        method=method[1],
        title=title,
        base=base_name,
        rows="\n".join(f"| {key} | {cell} |" for key, cell in cells.items()),
        labels=" or ".join(f"`{label}`" for label in record["template"]["labels"]),
        template=record["template"]["text"],
    )
