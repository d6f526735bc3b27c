import pytest
import torch

from hf_immunize.cli.ceiling import save_frontier
from hf_immunize.errors import RankError
from hf_immunize.linear.optimum import rir_ceiling


def test_the_frontier_is_an_image_of_reasonable_size(tmp_path):
    path = tmp_path / "frontier.png"
    save_frontier(rir_ceiling(torch.randn(30, 5), torch.randn(30, 5) * torch.arange(1, 6)), path)
    assert path.read_bytes().startswith(b"\x89PNG") and 5_000 < path.stat().st_size < 200_000


def test_nothing_shared_is_nothing_to_draw(tmp_path):
    with pytest.raises(RankError, match="share no direction"):
        save_frontier(rir_ceiling(torch.eye(4)[:2], torch.eye(4)[2:]), tmp_path / "none.png")


def test_legend_and_title_say_what_the_line_is_for(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    words = []

    def drawn(figure):
        (axis,) = figure.axes
        words.append((axis.get_legend().get_texts()[0].get_text(), axis.get_title()))

    monkeypatch.setattr(plt, "close", drawn)
    inside = rir_ceiling(torch.diag(torch.tensor([1.0, 5.0, 2.0])), [[1.0, 2.0, 0.5], [0.2, 1.0, 4.0]])
    save_frontier(inside, tmp_path / "inside.png")
    partly = rir_ceiling([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]], torch.diag(torch.tensor([3.0, 1.0, 2.0])))
    save_frontier(partly, tmp_path / "partly.png")
    assert words[0] == (f"frontier: RIR = {inside.value:.3g}", "What a linear map can reach")
    assert inside.common_value < 0.9 * inside.value
    assert words[1][0] == f"frontier of the shared directions: RIR = {partly.common_value:.3g}"
    assert words[1][1].endswith("on the shared directions (2)")
