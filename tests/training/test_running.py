import pytest
import torch

from hf_immunize.errors import NonFiniteError
from hf_immunize.training.evaluation import RunningMeans


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_term_whose_check_is_deferred_is_named_when_the_means_are_taken(value):
    means = RunningMeans(deferred=True)
    means.update({"r_well": torch.tensor(1.0), "r_ill": torch.tensor(float(value))}, step=3)
    means.update({"r_well": torch.tensor(1.0), "r_ill": torch.tensor(2.0)}, step=4)
    with pytest.raises(NonFiniteError, match=r"finite r_ill at step 4, found .*samples that are all alike"):
        means.take(step=4)


def test_values_on_a_device_are_not_looked_at_when_they_are_added():
    means = RunningMeans()
    for step in (1, 2):
        means.update({"r_ill": torch.tensor(0.0, device="meta")}, step)  # a look at it would raise


@pytest.mark.parametrize("deferred", [True, False])
def test_the_side_whose_features_are_not_finite_is_named(deferred):
    means = RunningMeans(deferred=deferred)
    finite = {"benign": torch.tensor(True), "harmful": torch.tensor(False)}
    with pytest.raises(NonFiniteError, match="features of the harmful images"):
        means.update({"r_ill": torch.tensor(float("nan"))}, 3, finite)
        means.take(step=4)
