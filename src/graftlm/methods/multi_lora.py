"""Several LoRA adapters on one base at once: each row of a batch is computed with the adapter it asks for.

    y_b = W x_b + s_n B_n A_n x_b        n = the adapter of row b, or none: then W x_b alone

What is unusual here: W's product is one for all rows, and so is each of the thin ones, as in Punica (Chen et al. 2023,
arXiv:2310.18547) and S-LoRA (Sheng et al. 2023, arXiv:2311.03285). There, a GPU kernel gathers each row's A and B. A
CPU would pay for these copies more than for the products, so here the *rows* are gathered: those of each adapter side
by side, filled up to as many as the most wanted adapter has, and one batched product goes over the adapters.

The adapters may differ in rank and targets: ranks are filled up with zeros, scales are folded into B. What the rows
want is said around a call, `with stack.using([0, None, 2]): model(ids)`, and is forgotten behind it.

Letters: N adapters, B rows, T tokens at hand, R rank (of linears of the same x together: of all of them), G adapters
that a batch spans, M rows of the most wanted one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods.base import Method, replace_linears
from graftlm.methods.lora import LoRA, scale_of
from graftlm.models import CausalLM, Linear, clone_with_shared_weights
from graftlm.models.checkpoint_mapping import our_module_name

Adapters = Mapping[str, tuple[Method, Mapping[str, Tensor]]]
"""By name: the method, and what it trained by our names (`exchange.adapters`)."""

TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linears of the same x, in the order in which the models call them."""


class RowGroups:
    """Where the rows of a batch stand when they are gathered by adapter."""

    def __init__(self, rows: Sequence[int | None], device: torch.device) -> None:
        wanted = {n for n in rows if n is not None}
        self.lo, self.hi = min(wanted), max(wanted) + 1
        """The adapters that the batch spans; one between that nobody wants costs zeros, which is less than a copy."""
        self.is_uniform = len(wanted) == 1 and None not in rows
        """Whether all rows want the same adapter: then nothing need be gathered."""
        self.count = len(rows)
        self._rows, self._device = rows, device
        self._found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of B t tokens: those to gather [G M t], those that are adapted [n], and where each of these went [n]."""
        if t not in self._found:
            groups = [[b for b, n in enumerate(self._rows) if n == g] for g in range(self.lo, self.hi)]
            m = max(map(len, groups))
            gathered = [b for group in groups for b in (*group, *[0] * (m - len(group)))]
            adapted = [b for group in groups for b in group]
            places = [g * m + i for g, group in enumerate(groups) for i in range(len(group))]
            self._found[t] = self._tokens(gathered, t), self._tokens(adapted, t), self._tokens(places, t)
        return self._found[t]

    def _tokens(self, rows: Sequence[int], t: int) -> Tensor:
        first = torch.tensor(rows, device=self._device)[:, None] * t
        return (first + torch.arange(t, device=self._device)).flatten()


@dataclass
class AdapterSelection:
    """What the rows of the call at hand want; None: the base. All linears of a stack look at one of these."""

    places: RowGroups | None = None


class MultiLoRALinear(Linear):
    """A frozen linear with the low-rank updates of N adapters beside it."""

    selection: AdapterSelection
    a: Tensor
    """[N, R, in]: A of this linear and of those that are computed with it, below one another."""
    own: range
    """Which of the R are this linear's."""
    b: Tensor
    """[N, out, r], times the scale."""

    @classmethod
    def from_linear(
        cls, linear: Linear, choice: AdapterSelection, a: Tensor, own: range, b: Tensor
    ) -> "MultiLoRALinear":
        """One that takes over this linear's weight and bias (no copy)."""
        with torch.device("meta"):  # no memory, no random numbers: every tensor is given below
            new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.selection, new.a, new.own, new.b = choice, a, own, b
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in] -> [B, ..., out]."""
        return self.forward_many([self], x)[0]

    @staticmethod
    def forward_many(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        """Each linear of the same x; one thin product with the A of all of them."""
        ys = [Linear.forward(linear, x) for linear in linears]
        stacked = [
            (m, y.view(-1, y.shape[-1])) for m, y in zip(linears, ys, strict=True) if isinstance(m, MultiLoRALinear)
        ]
        first = stacked[0][0]
        places = first.selection.places
        if places is None:
            return ys
        used = range(first.own.start, stacked[-1][0].own.stop)
        a = first.a[places.lo : places.hi, used.start : used.stop].transpose(1, 2)
        flat, t = x.reshape(-1, x.shape[-1]), x.numel() // (x.shape[0] * x.shape[-1])
        if places.is_uniform:
            thin = flat @ a[0]
            for linear, y in stacked:
                y.addmm_(thin[:, linear.columns(used)], linear.b[places.lo].T)
            return ys
        assert x.shape[0] == places.count, f"{x.shape[0]} rows, and {places.count} adapters are said for them"
        gathered, adapted, went = places.of(t)
        thin = torch.bmm(flat[gathered].view(places.hi - places.lo, -1, flat.shape[1]), a)
        for linear, y in stacked:
            u = torch.bmm(thin[:, :, linear.columns(used)], linear.b[places.lo : places.hi].transpose(1, 2))
            y.index_add_(0, adapted, u.flatten(0, 1)[went])
        return ys

    def columns(self, used: range) -> slice:
        """Its part of a thin product over `used`."""
        return slice(self.own.start - used.start, self.own.stop - used.start)


@dataclass(frozen=True)
class MultiLoRAModel:
    """A base with adapters beside it."""

    model: CausalLM
    """It has the base's very tensors. Outside of `using` it is the base."""
    names: tuple[str, ...]
    _choice: AdapterSelection

    @contextmanager
    def adapters_for(self, rows: Sequence[str | None] | str | None) -> Iterator[None]:
        """Within it row b of a call is computed with the adapter `rows[b]`, None for the base; or all with the same.

        For several names every call must have as many rows; for one it may have any number. Not to be nested, and of
        one thread at a time.
        """
        assert self._choice.places is None, "the choice is one call's"
        numbers = [
            None if n is None else self.names.index(n) for n in ([rows] if isinstance(rows, str) else rows or ())
        ]
        if any(number is not None for number in numbers):
            self._choice.places = RowGroups(numbers, self.model.device)
        try:
            yield
        finally:
            self._choice.places = None


