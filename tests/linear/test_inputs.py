import numpy as np
import pandas
import pytest
import torch

from hf_immunize.errors import DataError, NonFiniteError
from hf_immunize.linear.inputs import read_pair


def test_arrays_of_any_shape_and_byte_order(tmp_path):
    X = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "foreign.npy", X.reshape(2, 12).astype(">f8"))
    assert torch.equal(*read_pair(tmp_path / "foreign.npy", tmp_path / "a.npy"))


def test_tables_of_numbers_and_of_feature_lists(tmp_path):
    for name, sizes in (("p", [1, 2]), ("h", [3, 4])):
        pandas.DataFrame({"zone": ["b", "a"], "size": sizes, "price": [5, 6]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    first, second = read_pair(tmp_path / "p.csv", tmp_path / "h.csv", drop=["zone"])
    assert first.tolist() == [[1, 5], [2, 6]] and second.tolist() == [[3, 5], [4, 6]]
    pandas.DataFrame({"z": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}).to_parquet(tmp_path / "z.parquet")
    first, _ = read_pair(tmp_path / "z.parquet", tmp_path / "z.parquet", drop=["label"])
    assert first.tolist() == [[1, 2], [3, 4]]


def arrays(path):
    np.save(path / "good.npy", np.eye(2))
    np.save(path / "object.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    np.save(path / "string.npy", np.array([["a", "b"]]))
    (path / "cut.npy").write_bytes((path / "good.npy").read_bytes()[:-8])


TEXTS = {
    "c.txt": b"1 2",
    "empty.csv": b"",
    "ragged.csv": b"a,b\n1,2\n1,2,3\n",
    "wide.csv": b"a,b\n1,2,3\n4,5,6\n",
    "bytes.csv": b"a,b\n\xff\xfe,2\n",
    "missing.csv": b"a,b\n1,\n3,4\n",
    "typo.csv": b"a,b\n1,2\n3,l5\n",
    "bad.parquet": b"PAR1 no",
    "bad.npy": b"no",
}


@pytest.mark.parametrize("name", [*TEXTS, "nowhere.npy", "object.npy", "string.npy", "cut.npy"])
def test_what_holds_no_numbers_is_named(tmp_path, name):
    arrays(tmp_path)
    if name in TEXTS:
        (tmp_path / name).write_bytes(TEXTS[name])
    with pytest.raises(DataError) as caught:
        read_pair(tmp_path / "good.npy", tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "pickle" not in str(caught.value)


def test_infinite_cells_and_other_columns_are_named(tmp_path):
    pandas.DataFrame({"a": [1.0, 2.0], "b": [1.0, float("inf")]}).to_csv(tmp_path / "p.csv", index=False)
    pandas.DataFrame({"a": [1.0, 2.0], "c": [1.0, 2.0]}).to_csv(tmp_path / "h.csv", index=False)
    with pytest.raises(NonFiniteError, match=r"p\.csv, found inf in row 1, column 1"):
        read_pair(tmp_path / "h.csv", tmp_path / "p.csv")
    (tmp_path / "g.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(DataError, match="same columns"):
        read_pair(tmp_path / "h.csv", tmp_path / "g.csv")
    with pytest.raises(DataError, match="column 'z'"):
        read_pair(tmp_path / "h.csv", tmp_path / "h.csv", drop=["z"])
