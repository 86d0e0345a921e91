"""README.md of an exported model: how to load it, what it was made of and with, and the proof of the export.

The head between the dashes is what the Hugging Face hub reads.
"""

from pathlib import Path
from typing import Any

from graftlm.files.hub import HUB_NAME

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- graftlm
- {method}
---

# {title}

{base}, adapted with {method} by graftlm; a plain model, which is loaded like any other:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{title}")
model = AutoModelForCausalLM.from_pretrained("{title}")
```

| | |
|---|---|
{rows}

It was trained on prompts of this form, behind which {labels} followed:

````text
{template}
````
"""


def card(title: str, about: dict[str, Any]) -> str:
    """The page of an exported model; `about` is what its export.json holds."""
    base, data, proof = about["base"], about["data"], about["verification"]
    on_hub = HUB_NAME.fullmatch(base["name"]) is not None and "/" in base["name"]
    shown = base["name"] if on_hub else Path(base["name"]).name  # a local path tells of the machine, not the base
    method = dict(about["method"])
    name = method.pop("method")
    settings = ", ".join(f"{key} {_value(value)}" for key, value in method.items() if value is not None)
    rows = {
        "base": shown,
        "base weights": f"sha256 {base['sha256']}",
        "method": f"{name} ({settings})" if settings else name,
        "data": f"{Path(data['name']).name}, fingerprint {data['fingerprint']}" if data.get("name") else "not known",
        "checkpoint": _checkpoint(about),
        "number format": about["dtype"],
        "made with": f"graftlm {about['graftlm']}, {about['date']}",
        "verification": f"loaded back from these files, the largest difference of a logit from the adapted base is "
        f"{proof['max_abs_logit_diff']:.1e} ({proof['tolerance']:.1e} is accepted; the largest logit is "
        f"{proof['max_abs_logit']:.0f}), on {proof['prompts']}",
    }
    return CARD.format(
        base_model=f"base_model: {base['name'].partition('@')[0]}\n" if on_hub else "",
        method=name,
        title=title,
        base=shown,
        rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
        labels=" or ".join(f"`{label}`" for label in about["template"]["labels"]),
        template=about["template"]["text"],
    )


def _value(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _checkpoint(about: dict[str, Any]) -> str:
    score = about["val_metrics"]
    if not score:
        return about["checkpoint"]
    accuracy = "" if score.get("val_accuracy") is None else f", accuracy {score['val_accuracy']:.4f}"
    return f"{about['checkpoint']}: validation loss {score['val_loss']:.4f}{accuracy}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
