import torch

from hf_immunize.linear.optimum import advice, rir_ceiling


def words(P, H):
    text = advice(rir_ceiling(P, H))
    assert text.endswith(".") and "\n" not in text
    return text


def test_one_sentence_for_every_kind_of_pair():
    X = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert "No linear map" in words(X, X)
    assert "almost the same" in words(X, torch.diag(torch.tensor([3.0, 2.2, 1.0])))
    assert "only weakly" in words(X, torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    assert "can immunize here" in words(X, torch.diag(torch.tensor([1.0, 2.0, 9.0])))
    P = torch.randn(9, 4)
    P[:, 3] = 0
    assert "without limit" in words(P, torch.randn(9, 4)) and "on the directions that both use" in words(
        P, torch.randn(9, 4)
    )
    assert "share no direction" in words(torch.eye(4)[[0, 1, 0, 1]], torch.eye(4)[[2, 3]])
    assert "add benign data" in words(torch.randn(3, 8), torch.randn(20, 8))
