"""Several LoRA adapters on one base in one batch: each row is computed with its own adapter.

    y_b = W x_b + s_n B_n A_n x_b        n = the adapter of row b; without one, W x_b

The product with W is one for all rows, and so are the low-rank products, as in Punica (Chen et al. 2023,
arXiv:2310.18547) and S-LoRA (Sheng et al. 2023, arXiv:2311.03285). There a GPU kernel gathers each row's A and B. On a
CPU those copies cost more than the products, so here the *rows* are gathered by adapter, padded to the most rows that
any adapter has, and multiplied in one batched product over the adapters.

Adapters may differ in rank and targets: ranks are padded with zeros, scales are multiplied into B. The adapters of the
rows are set around a call, `with stack.adapters_for(["sad", None, "happy"]): model(ids)`.

Letters: N adapters, B rows, T tokens of a row, R sum of the ranks of linears of the same x, G adapters in the range
that a batch uses, M most rows of one adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods.base import AdaptedLinear, Method, replace_linears
from graftlm.methods.lora import LoRA, scale_of
from graftlm.models import CausalLM, Linear, clone_with_shared_weights
from graftlm.models.config import our_linear
from graftlm.models.layers import LowRankUpdate

Adapters = Mapping[str, tuple[Method, Mapping[str, Tensor]]]
"""Name -> the method, and its trained tensors by our names (`exchange.huggingface`)."""

SAME_INPUT = (("q", "k", "v"), ("o",), ("conv_in",), ("conv_out",), ("gate", "up"), ("down",))
"""Roles of linears that have the same input, in the order in which the models call them."""


class RowGroups:
    """The rows of a batch grouped by adapter; `rows` has each row's adapter, None for the base."""

    def __init__(self, rows: Sequence[int | None], device: torch.device) -> None:
        used = {n for n in rows if n is not None}
        self.lo, self.hi = min(used), max(used) + 1
        """The range of adapters. An unused one in between multiplies zeros, which costs less than copying others."""
        self.is_uniform = len(used) == 1 and None not in rows
        """Whether all rows have the same adapter: then nothing is gathered."""
        self.count = len(rows)
        self._rows, self._device = rows, device
        self.adapters = torch.tensor([-1 if n is None else n for n in rows])
        """Each row's adapter, -1 for the base: [B] on the CPU."""
        self._indices: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into B t tokens: gathered [G M t], adapted [n], and of the adapted ones in the gathered [n]."""
        if t not in self._indices:
            groups = [[b for b, n in enumerate(self._rows) if n == g] for g in range(self.lo, self.hi)]
            m = max(map(len, groups))
            gathered = [b for group in groups for b in (*group, *[0] * (m - len(group)))]
            adapted = [b for group in groups for b in group]
            positions = [g * m + i for g, group in enumerate(groups) for i in range(len(group))]
            self._indices[t] = (self._tokens(gathered, t), self._tokens(adapted, t), self._tokens(positions, t))
        return self._indices[t]

    def _tokens(self, rows: Sequence[int], t: int) -> Tensor:
        first = torch.tensor(rows, device=self._device)[:, None] * t
        return (first + torch.arange(t, device=self._device)).flatten()


@dataclass
class AdapterSelection:
    """The adapters of the current call's rows; None: the base. All linears of a model share one instance."""

    groups: RowGroups | None = None

    def adapters(self, rows: int) -> Tensor | None:
        """The adapter of each of these rows, -1 for the base: [B] int64; None: the base for all."""
        if self.groups is None:
            return None
        assert self.groups.is_uniform or self.groups.count == rows, f"adapters were set for {self.groups.count} rows"
        return self.groups.adapters if self.groups.count == rows else self.groups.adapters[:1].repeat(rows)


