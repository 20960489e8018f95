"""scripts/generate.py as a user runs it, on a model whose text and sparsity are known by hand.

The residual stream is one-hot, nothing is added to it, and the head sends each byte to the next one of TEXT: the text is
TEXT whatever is computed right. A quarter of the neurons have positive gates: the prompt's sparsity is exactly 75 %.
"""

import dataclasses
import os
import re

import numpy as np
import pytest

from prosparse_jax.config import ActivationConfig, ModelConfig
from prosparse_jax.data.tokenizer import train_byte_level_bpe
from prosparse_jax.interop.conversion import write_checkpoint
from prosparse_jax.interop.weights import parameter_shapes
from tests.inference.memory import MemorySource
from tests.processes import PATIENCE, scripts, session_directory, text
from tests.support import small_config

__all__ = ["scripts", "session_directory", "text"]

# No byte comes twice, so that the last one decides the next.
TEXT = "aé€😀 b!"
MODEL = ModelConfig(
    vocab_size=257, d_model=257, ffn_width=64, num_layers=2, num_query_heads=2, num_kv_heads=1, head_width=4,
    activation=ActivationConfig(name="relu"),
)  # fmt: skip


def tree(shapes: dict[str, np.ndarray]) -> dict:
    nested: dict = {}
    for name, values in shapes.items():
        *parents, leaf = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = values
    return nested


def write_model(path, *, name: str = "relu", with_tokenizer: bool = True, assets: dict[str, bytes] | None = None):
    """A checkpoint of the model above; the token after "!" is the separator, which ends a text."""
    model = dataclasses.replace(MODEL, activation=ActivationConfig(name=name))
    tokenizer = train_byte_level_bpe([], model.vocab_size)
    bytes_of_text = tokenizer.backend.encode(TEXT).ids
    assert len(set(bytes_of_text)) == len(bytes_of_text) == len(TEXT.encode())
    weights = {key: np.zeros(shape, np.float32) for key, shape in parameter_shapes(model).items()}
    for key in weights:
        if key.endswith("scale"):
            weights[key] += 1
    weights["embedding"] += np.eye(257, dtype=np.float32)
    weights["head"][[*bytes_of_text[1:], tokenizer.eos_id], bytes_of_text] = 1
    gates = np.where(np.arange(64) % 4 == 0, 1, -1).astype(np.float32)
    weights["layers/ffn/gate"] += gates[None, :, None]
    weights["layers/ffn/up"] += 1
    files = dict(tokenizer.files) if with_tokenizer else {}
    source = MemorySource(model, tree(weights), files | (assets or {}))
    write_checkpoint(source, path, dataclasses.replace(small_config(), model=model))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "relu")


def last_line(out: str) -> dict[str, float]:
    match = re.fullmatch(
        r"(?P<speed>[\d.]+) tokens/s, (?P<tokens>\d+) prompt tokens, (?P<sparsity>[\d.]+) % sparsity of their FFN "
        r"activations, FFN: (?P<ffn>\w+)",
        out.splitlines()[-1],
    )
    assert match, out
    return match.groupdict()


def test_one_text_is_streamed_in_whole_characters_and_ends_at_its_stop_token(scripts, checkpoint):
    process = scripts.start("generate", "--checkpoint", checkpoint, "--prompt", "a")
    received = []
    while part := os.read(process.stdout.fileno(), 65536):
        received.append(part)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    # Decoding each part: none ends inside of a character.
    out = "".join(part.decode() for part in received)
    assert out.splitlines()[0] == TEXT
    assert len(out.splitlines()) == 2
    # The prompt's piece comes before the second token's program is compiled: text does not wait for the end.
    assert len(received) > 1
    line = last_line(out)
    assert (line["tokens"], line["sparsity"], line["ffn"]) == ("1", "75.0", "gather")
    assert float(line["speed"]) > 0


def test_several_texts_appear_whole(scripts, checkpoint):
    options = ("--prompt", "!", "--prompt", "aé", "--prompt", "€", "--max-new-tokens", 6, "--ffn", "dense")
    out = scripts.run("generate", "--checkpoint", checkpoint, *options, "--temperature", 1e-5, "--top-p", 0.5).stdout
    # The first ends at once; of the others, the bytes of six tokens follow.
    expected = ["!", "aé€\ufffd", "€😀 b"]
    assert out.splitlines()[:-1] == expected
    line = last_line(out)
    assert (line["tokens"], line["sparsity"], line["ffn"]) == ("7", "75.0", "dense")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, ("--prompt", "a", "--prompt", ""), "prompt 2 is empty"),
        ({"with_tokenizer": False}, ("--prompt", "a"), "has no tokenizer.json"),
        ({"name": "swish"}, ("--prompt", "a", "--ffn", "sparse"), "ffn=sparse needs a model with relu or fatrelu"),
        (
            {},
            ("--prompt", "a", "--temperature", -1, "--top-p", 2, "--seed", -1),
            r"temperature=-1.0.*top_p=2.0.*seed=-1",
        ),
        ({}, ("--prompt", "a", "--ffn", "fast"), "invalid choice: 'fast'"),
    ],
)
def test_what_a_user_gets_wrong_ends_with_2(scripts, tmp_path, model, options, message):
    path = write_model(tmp_path / "model", **model)
    found = scripts.run("generate", "--checkpoint", path, *options, code=2)
    assert re.search(message, found.stderr, re.DOTALL), found.stderr
    assert found.stdout == ""
