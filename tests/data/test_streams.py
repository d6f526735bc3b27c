import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from hf_immunize.data.pairs import PairedCollator, PairedDataset
from hf_immunize.data.streams import StreamedRows, is_stream
from hf_immunize.errors import DataError


def stream(count=5):
    return datasets.Dataset.from_dict({"pixel_values": [[[[float(i)]]] for i in range(count)]}).to_iterable_dataset()


def values(rows, positions):
    return [int(rows[position]["pixel_values"]) for position in positions]


def test_rows_come_round_again_after_the_end():
    assert values(StreamedRows(stream(3), "harmful_dataset"), range(8)) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_resumed_run_starts_at_its_position():
    straight = StreamedRows(stream(), "harmful_dataset")
    expected = values(straight, range(13))[7:]
    assert values(StreamedRows(stream(), "harmful_dataset"), range(7, 13)) == expected


def test_going_back_reads_again():
    assert values(StreamedRows(stream(), "harmful_dataset"), [4, 1, 9, 0]) == [4, 1, 4, 0]


def test_an_empty_stream_is_refused():
    with pytest.raises(DataError, match="empty stream"):
        StreamedRows(stream(1).filter(lambda row: False), "harmful_dataset")


def test_an_iterator_is_refused():
    with pytest.raises(DataError, match="an iterator"):
        StreamedRows(({"pixel_values": torch.zeros(1, 1, 1)} for _ in range(3)), "harmful_dataset")


def test_a_stream_that_changes_its_length_is_named():
    class Shrinking:
        def __init__(self):
            self.count = 4

        def __iter__(self):
            self.count -= 1
            return iter([{"pixel_values": torch.zeros(1, 1, 1)}] * self.count)

    rows = StreamedRows(Shrinking(), "harmful_dataset")
    with pytest.raises(DataError, match="as many rows in each pass"):
        values(rows, range(9))


def loader(workers):
    benign = [{"pixel_values": torch.zeros(1, 1, 1), "labels": 0}] * 6
    data = PairedDataset(benign, StreamedRows(stream(), "harmful_dataset"))
    sampler, collator = data.make_sampler(0), PairedCollator(stack)
    return DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collator, num_workers=workers)


def test_pairs_take_a_stream_in_its_order():
    assert [batch["harmful"]["pixel_values"].flatten().tolist() for batch in loader(0)] == [[0, 1], [2, 3], [4, 0]]


def test_workers_are_refused():
    with pytest.raises(DataError, match="dataloader_num_workers=0"):
        next(iter(loader(1)))


def stack(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


@pytest.mark.parametrize("data, streamed", [(stream(), True), ([1], False), (None, False)])
def test_streams_are_told_from_stored_data(data, streamed):
    assert is_stream(data) == streamed
