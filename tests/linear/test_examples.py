"""The two experiments as a user runs them, on toy data and offline."""

import gzip
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def example(monkeypatch, tmp_path):
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))

    def load(name):
        module = importlib.import_module(name)
        common = importlib.import_module("linear_common")
        for owner in (module, common):
            monkeypatch.setattr(owner, "FIGURES", tmp_path / "figures", raising=False)
        monkeypatch.setattr(common, "PAGE", tmp_path / "linear.md")
        return module

    yield load
    for name in ("house_prices", "mnist_pairs", "linear_common"):
        sys.modules.pop(name, None)


def houses(path, rows=420):
    generator = np.random.default_rng(0)
    size = generator.normal(100, 20, rows)
    lines = ["Id,MSZoning,LotArea,LotFrontage,Street,Alley,Rooms,Size,Flat,SalePrice"]
    for i in range(rows):
        zone, street = ("RL", "Pave") if i % 2 else ("RM", ("Pave", "Grvl")[i % 3 == 0])
        front = "NA" if i % 7 == 0 else f"{generator.normal(60, 9):.1f}"
        rooms = generator.integers(2, 9)
        lines.append(f"{i},{zone},{50 * size[i]:.0f},{front},{street},NA,{rooms},{size[i]:.2f},1,{900 * size[i]:.0f}")
    path.write_text("\n".join(lines))


def test_house_prices_end_to_end_and_resumed(example, tmp_path, monkeypatch, capsys):
    module = example("house_prices")
    houses(tmp_path / "train.csv")
    monkeypatch.setattr(module, "STEPS", 20)
    for name, (arguments, paper) in list(module.METHODS.items()):
        short = arguments if arguments["method"] == "optimum" else arguments | {"epochs": 2}
        monkeypatch.setitem(module.METHODS, name, (short, paper))
    call = ["house_prices.py", "--data", str(tmp_path / "train.csv"), "--seeds", "2", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", call)
    module.main()
    page = (tmp_path / "linear.md").read_text(encoding="utf-8")
    assert "356.20" in page and "| optimum, t = 1 |" in page and "nan" not in page
    assert (tmp_path / "figures" / "house_prices.png").stat().st_size < 200_000
    # A second run computes nothing, so it may not call the solver at all; the page comes out the same.
    monkeypatch.setattr(module, "immunize_linear", None)
    module.main()
    assert (tmp_path / "linear.md").read_text(encoding="utf-8") == page


def test_house_prices_code_cells_as_the_paper_does(example, tmp_path):
    module = example("house_prices")
    houses(tmp_path / "train.csv")
    frame, _ = module.load(str(tmp_path / "train.csv"))
    (P, y_p), (H, y_h) = module.prepare(frame)
    assert P.shape == (210, 8) and H.shape == (210, 8) and len(y_p) == len(y_h) == 210
    assert torch.isfinite(P).all() and torch.isfinite(H).all()
    assert not P[:, 7].any()  # the constant column "Flat" is 0, not NaN
    torch.testing.assert_close(y_p.std(), torch.tensor(1.0, dtype=torch.float64))


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


def test_mnist_reads_its_own_files_and_runs_a_pair(example, tmp_path, monkeypatch, capsys):
    module = example("mnist_pairs")
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 10
    images = (generator.random((300, 5, 5)) * 255 * (generator.random((10, 5, 5)) > 0.3)[labels]).astype(np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    for name, (arguments, paper) in list(module.METHODS.items()):
        short = arguments if arguments["method"] == "optimum" else arguments | {"epochs": 2, "batch_size": 16}
        monkeypatch.setitem(module.METHODS, name, (short, paper))
    call = ["mnist_pairs.py", "--data", str(tmp_path), "--pairs", "3-5,5-3", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", call)
    module.main()
    out = capsys.readouterr().out
    assert "[2/2] benign 5, harmful 3" in out and "ceiling 1.000000" in out and "| Algorithm 1, step rules |" in out
    assert not (tmp_path / "linear.md").exists()  # some pairs are no result


def test_the_store_survives_a_cut_off_line(example, tmp_path):
    example("house_prices")
    common = importlib.import_module("linear_common")
    store = common.Store(tmp_path / "s.jsonl")
    store.get("a", lambda: {"x": 1})
    with store.path.open("a") as file:
        file.write('{"key": "b", "x"')
    assert list(common.Store(store.path).rows) == ["a"]
