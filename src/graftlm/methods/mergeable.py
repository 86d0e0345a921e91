"""A linear whose update folds into its weight: added to the products in training, part of the weight in evaluation.

What is unusual here: merging happens by itself. `train(False)`, and so `eval()`, folds the update into the weight;
`train(True)` puts the pristine tensors back, bit for bit, because they were kept aside and not computed back.
"""

from typing import Any, Self

import torch
from torch import Tensor

from graftlm.models import Linear


class MergeableLinear(Linear):
    """A linear that a method updates; a subclass says with `folded` what its tensors become."""

    folds = True
    """Whether evaluation merges. Models that share one base's tensors do not, since each merged weight would be a copy;
    nor do those whose base is cut over several processes."""
    _pristine: dict[str, Tensor] | None = None

    def merged_tensors(self) -> dict[str, Tensor]:
        """The base's tensors that the update changes, by name, as it makes them, in float32 or wider; may be none."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update at the moment."""
        return self._pristine is not None

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, whether merged or not."""
        return self.weight.data if self._pristine is None else self._pristine["weight"]

    def train(self, mode: bool = True) -> Self:
        """Unmerge for training, merge for evaluation; either may be repeated without effect."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.folds:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update in, computed in float32 (or wider); nothing happens if it is folded already."""
        if self.merged or not (folded := self.merged_tensors()):
            return
        self._pristine = {name: getattr(self, name).data for name in folded}
        for name, tensor in folded.items():
            getattr(self, name).data = tensor.to(self._pristine[name].dtype)

    def unmerge(self) -> None:
        """Put the pristine tensors back."""
        for name, tensor in (self._pristine or {}).items():
            getattr(self, name).data = tensor
        self._pristine = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A merged weight saved beside what was merged into it would be adapted twice when it is loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in (self._pristine or {}).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()
