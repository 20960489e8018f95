"""Weights on a device, and generations from them: prompts in, tokens out as they are chosen."""

import dataclasses
import functools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import api
from prosparse_jax.config import ModelConfig
from prosparse_jax.errors import ConfigError
from prosparse_jax.inference.decoder import SKIPPING, Decoder, KVCache
from prosparse_jax.inference.sampling import Sampling, sample
from prosparse_jax.interop.weights import LAYER_PREFIX, WeightSource, parameter_shapes

FFNChoice = Literal["auto", "sparse", "dense"]
LONGEST_CONTEXT = 2**20
"""Tokens of prompt and continuation; far beyond what models are trained for, it only stops slips of the finger."""
_SHORTEST_PROMPT, _CAPACITY_STEP = 16, 128


class Engine:
    """A model ready to generate.

    The prompt is read with dense FFNs, since nearly every neuron is active for some token of it. FFNs of new tokens may
    skip inactive neurons (`pallas_kernels.api.sparse_ffn`).

    Args:
        source: Its weights; read piece by piece, cast once.
        ffn: "sparse" always skips inactive neurons of new tokens, "dense" computes all. "auto" skips where it is expected
            to be faster, going by the share of zeros in the prompt's activations.
        compute_dtype: Of weights, activations and cache; by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: "sparse" with an activation that it would compute wrongly, or an unknown `ffn`.
    """

    def __init__(self, source: WeightSource, *, ffn: FFNChoice = "auto", compute_dtype: Any = None):
        model = source.model
        self.can_skip = model.ffn_width > 0 and model.activation.name in SKIPPING
        if ffn not in get_args(FFNChoice):
            raise ConfigError([f"ffn={ffn!r} is unknown; choose one of {', '.join(get_args(FFNChoice))}"])
        if ffn == "sparse" and not self.can_skip:
            held = f"activation {model.activation.name}" if model.ffn_width else "no FFN"
            raise ConfigError(
                [f"ffn=sparse needs a model with {' or '.join(SKIPPING)}; {source.location} has {held}. Use ffn=dense"]
            )
        device = jax.local_devices()[0]
        default = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
        self.ffn = ffn
        self.decoder = Decoder(model, jnp.dtype(default if compute_dtype is None else compute_dtype))
        self.weights = _read_weights(source, self.decoder.dtype, device)

    def ffn_kind(self, batch: int, zero_share: float) -> api.Implementation:
        """What computes the FFNs of `batch` new tokens, if that share of activations is zero."""
        if self.ffn == "dense" or not self.can_skip:
            return "xla_dense"
        tokens: Any = jax.ShapeDtypeStruct((batch, self.decoder.model.d_model), self.decoder.dtype)
        gate, up, down = (self.weights["layers"][0][f"ffn/{name}"] for name in ("gate", "up", "down"))
        expected = 0.0 if self.ffn == "sparse" else 1 - zero_share
        chosen = api.choose(tokens, gate, up, down, active_share=expected)
        return "xla_gather" if self.ffn == "sparse" and chosen == "xla_dense" else chosen

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, stop: Collection[int] = ()
    ) -> "Generation":
        """Continues a batch of prompts, which may differ in length; iterate over the result for the tokens as they come.

        Args:
            prompts: Token ids, at least one each.
            max_new_tokens: Longest continuation.
            sampling: How tokens are chosen.
            stop: Token ids that end a sequence; the batch ends when all have.

        Raises:
            ConfigError: With every prompt or number that cannot be.
        """
        check_request(self.decoder.model, prompts, max_new_tokens)
        return Generation(self, prompts, max_new_tokens, sampling, frozenset(stop))


