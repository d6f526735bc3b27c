"""Benign and harmful rows come side by side, in an order that can be resumed."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_immunize.data.images import ImageCollator
from hf_immunize.data.pairs import BatchSizes, PairedCollator, PairedDataset, PairedSampler
from hf_immunize.errors import ArgumentError, DataError, ShapeError


def pairs_of(sampler, epochs):
    drawn = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    return drawn


sizes = st.integers(1, 13)


@given(num_benign=sizes, num_harmful=sizes, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_an_epoch_is_one_pass_over_the_benign_rows(num_benign, num_harmful, seed, epoch):
    sampler = PairedSampler(num_benign, num_harmful, seed)
    benign = [pair[0] for pair in pairs_of(sampler, [epoch])]
    assert sorted(benign) == list(range(num_benign)) and len(sampler) == num_benign


@given(num_benign=sizes, num_harmful=sizes, seed=st.integers(0, 2**32), epochs=st.integers(1, 6))
def test_harmful_rows_are_used_equally_often(num_benign, num_harmful, seed, epochs):
    drawn = pairs_of(PairedSampler(num_benign, num_harmful, seed), range(epochs))
    counts = Counter(row for pair in drawn for row in pair[1])
    times = [counts[row] for row in range(num_harmful)]
    assert max(times) - min(times) <= 1


def test_pairs_depend_on_seed_and_epoch_alone():
    first = pairs_of(PairedSampler(10, 7, seed=3), [2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert pairs_of(PairedSampler(10, 7, seed=3), [2]) == first


def test_no_global_random_state_is_used():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(PairedSampler(10, 7, seed=3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


def test_epochs_seeds_and_sides_differ():
    orders = [pairs_of(PairedSampler(50, 50, seed), [epoch]) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3
    assert [pair[0] for pair in orders[0]] != [pair[1][0] for pair in orders[0]]


def test_an_empty_side_has_no_sampler():
    with pytest.raises(ArgumentError, match="3 and 0"):
        PairedSampler(3, 0, seed=0)


def rows(count, shape=(3, 4, 4), first=0):
    return [{"pixel_values": torch.full(shape, float(first + i)), "labels": i} for i in range(count)]


def test_a_pair_holds_both_rows_and_the_benign_label_alone():
    pair = PairedDataset(rows(3), rows(2, first=10))[2, (1,), (), ()]
    assert pair["benign"]["labels"] == 2 and set(pair["harmful"][0]) == {"pixel_values"}
    assert pair["harmful"][0]["pixel_values"][0, 0, 0] == 11


def test_harmful_labels_come_on_request():
    assert PairedDataset(rows(3), rows(2), harmful_labels=True)[2, (1,), (), ()]["harmful"][0]["labels"] == 1


def test_the_length_is_the_benign_one():
    assert len(PairedDataset(rows(3), rows(2))) == 3


@pytest.mark.parametrize("benign, harmful, name", [(0, 2, "benign"), (2, 0, "harmful")])
def test_an_empty_side_is_refused(benign, harmful, name):
    with pytest.raises(DataError, match=f"empty {name} dataset"):
        PairedDataset(rows(benign), rows(harmful))


def test_pairs_are_collated_side_by_side():
    batch = PairedCollator(ImageCollator())([PairedDataset(rows(3), rows(2))[i, (0,), (), ()] for i in range(3)])
    assert batch["benign"]["pixel_values"].shape == batch["harmful"]["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["benign"]["labels"].tolist() == [0, 1, 2] and "labels" not in batch["harmful"]


@given(
    counts=st.tuples(sizes, sizes, sizes),
    batch=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 7), st.integers(0, 3)),
    epochs=st.integers(1, 4),
)
def test_full_batches_hold_the_sizes_asked(counts, batch, epochs):
    sampler = PairedSampler(
        counts[0], counts[1], 0, num_distillation=counts[2], num_held_out=4, batch_sizes=BatchSizes(*batch)
    )
    for epoch in range(epochs):
        drawn = pairs_of(sampler, [epoch])
        for start in range(0, counts[0] - batch[0] + 1, batch[0]):
            rows_of_batch = drawn[start : start + batch[0]]
            found = [sum(len(draw[side]) for draw in rows_of_batch) for side in (1, 2, 3)]
            assert found == list(batch[1:])


@given(num_harmful=sizes, batch=st.integers(1, 7), epochs=st.integers(1, 5))
def test_harmful_rows_are_used_equally_often_in_batches_of_another_size(num_harmful, batch, epochs):
    sampler = PairedSampler(8, num_harmful, 0, batch_sizes=BatchSizes(4, batch))
    counts = Counter(row for draw in pairs_of(sampler, range(epochs)) for row in draw[1])
    times = [counts[row] for row in range(num_harmful)]
    assert max(times) - min(times) <= 1


def test_a_stream_is_counted_on_over_the_epochs():
    drawn = pairs_of(PairedSampler(4, None, 0, batch_sizes=BatchSizes(2, 3)), [0, 1])
    assert [row for draw in drawn for row in draw[1]] == list(range(12))


def test_distillation_rows_come_without_labels():
    data = PairedDataset(rows(2), rows(2), distillation=rows(3), batch_sizes=BatchSizes(2, 2, 4))
    batch = PairedCollator(ImageCollator())([data[draw] for draw in data.make_sampler(0)])
    assert set(batch["distillation"]) == {"pixel_values"} and len(batch["distillation"]["pixel_values"]) == 4


def test_without_a_distillation_set_its_batch_size_does_not_matter():
    data = PairedDataset(rows(2), rows(2), batch_sizes=BatchSizes(2, 2, 4))
    assert [draw[2] for draw in data.make_sampler(0)] == [(), ()]


def test_single_rows_are_collated_as_one():
    assert set(PairedCollator(ImageCollator())(rows(2))) == {"pixel_values", "labels"}


def test_a_collator_that_gives_no_pixel_values_is_named_with_its_side():
    pairs = PairedDataset(rows(2), rows(2))
    with pytest.raises(DataError, match="pixel_values in a collated batch of benign images, found images"):
        PairedCollator(lambda items: {"images": len(items)})([pairs[0, (0,), (), ()]])


def test_sides_of_different_shapes_are_refused():
    data = PairedDataset(rows(1), rows(1, shape=(3, 5, 5)))
    with pytest.raises(ShapeError, match=r"\(3, 4, 4\) and \(3, 5, 5\)"):
        PairedCollator(ImageCollator())([data[0, (0,), (), ()]])


class Indices(PairedDataset):
    """Yields the pair itself, to see what a loader draws."""

    def __getitem__(self, pair):
        return pair


def prepared(processes, rank=0):
    """Return a loader as accelerate prepares it for one of several processes."""
    Accelerator(cpu=True)
    data = Indices(rows(16), rows(5))
    loader = DataLoader(data, batch_size=2, sampler=data.make_sampler(seed=1), collate_fn=list)
    return prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)


def batches(epoch):
    drawn = pairs_of(PairedSampler(16, 5, seed=1), [epoch])
    return [drawn[start : start + 2] for start in range(0, 16, 2)]


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_accelerate_announces_each_epoch(processes, rank):
    loader = prepared(processes, rank)
    for epoch in (0, 1):
        assert list(loader) == batches(epoch)[rank::processes]


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_run_resumed_within_an_epoch_draws_the_same_pairs(processes, rank):
    resumed = skip_first_batches(prepared(processes, rank), 3)
    resumed.set_epoch(4)
    assert list(resumed) == batches(4)[rank::processes][3:]


def test_loader_workers_draw_the_same_pairs():
    data = Indices(rows(16), rows(5))
    loader = DataLoader(data, batch_size=2, sampler=data.make_sampler(seed=1), collate_fn=list, num_workers=1)
    assert list(loader) == batches(0)


def test_held_out_rows_come_with_their_labels():
    data = PairedDataset(rows(8), rows(2), batch_sizes=BatchSizes(4, 4, 0, 1), held_out=rows(3))
    draws = list(data.make_sampler(0))
    batch = PairedCollator(ImageCollator())([data[draw] for draw in draws[:4]])
    assert batch["held_out"]["labels"].shape == (1,) and "distillation" not in batch


@pytest.mark.parametrize("side", ["benign", "harmful"])
def test_a_collator_that_gives_whole_numbers_is_named_with_its_side(side):
    pair = {"benign": {"whole": side == "benign"}, "harmful": [{"whole": side == "harmful"}]}

    def collate(rows):
        dtype = torch.uint8 if rows[0]["whole"] else torch.float32
        return {"pixel_values": torch.zeros(len(rows), 3, 4, 4, dtype=dtype)}

    with pytest.raises(DataError, match=f"{side} images, found torch.uint8"):
        PairedCollator(collate)([pair] * 2)
