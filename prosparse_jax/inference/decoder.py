"""The model for inference: a whole prompt at once into a key/value cache, then one token at a time out of it.

Layers are unrolled: each layer's weights are arrays of their own, which XLA reads where they lie, while a slice of a stack
would be copied first. Rounding is that of `prosparse_jax.model.transformer`. One device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.api import Implementation, sparse_ffn
from prosparse_jax.activations import ACTIVATIONS
from prosparse_jax.config import ModelConfig
from prosparse_jax.model.attention import causal_attention
from prosparse_jax.model.rope import rotary_tables, rotate
from prosparse_jax.parallel.sharding import ShardingRules

SKIPPING = ("relu", "fatrelu")
"""Activations whose inactive neurons `sparse_ffn` can tell by a threshold."""


class LayerCache(NamedTuple):
    """Keys and values of one layer; S is the capacity."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


class KVCache(NamedTuple):
    """What has been read so far: of each sequence the first `lengths` entries; the others are never looked at."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]


Attend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache]]
FFN = Callable[[int, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is computed, apart from the weights: equal decoders share their compiled programs.

    Weights are a dict of unlayered parameters by name and, under "layers", a list with a dict for each layer; matrices in
    `dtype`, norm scales in float32.
    """

    model: ModelConfig
    dtype: jnp.dtype

    def prefill(
        self, weights: dict[str, Any], tokens_BT: Int[Array, "B T"], counts_B: Int[Array, "B"], capacity: int
    ) -> tuple[Float[Array, "B V"], KVCache, Float[Array, ""]]:
        """Reads prompts, of which the first `counts_B` tokens are real, into a new cache for `capacity` >= T tokens.

        Returns:
            Logits after the last real token in float32, the cache, and the share of zeros among the FFNs' intermediate
            activations of real tokens, averaged over layers (0 without FFNs).
        """
        length = tokens_BT.shape[1]
        real_BT = jnp.arange(length) < counts_B[:, None]
        room = ((0, 0), (0, capacity - length), (0, 0), (0, 0))
        zero_shares = []

        # Padding comes after the real tokens, which therefore never see it; new tokens overwrite it in the cache.
        def attend(_: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, LayerCache]:
            context = causal_attention(q_BTNH, k_BTKH, v_BTKH, implementation="xla", sharding=ShardingRules())
            return context, LayerCache(jnp.pad(k_BTKH, room), jnp.pad(v_BTKH, room))

        def ffn(index: int, x_BTD: jax.Array) -> jax.Array:
            layer = weights["layers"][index]
            x1_BTF = self._intermediate(index, layer, x_BTD)
            zeros_BT = jnp.mean(x1_BTF == 0, axis=-1, dtype=jnp.float32)
            zero_shares.append(jnp.sum(zeros_BT * real_BT) / jnp.sum(real_BT))
            return jnp.einsum("btf,fd->btd", x1_BTF, layer["ffn/down"])

        rotation = tuple(map(jnp.asarray, rotary_tables(self.model, length)))
        x_BTD, layers = self._blocks(weights, tokens_BT, rotation, attend, ffn)
        last_BD = jnp.take_along_axis(x_BTD, counts_B[:, None, None] - 1, axis=1)[:, 0]
        zero_share = jnp.mean(jnp.stack(zero_shares)) if zero_shares else jnp.float32(0)
        return self._logits(weights, last_BD), KVCache(layers, counts_B), zero_share

    def advance(
        self, weights: dict[str, Any], cache: KVCache, tokens_B: Int[Array, "B"], ffn_kind: Implementation
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends one token to each sequence; the cache must have room. Logits after it in float32, and the cache.

        `ffn_kind` "xla_dense" computes every neuron, with any activation; the others skip those below the threshold.
        """
        rows = jnp.arange(len(tokens_B))
        seen_BS = jnp.arange(cache.layers[0].keys.shape[1]) <= cache.lengths[:, None]

        def attend(index: int, q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array) -> tuple[jax.Array, LayerCache]:
            keys, values = cache.layers[index]
            keys = keys.at[rows, cache.lengths].set(k_B1KH[:, 0])
            values = values.at[rows, cache.lengths].set(v_B1KH[:, 0])
            mask = seen_BS[:, None, None, :]
            context = jax.nn.dot_product_attention(q_B1NH, keys, values, mask=mask, implementation="xla")
            return context, LayerCache(keys, values)

        def ffn(index: int, x_B1D: jax.Array) -> jax.Array:
            layer = weights["layers"][index]
            if ffn_kind == "xla_dense":
                x1_BF = self._intermediate(index, layer, x_B1D)[:, 0]
                return jnp.einsum("fd,bf->bd", layer["ffn/down"], x1_BF)[:, None]
            gate, up, down = (layer[f"ffn/{name}"] for name in ("gate", "up", "down"))
            return sparse_ffn(x_B1D[:, 0], gate, up, down, self._parameter(index), implementation=ffn_kind)[:, None]

        tables = rotary_tables(self.model, cache.layers[0].keys.shape[1])
        rotation = tuple(jnp.asarray(table)[cache.lengths][:, None] for table in tables)
        x_B1D, layers = self._blocks(weights, tokens_B[:, None], rotation, attend, ffn)
        return self._logits(weights, x_B1D[:, 0]), KVCache(layers, cache.lengths + 1)

    def _blocks(
        self,
        weights: dict[str, Any],
        tokens_BT: Int[Array, "B T"],
        rotation: tuple[jax.Array, ...],
        attend: Attend,
        ffn: FFN,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """The residual stream after all layers, and what `attend` keeps of each."""
        model = self.model
        batch, length = tokens_BT.shape
        cosine, sine = rotation
        x_BTD = weights["embedding"][tokens_BT].astype(jnp.float32) * model.embedding_multiplier
        x_BTD = x_BTD.astype(self.dtype)
        caches = []
        for index, layer in enumerate(weights["layers"]):
            normalised_BTD = self._norm(x_BTD, layer["attention_norm/scale"])
            q_BTNH, k_BTKH, v_BTKH = (
                _project(layer[f"attention/{name}"], normalised_BTD).reshape(batch, length, -1, model.head_width)
                for name in ("query", "key", "value")
            )
            context, cache = attend(index, rotate(q_BTNH, cosine, sine), rotate(k_BTKH, cosine, sine), v_BTKH)
            caches.append(cache)
            attended_BTD = _project(layer["attention/output"], context.reshape(batch, length, -1))
            x_BTD = x_BTD + model.residual_multiplier * attended_BTD
            if model.ffn_width:
                x_BTD = x_BTD + model.residual_multiplier * ffn(index, self._norm(x_BTD, layer["ffn_norm/scale"]))
        return x_BTD, tuple(caches)

    def _parameter(self, index: int) -> Float[Array, ""]:
        """The activation's threshold or shift in a layer."""
        parameter = self.model.activation.parameter
        return jnp.float32(parameter[index] if isinstance(parameter, tuple) else parameter)

    def _intermediate(self, index: int, layer: dict[str, jax.Array], x_BTD: jax.Array) -> Float[Array, "B T F"]:
        """Input of the down projection, every neuron computed."""
        activation = ACTIVATIONS[self.model.activation.name].function
        gate_BTF = activation(_project(layer["ffn/gate"], x_BTD), self._parameter(index))
        return gate_BTF * _project(layer["ffn/up"], x_BTD)

    def _norm(self, x: Float[Array, "... D"], scale_D: Float[Array, "D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normalised = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.model.norm_eps)
        return (normalised * scale_D).astype(x.dtype)

    def _logits(self, weights: dict[str, Any], x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
        final_BD = self._norm(x_BD, weights["norm/scale"]) / self.model.logits_divisor
        table_VD = weights["embedding" if self.model.tie_embeddings else "head"]
        # Logits rounded to bfloat16 would tie, and the first of equal ones would win.
        return jnp.einsum("vd,bd->vb", table_VD, final_BD, preferred_element_type=jnp.float32).T


def _project(weight_ED: Float[Array, "E D"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """x weight^T. The matrix comes first for a single token: XLA's CPU compiler is 17 times slower the other way round."""
    if x_BTD.shape[1] == 1:
        return jnp.einsum("ed,bd->eb", weight_ED, x_BTD[:, 0]).T[:, None, :]
    return jnp.einsum("btd,ed->bte", x_BTD, weight_ED)
