"""Fixed-length sequences from a flat array of tokens: the endless training order and the fixed validation batches."""

import zlib
from typing import Any

import grain
import numpy as np

from prosparse_jax.errors import DataError

Batch = dict[str, np.ndarray]
"""inputs (B, T) int32; targets (B, T) int32, the inputs shifted by one; mask (B, T) bool, False on padding; loss_mask
(B, T) bool, False on targets that do not count; source (B,) int32, the source of each sequence."""

# Tokens that go into the check that a checkpoint continues on the same data.
_SAMPLED_TOKENS = 2**16


class PackedSequences:
    """Item i covers the tokens i*T ... i*T + T: T inputs and, one further, T targets.

    Documents follow each other without padding, so that every token but the very first is a target once; less than a
    sequence is dropped at the end.

    Args:
      tokens: (any number,) of an unsigned integer type.
      sequence_length: T.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        self._tokens = tokens
        self._length = sequence_length

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._length

    def __getitem__(self, index: int) -> Batch:
        """inputs (T,) int32, targets (T,) int32, mask and loss_mask (T,) bool, all True, source () int32, 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin = int(index) * self._length
        window = np.asarray(self._tokens[begin : begin + self._length + 1]).astype(np.int32)
        real = np.ones(self._length, bool)
        source = np.zeros((), np.int32)
        return {"inputs": window[:-1], "targets": window[1:], "mask": real, "loss_mask": real, "source": source}


class TrainingDataset(grain.IterDataset):
    """Endless batches: each epoch visits every sequence once, in an order of its own that the seed decides.

    The state of its iterator counts batches and says what they are counted in, so that it continues exactly, or not
    at all where tokens, sequence length, batch size or seed have changed.

    Args:
      tokens: (any number,) token ids of the training split.
      sequence_length: T.
      batch_size: B. A batch may hold the end of one epoch and the beginning of the next.
      seed: any integer from 0 to 2**32 - 1.
      process_index, process_count: of several processes each gets an equal part of every batch, in order. The state does
        not depend on their number.

    Raises:
      DataError: fewer sequences than one batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        sequences = PackedSequences(tokens, sequence_length)
        _require_one_batch("train", sequences, tokens, sequence_length, batch_size)
        ordered = grain.MapDataset.source(sequences).seed(seed).shuffle().repeat()
        # No threads: the tokens are mapped memory, and the cores belong to the model.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        super().__init__(ordered.batch(batch_size, drop_remainder=True).to_iter_dataset(options))
        self._counted_in = {
            "tokens": len(tokens),
            "tokens_checksum": _sample_checksum(tokens),
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "seed": seed,
        }

        part = batch_size // process_count
        self._rows = slice(process_index * part, (process_index + 1) * part)

    def __iter__(self) -> "_TrainingIterator":
        return _TrainingIterator(iter(self._parent), self._counted_in, self._rows)


class _TrainingIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, counted_in: dict[str, int], rows: slice):
        super().__init__(parent)
        self._counted_in, self._rows = counted_in, rows

    def __next__(self) -> Batch:
        return {name: values[self._rows] for name, values in next(self._parent).items()}

    def get_state(self) -> dict[str, Any]:
        return {"position": self._parent.get_state(), "counted_in": dict(self._counted_in)}

    def set_state(self, state: dict[str, Any]) -> None:
        saved = state["counted_in"]
        changed = [
            f"{key} is {value}, was {saved.get(key)}"
            for key, value in self._counted_in.items()
            if saved.get(key) != value
        ]
        if changed:
            raise DataError(
                f"the checkpoint's place in the training data does not fit this run: {'; '.join(changed)}. "
                "Set it back to continue exactly, or start a new run from the checkpoint's weights with init_from."
            )
        self._parent.set_state(state["position"])


def training_iterator(
    tokens: np.ndarray,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterator of `TrainingDataset`: endless batches, with a state that Orbax saves and restores.

    Raises:
      DataError: fewer sequences than one batch. From `set_state`: the state is of other tokens, another sequence
        length, batch size or seed; Orbax wraps it, as the `__cause__` of an error of its own.
    """
    return iter(
        TrainingDataset(
            tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
    )


def validation_batches(tokens: np.ndarray, *, sequence_length: int, batch_size: int, sequences: int) -> list[Batch]:
    """The same held-out sequences every time, spread evenly over the split.

    Args:
      tokens: (any number,) token ids of the validation split.
      sequence_length: T.
      batch_size: B; the last batch is filled up with sequences of zeros whose mask is False.
      sequences: how many are wanted; all there are where the split has fewer.

    Raises:
      DataError: fewer sequences than one batch.
    """
    source = PackedSequences(tokens, sequence_length)
    _require_one_batch("validation", source, tokens, sequence_length, batch_size)
    count = min(sequences, len(source))
    chosen = [source[i * len(source) // count] for i in range(count)]
    padding = {key: np.zeros_like(value) for key, value in chosen[0].items()}
    chosen += [padding] * (-count % batch_size)
    return [
        {key: np.stack([item[key] for item in chosen[begin : begin + batch_size]]) for key in padding}
        for begin in range(0, len(chosen), batch_size)
    ]


def _require_one_batch(
    split: str, sequences: PackedSequences, tokens: np.ndarray, sequence_length: int, batch_size: int
) -> None:
    if len(sequences) < batch_size:
        more = " or raise data.validation_share" if split == "validation" else ""
        raise DataError(
            f"the {split} split has {len(tokens)} tokens, which make {len(sequences)} sequences of {sequence_length} "
            f"where a batch needs {batch_size}. Give more text{more}, or lower training.sequence_length or "
            "training.sequences_per_step."
        )


def _sample_checksum(tokens: np.ndarray) -> int:
    """Changes with nearly every change of the tokens, in a time that does not grow with them."""
    stride = max(1, len(tokens) // _SAMPLED_TOKENS)
    return zlib.crc32(np.ascontiguousarray(tokens[::stride]).tobytes())
