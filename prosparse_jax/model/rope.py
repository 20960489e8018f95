"""Rotary position embeddings in Hugging Face's half-split layout, with linear and llama-3 scaling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prosparse_jax.config import ModelConfig, RopeScaling


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Low frequencies are divided by the factor, high ones kept, those between blended (Llama 3.1 release notes)."""
    wavelengths = 2 * np.pi / frequencies
    periods = scaling.original_max_positions / wavelengths
    blend = (periods - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotary_frequencies(model: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of channels, shape (H/2,), float64."""
    exponents = np.arange(0, model.head_width, 2, dtype=np.float64) / model.head_width
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling.kind == "none":
        return frequencies
    if model.rope_scaling.kind == "linear":
        return frequencies / model.rope_scaling.factor
    assert model.rope_scaling.kind == "llama3", model.rope_scaling
    return _llama3_frequencies(frequencies, model.rope_scaling)


def rotary_tables(model: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every angle, each (T, H/2) float32: constants of the program."""
    angles_TH = np.arange(length, dtype=np.float64)[:, None] * rotary_frequencies(model)[None, :]
    return np.cos(angles_TH).astype(np.float32), np.sin(angles_TH).astype(np.float32)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cosine: Float[Array, "*B T half"], sine: Float[Array, "*B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates channel i together with channel i + H/2, in float32; returns x's dtype.

    The angles are those of each position, the same for all sequences or for each its own.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[..., None, :], sine[..., None, :]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)