def check_request(model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ConfigError with every prompt or number that `Engine.generate` cannot serve; needs no weights."""
    problems = [f"max_new_tokens={max_new_tokens} must be at least 1"] if max_new_tokens < 1 else []
    if not prompts:
        problems.append("there is no prompt")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            problems.append(f"prompt {number} is empty; a model continues at least one token")
        elif not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            problems.append(f"prompt {number} has token ids outside of the model's 0 to {model.vocab_size - 1}")
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > LONGEST_CONTEXT:
        problems.append(f"prompt and max_new_tokens={max_new_tokens} are {longest} tokens, over {LONGEST_CONTEXT}")
    if problems:
        raise ConfigError(problems)


@dataclasses.dataclass
class Generation:
    """A running generation. Iterating gives, for each step, the new token of every sequence that has not ended (None
    for those that have); a stop token is the last one of its sequence. The other fields are set on the way."""

    engine: Engine
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stop: frozenset[int]
    ffn_kind: api.Implementation | None = None
    """What computes the FFNs of new tokens; None until the prompts are read."""
    prompt_sparsity: float = 0.0
    """Share of zeros in the FFNs' intermediate activations over the prompts."""
    timed_tokens: int = 0
    """Tokens after the first step, which compiles; `timed_seconds` is how long they took."""
    timed_seconds: float = 0.0

    def __iter__(self) -> Iterator[list[int | None]]:
        engine, batch = self.engine, len(self.prompts)
        key = jax.random.key(self.sampling.seed)
        cache, tokens_B, zero_share = self._prefill(key)
        self.prompt_sparsity = float(zero_share)
        self.ffn_kind = engine.ffn_kind(batch, self.prompt_sparsity)
        ended, started = [False] * batch, 0.0
        for number in range(1, self.max_new_tokens + 1):
            chosen = tokens_B
            if number < self.max_new_tokens:
                # Dispatched before the token is fetched, so that the device works while the host prints.
                cache, tokens_B = _step(
                    engine.decoder, engine.weights, cache, tokens_B, key, ffn_kind=self.ffn_kind, sampling=self.sampling
                )
            new = [None if done else int(token) for token, done in zip(np.asarray(chosen), ended, strict=True)]
            if number <= 2:
                started = time.perf_counter()
            else:
                self.timed_seconds = time.perf_counter() - started
                self.timed_tokens += batch - sum(ended)
            yield new
            ended = [token is None or token in self.stop for token in new]
            if all(ended):
                return

    def _prefill(self, key: jax.Array) -> tuple[KVCache, jax.Array, jax.Array]:
        counts_B = np.array([len(prompt) for prompt in self.prompts], np.int32)
        longest = int(counts_B.max())
        # Few sizes, so that prompts of nearby lengths share a compiled program. The last token is never read.
        padded = max(_SHORTEST_PROMPT, 1 << (longest - 1).bit_length())
        needed = max(padded, longest + self.max_new_tokens - 1)
        capacity = -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
        tokens_BT = np.zeros((len(counts_B), padded), np.int32)
        for row, prompt in zip(tokens_BT, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        engine = self.engine
        return _prefill(
            engine.decoder, engine.weights, tokens_BT, counts_B, key, capacity=capacity, sampling=self.sampling
        )


def _read_weights(source: WeightSource, dtype: jnp.dtype, device: jax.Device) -> dict[str, Any]:
    """All weights on `device`, as `Decoder` takes them."""

    def place(name: str, layer: int | None) -> jax.Array:
        values = source.read(name, layer)
        return jax.device_put(values.astype(np.float32 if values.ndim == 1 else dtype), device)

    names = parameter_shapes(source.model)
    layered = [name for name in names if name.startswith(LAYER_PREFIX)]
    weights: dict[str, Any] = {name: place(name, None) for name in names if name not in layered}
    weights["layers"] = [
        {name.removeprefix(LAYER_PREFIX): place(name, layer) for name in layered}
        for layer in range(source.model.num_layers)
    ]
    return weights


# Not methods of Engine: a compiled program would keep the weights of its engine alive.
@functools.partial(jax.jit, static_argnames=("decoder", "capacity", "sampling"))
def _prefill(
    decoder: Decoder,
    weights: dict[str, Any],
    tokens_BT: Int[Array, "B T"],
    counts_B: Int[Array, "B"],
    key: jax.Array,
    *,
    capacity: int,
    sampling: Sampling,
) -> tuple[KVCache, Int[Array, "B"], Float[Array, ""]]:
    logits_BV, cache, zero_share = decoder.prefill(weights, tokens_BT, counts_B, capacity)
    return cache, sample(logits_BV, _key_of_token(key, cache), sampling), zero_share


@functools.partial(jax.jit, static_argnames=("decoder", "ffn_kind", "sampling"), donate_argnames="cache")
def _step(
    decoder: Decoder,
    weights: dict[str, Any],
    cache: KVCache,
    tokens_B: Int[Array, "B"],
    key: jax.Array,
    *,
    ffn_kind: api.Implementation,
    sampling: Sampling,
) -> tuple[KVCache, Int[Array, "B"]]:
    logits_BV, cache = decoder.advance(weights, cache, tokens_B, ffn_kind)
    return cache, sample(logits_BV, _key_of_token(key, cache), sampling)


def _key_of_token(key: jax.Array, cache: KVCache) -> jax.Array:
    """Another key for each step, from the tokens read so far: nothing has to come from the host."""
    return jax.random.fold_in(key, cache.lengths[0])
