"""PolarGroup: linear layers that read the same input, multiplied as one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polar_kernels import ops
from polar_kernels.errors import ArgumentError
from polar_kernels.module import TiledWeight, cast_for_autocast
from polar_kernels.tiles import TILE_ROWS

if TYPE_CHECKING:
    from polar_kernels.linear import PolarLinear


class PolarGroup(nn.Module):
    """Layers that read the same input, q, k and v say: one rotation and one product in place of one each.

    x: [..., in_features]; result: the members' outputs [..., out_features], views of one tensor, in their order.

    The members stay where they are in a model, with their names and tensors, and may go on being called one by one: the
    first call with an `x` multiplies for all of them, and the others, called with the very same tensor, are handed
    theirs. That tensor must not be written to in between.

    On a GPU with tile layout the members' tiles become slices of one tensor, at no cost in memory; elsewhere each
    member multiplies by itself. Register a group in the module tree after its members, so that it is moved and loaded
    after them. Raises ArgumentError for layers that cannot be one product.
    """

    def __init__(self, members: Sequence["PolarLinear"]) -> None:
        super().__init__()
        self._members = tuple(members)  # in a tuple, so that they are not registered as children a second time
        self._merged: tuple[torch.Tensor, torch.Tensor] | None = None
        self._slices: tuple[torch.Tensor, ...] = ()
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        difference = _difference(self._members)
        if difference:
            raise ArgumentError(difference)
        for index, member in enumerate(self._members):
            member.join(self, index)
        self.settle()

    @property
    def members(self) -> tuple["PolarLinear", ...]:
        return self._members

    @property
    def is_merged(self) -> bool:
        """Whether the members are multiplied as one."""
        return self._merged is not None

    def dissolve(self) -> None:
        """Let the members be by themselves again."""
        for member in self._members:
            member.leave()
        self._forget()

    def settle(self) -> None:
        """Make the members' tiles slices of one tensor, where they have tiles and still are of one kind."""
        tiles = [member.tiles for member in self._members if member.tiles is not None]
        norms = [member.tile_norms for member in self._members if member.tile_norms is not None]
        if self._merged is not None and _are_same(tiles, self._slices):
            return
        self._forget()
        if len(tiles) < len(self._members) or len({t.device for t in tiles}) > 1 or _difference(self._members):
            return
        counts = [len(t) for t in tiles]
        self._merged = torch.cat(tiles), torch.cat(norms)
        self._slices = self._merged[0].split(counts)
        for member, own, own_norms in zip(self._members, self._slices, self._merged[1].split(counts), strict=True):
            member.tiles, member.tile_norms = own, own_norms

    def member_changed(self, index: int) -> None:
        """Called by a member whose tensors may have been replaced: the merged ones are no longer its."""
        if self._merged is not None and self._members[index].tiles is not self._slices[index]:
            self._forget()

    def _forget(self) -> None:
        self._merged, self._slices, self._last = None, (), None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._merged is None or len({member.activation for member in self._members}) > 1:
            return tuple(member.multiply_alone(x) for member in self._members)
        first = self._members[0]
        biases = [member.bias for member in self._members if member.bias is not None]
        sizes = [member.out_features for member in self._members]
        y = ops.tiled_linear(
            cast_for_autocast(x),
            *self._merged,
            first.awq_scales,
            first.level_table,
            first.centroids,
            torch.cat([*biases]) if biases else None,
            sum(sizes),
            first.activation == "exact",
        )
        return y.split(sizes, -1)

    @property
    def tiled(self) -> TiledWeight | None:
        """The members' weight as int8 products read it; None where they are not multiplied as one, or not in int8."""
        if self._merged is None or any(member.activation == "exact" for member in self._members):
            return None
        first = self._members[0]
        assert first.level_table is not None  # as tiles come with it
        return TiledWeight(*self._merged, first.awq_scales, first.level_table)

    def hand_out(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Let the members give their parts of `y` [..., their out_features together] when they are called with `x`."""
        self._last = x, y.split([member.out_features for member in self._members], -1)

    def output_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of one member, from the product made when the first of them was asked for `x`."""
        last = self._last
        outputs = last[1] if last is not None and last[0] is x else self(x)
        # Nothing is kept once the last member, which a model calls last, has its output.
        self._last = None if index == len(self._members) - 1 else (x, outputs)
        return outputs[index]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PolarGroup":
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.settle()

    def extra_repr(self) -> str:
        return f"{len(self._members)} layers, out_features={[member.out_features for member in self._members]}"


def _are_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _difference(members: tuple["PolarLinear", ...]) -> str | None:
    """Why the layers cannot be one product, or None."""
    if len(members) < 2:
        return f"a group needs two layers or more, found {len(members)}"
    first = members[0]
    for member in members[1:]:
        if (member.in_features, member.bits) != (first.in_features, first.bits):
            return (
                f"layers of a group must have the same in_features and bits, found {first.in_features} and "
                f"{member.in_features} in features, {first.bits} and {member.bits} bits"
            )
        if (member.bias is None) != (first.bias is None):
            return "layers of a group must all have a bias, or none"
        for name in ("awq_scales", "centroids"):
            one, other = getattr(first, name), getattr(member, name)
            if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
                return f"layers of a group must have the same {name}"
    for member in members[:-1]:
        if member.out_features % TILE_ROWS:
            return (
                f"out_features of a group's layers but the last must be multiples of {TILE_ROWS}, "
                f"found {member.out_features}"
            )
    return None
