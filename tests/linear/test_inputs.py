import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from hf_immunize.errors import ArgumentError, DataError, ImageDecodeError, NonFiniteError
from hf_immunize.linear.inputs import read_pair, standardize


def test_arrays_of_all_kinds(tmp_path):
    X = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "b.npz", only=X.reshape(2, 12))
    np.save(tmp_path / "foreign.npy", X.reshape(2, 12).astype(">f8"))
    assert torch.equal(*read_pair(tmp_path / "foreign.npy", tmp_path / "b.npz"))
    first, second = read_pair(tmp_path / "a.npy", tmp_path / "b.npz")
    assert first.shape == (2, 12) and torch.equal(first, second)


def test_tables_share_one_coding_of_their_texts(tmp_path):
    pandas.DataFrame({"zone": ["b", "a"], "size": [1, 2], "price": [5, 6]}).to_csv(tmp_path / "p.csv", index=False)
    pandas.DataFrame({"zone": ["c", "b"], "size": [3, 4], "price": [7, 8]}).to_csv(tmp_path / "h.csv", index=False)
    first, second = read_pair(tmp_path / "p.csv", tmp_path / "h.csv", drop=["price"])
    assert first.tolist() == [[1, 1], [0, 2]] and second.tolist() == [[2, 3], [1, 4]]
    first, _ = read_pair(tmp_path / "p.csv", tmp_path / "h.csv", columns=["size"])
    assert first.tolist() == [[1], [2]]


def test_missing_cells_need_a_value(tmp_path):
    pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", None]}).to_csv(tmp_path / "p.csv", index=False)
    pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}).to_csv(tmp_path / "h.csv", index=False)
    with pytest.raises(NonFiniteError, match=r"p\.csv, row 1, column 'b'"):
        read_pair(tmp_path / "p.csv", tmp_path / "h.csv")
    first, _ = read_pair(tmp_path / "p.csv", tmp_path / "h.csv", fill=0.0)
    assert first.tolist() == [[1, 0], [2, 0]]


def test_feature_lists_and_images_in_parquet(tmp_path):
    pandas.DataFrame({"z": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}).to_parquet(tmp_path / "z.parquet")
    first, _ = read_pair(tmp_path / "z.parquet", tmp_path / "z.parquet", columns=["z"])
    assert first.tolist() == [[1, 2], [3, 4]]
    Image.new("RGB", (9, 5), (255, 255, 255)).save(tmp_path / "white.png")
    cell = {"bytes": (tmp_path / "white.png").read_bytes(), "path": None}
    pandas.DataFrame({"image": [cell, cell]}).to_parquet(tmp_path / "i.parquet")
    first, _ = read_pair(tmp_path / "i.parquet", tmp_path / "i.parquet", image_size=4)
    assert first.shape == (2, 16) and (first == 1).all()


def test_a_folder_of_images(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    first, _ = read_pair(tmp_path, tmp_path, image_size=2)
    assert first[:, 0].tolist() == pytest.approx([0, 50 / 255, 100 / 255])
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(ImageDecodeError, match=r"3\.png"):
        read_pair(tmp_path, tmp_path)


def test_bad_files_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(2))
    np.savez(tmp_path / "b.npz", x=np.eye(2), y=np.eye(2))
    (tmp_path / "c.txt").write_text("1 2")
    (tmp_path / "empty").mkdir()
    pandas.DataFrame({"a": [1, 2]}).to_csv(tmp_path / "d.csv", index=False)
    pandas.DataFrame({"b": [1, 2]}).to_csv(tmp_path / "e.csv", index=False)
    for pair, words in (
        (("nowhere.npy", "a.npy"), "no file"),
        (("a.npy", "b.npz"), "--key: x, y"),
        (("a.npy", "c.txt"), "Expected .npy"),
        (("a.npy", "empty"), "no images"),
        (("d.csv", "e.csv"), "same columns"),
    ):
        with pytest.raises(DataError, match=words):
            read_pair(tmp_path / pair[0], tmp_path / pair[1])
    with pytest.raises(DataError, match="column 'z'"):
        read_pair(tmp_path / "d.csv", tmp_path / "d.csv", columns=["z"])


def written(path, content):
    path.write_bytes(content)
    return path


