import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hasten.errors import Unsupported  # noqa: E402
from hasten.torchview.augment import channels_first, mirror_shift  # noqa: E402


def drawn(image, seed=0, name="x"):
    return mirror_shift({name: image}, torch.Generator().manual_seed(seed))[name]


def moves(image):
    """Give every image [c, h, w] that a shift by up to an eighth and a mirror can make, the edge repeated."""
    _, h, w = image.shape
    found = []
    for dy in range(-(h // 8), h // 8 + 1):
        for dx in range(-(w // 8), w // 8 + 1):
            rows = (torch.arange(h) + dy).clamp(0, h - 1)
            columns = (torch.arange(w) + dx).clamp(0, w - 1)
            moved = image[:, rows][:, :, columns]
            found += [moved, moved.flip(2)]
    return found


@settings(max_examples=15, deadline=None)
@given(h=st.integers(8, 20), w=st.integers(8, 20), seed=st.integers(0, 99), last=st.booleans())
def test_each_image_is_shifted_and_mirrored_whole(h, w, seed, last):
    images = torch.rand(4, 3, h, w, generator=torch.Generator().manual_seed(seed))
    made = drawn(images.permute(0, 2, 3, 1), seed).permute(0, 3, 1, 2) if last else drawn(images, seed)
    for image, moved in zip(images, made, strict=True):
        assert any(torch.equal(moved, other) for other in moves(image))


def test_every_shift_and_both_mirrors_occur():
    image = torch.rand(1, 1, 16, 16)
    made = drawn(image.expand(2000, 1, 16, 16).contiguous())
    assert all(any(torch.equal(moved, other) for moved in made) for other in moves(image[0]))


def test_half_of_the_images_are_mirrored():
    image = torch.arange(4.0).expand(1000, 3, 4, 4).contiguous()  # too small to be shifted
    mirrored = (drawn(image)[:, 0, 0, 0] == 3).float().mean()
    assert 0.45 < float(mirrored) < 0.55


def test_images_of_one_sample_move_together_and_other_inputs_stay():
    images, other = torch.rand(8, 3, 16, 16), torch.rand(8, 5)
    made = mirror_shift({"a": images, "b": 2 * images, "c": other}, torch.Generator().manual_seed(0))
    assert torch.equal(made["b"], 2 * made["a"])
    assert torch.equal(made["c"], other)


def test_the_generator_alone_decides():
    images = torch.rand(8, 3, 16, 16)
    assert torch.equal(drawn(images, 1), drawn(images, 1))
    assert not torch.equal(drawn(images, 1), drawn(images, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_the_dtype_is_kept(dtype):
    assert drawn((torch.rand(2, 3, 16, 16) * 255).to(dtype)).dtype is dtype


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((2, 3, 32, 32), True),
        ((2, 32, 32, 3), False),
        ((2, 64, 8, 8), True),
        ((2, 8, 8, 64), False),
        ((2, 3, 48, 64), True),
        ((2, 48, 64, 3), False),
        ((2, 1, 1, 1), True),
    ],
)
def test_channels_are_told_from_sides(shape, first):
    assert channels_first(shape) is first


def test_what_is_no_image_is_refused():
    with pytest.raises(Unsupported, match=r"it takes images .* and the inputs are 'x' \[2, 16\]"):
        drawn(torch.rand(2, 16))
