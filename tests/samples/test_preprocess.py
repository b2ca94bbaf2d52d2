import io

import numpy as np
import pytest
from PIL import Image

from hasten.errors import BadInput, InvalidSetting
from hasten.samples.preprocess import MAX_PIXELS, Preprocess, preprocess_for
from hasten.tensors import TensorSpec


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def test_pixels_are_scaled_and_laid_out_channels_first() -> None:
    made = Preprocess().apply_image(png(gradient(4, 5)))
    assert made.shape == (3, 4, 5)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, gradient(4, 5).transpose(2, 0, 1) / 255, rtol=1e-6)


def test_mean_and_deviation_apply_per_channel_in_either_layout() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    first = Preprocess(mean=mean, std=std).apply_image(png(gradient(4, 5)))
    last = Preprocess(mean=mean, std=std, layout="nhwc").apply_image(png(gradient(4, 5)))
    expected = (gradient(4, 5) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(first, last.transpose(2, 0, 1))


def test_a_resize_comes_before_the_centre_crop() -> None:
    made = Preprocess(resize=(8, 8), crop=(4, 6), color="gray", scale=1.0, dtype="uint8").apply_image(
        png(np.full((16, 12, 3), 7, np.uint8))
    )
    assert made.shape == (1, 4, 6)
    assert (made == 7).all()


def test_the_crop_is_the_centre() -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[2:4, 2:4] = 200
    assert (Preprocess(crop=(2, 2), scale=1.0).apply_image(png(pixels)) == 200).all()


def test_values_survive_being_kept_with_an_artifact() -> None:
    declared = Preprocess(resize=(8, 9), mean=(0.5,), std=(0.2, 0.3, 0.4), layout="nhwc", dtype="float16")
    assert Preprocess.of(declared.values) == declared


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    with pytest.raises(BadInput, match="pixels"):
        Preprocess().apply_image(file.getvalue())


def test_a_decompression_bomb_is_one_clear_error() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(BadInput, match="too large"):
        Preprocess().apply_image(file.getvalue())


@pytest.mark.parametrize("damage", [lambda data: b"not an image", lambda data: data[: len(data) // 2]])
def test_a_damaged_image_is_one_clear_error(damage) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with pytest.raises(BadInput, match="image"):
        Preprocess().apply_image(damage(png(noise)))


def test_sixteen_bit_pixels_are_refused_not_clipped() -> None:
    with pytest.raises(BadInput, match="8 bits"):
        Preprocess().apply_image(png(np.full((4, 4), 40_000, np.uint16)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"std": (0.0,)}, "std"),
        ({"mean": (0.1, 0.2)}, "mean"),
        ({"resize": (0, 4)}, "resize"),
        ({"dtype": "uint8"}, "uint8"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, word) -> None:
    with pytest.raises(InvalidSetting, match=word):
        Preprocess(**settings)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        (("n", 3, 8, 9), "float32", Preprocess(resize=(8, 9))),
        (("n", 8, 9, 1), "float16", Preprocess(resize=(8, 9), color="gray", layout="nhwc", dtype="float16")),
        (("n", 3, "h", "w"), "uint8", Preprocess(scale=1.0, dtype="uint8")),
    ],
)
def test_an_input_says_how_images_fit_it(shape, dtype, expected) -> None:
    assert preprocess_for(TensorSpec("x", dtype, shape)) == expected


def test_what_was_declared_is_kept_and_only_its_size_filled_in() -> None:
    declared = Preprocess(mean=(0.5,), scale=1.0)
    spec = TensorSpec("x", "float32", ("n", 3, 8, 9))
    assert preprocess_for(spec, declared) == Preprocess(mean=(0.5,), scale=1.0, resize=(8, 9))
    assert preprocess_for(spec, Preprocess(crop=(4, 4))) == Preprocess(crop=(4, 4))


def test_images_for_an_input_that_takes_none_are_refused() -> None:
    with pytest.raises(BadInput, match="declare"):
        preprocess_for(TensorSpec("x", "float32", ("n", 10)))
