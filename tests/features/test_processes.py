"""One process by itself; what several do together is tested in tests/distributed/test_spread_two_ranks.py."""

import pytest

from hf_immunize.features.ranks import ALONE, launched


@pytest.mark.parametrize("size", [None, "8"], ids=["nothing set", "a scheduler's size alone"])
def test_without_a_launcher_a_process_is_alone(size, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert launched() is ALONE and ALONE.first and ALONE.count == 1


def test_an_error_of_ones_own_stays_what_it_is():
    with pytest.raises(KeyError, match="mine"):
        ALONE.together(lambda: {}["mine"])


def test_a_process_alone_shares_every_folder_and_makes_none(tmp_path):
    assert ALONE.share_folder(tmp_path / "new") and not (tmp_path / "new").exists()
    ALONE.leave()