class MultiLoRALinear(AdaptedLinear):
    """A frozen linear with the low-rank updates of N adapters; `a`, `columns` and `b` are set by the caller."""

    a: Tensor
    """[N, R, in]: A of this linear and of the others with the same input, concatenated."""
    columns: range
    """This linear's part of R."""
    b: Tensor
    """[N, out, r], times the scale."""

    def __init__(self, linear: Linear, selection: AdapterSelection) -> None:
        super().__init__(linear)
        self.selection = selection

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in] -> [B, ..., out]."""
        return self.forward_many([self], x)[0]

    def low_rank_updates(self) -> Sequence[LowRankUpdate]:
        """Those of its adapters."""
        return (LowRankUpdate(self.a[:, self.columns.start : self.columns.stop], self.b, self.selection.adapters),)

    @staticmethod
    def forward_many(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        """Each linear of the same x; one product with the A of all of them."""
        ys = [Linear.forward(linear, x) for linear in linears]
        pairs = zip(linears, ys, strict=True)
        adapted = [(m, y.view(-1, y.shape[-1])) for m, y in pairs if isinstance(m, MultiLoRALinear)]
        first = adapted[0][0]
        groups = first.selection.groups
        if groups is None:
            return ys
        start, stop = first.columns.start, adapted[-1][0].columns.stop
        a = first.a[groups.lo : groups.hi, start:stop].transpose(1, 2)
        flat, t = x.reshape(-1, x.shape[-1]), x.numel() // (x.shape[0] * x.shape[-1])
        parts = [slice(m.columns.start - start, m.columns.stop - start) for m, _ in adapted]
        if groups.is_uniform:
            low_rank = flat @ a[0]
            for (linear, y), part in zip(adapted, parts, strict=True):
                y.addmm_(low_rank[:, part], linear.b[groups.lo].T)
            return ys
        assert x.shape[0] == groups.count, f"{x.shape[0]} rows, but adapters were set for {groups.count}"
        gathered, rows, positions = groups.of(t)
        low_rank = torch.bmm(flat[gathered].view(groups.hi - groups.lo, -1, flat.shape[1]), a)
        for (linear, y), part in zip(adapted, parts, strict=True):
            update = torch.bmm(low_rank[:, :, part], linear.b[groups.lo : groups.hi].transpose(1, 2))
            y.index_add_(0, rows, update.flatten(0, 1)[positions])
        return ys


@dataclass(frozen=True)
class MultiLoRAModel:
    """A base with several adapters."""

    model: CausalLM
    """It shares the base's tensors. Outside of `adapters_for` it computes the base."""
    names: tuple[str, ...]
    _selection: AdapterSelection

    @contextmanager
    def adapters_for(self, rows: Sequence[str | None] | str | None) -> Iterator[None]:
        """Inside it row b of a call has the adapter `rows[b]`, None for the base; or all rows have the same.

        With a sequence every call must have as many rows. Not reentrant, and for one thread at a time.
        """
        assert self._selection.groups is None, "adapters are set already"
        names = [rows] if isinstance(rows, str) else rows or ()
        numbers = [None if name is None else self.names.index(name) for name in names]
        if any(number is not None for number in numbers):
            self._selection.groups = RowGroups(numbers, self.model.device)
        try:
            yield
        finally:
            self._selection.groups = None


def stack(base: CausalLM, adapters: Adapters) -> MultiLoRAModel:
    """A model that shares the tensors of `base` and computes each row with its own adapter; for evaluation only.

    Adapters are kept in the base's dtype. Raises InputError for an adapter that is no LoRA, or has NaN or inf.
    """
    model, selection = clone_with_shared_weights(base), AdapterSelection()
    for name, (method, state) in adapters.items():
        check_servable(name, method)
        if not all(bool(tensor.to(base.dtype).isfinite().all()) for tensor in state.values()):
            raise InputError(f"adapter {name}: holds NaN or inf in {base.dtype}: train it again")
    replaced: dict[str, Linear] = {}
    for i in range(base.config.num_layers):
        for roles in SAME_INPUT:
            names = [our_linear(i, role) for role in roles if role in base.config.layer(i).roles]
            replaced |= _adapt(base, names, adapters, selection)
    layers = range(base.config.num_layers)
    replace_linears(model, base.config.roles, lambda old, name: replaced.get(name, old), layers)
    return MultiLoRAModel(model.eval(), tuple(adapters), selection)


def check_servable(name: str, method: Method) -> None:
    """An InputError for a method whose adapters cannot be served together."""
    if type(method) is not LoRA:
        hint = "merge it (graft export --format merged)" if method.mergeable else "serve its run on its own"
        raise InputError(
            f"adapter {name}: is {method.name}, and only lora is served together with others: {hint}, as the base"
        )


def _adapt(
    base: CausalLM, names: Sequence[str], adapters: Adapters, selection: AdapterSelection
) -> dict[str, MultiLoRALinear]:
    """Name -> replacement, for those of the base's linears with the same input that an adapter changes."""
    ranks = {n: max((len(state.get(f"{n}.lora_A", ())) for _, state in adapters.values()), default=0) for n in names}
    adapted: dict[str, MultiLoRALinear] = {}
    a, start = torch.empty(0), 0
    for name in filter(ranks.__getitem__, names):
        linear = base.get_submodule(name)
        assert isinstance(linear, Linear)
        options: dict[str, Any] = {"device": linear.stored_weight.device, "dtype": base.dtype}
        if not adapted:
            a = torch.zeros(len(adapters), sum(ranks.values()), linear.in_features, **options)
        new = adapted[name] = MultiLoRALinear(linear, selection)
        new.a, new.columns = a, range(start, start + ranks[name])
        new.b = torch.zeros(len(adapters), linear.out_features, ranks[name], **options)
        for n, (method, state) in enumerate(adapters.values()):
            if f"{name}.lora_A" in state:
                assert isinstance(method, LoRA)
                own_a, own_b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
                a[n, start : start + len(own_a)] = own_a.to(**options)
                # As LoRALinear does: scaled in float32 and then rounded.
                new.b[n, :, : len(own_a)] = (own_b * scale_of(method)).to(**options)
        start += ranks[name]
    return adapted
