"""Step 2 for a few tokens: up rows of the neurons that are active for any of them. Mosaic GPU, sm_80 and sm_90."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.reference import activated
from pallas_kernels.shapes import ShapeError, streaming_multiprocessors, vector_width, weight_problems

ROW_BLOCK = 2
BLOCKS_PER_SM = 4


def gate_up(
    x_BD: Float[Array, "B D"],
    gate_FB: Float[Array, "F B"],
    up_FD: Float[Array, "F D"],
    threshold: Float[Array, ""],
    *,
    blocks: int | None = None,
    interpret: Any = None,
) -> Float[Array, "F B"]:
    """x1 = act(gate) * x up^T in float32, zero where a neuron is inactive for a token; paper step 2.

    Args:
        x_BD: 1 to 8 tokens, bfloat16 or float16, like `up_FD`.
        gate_FB: Gate products (step 1), float32, neurons first.
        up_FD: One row per neuron. F a multiple of 2, D of 128.
        threshold: t; a neuron is active where its gate product, rounded to x's dtype, is >= t and > 0.
        blocks: Thread blocks; by default four for each multiprocessor of the GPU at hand.
        interpret: plgpu.InterpretGPUParams to run without a GPU.

    Raises:
        ShapeError: With everything that is wrong with the arrays.
    """
    problems = weight_problems(x_BD, {"up": up_FD}, row_block=ROW_BLOCK)
    if gate_FB.shape != (up_FD.shape[0], x_BD.shape[0]):
        problems.append(f"gate has shape {gate_FB.shape}; it must be (F, B) = {(up_FD.shape[0], x_BD.shape[0])}")
    if problems:
        raise ShapeError("gate_up", problems)
    neurons, width = up_FD.shape
    groups = neurons // ROW_BLOCK
    blocks = min(blocks or BLOCKS_PER_SM * streaming_multiprocessors(), groups)
    kernel = plgpu.kernel(
        _body(x_BD.shape[0], width, groups, blocks),
        out_type=jax.ShapeDtypeStruct((neurons, x_BD.shape[0]), jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM(x_BD.shape, x_BD.dtype)],
        interpret=interpret,
    )
    return kernel(x_BD, activated(gate_FB, threshold, x_BD.dtype), up_FD)


def _body(batch: int, width: int, groups: int, blocks: int) -> Callable[..., None]:
    """What one block does, for up rows in `groups` groups."""
    tokens = range(batch)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector_width(width))

    def body(x_ref, gate_ref, up_ref, x1_ref, x_shared):
        block = lax.axis_index("block")
        for token in tokens:
            x_shared[token] = plgpu.load(x_ref.at[token], layout=layout)

        def take_neuron(neuron):
            gates = [gate_ref[neuron, token] for token in tokens]
            active = gates[0] != 0
            for gate in gates[1:]:
                active = active | (gate != 0)

            def products():
                up_D = plgpu.load(up_ref.at[neuron], layout=layout).astype(jnp.float32)
                return tuple(
                    jnp.sum(up_D * plgpu.load(x_shared.at[token], layout=layout).astype(jnp.float32)) * gates[token]
                    for token in tokens
                )

            values = lax.cond(active, products, lambda: (jnp.float32(0),) * len(tokens))
            for token in tokens:
                x1_ref[neuron, token] = values[token]

        def take_group(index, carry):
            for row in range(ROW_BLOCK):
                take_neuron((block + index * blocks) * ROW_BLOCK + row)
            return carry

        lax.fori_loop(0, lax.div(groups - block + blocks - 1, blocks), take_group, jnp.int32(0))

    return body
