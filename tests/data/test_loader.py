"""Sequences against numpy slices, epochs against sets, and the iterator's state against Grain and Orbax."""

import itertools
import threading

import grain
import numpy as np
import pytest
from grain._src.python.testing.experimental import assert_equal_output_after_checkpoint
from orbax.checkpoint import v1 as ocp

from prosparse_jax.data.loader import PackedSequences, TrainingDataset, training_iterator, validation_batches
from prosparse_jax.errors import DataError

T, B = 8, 4
# Every token is its own position, so that a batch says which sequences it holds. 25 sequences: not a multiple of B.
TOKENS = np.arange(25 * T + 5, dtype=np.uint16)


def iterator(tokens=TOKENS, *, sequence_length=T, batch_size=B, seed=3):
    return training_iterator(tokens, sequence_length=sequence_length, batch_size=batch_size, seed=seed)


def visited(batches) -> list[int]:
    """Which sequences the batches hold, in order."""
    return [int(first) // T for batch in batches for first in batch["inputs"][:, 0]]


def assert_same_batches(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("length", [1, 7, 8])
def test_sequences_are_slices_with_targets_one_further(length):
    tokens = np.random.default_rng(0).integers(0, 50_000, 100).astype(np.uint16)
    sequences = PackedSequences(tokens, length)
    whole = (len(tokens) - 1) // length
    assert len(sequences) == whole
    items = [sequences[i] for i in range(whole)]
    np.testing.assert_array_equal([i["inputs"] for i in items], tokens[: whole * length].reshape(whole, length))
    np.testing.assert_array_equal([i["targets"] for i in items], tokens[1 : whole * length + 1].reshape(whole, length))
    assert all(item["mask"].all() for item in items)
    assert all(item["loss_mask"].all() and item["source"] == 0 for item in items)
    kinds = {"inputs": "i4", "targets": "i4", "mask": "?", "loss_mask": "?", "source": "i4"}
    assert {key: value.dtype for key, value in items[0].items()} == kinds
    with pytest.raises(IndexError):
        sequences[whole]


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_how_many_sequences_fit(tokens, sequences):
    assert len(PackedSequences(np.zeros(tokens, np.uint16), 8)) == sequences


def test_ids_above_sixteen_bits_survive():
    tokens = np.array([70_000, 2**31 - 1, 5], np.uint32)
    assert PackedSequences(tokens, 2)[0]["targets"].tolist() == [2**31 - 1, 5]


def test_batches_hold_plain_arrays_of_one_shape(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, mode="r")
    batch = next(iterator(mapped))
    shapes = dict.fromkeys(("inputs", "targets", "mask", "loss_mask"), (np.ndarray, (B, T))) | {
        "source": (np.ndarray, (B,))
    }
    assert {key: (type(value), value.shape) for key, value in batch.items()} == shapes
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


def test_an_epoch_visits_every_sequence_once_in_an_order_of_its_own():
    order = visited(itertools.islice(iterator(), 25))  # 25 batches of 4 are 4 epochs of 25
    epochs = [order[begin : begin + 25] for begin in range(0, 100, 25)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(25))] * 4
    assert len({tuple(epoch) for epoch in [*epochs, range(25)]}) == 5


def test_the_order_depends_on_the_seed_alone():
    orders = [visited(itertools.islice(iterator(seed=seed), 6)) for seed in (0, 1, 2, 2**32 - 1, 2)]
    assert orders[2] == orders[4]
    assert len({tuple(order) for order in orders}) == 4


def test_neighbouring_seeds_are_not_the_same_order_an_epoch_later():
    """Grain derives the order of epoch e from seed + e; our seed must not enter there directly."""
    first, second = (visited(itertools.islice(iterator(seed=seed), 25)) for seed in (0, 1))
    assert first[25:50] != second[:25]


def test_grain_confirms_that_every_state_continues_exactly():
    dataset = TrainingDataset(TOKENS, sequence_length=T, batch_size=B, seed=5)
    assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(dataset, count=16))


@pytest.mark.parametrize("position", [0, 1, 6, 7, 40])
def test_orbax_saves_and_restores_the_place(tmp_path, position):
    original = iterator()
    for _ in range(position):
        next(original)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": original})
    expected = list(itertools.islice(original, 10))  # the saved place must not move with the iterator
    restored = iterator()
    next(restored)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": restored})
    assert_same_batches(itertools.islice(restored, 10), expected)


def test_a_place_in_other_data_is_refused(tmp_path):
    state = iterator().get_state()
    changed = TOKENS.copy()
    changed[77] += 1
    for other, expected in (
        (iterator(seed=4), r"seed is 4, was 3\."),
        (iterator(batch_size=5), r"batch_size is 5, was 4\."),
        (iterator(sequence_length=4), r"sequence_length is 4, was 8\."),
        (iterator(TOKENS[:-1]), r"tokens is 204, was 205"),
        (iterator(changed), r"tokens_checksum is \d+, was \d+\. Set it back .* init_from"),
    ):
        with pytest.raises(DataError, match=expected):
            other.set_state(state)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator()})
    with pytest.raises(Exception, match="data") as caught:  # Orbax wraps what a handler raises
        ocp.load_checkpointables(tmp_path / "checkpoint", {"data": iterator(seed=4)})
    assert isinstance(caught.value.__cause__, DataError)
    assert "seed is 4, was 3" in str(caught.value.__cause__)


def test_reading_takes_no_threads_of_its_own():
    """The cores belong to the model; and without read-ahead the state is exact by construction."""
    before = set(threading.enumerate())
    next(iterator())
    # Threads of earlier tests may end meanwhile; none may begin.
    assert set(threading.enumerate()) <= before


def test_validation_sequences_are_spread_evenly_and_the_same_every_time():
    batches = validation_batches(TOKENS, sequence_length=T, batch_size=B, sequences=8)
    assert visited(batches) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert all(batch["mask"].all() for batch in batches)
    assert_same_batches(batches, validation_batches(TOKENS, sequence_length=T, batch_size=B, sequences=8))


@pytest.mark.parametrize(("wanted", "real"), [(6, 6), (1, 1), (25, 25), (1000, 25)])
def test_the_last_validation_batch_is_padded_and_padding_does_not_count(wanted, real):
    batches = validation_batches(TOKENS, sequence_length=T, batch_size=B, sequences=wanted)
    names = ("inputs", "targets", "mask", "loss_mask")
    assert {batch[name].shape for batch in batches for name in names} == {(B, T)}
    assert {batch["source"].shape for batch in batches} == {(B,)}
    mask = np.concatenate([batch["mask"] for batch in batches])
    inputs = np.concatenate([batch["inputs"] for batch in batches])
    assert mask.sum() == real * T
    assert len(batches) == -(-real // B)
    assert not mask[real:].any()
    np.testing.assert_array_equal(mask, np.concatenate([batch["loss_mask"] for batch in batches]))
    assert not inputs[real:].any()
    assert len({int(row[0]) for row in inputs[:real]}) == real


def test_too_little_text_is_an_error_that_says_how_much_there_is():
    with pytest.raises(
        DataError, match=r"the train split has 205 tokens, which make 25 sequences of 8 where a batch needs 26\. .*"
    ):
        iterator(batch_size=26)
    with pytest.raises(
        DataError, match=r"the validation split has 8 tokens, which make 0 sequences .*validation_share"
    ):
        validation_batches(TOKENS[:8], sequence_length=T, batch_size=1, sequences=4)
