"""Images are checked, turned upright, and measured."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.data.pictures import ORIENTATION, decode, encode, noise, picture, sixteen_bit, turned
from upreid_ray.data.shards.images import (
    ImageRules,
    RefusedImageError,
    check,
    measure,
    usable_image,
)


def usable(encoded: bytes, *, max_height: int | None = None) -> Image.Image:
    """Return what is kept of an image, decoded."""
    return decode(usable_image(encoded, max_height=max_height).encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_usable_jpeg_and_png_are_kept_byte_for_byte(mode, kind):
    encoded = encode(picture(mode), kind)

    assert usable_image(encoded, max_height=16).encoded == encoded


@pytest.mark.parametrize(
    "encoded",
    [
        encode(picture("CMYK"), "JPEG"),
        sixteen_bit(),
        encode(picture("P"), "PNG"),
        encode(picture("RGBA"), "PNG"),
        encode(picture("LA"), "PNG"),
        encode(picture(), "BMP"),
        encode(picture(), "WEBP"),
        encode(picture("P"), "GIF"),
        turned(),
    ],
    ids=["cmyk", "16 bit", "palette", "rgba", "la", "bmp", "webp", "gif", "turned"],
)
def test_other_images_become_rgb_jpeg(encoded):
    image = usable(encoded)

    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (8, 16))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_re_encoded_image_looks_the_same(mode):
    encoded = encode(picture(mode, (16, 32)), "PNG")

    image = usable(encoded)

    np.testing.assert_allclose(image, decode(encoded).convert("RGB"), atol=3)


def test_sixteen_bits_are_scaled_to_eight():
    image = usable(sixteen_bit())

    np.testing.assert_allclose(image, np.full((16, 8, 3), 0x80), atol=2)


@pytest.mark.parametrize(
    ("levels", "kind", "expected"),
    [
        (np.full((16, 8), 2048, np.uint16), "PNG", 128),  # 12 bits
        (np.full((16, 8), 512, np.uint16), "TIFF", 128),  # 10 bits
        (np.full((16, 8), 8192, np.uint16), "PNG", 128),  # 14 bits
        (np.full((16, 8), 200, np.uint16), "PNG", 200),
        (np.full((16, 8), 200, np.int32), "TIFF", 200),
        (np.full((16, 8), 40_000, np.int32), "TIFF", 156),
        (np.full((16, 8), 2**30, np.int32), "TIFF", 64),
        (np.full((16, 8), 0.5, np.float32), "TIFF", 128),
        (np.full((16, 8), 150.2, np.float32), "TIFF", 150),
    ],
)
def test_deep_images_are_scaled_by_the_range_that_they_use(levels, kind, expected):
    encoded = encode(Image.fromarray(levels), kind)

    picture = usable_image(encoded, max_height=None).picture

    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("level", [-1.0, 1.5, 100.0, 300.0, np.nan, np.inf, np.int32(-5)])
def test_a_deep_image_of_an_unknown_range_is_refused(level):
    levels = np.full((16, 8), level, None if isinstance(level, np.int32) else np.float32)

    with pytest.raises(RefusedImageError, match=r"^its levels reach from \S+ to \S+$") as error:
        usable_image(encode(Image.fromarray(levels), "TIFF"), max_height=None)

    assert error.value.kind == "range"


def png_of_16_bits(level: int) -> bytes:
    """Return a colour PNG of 16 bits a channel, which Pillow does not write."""
    rows = (b"\0" + level.to_bytes(2, "big") * 3 * 8) * 16
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 8, 16, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = [
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of_16_bits(level: int) -> bytes:
    """Return a colour TIFF of 16 bits a channel, which Pillow does not write."""
    tags = {256: 8, 257: 16, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 16, 279: 768}
    entries = [
        struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value)
        for tag, value in tags.items()
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return head + struct.pack("<HHH", 16, 16, 16) + level.to_bytes(2, "little") * 3 * 128


@pytest.mark.parametrize("make", [png_of_16_bits, tiff_of_16_bits])
def test_a_colour_image_that_does_not_use_its_16_bits_is_refused(make):
    usable = usable_image(make(0x8000), max_height=None)

    assert np.abs(np.asarray(usable.picture).astype(int) - 128).max() <= 1
    with pytest.raises(RefusedImageError, match="too dark to use its 16 bits") as error:
        usable_image(make(4000), max_height=None)
    assert error.value.kind == "range"


def test_a_turned_image_is_upright_afterwards():
    pixels = np.asarray(usable(turned()).convert("L"))

    top, bottom = pixels[:6].mean(), pixels[-6:].mean()
    assert (round(top, -1), round(bottom, -1)) == (40, 200)


def test_the_orientation_of_a_turned_image_is_gone_afterwards():
    image = usable(turned())

    assert image.getexif().get(ORIENTATION, 1) == 1


def test_a_high_image_is_shrunk_and_keeps_its_ratio():
    encoded = encode(picture(size=(30, 90)), "PNG")

    assert usable(encoded, max_height=60).size == (20, 60)


def test_a_turned_image_is_measured_upright():
    assert usable(turned(), max_height=12).size == (6, 12)


def test_a_thin_image_keeps_one_column_when_it_is_shrunk():
    encoded = encode(picture(size=(2, 900)), "PNG")

    assert usable(encoded, max_height=60).size == (1, 60)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "the file is empty"),
        (noise()[:600], "does not decode: "),
        (noise()[:2], "does not decode: "),
        (encode(picture(size=(64, 64)), "PNG")[:-40], "does not decode: "),
        (b"<html>\n<body>Not Found</body>\n</html>", "does not decode: "),
        (
            encode(picture("P"), "GIF", save_all=True, append_images=[picture("P", left=90)]),
            "has 2 frames",
        ),
    ],
    ids=["empty", "truncated jpeg", "start of a jpeg", "truncated png", "text", "animated"],
)
def test_what_is_no_whole_image_is_refused_in_one_line(encoded, reason):
    with pytest.raises(RefusedImageError, match=rf"^{reason}[^\n]*$"):
        usable_image(encoded, max_height=None)


def test_the_reason_of_a_refusal_is_the_same_each_time():
    with pytest.raises(RefusedImageError) as refusal:
        usable_image(b"<html>", max_height=None)

    assert "0x" not in str(refusal.value)  # no address in memory


@pytest.mark.parametrize("limit", [100, 60], ids=["warned about", "refused by Pillow"])
def test_a_decompression_bomb_is_refused_in_one_line(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with pytest.raises(RefusedImageError, match=r"^does not decode: [^\n]+bomb[^\n]*$"):
        usable_image(encode(picture(), "PNG"), max_height=None)


def test_the_first_picture_of_a_camera_s_pair_is_taken():
    pair = encode(picture(), "MPO", save_all=True, append_images=[picture(left=250)])

    kept = usable_image(pair, max_height=None)

    assert decode(kept.encoded).format == "JPEG"
    assert np.asarray(kept.picture)[:, :3].mean() == pytest.approx(40, abs=3)


def test_the_picture_that_is_measured_is_the_one_that_is_kept():
    kept = usable_image(encode(picture("P"), "PNG"), max_height=8)

    assert kept.picture.size == decode(kept.encoded).size == (4, 8)


def test_formats_that_are_no_photographs_are_not_tried():
    with pytest.raises(RefusedImageError, match=r"^does not decode"):
        usable_image(encode(picture("L"), "PPM"), max_height=None)


def test_the_colours_of_a_picture_are_means_of_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 3), np.uint8)

    measures = measure(Image.fromarray(pixels))

    scaled = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(measures.mean, scaled.mean(0))
    np.testing.assert_allclose(measures.mean_square, (scaled**2).mean(0))


def test_blur_takes_sharpness_away():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8)
    sharp = Image.fromarray(pixels)

    values = [
        measure(sharp.filter(ImageFilter.GaussianBlur(radius))).sharpness
        for radius in (0, 1, 3)
    ]

    assert values[0] > 2 * values[1] > 4 * values[2]


def test_sharpness_of_a_known_picture_is_the_variance_of_its_laplacian():
    levels = np.zeros((128, 64), np.uint8)
    levels[64, 32] = 10

    measured = measure(Image.fromarray(levels).convert("RGB")).sharpness

    # One pixel of -40 and four of 10 among 126 x 62.
    expected = (40**2 + 4 * 10**2) / (126 * 62)
    assert measured == pytest.approx(expected)


def test_equal_pixels_have_equal_digests_and_others_have_not():
    image = picture("RGB")
    reshaped = Image.frombytes("RGB", (16, 8), image.tobytes())

    digests = [measure(each).digest for each in (image, image.copy(), reshaped)]

    assert (digests[0] == digests[1], digests[0] == digests[2]) == (True, False)


def test_fingerprints_of_an_image_survive_shrinking_and_compression():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8))
    image = coarse.resize((128, 256), Image.Resampling.BICUBIC)
    again = decode(encode(image.resize((64, 128)), "JPEG", quality=60))
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    prints = [measure(each).fingerprint for each in (image, again, other)]

    distances = [((prints[0] ^ each) & (2**64 - 1)).bit_count() for each in prints[1:]]
    assert (distances[0] <= 2, distances[1] > 16) == (True, True), distances


@pytest.mark.parametrize(
    ("rules", "size", "kind"),
    [
        (ImageRules(min_width=9), (8, 16), "small"),
        (ImageRules(min_height=17), (8, 16), "small"),
        (ImageRules(min_aspect=2.1), (8, 16), "shape"),
        (ImageRules(max_aspect=1.9), (8, 16), "shape"),
        (ImageRules(min_sharpness=1e6), (8, 16), "blurred"),
    ],
)
def test_images_outside_of_the_bounds_are_refused_with_their_kind(rules, size, kind):
    with pytest.raises(RefusedImageError, match=r"^(is|has)") as refusal:
        check(measure(picture("RGB", size)), rules)

    assert refusal.value.kind == kind


def test_images_on_the_bounds_are_kept():
    bounds = ImageRules(min_width=8, min_height=16, min_aspect=2, max_aspect=2)

    check(measure(picture("RGB")), bounds)
