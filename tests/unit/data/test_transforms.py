"""Transforms of batches of images."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from flame.data.transforms import (
    BatchTransform,
    Compose,
    Normalize,
    OnField,
    RandomCrop,
    RandomHorizontalFlip,
    ToFloat,
)


def pixels(number: int = 5, channels: int = 2, height: int = 4, width: int = 6) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(1, 256, size=(number, channels, height, width), dtype=np.uint8)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    images = pixels(64)
    cropped = RandomCrop((4, 5), padding=(1, 2), fill=7)(images, random())
    assert cropped.shape == (64, 2, 4, 5)
    assert cropped.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (1, 1)), constant_values=7)
    places = set()
    for image, window in zip(padded, cropped, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(4)
            if (image[:, top : top + 4, left : left + 5] == window).all()
        ]
        assert found
        places.add(found[0])
    assert len(places) > 10


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric"])
def test_a_crop_pads_in_other_modes(mode: Any) -> None:
    images = pixels(1)
    cropped = RandomCrop((8, 10), padding=2, padding_mode=mode)(images, random())
    expected = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode=mode)
    np.testing.assert_array_equal(cropped, expected)


def test_a_crop_takes_sides_apart() -> None:
    images = pixels(1)
    cropped = RandomCrop((4 + 2 + 4, 6 + 1 + 3), padding=(1, 2, 3, 4))(images, random())
    np.testing.assert_array_equal(cropped[:, :, 2:6, 1:7], images)


def test_a_crop_of_the_whole_changes_nothing() -> None:
    images = pixels()
    np.testing.assert_array_equal(RandomCrop((4, 6))(images, random()), images)


def test_flips_mirror_some_images() -> None:
    images = pixels(200)
    before = images.copy()
    flipped = RandomHorizontalFlip(0.25)(images, random())
    mirrored = (flipped == images[..., ::-1]).all(axis=(1, 2, 3))
    same = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 25 < mirrored.sum() < 75
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(RandomHorizontalFlip(0.0)(images, random()), images)
    np.testing.assert_array_equal(RandomHorizontalFlip(1.0)(images, random()), images[..., ::-1])


def test_floats_lie_between_zero_and_one() -> None:
    images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    changed = ToFloat()(images)
    assert changed.dtype == np.float32
    np.testing.assert_allclose(changed.ravel(), [0.0, 0.2, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(ToFloat()(np.full((1, 1, 1, 1), 3.5)), 3.5)


def test_normalization_is_per_channel() -> None:
    images = pixels().astype(np.float32)
    changed = Normalize((100, 50), (10, 20))(images)
    assert changed.dtype == np.float32
    expected = (images - np.array([100, 50]).reshape(2, 1, 1)) / np.array([10, 20]).reshape(2, 1, 1)
    np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Normalize(100, 10)(images), (images - 100) / 10, atol=1e-5)


def test_tensors_stay_tensors_and_are_not_changed() -> None:
    images = flame.tensor(pixels())
    chain = Compose(
        [RandomCrop(4, padding=1), RandomHorizontalFlip(), ToFloat(), Normalize(0.5, 2)]
    )
    changed = chain(images, random())
    assert isinstance(changed, flame.Tensor)
    assert tuple(changed.shape) == (5, 2, 4, 4)
    np.testing.assert_array_equal(images.numpy(), pixels())
    np.testing.assert_array_equal(changed.numpy(), chain(pixels(), random()))


def test_the_generator_decides() -> None:
    chain = Compose([RandomCrop(3, padding=1), RandomHorizontalFlip()])
    a, b, c = (chain(pixels(), random(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_an_empty_batch_stays_empty() -> None:
    chain = Compose(
        [RandomCrop(4, padding=1), RandomHorizontalFlip(), ToFloat(), Normalize(0.5, 1)]
    )
    assert chain(pixels(0), random()).shape == (0, 2, 4, 4)


def test_one_field_of_a_batch_is_changed() -> None:
    images, labels = pixels(), np.arange(5)
    pair = OnField(ToFloat())((images, labels), random())
    assert isinstance(pair, tuple)
    assert pair[0].dtype == np.float32
    assert pair[1] is labels
    mapping = OnField(ToFloat(), "image")({"image": images, "label": labels}, random())
    assert mapping["image"].dtype == np.float32
    assert mapping["label"] is labels
    assert isinstance(OnField(ToFloat(), 1)([labels, images], random()), list)
    named = namedtuple("named", ["image", "label"])
    assert OnField(ToFloat())(named(images, labels), random()).image.dtype == np.float32
    with pytest.raises(DTypeError, match="tuple, list or dict"):
        OnField(ToFloat())(images, random())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RandomCrop(0), ArgumentError, "size must"),
        (lambda: RandomCrop(2, padding=-1), ArgumentError, "padding must"),
        (lambda: RandomCrop(2, padding=(1, 2, 3)), ArgumentError, "padding must"),
        (lambda: RandomCrop(2, padding_mode="wrap"), ArgumentError, "padding_mode"),  # type: ignore[arg-type]
        (lambda: RandomHorizontalFlip(1.5), ArgumentError, "p must"),
        (lambda: Normalize(0, 0), ArgumentError, "std above 0"),
        (lambda: RandomCrop(9, padding=1)(pixels(), random()), ShapeError, "4 by 6 with padding"),
        (lambda: RandomCrop(2)(pixels()), ArgumentError, "needs a generator"),
        (lambda: RandomHorizontalFlip()(pixels()[0], random()), ShapeError, r"\(N, C, H, W\)"),
        (lambda: ToFloat()([1, 2]), DTypeError, "got list"),
        (lambda: Normalize(0, 1)(pixels()), DTypeError, "put ToFloat before"),
        (lambda: Normalize((1, 2, 3), 1)(pixels().astype(float)), ShapeError, "mean has 3 values"),
        (lambda: BatchTransform()(pixels()), UnsupportedError, "defines _apply"),
    ],
)
def test_misuse_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_transforms_show_their_options() -> None:
    assert repr(RandomHorizontalFlip(0.25)) == "RandomHorizontalFlip(p=0.25)"
    assert (
        repr(OnField(Compose([ToFloat()]))) == "OnField(Compose(transforms=[ToFloat()]), field=0)"
    )
