"""Tokenises the corpus once: two flat files of token ids, train and validation, that later runs map into memory."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prosparse_jax.config import DataConfig
from prosparse_jax.data import cache
from prosparse_jax.data.documents import Document, is_validation, stable_fraction
from prosparse_jax.data.progress import DelayedProgress
from prosparse_jax.data.sources import corpus_info, read_documents
from prosparse_jax.data.tokenizer import TextTokenizer
from prosparse_jax.errors import DataError

SPLITS = ("train", "validation")

# Characters and documents of one call of the tokenizer: enough to occupy every core, small next to memory.
_BATCH_CHARACTERS = 2**21
_BATCH_DOCUMENTS = 2048

# Bump when the layout of an entry changes.
_FORMAT = 1
_MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]
"""Called with the bytes of the corpus done so far and all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFiles:
    """The token ids of both splits, documents one after another, mapped read-only from disk."""

    train: np.ndarray
    """(train tokens,) uint16, or uint32 for a vocabulary that needs it."""
    validation: np.ndarray
    """(validation tokens,) of the same type."""
    train_documents: int
    validation_documents: int
    fingerprint: str
    """Of the text, the tokenizer and the split: equal fingerprints mean equal tokens."""
    directory: Path


def prepare_tokens(data: DataConfig, tokenizer: TextTokenizer, *, progress: Progress | None = None) -> TokenFiles:
    """Tokenises the corpus, or finds the files of an earlier run over the same text with the same tokenizer.

    A document is stored as text [EOS], after BOS where the tokenizer puts it. Memory does not grow with the
    corpus.

    Args:
      data: where the text and the cache are, and what share of the documents is held out.
      tokenizer: its ids are stored.
      progress: told how far the work is; by default a bar on stderr once it takes more than two seconds.

    Raises:
      FileNotFoundError, DataError: as `read_documents`; the train or validation split is empty; the cache cannot be
        written.
    """
    corpus = corpus_info(data)
    key = json.dumps([_FORMAT, corpus.fingerprint, tokenizer.fingerprint, data.validation_share])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    build = functools.partial(_build, data, tokenizer, fingerprint, corpus.size, progress)
    entry = cache.cache_directory(data) / "tokens" / fingerprint[:16]
    return cache.read_or_build(entry, functools.partial(_read, fingerprint), build)


def _read(fingerprint: str, entry: Path) -> TokenFiles | None:
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        dtype = np.dtype(manifest["dtype"])
        sizes = {split: (entry / f"{split}.bin").stat().st_size for split in SPLITS}
        expected = {split: manifest[split]["tokens"] * dtype.itemsize for split in SPLITS}
        counts = {split: manifest[split]["documents"] for split in SPLITS}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if manifest["fingerprint"] != fingerprint or sizes != expected:
        return None
    train, validation = (np.memmap(entry / f"{split}.bin", dtype, mode="r") for split in SPLITS)
    return TokenFiles(train, validation, counts["train"], counts["validation"], fingerprint, entry)


def _build(
    data: DataConfig, tokenizer: TextTokenizer, fingerprint: str, size: int, progress: Progress | None, folder: Path
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with DelayedProgress("tokenising") as bar:
        counts = _write_splits(data, tokenizer, folder, dtype, lambda done: (progress or bar.update)(done, size))
    manifest = {"fingerprint": fingerprint, "dtype": dtype.str, "paths": data.paths, **counts}
    with _durable_file(folder / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _write_splits(
    data: DataConfig, tokenizer: TextTokenizer, folder: Path, dtype: np.dtype, report: Callable[[int], None]
) -> dict[str, dict[str, int]]:
    """Writes train.bin and validation.bin; returns the documents and tokens of each."""
    before = [tokenizer.bos_id] if tokenizer.begins_with_bos else []
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    smallest_fraction, done = 1.0, 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(_durable_file(folder / f"{split}.bin")) for split in SPLITS}
        for batch in _batches(read_documents(data)):
            for document, ids in zip(batch, tokenizer.encode_batch([each.text for each in batch]), strict=True):
                split = SPLITS[is_validation(document.name, data.validation_share)]
                tokens = np.array(before + ids + after, dtype)
                files[split].write(tokens.tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(tokens)
                smallest_fraction = min(smallest_fraction, stable_fraction(document.name))
                done += document.size
            report(done)
    _refuse_empty_split(data, counts, smallest_fraction)
    return counts


def _refuse_empty_split(data: DataConfig, counts: dict[str, dict[str, int]], smallest_fraction: float) -> None:
    train, validation = (counts[split]["documents"] for split in SPLITS)
    if train and validation:
        return
    if train + validation == 1:
        fix = "Give the text as several files or as JSON Lines, so that one document can be held out and another trained on"
    elif validation:
        fix = "Lower data.validation_share"
    else:
        # Rounded up, since a document is held out when its fraction lies below the share.
        fix = f"Raise data.validation_share to {math.floor(smallest_fraction * 1000 + 1) / 1000} or more, or give more text"
    raise DataError(
        f"the {'train' if validation else 'validation'} split is empty: data.validation_share={data.validation_share} "
        f"holds out {validation} of {train + validation} documents. {fix}."
    )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk, not only in memory, before the entry it belongs to gets its name."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
