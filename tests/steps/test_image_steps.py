"""Images on their way to a model: the same pixels as samples are read with, and nothing larger than allowed."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hasten.errors import BadRequest, InvalidSetting, SignatureMismatch, TooLarge
from hasten.samples.preprocess import Preprocess, has_more_scans
from hasten.settings import build
from hasten.steps.center_crop import CenterCrop
from hasten.steps.decode_image import DecodeImage
from hasten.steps.from_preprocess import steps_of
from hasten.steps.normalise import Normalise
from hasten.steps.pipeline import open_pipeline
from hasten.steps.pixels import image_spec
from hasten.steps.resize import Resize
from hasten.steps.step import Around
from hasten.tensors import Array, Signature, TensorSpec

AROUND = Around(folder=Path())


def encoded(image: Image.Image, form: str = "PNG", **more: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, form, **more)
    return held.getvalue()


def noise(height: int, width: int, *, seed: int = 0, bands: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(values[:, :, 0] if bands == 1 else values)


def through(step: Any, pixels: Array) -> Array:
    """Give what a step on pixels makes of them."""
    spec = image_spec("image", *pixels.shape)
    return step.open(AROUND, {"image": spec}).apply({"image": pixels})["image"]


def held(data: bytes) -> Array:
    made = np.empty((), object)
    made[()] = data
    return made


FORMS = st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"])
MODES = st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "CMYK", "1"])


@st.composite
def preprocesses(draw: Any) -> Preprocess:
    color = draw(st.sampled_from(["rgb", "gray"]))
    resize = draw(st.none() | st.tuples(st.integers(8, 40), st.integers(8, 40)))
    crop = draw(st.none() | st.tuples(st.integers(1, 8), st.integers(1, 8)))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "float64", "uint8"]))
    values = {"color": color, "resize": resize, "crop": crop, "dtype": dtype, "scale": 1.0}
    values["layout"] = draw(st.sampled_from(["nchw", "nhwc"]))
    if dtype != "uint8":
        count = draw(st.sampled_from([0, 1, 1 if color == "gray" else 3]))
        values["scale"] = draw(st.sampled_from([1 / 255, 1.0, 2.0]))
        values["mean"] = [0.1 * (at + 1) for at in range(count)]
        values["std"] = [0.2 * (at + 1) for at in range(count)]
    return build(Preprocess, values)


@settings(max_examples=150, deadline=None)
@given(preprocesses(), FORMS, MODES, st.integers(8, 50), st.integers(8, 50), st.integers(0, 9))
def test_steps_written_from_a_preprocessing_give_the_very_same_numbers(
    preprocess: Preprocess, form: str, mode: str, height: int, width: int, seed: int
) -> None:
    image = noise(height, width, seed=seed).convert("RGB" if form in ("JPEG", "WEBP") and mode != "L" else mode)
    if form == "BMP" and image.mode in ("LA", "CMYK"):
        image = image.convert("RGB")
    if form == "PNG" and image.mode == "CMYK":
        image = image.convert("RGBA")
    data = encoded(image, form)
    wanted = preprocess.apply_image(data)
    open_axes = tuple(f"axis{at}" for at in range(3))
    shape = open_axes if preprocess.size is None else wanted.shape
    channels = preprocess.channels
    shape = (channels, *shape[1:]) if preprocess.layout == "nchw" else (*shape[:2], channels)
    model = Signature(
        (TensorSpec("x", preprocess.dtype, ("batch", *shape)),), (TensorSpec("y", "float32", ("batch", 2)),)
    )
    pipeline = open_pipeline({"pre": steps_of(preprocess, model_input="x")}, model, AROUND, where="it")
    assert pipeline is not None
    column = np.empty(1, object)
    column[0] = data
    got = pipeline.prepare({"image": column}, lambda: False, 1 << 30)["x"]
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got[0], wanted)


def test_a_photo_is_turned_as_its_exif_says_or_left_as_it_is_stored() -> None:
    stored = np.zeros((8, 4, 3), np.uint8)
    stored[0, 0] = 255
    for flag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = flag
        data = encoded(Image.fromarray(stored), "PNG", exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(DecodeImage().decode(data), upright)
        np.testing.assert_array_equal(DecodeImage(orientation="stored").decode(data), stored)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("junk", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" * 3])
def test_exif_that_cannot_be_read_turns_nothing(junk: bytes) -> None:
    data = encoded(noise(8, 4), "JPEG", exif=b"Exif\0\0" + junk)
    assert DecodeImage().decode(data).shape == (8, 4, 3)


def test_an_orientation_that_is_infinite_turns_nothing() -> None:
    infinite = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIf", 0x0112, 11, 1, np.inf) + bytes(4)
    assert DecodeImage().decode(encoded(noise(8, 4), "JPEG", exif=b"Exif\0\0" + infinite)).shape == (8, 4, 3)


def test_colours_of_sixteen_bits_are_refused_as_grays_are() -> None:
    with pytest.raises(BadRequest, match=r"RGB;16B; hasten reads those of 8 bits"):
        DecodeImage().decode(png(2, 2, bytes(2 * (1 + 2 * 6)), bits=16))


def test_two_images_of_different_sizes_are_read_side_by_side() -> None:
    model = Signature(
        tuple(TensorSpec(name, "uint8", ("batch", 8, 8, 3)) for name in "ab"),
        (TensorSpec("y", "float32", ("batch", 2)),),
    )
    steps = tuple({"step": "resize", "input": name, "height": 8, "width": 8} for name in "ab")
    pipeline = open_pipeline({"pre": steps}, model, AROUND, where="it")
    assert pipeline is not None
    a, b = np.zeros((1, 48, 64, 3), np.uint8), np.zeros((1, 20, 30, 3), np.uint8)
    pipeline.signature.check({"a": a, "b": b})
    got = pipeline.prepare({"a": a, "b": b}, lambda: False, 1 << 20)
    assert {array.shape for array in got.values()} == {(1, 8, 8, 3)}


def test_transparency_is_dropped_as_training_does_or_laid_on_a_colour() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert DecodeImage().decode(encoded(clear))[0, 0].tolist() == [10, 20, 30]
    blend = DecodeImage(alpha="blend", background=(1, 2, 3))
    assert blend.decode(encoded(clear))[0, 0].tolist() == [1, 2, 3]
    palette = clear.convert("P")
    assert blend.decode(encoded(palette, transparency=palette.getpixel((0, 0))))[0, 0].tolist() == [1, 2, 3]


def test_gray_and_colour_become_what_the_model_wants() -> None:
    gray = noise(5, 6, bands=1)
    three = DecodeImage().decode(encoded(gray))
    assert three.shape == (5, 6, 3)
    assert (three == np.asarray(gray)[:, :, None]).all()
    assert DecodeImage(color="gray").decode(encoded(noise(5, 6))).shape == (5, 6, 1)


def bomb(width: int, height: int) -> bytes:
    """Write a PNG of a few hundred bytes that claims to be huge."""
    return png(width, height, bytes(1000))


def png(width: int, height: int, data: bytes, *, bits: int = 8) -> bytes:
    """Write a PNG of colours with these bytes in its rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match=r"pixels|too large|no image"):
            DecodeImage().decode(bomb(*size))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def of_scans(scans: int, **more: Any) -> bytes:
    """Write a progressive JPEG whose last scan is there again and again, until it has as many as this."""
    data = encoded(noise(16, 16, bands=1), "JPEG", progressive=True, **more)
    body = data.removesuffix(END)
    at = body.rfind(SCAN)
    return body + body[at:] * (scans - body.count(SCAN)) + END


