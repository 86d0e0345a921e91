"""A linear whose update is added to its output in training and merged into its weight in evaluation.

`eval()` merges; `train()` restores the base's tensors bit for bit, because they are kept rather than computed back.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from graftlm.models import Linear


class MergeableLinear(Linear):
    """A linear with an update; a subclass returns the updated tensors in `merged_tensors`."""

    merge_on_eval = True
    """Whether evaluation merges. Models that share one base's tensors do not, since each merged weight would be a copy;
    neither do models whose base is sharded across ranks."""
    _base_tensors: dict[str, Tensor] | None = None

    def merged_tensors(self) -> dict[str, Tensor]:
        """Name -> updated tensor, in float32 or wider, for those of the base's tensors that change; may be empty."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight contains the update."""
        return self._base_tensors is not None

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, merged or not."""
        return self.weight.data if self._base_tensors is None else self._base_tensors["weight"]

    def train(self, mode: bool = True) -> Self:
        """Unmerge for training, merge for evaluation; a repeated call has no effect."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_on_eval:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the update, computed in float32 (or wider), if it is not merged yet."""
        if self.merged or not (merged := self.merged_tensors()):
            return
        self._base_tensors = {name: getattr(self, name).data for name in merged}
        for name, tensor in merged.items():
            getattr(self, name).data = tensor.to(self._base_tensors[name].dtype)

    def unmerge(self) -> None:
        """Restore the base's tensors."""
        for name, tensor in (self._base_tensors or {}).items():
            getattr(self, name).data = tensor
        self._base_tensors = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A merged weight saved next to its update would be adapted twice after loading.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in (self._base_tensors or {}).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()


def mergeable_linears(model: nn.Module) -> Iterator[MergeableLinear]:
    """The linears of a model that have an update to merge."""
    return (module for module in model.modules() if isinstance(module, MergeableLinear))
