"""Where each kind of array lives. The model asks these rules and knows nothing of the mesh's size."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

Split = Literal["rows", "columns", "none"]
"""What a tensor group shares of a matrix in use: a GPU of the group has some rows, some columns, or all of it."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Fully sharded data parallelism, composed with tensor parallelism inside attention and FFN.

    Sequences are split along the batch over `batch_axes`. A tensor group (the devices along `tensor_axis`) shares
    sequences: inside attention and FFN each of its devices has all tokens for some heads and neurons, elsewhere all of
    the model's width for some tokens (Megatron-LM's sequence parallelism, arXiv 2205.05198).
    """

    batch_axes: tuple[str, ...] = ("data", "fsdp")
    weight_axis: str = "fsdp"
    tensor_axis: str = "tensor"

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes of the mesh."""
        return (*self.batch_axes, self.tensor_axis)

    def tokens(self, rank: int) -> PartitionSpec:
        """Spec of (B, T, ...) outside attention and FFN: a device has some tokens of its sequences."""
        return PartitionSpec(self.batch_axes, self.tensor_axis, *[None] * (rank - 2))

    def sequences(self, rank: int) -> PartitionSpec:
        """Spec of (B, T, ...) of which a device needs all tokens of its sequences."""
        return PartitionSpec(self.batch_axes, *[None] * (rank - 1))

    def features(self, rank: int) -> PartitionSpec:
        """Spec of (B, T, features, ...) inside attention and FFN: a device has some heads or neurons, of all tokens."""
        return PartitionSpec(self.batch_axes, None, self.tensor_axis, *[None] * (rank - 3))

    def matrix(self, split: Split) -> PartitionSpec:
        """Spec of one stored weight matrix, split over all devices but the copies.

        Rows are split where they can be, so that gathered pieces are contiguous. In the order of the mesh if all are
        gathered: XLA scatters the gradient in that order alone, in another it sums whole matrices everywhere.
        """
        if split == "columns":
            return PartitionSpec(self.weight_axis, self.tensor_axis)
        if split == "none":
            return PartitionSpec((self.weight_axis, self.tensor_axis), None)
        return PartitionSpec((self.tensor_axis, self.weight_axis), None)

    def gather(
        self, weight: Float[Array, "rows columns"], dtype: jnp.dtype, split: Split
    ) -> Float[Array, "rows columns"]:
        """The matrix as the devices use it, in `dtype`, so that the copy over the wire is already narrow.

        The `reduced` type makes its gradient an unreduced sum, whose reshard back is a reduce-scatter: no
        parameter-sized all-reduce. The axes that hold copies of the weights come first here, so that on the way back
        they sum shards, after the reduce-scatter, and not whole matrices.
        """
        copies = set(self.batch_axes) - {self.weight_axis}
        used = {
            "rows": (self.tensor_axis, None),
            "columns": (None, self.tensor_axis),
            "none": (None, None),
        }[split]
        reduced = set(self.axes if split == "none" else self.batch_axes)
        shard = jax.sharding.reshard(weight.astype(dtype), PartitionSpec(*self.matrix(split), reduced=copies))
        return jax.sharding.reshard(shard, PartitionSpec(*used, reduced=reduced))

    def gather_tokens(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """All tokens of a device's sequences, for its heads or neurons. On the way back their gradients add up."""
        return jax.sharding.reshard(x_BTD, PartitionSpec(*self.sequences(3), reduced={self.tensor_axis}))

    @property
    def partial(self) -> PartitionSpec:
        """Spec of (B, T, D) of which a device of a tensor group has one summand: what its heads or neurons give."""
        return PartitionSpec(*self.sequences(3), unreduced={self.tensor_axis})

    def scatter_tokens(self, partial_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The sum of the group's `partial` results, for a device's tokens."""
        return jax.sharding.reshard(partial_BTD, self.tokens(3))