SCAN, END = b"\xff\xda", b"\xff\xd9"


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded() -> None:
    assert DecodeImage().decode(of_scans(100)).shape == (16, 16, 3)
    for data in (of_scans(101), of_scans(4000), of_scans(101, comment=b"\xff\xd9" * 9)):
        with pytest.raises(BadRequest, match="JPEG of more than 100 scans"):
            DecodeImage().decode(data)


def test_scans_of_a_preview_or_behind_the_image_do_not_count() -> None:
    preview = b"Exif\0\0" + of_scans(300)
    plain = encoded(noise(16, 16, bands=1), "JPEG", progressive=True, exif=preview, comment=SCAN * 300)
    assert preview in plain
    for data in (plain, plain + of_scans(300)):
        assert DecodeImage(orientation="stored").decode(data).shape == (16, 16, 3)


def test_a_jpeg_of_endless_segments_is_refused_quickly() -> None:
    start, rest = encoded(noise(8, 8), "JPEG")[:2], encoded(noise(8, 8), "JPEG")[2:]
    assert has_more_scans(start + b"\xff\xfe\0\2" * 20_000 + SCAN * 101 + rest, 100)


def test_colours_of_five_or_six_bits_are_read() -> None:
    for green, wanted in ((0x07E0, "565"), (0x03E0, "555")):
        red = 0xFFFF ^ green ^ 0x001F ^ (0x8000 if wanted == "555" else 0)
        head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0) + struct.pack("<III", red, green, 0x1F)
        data = b"BM" + struct.pack("<IHHI", 18 + len(head), 0, 0, 14 + len(head)) + head
        got = DecodeImage().decode(data + struct.pack("<HH", red, green))
        assert got.tolist() == [[[255, 0, 0], [0, 255, 0]]], wanted


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_chunks_that_break_the_decoder_are_a_bad_request() -> None:
    data, end = png(2, 2, bytes(2 * (1 + 2 * 3))), chunk(b"IEND", b"")
    assert data.endswith(end)
    for broken in (
        data.removesuffix(end) + chunk(b"iCCP", b"") + end,
        data[:33] + chunk(b"tEXt", b"transparency\0x") + data[33:],
    ):
        with pytest.raises(BadRequest, match="cannot be decoded"):
            DecodeImage(alpha="blend").decode(broken)


