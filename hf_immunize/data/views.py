"""Images made of the benign ones, on which the model shall stay what it was too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.data.sources import choose, load_image_dataset
from hf_immunize.errors import DataError


# A benign image gives so many; more of them are more of the same.
_PER_IMAGE, _MOST = 6, 4000
_LARGEST = 256


class Views(torch.utils.data.Dataset[dict[str, Any]]):
    """Crops (half of them), blends of two crops (a quarter) and collages of four (a quarter) of a set's images.

    To distil on: a few hundred benign images hold a network near itself on those alone, views of them on what is like
    them. A view depends on its number and the seed alone, so that a cached trunk may keep it.

    Args:
        dataset: Images, as `ImmunizationTrainer` takes them.
        count: How many; by default six for each image, 4,000 at most.
        image_column: Where it cannot be found without help.
        seed: Of the draws.

    Raises:
        DataError: If the set holds pixel values in place of images.

    Example:
        >>> images = [{"image": Image.new("RGB", (40, 30), (index, 0, 0)), "label": 0} for index in range(3)]
        >>> views = Views(images)
        >>> len(views), views[0]["image"].size, views[5]["image"].tobytes() == Views(images)[5]["image"].tobytes()
        (18, (30, 30), True)
    """

    def __init__(
        self, dataset: Any, count: int | None = None, *, image_column: str | None = None, seed: int = 0
    ) -> None:
        rows = dataset
        if not isinstance(dataset, ImageRows):
            column, _ = find_columns(dataset, image_column, need_label=False)
            rows = ImageRows(dataset, "the images to make views of", column)
        first = rows[0].get("image")
        if first is None:
            raise DataError("Expected images to make views of, found pixel values. Give other images to distil on.")
        self._rows, self._seed = rows, seed
        self._count = min(_PER_IMAGE * len(rows), _MOST) if count is None else count
        self._side = min(*first.size, _LARGEST)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        draw, side = np.random.default_rng((self._seed, index)), self._side
        kind = draw.random()
        if kind < 0.5:
            return {"image": self._crop(draw, side, side)}
        if kind < 0.75:
            pair = self._crop(draw, side, side), self._crop(draw, side, side)
            return {"image": Image.blend(*pair, draw.uniform(0.3, 0.7))}
        x, y = (int(draw.integers(side // 3, side - side // 3 + 1)) for _ in range(2))
        collage = Image.new("RGB", (side, side))
        for left, top, right, bottom in ((0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)):
            collage.paste(self._crop(draw, right - left, bottom - top), (left, top))
        return {"image": collage}

    def _crop(self, draw: np.random.Generator, width: int, height: int) -> Image.Image:
        """A part of an image, a fifth of its area at least, of nearly the proportions asked for; half are mirrored."""
        image = self._rows[int(draw.integers(len(self._rows)))]["image"]
        area = draw.uniform(0.2, 1.0) * image.width * image.height
        ratio = math.exp(draw.uniform(math.log(0.75), math.log(4 / 3))) * width / height
        w, h = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
        left, top = draw.uniform(0, image.width - w), draw.uniform(0, image.height - h)
        part = image.resize((max(width, 1), max(height, 1)), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def to_distil_on(
    source: str | None,
    benign: Any,
    *,
    distils: bool = True,
    image_column: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Any:
    """The images that a user names: "none", others, or "views" of the benign ones, where a loss that distils asks."""
    source = source or ("views" if distils else "none")
    if source == "none":
        return None
    if source != "views":
        others = load_image_dataset(source)
        return others if limit is None else others.select(choose(len(others), limit, seed))
    try:
        return Views(benign, limit, image_column=image_column, seed=seed)
    except DataError:  # of pixel values
        return None