def test_damaged_files_are_one_sentence_that_names_path_and_kind(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, np.eye(2))
    np.save(tmp_path / "object.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "string.npy", np.array([["a", "b"]]))
    np.savez(tmp_path / "object.npz", np.array([None]))
    whole = good.read_bytes()
    for path, words in (
        (written(tmp_path / "empty.csv", b""), r"\.csv file that can be read"),
        (written(tmp_path / "ragged.csv", b"a,b\n1,2\n1,2,3\n"), r"\.csv file that can be read"),
        (written(tmp_path / "wide.csv", b"a,b\n1,2,3\n4,5,6\n"), r"as many cells .*\(2\), found 3"),
        (written(tmp_path / "bytes.csv", b"a,b\n\xff\xfe,2\n"), r"\.csv file that can be read"),
        (written(tmp_path / "bad.parquet", b"PAR1 no"), r"\.parquet file that can be read"),
        (written(tmp_path / "bad.npz", b"PK no"), r"\.npz file that can be read"),
        (written(tmp_path / "empty.npz", b""), r"\.npz file that can be read"),
        (written(tmp_path / "bad.safetensors", b"no"), r"\.safetensors file that can be read"),
        (written(tmp_path / "cut.npy", whole[:-8]), r"\.npy file that can be read"),
        (written(tmp_path / "bad.npy", b"no"), r"\.npy file that can be read"),
        (tmp_path / "object.npy", "Python objects"),
        (tmp_path / "object.npz", "Python objects"),
        (tmp_path / "string.npy", "array of numbers"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            read_pair(path, good)
        assert str(path) in str(caught.value) and "pickle" not in str(caught.value)


def test_infinite_cells_are_named_with_a_remedy_for_tables(tmp_path):
    pandas.DataFrame({"a": [1.0, 2.0], "b": [1.0, 2.0]}).to_csv(tmp_path / "p.csv", index=False)
    pandas.DataFrame({"a": [1.0, 2.0], "b": [1.0, float("inf")]}).to_csv(tmp_path / "h.csv", index=False)
    for fill in (None, 0.0):
        with pytest.raises(NonFiniteError, match=r"infinite one in .*h\.csv, row 1, column 'b'.*--drop"):
            read_pair(tmp_path / "p.csv", tmp_path / "h.csv", fill=fill)
    with pytest.raises(ArgumentError, match="--fill 0"):
        read_pair(tmp_path / "p.csv", tmp_path / "h.csv", fill=float("nan"))
    pandas.DataFrame({"z": [[1.0, 2.0], [3.0, float("inf")]]}).to_parquet(tmp_path / "z.parquet")
    with pytest.raises(NonFiniteError, match=r"z\.parquet, found inf in row 1, column 1"):
        read_pair(tmp_path / "z.parquet", tmp_path / "z.parquet")


@pytest.mark.parametrize("swap", [False, True])
def test_a_typo_in_a_column_of_numbers_is_named(tmp_path, swap):
    pandas.DataFrame({"a": [1, 2, 3, 4], "zone": list("abcd")}).to_csv(tmp_path / "p.csv", index=False)
    pandas.DataFrame({"a": ["1", "2", "3O", None], "zone": list("abcd")}).to_csv(tmp_path / "h.csv", index=False)
    pair = [tmp_path / "p.csv", tmp_path / "h.csv"]
    with pytest.raises(DataError, match=r"column 'a'.*found '3O' in .*h\.csv, row 2 .*--drop"):
        read_pair(*(pair[::-1] if swap else pair))
    # Numbers in one file and texts in the other are no categories either.
    pandas.DataFrame({"a": ["x", "y", "z", "x", "y"], "zone": list("abcde")}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"'x' in .*t\.csv, row 0"):
        read_pair(pair[0], tmp_path / "t.csv")
    notes = []
    read_pair(*pair, drop=["a"], notes=notes)
    assert len(notes) == 1 and "1 text columns" in notes[0] and "zone" in notes[0]


def test_columns_are_standardized_and_constant_ones_reported():
    X = 3 + 5 * torch.randn(100, 4, dtype=torch.float64)
    X[:, 1] = 0.1  # its mean rounds
    scaled, constant = standardize(X)
    assert constant == [1] and not scaled[:, 1].any() and scaled.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(scaled.std(0), torch.tensor([1.0, 0, 1, 1]).double())
    with pytest.raises(NonFiniteError, match="row 2, column 0"):
        standardize(torch.tensor([[1.0], [2.0], [float("nan")]]))