def stack(base: CausalLM, adapters: Adapters) -> MultiLoRAModel:
    """A model with the tensors of `base` that computes each row with its own adapter; for evaluation only.

    Adapters are kept in the base's dtype. Raises InputError for an adapter that is no LoRA or holds what is no number.
    """
    model, choice = clone_with_shared_weights(base), AdapterSelection()
    for name, (method, state) in adapters.items():
        check_servable(name, method)
        if not all(bool(tensor.to(base.dtype).isfinite().all()) for tensor in state.values()):
            raise InputError(f"adapter {name}: holds what is no number, or none of {base.dtype}: train it again")
    made: dict[str, MultiLoRALinear] = {}
    for i, block in enumerate(base.blocks):
        for roles in TOGETHER:
            here = {
                f"blocks.{i}.{our_module_name(r)}": block.get_submodule(our_module_name(r))
                for r in roles
                if r in base.config.roles
            }
            made |= _stacked({n: m for n, m in here.items() if isinstance(m, Linear)}, adapters, choice, base.dtype)
    replace_linears(model, base.config.roles, lambda old, name: made.get(name, old), range(base.config.num_layers))
    return MultiLoRAModel(model.eval(), tuple(adapters), choice)


def check_servable(name: str, method: Method) -> None:
    """An InputError for a method whose adapters cannot be served beside others."""
    if type(method) is not LoRA:
        way = "merge it (graft export --merged)" if method.mergeable else "serve its run on its own"
        raise InputError(f"adapter {name}: is {method.name}, and only lora is served beside others: {way}, as the base")


def _stacked(
    linears: Mapping[str, Linear], adapters: Adapters, choice: AdapterSelection, dtype: torch.dtype
) -> dict[str, MultiLoRALinear]:
    """The linears of one x that any adapter changes, each with its part of the A that they share."""
    ranks = {
        name: max((len(state.get(f"{name}.lora_A", ())) for _, state in adapters.values()), default=0)
        for name in linears
    }
    changed = {name: linear for name, linear in linears.items() if ranks[name]}
    if not changed:
        return {}
    device, n = next(iter(changed.values())).weight.device, len(adapters)
    width = next(iter(changed.values())).in_features
    a = torch.zeros(n, sum(ranks.values()), width, device=device, dtype=dtype)
    made, start = {}, 0
    for name, linear in changed.items():
        b = torch.zeros(n, linear.out_features, ranks[name], device=device, dtype=dtype)
        for number, (method, state) in enumerate(adapters.values()):
            if f"{name}.lora_A" in state:
                assert isinstance(method, LoRA)
                own_a, own_b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
                a[number, start : start + len(own_a)] = own_a.to(device, dtype)
                # As LoRALinear does: scaled in float32 and then rounded.
                scale = scale_of(len(own_a), method.alpha, method.rslora)
                b[number, :, : len(own_a)] = (own_b * scale).to(device, dtype)
        made[name] = MultiLoRALinear.from_linear(linear, choice, a, range(start, start + ranks[name]), b)
        start += ranks[name]
    return made
