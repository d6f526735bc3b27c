"""Views of benign images: the same each time, of one size, of nothing but what the images hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_immunize.data.views import Views, to_distil_on
from hf_immunize.errors import DataError


def plain_images(sizes=((40, 30), (31, 50), (64, 64)), mode="RGB"):
    return [{"image": Image.new(mode, size, 40 * (i + 1)), "label": 0} for i, size in enumerate(sizes)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_view_is_its_number_and_the_seed_and_has_no_colour_of_its_own(mode):
    images, other = plain_images(mode=mode), Views(plain_images(mode=mode), seed=1)
    views = [np.asarray(view["image"]) for view in Views(images)]
    again = Views(images)
    assert {view.shape for view in views} == {(30, 30, 3)} and len(views) == len(again) == 18
    assert all((view == np.asarray(again[i]["image"])).all() for i, view in reversed(list(enumerate(views))))
    assert any((view != np.asarray(other[i]["image"])).any() for i, view in enumerate(views))
    low, high = (bound(np.asarray(row["image"].convert("RGB")).max() for row in images) for bound in (min, max))
    assert all((view.max(axis=(0, 1)) <= high).all() for view in views)
    colours = [len(np.unique(view.reshape(-1, 3), axis=0)) for view in views]
    assert min(colours) == 1 and max(colours) > 1 and low < high  # crops of one image, and collages


@pytest.mark.parametrize(("source", "distils", "count"), [(None, True, 18), (None, False, 0), ("views", False, 18)])
def test_views_are_what_a_loss_that_distils_takes_by_default(source, distils, count):
    found = to_distil_on(source, plain_images(), distils=distils)
    assert (0 if found is None else len(found)) == count
    assert len(to_distil_on("views", plain_images(), limit=5)) == 5


def test_pixel_values_have_no_views():
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}] * 3
    assert to_distil_on(None, rows) is None
    with pytest.raises(DataError, match="pixel values"):
        Views(rows)
