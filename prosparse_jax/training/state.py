"""The state that a training step maps to the next one, and how it is born sharded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from prosparse_jax.config import Config
from prosparse_jax.model.attention import choose_attention
from prosparse_jax.model.transformer import CausalLM, RunOptions

Parameters = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that changes from step to step, all on the devices."""

    parameters: Parameters
    """Nested dict of float32 arrays, named after the modules of CausalLM."""
    optimizer: optax.OptState
    step: Int[Array, ""]
    """Optimizer steps done, skipped ones included."""
    skipped_updates: Int[Array, ""]
    """Steps whose loss or gradient was not finite, so that parameters and optimizer were left as they were."""
    rng: jax.Array
    """The run's PRNG key."""


def run_options(config: Config, platform: str) -> RunOptions:
    """How this config computes on `platform` ("cpu" or "gpu")."""
    training = config.training
    dtype = training.compute_dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return RunOptions(
        compute_dtype=jnp.dtype(dtype),
        attention=choose_attention(
            training.attention, platform, config.model.head_width, dtype, document_masks=config.data.document_masks
        ),
        remat=training.remat,
        layer_unroll=training.layer_unroll,
    )


def split_model(model: CausalLM) -> tuple[nnx.GraphDef, Parameters]:
    """The static part of a model and its parameters as a plain nested dict."""
    graphdef, parameters = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(parameters)


def abstract_model(config: Config, options: RunOptions) -> tuple[nnx.GraphDef, Parameters]:
    """The model's static part and the shapes, dtypes and shardings of its parameters. Call under `jax.set_mesh`."""
    return split_model(
        jax.eval_shape(lambda: CausalLM(config.model, options, rngs=nnx.Rngs(jax.random.key(config.seed))))
    )


def initial_parameters(config: Config, options: RunOptions) -> Parameters:
    """Random parameters, each made on the devices that hold it. Call under `jax.set_mesh`."""

    @jax.jit
    def create(key):
        return split_model(CausalLM(config.model, options, rngs=nnx.Rngs(key)))[1]

    return create(jax.random.key(config.seed))


def initial_state(parameters: Parameters, transformation: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; also maps abstract parameters under `jax.eval_shape`."""
    return TrainState(
        parameters=parameters,
        optimizer=transformation.init(parameters),
        step=jnp.zeros((), jnp.int32),
        skipped_updates=jnp.zeros((), jnp.int32),
        rng=jax.random.key(seed),
    )