def test_an_image_whose_numbers_take_too_much_is_refused_before_it_is_decoded() -> None:
    model = Signature(
        (TensorSpec("x", "float32", ("batch", 3, "h", "w")),), (TensorSpec("y", "float32", ("batch", 2)),)
    )
    pre = ({"step": "decode-image"}, {"step": "normalise"}, {"step": "rename", "input": "image", "to": "x"})
    pipeline = open_pipeline({"pre": pre}, model, AROUND, where="it")
    assert pipeline is not None
    column = held(encoded(Image.new("RGB", (2000, 1000))))[None]
    row_bytes = 3 * 2000 * 1000 * 4
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="its first row takes more than"):
            pipeline.prepare({"image": column}, lambda: False, row_bytes - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert pipeline.prepare({"image": column}, lambda: False, row_bytes)["x"].nbytes == row_bytes


def test_an_image_that_becomes_small_may_be_large() -> None:
    model = Signature((TensorSpec("x", "float32", ("batch", 3, 8, 8)),), (TensorSpec("y", "float32", ("batch", 2)),))
    pre = ({"step": "decode-image"}, {"step": "resize", "height": 8, "width": 8}, {"step": "normalise", "output": "x"})
    pipeline = open_pipeline({"pre": pre}, model, AROUND, where="it")
    assert pipeline is not None
    column = held(encoded(Image.new("RGB", (2000, 1000))))[None]
    assert pipeline.prepare({"image": column}, lambda: False, 1000)["x"].shape == (1, 3, 8, 8)


def test_an_image_over_the_deployments_own_limit_is_refused() -> None:
    with pytest.raises(BadRequest, match="30 x 20 pixels; over 599 are refused"):
        DecodeImage(max_pixels=599).decode(encoded(noise(20, 30)))
    assert DecodeImage(max_pixels=600).decode(encoded(noise(20, 30))).shape == (20, 30, 3)


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 300])
def test_a_damaged_file_is_a_bad_request(cut: int) -> None:
    with pytest.raises(BadRequest, match="image"):
        DecodeImage().decode(encoded(noise(40, 40), "JPEG")[:cut])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_no_bytes_raise_anything_but_a_bad_request(junk: bytes, at: int, form: str) -> None:
    data = encoded(noise(10, 10), form)
    at = min(at, len(data))
    with contextlib.suppress(BadRequest):
        DecodeImage().decode(data[:at] + junk + data[at + len(junk) :])


@pytest.mark.parametrize(("height", "width"), [(40, 30), (30, 40), (25, 25), (100, 7)])
def test_the_shorter_side_becomes_the_size_and_the_shape_stays(height: int, width: int) -> None:
    got = through(Resize(mode="shorter", size=16), np.asarray(noise(height, width)))
    longer = int(16 * max(height, width) / min(height, width))
    assert got.shape[:2] == ((longer, 16) if height > width else (16, longer))


def test_padding_keeps_the_shape_in_the_middle_of_a_colour() -> None:
    got = through(Resize(mode="pad", height=20, width=20, fill=9), np.full((10, 20, 3), 200, np.uint8))
    assert got.shape == (20, 20, 3)
    assert (got[:5] == 9).all()
    assert (got[5:15] == 200).all()
    assert (got[15:] == 9).all()


def test_without_antialiasing_a_thin_line_is_lost_and_with_it_is_not() -> None:
    lines = np.zeros((64, 64, 1), np.uint8)
    lines[::16] = 255
    smooth = through(Resize(height=8, width=8), lines)
    sharp = through(Resize(height=8, width=8, antialias=False), lines)
    assert smooth.max() > 0
    assert sharp.max() == 0


def test_a_longer_side_that_would_be_endless_is_refused() -> None:
    with pytest.raises(BadRequest, match="more than 50,000,000 pixels"):
        through(Resize(mode="shorter", size=4096), np.zeros((1, 5000, 3), np.uint8))


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"height": 3}, "width is needed"),
        ({"mode": "shorter", "height": 3}, "height has no meaning"),
        ({"mode": "shorter"}, "size is needed"),
        ({"height": 3, "width": 3, "antialias": False, "filter": "lanczos"}, "antialias"),
        ({"height": 0, "width": 3}, "height"),
    ],
)
def test_sizes_that_make_no_sense_are_told(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting, match=says):
        build(Resize, settings_)


def test_the_centre_is_cut_out_and_a_smaller_image_is_refused() -> None:
    pixels = np.arange(7 * 6 * 3, dtype=np.uint8).reshape(7, 6, 3)
    step = CenterCrop(height=4, width=3)
    np.testing.assert_array_equal(through(step, pixels), pixels[1:5, 1:4])
    spec = image_spec("image")
    with pytest.raises(BadRequest, match=r"3 x 6 .* cannot be cropped to 4 x 3"):
        step.open(AROUND, {"image": spec}).apply({"image": pixels[:3]})
    with pytest.raises(SignatureMismatch, match="cuts out 4 x 3"):
        step.gives({"image": image_spec("image", 3, 6)})


def test_the_wrong_number_of_means_is_told() -> None:
    with pytest.raises(InvalidSetting, match="one value, or three"):
        Normalise(mean=(0.1, 0.2))
    with pytest.raises(SignatureMismatch, match="3 means or deviations for 1 channel"):
        Normalise(mean=(0.1, 0.2, 0.3)).gives({"image": image_spec("image", channels=1)})
