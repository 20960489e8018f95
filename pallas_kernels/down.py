"""Step 3 for a few tokens: down rows of the neurons that are active for any of them. Mosaic GPU, sm_80 and sm_90."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.shapes import (
    LARGEST_BATCH,
    THREADS,
    WEIGHT_DTYPES,
    ShapeError,
    streaming_multiprocessors,
    vector_width,
)

ROW_BLOCK = 4
BLOCKS_PER_SM = 4
_COLUMNS = (1024, 512, 256, 128)
"""Columns of one block, the first of these that divides D: blocks side by side share a row, so that the accumulators of
eight tokens fit the registers."""


def down(
    x1_FB: Float[Array, "F B"],
    down_FD: Float[Array, "F D"],
    *,
    blocks: int | None = None,
    interpret: Any = None,
) -> Float[Array, "B D"]:
    """y = x1^T down in float32, reading only rows of neurons with a non-zero x1; paper step 3.

    Args:
        x1_FB: Intermediate activations of 1 to 8 tokens, float32, neurons first.
        down_FD: One row per neuron, bfloat16 or float16. F a multiple of 4, D of 128.
        blocks: Thread blocks along F; by default enough for four on each multiprocessor of the GPU at hand.
        interpret: plgpu.InterpretGPUParams to run without a GPU.

    Raises:
        ShapeError: With everything that is wrong with the arrays.
    """
    problems = _problems(x1_FB, down_FD)
    if problems:
        raise ShapeError("down", problems)
    neurons, width = down_FD.shape
    columns = next(size for size in _COLUMNS if width % size == 0)
    parts = width // columns
    groups = neurons // ROW_BLOCK
    blocks = min(blocks or -(-BLOCKS_PER_SM * streaming_multiprocessors() // parts), groups)
    kernel = plgpu.kernel(
        _body(x1_FB.shape[1], columns, groups, blocks),
        out_type=jax.ShapeDtypeStruct((blocks, x1_FB.shape[1], width), jnp.float32),
        grid=(blocks, parts),
        grid_names=("block", "part"),
        interpret=interpret,
    )
    return kernel(x1_FB, down_FD).sum(axis=0)


def _body(batch: int, columns: int, groups: int, blocks: int) -> Callable[..., None]:
    """What one block does, for down rows in `groups` groups."""
    tokens = range(batch)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=vector_width(columns))

    def body(x1_ref, down_ref, partial_ref):
        block, own = lax.axis_index("block"), pl.ds(lax.axis_index("part") * columns, columns)

        def add_neuron(neuron, sums):
            values = [x1_ref[neuron, token] for token in tokens]
            active = values[0] != 0
            for value in values[1:]:
                active = active | (value != 0)

            def add(sums):
                row_C = plgpu.load(down_ref.at[neuron, own], layout=layout).astype(jnp.float32)
                return tuple(total_C + row_C * value for total_C, value in zip(sums, values, strict=True))

            return lax.cond(active, add, lambda sums: sums, sums)

        def take_group(index, sums):
            for row in range(ROW_BLOCK):
                sums = add_neuron((block + index * blocks) * ROW_BLOCK + row, sums)
            return sums

        zeros_C = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
        own_groups = lax.div(groups - block + blocks - 1, blocks)
        sums = lax.fori_loop(0, own_groups, take_group, (zeros_C,) * len(tokens))
        for token in tokens:
            partial_ref[block, token, own] = sums[token]

    return body


def _problems(x1_FB: jax.Array, down_FD: jax.Array) -> list[str]:
    found = []
    if x1_FB.ndim != 2 or down_FD.ndim != 2 or x1_FB.shape[0] != down_FD.shape[0]:
        found.append(f"x1 has shape {x1_FB.shape} and down {down_FD.shape}; they must be (F, B) and (F, D)")
        return found
    if not 1 <= x1_FB.shape[1] <= LARGEST_BATCH:
        found.append(f"x1 holds {x1_FB.shape[1]} tokens; a kernel takes 1 to {LARGEST_BATCH}")
    if x1_FB.dtype != jnp.float32:
        found.append(f"x1 is {x1_FB.dtype}; it must be float32")
    if down_FD.dtype.name not in WEIGHT_DTYPES:
        found.append(f"down is {down_FD.dtype}; it must be one of {', '.join(WEIGHT_DTYPES)}")
    if down_FD.shape[0] % ROW_BLOCK:
        found.append(f"down has {down_FD.shape[0]} neurons, not a multiple of the row block {ROW_BLOCK}")
    if not vector_width(down_FD.shape[1]):
        found.append(f"D={down_FD.shape[1]} is not a multiple of {THREADS}, the threads that share a row")
    return found
