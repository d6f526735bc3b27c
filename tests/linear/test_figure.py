import pytest
import torch

from hf_immunize.errors import RankError
from hf_immunize.linear.figure import save_frontier
from hf_immunize.linear.optimum import rir_ceiling


def test_the_frontier_is_an_image_of_reasonable_size(tmp_path):
    path = tmp_path / "frontier.png"
    save_frontier(rir_ceiling(torch.randn(30, 5), torch.randn(30, 5) * torch.arange(1, 6)), path)
    assert path.read_bytes().startswith(b"\x89PNG") and 5_000 < path.stat().st_size < 200_000


def test_nothing_shared_is_nothing_to_draw(tmp_path):
    with pytest.raises(RankError, match="share no direction"):
        save_frontier(rir_ceiling(torch.eye(4)[:2], torch.eye(4)[2:]), tmp_path / "none.png")
