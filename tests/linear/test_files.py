import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from hf_immunize.errors import DataError, ImageDecodeError, NonFiniteError
from hf_immunize.linear.files import read_pair


def test_arrays_of_all_kinds(tmp_path):
    X = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "b.npz", only=X.reshape(2, 12))
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
    with pytest.raises(DataError, match="no column 'z'"):
        read_pair(tmp_path / "d.csv", tmp_path / "d.csv", columns=["z"])
