"""Image loading: every mode and orientation as documented, and an error for every broken file."""

import contextlib
import pickle
import random
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.data.image import (
    BadImageError,
    View,
    cover,
    crop_box,
    from_array,
    from_tensor,
    image_size,
    load_image,
    load_labels,
    to_array,
    to_rgb,
)

# An image whose four corners and proportions differ, so that no two orientations look alike.
COLORS = np.zeros((4, 6, 3), np.uint8)
COLORS[0, 0], COLORS[0, -1], COLORS[-1, 0], COLORS[-1, -1] = (250, 10, 20), (20, 200, 30), (40, 50, 220), (230, 220, 60)
COLORS[1:3, 1:5] = (120, 130, 140)
GREY = COLORS.astype(np.float64).mean(-1).round().astype(np.uint8)
ALPHA = np.full((4, 6), 255, np.uint8)
ALPHA[0, 0], ALPHA[1, 1] = 0, 128

# What a viewer does for each EXIF orientation; `stored` does the opposite.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def over_white(rgb, alpha):
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


def rgb_of(grey):
    return np.repeat(grey[..., None], 3, -1)


def palette(image):
    return image.quantize(16)


RGB = Image.fromarray(COLORS)
L = Image.fromarray(GREY)
A = Image.fromarray(ALPHA)
WIDE = GREY.astype(np.uint16) * 257
# mode -> (what is stored, what must come out, file type, tolerance in levels)
MODES = {
    "1": (Image.fromarray(GREY > 100), rgb_of((GREY > 100) * 255), "png", 0),
    "L": (L, rgb_of(GREY), "tif", 0),
    "P": (palette(RGB), COLORS, "png", 0),
    "RGB": (RGB, COLORS, "png", 0),
    "CMYK": (RGB.convert("CMYK"), COLORS, "tif", 1),
    "YCbCr": (RGB.convert("YCbCr"), COLORS, "tif", 3),
    "LAB": (RGB, COLORS, "tif", 12),  # converted below; 8-bit LAB is coarse
    "I;16": (Image.fromarray(WIDE), rgb_of(GREY), "png", 0),
    "I": (Image.fromarray(WIDE.astype(np.int32)), rgb_of(GREY), "tif", 0),
    "F": (Image.fromarray(GREY.astype(np.float32) / 255), rgb_of(GREY), "tif", 0),
    "RGBA": (Image.merge("RGBA", [*RGB.split(), A]), over_white(COLORS, ALPHA), "png", 1),
    "LA": (Image.merge("LA", [L, A]), over_white(rgb_of(GREY), ALPHA), "png", 1),
    "RGBA tif": (Image.merge("RGBA", [*RGB.split(), A]), over_white(COLORS, ALPHA), "tif", 1),
}


def lab(image):
    from PIL import ImageCms

    return ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def stored(image, orientation):
    """Return the image as a camera in this orientation stores it."""
    flips = Image.Transpose
    method = {
        2: flips.FLIP_LEFT_RIGHT, 3: flips.ROTATE_180, 4: flips.FLIP_TOP_BOTTOM, 5: flips.TRANSPOSE, 6: flips.ROTATE_90,
        7: flips.TRANSVERSE, 8: flips.ROTATE_270,
    }.get(orientation)  # fmt: skip
    return image if method is None else image.transpose(method)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_upright_opaque_rgb(tmp_path, mode):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow 12 cannot read the YCbCr TIFFs that it writes")
    image, expected, suffix, tolerance = MODES[mode]
    image = lab(image) if mode == "LAB" else image
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"x.{suffix}"
        stored(image, orientation).save(path, exif=exif)
        loaded = load_image(path)
        assert loaded.mode == "RGB" and loaded.size == image_size(path) == (6, 4), orientation
        assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= tolerance + 0.5, orientation


def test_the_size_of_an_image_that_only_its_xmp_turns_is_that_of_the_loaded_one(tmp_path):
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", xmp)
    for path, options in ((tmp_path / "x.jpg", {"xmp": xmp.encode()}), (tmp_path / "x.png", {"pnginfo": note})):
        Image.new("RGB", (6, 4)).save(path, **options)
        assert load_image(path).size == image_size(path) == (4, 6)


def test_stored_orientations_are_those_of_exif():
    for orientation, turn in UPRIGHT.items():
        assert (turn(np.asarray(stored(RGB, orientation))) == COLORS).all(), orientation


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (RGB, {"transparency": (250, 10, 20)}),
        (L, {"transparency": int(GREY[0, 0])}),
        (Image.fromarray(WIDE), {"transparency": int(WIDE[0, 0])}),
        (palette(RGB), {"transparency": palette(RGB).getpixel((0, 0))}),
    ],
    ids=["RGB", "L", "I;16", "P"],
)
def test_a_transparent_color_becomes_white(tmp_path, image, options):
    image.save(tmp_path / "x.png", **options)
    pixels = np.asarray(load_image(tmp_path / "x.png"))
    assert (pixels[0, 0] == 255).all() and not (pixels[-1, -1] == 255).all()


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "RGBX", "HSV", "I;16B"])
def test_modes_that_no_file_has_convert_too(mode):
    source = {
        "La": Image.merge("LA", [L, A]),
        "RGBa": MODES["RGBA"][0],
        "I;16B": Image.fromarray(WIDE.astype(np.int32)),
    }.get(mode, RGB)
    pixels = np.asarray(to_rgb(source.convert(mode)))
    assert pixels.shape == (4, 6, 3) and pixels.std() > 10


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "x.jpg")).astype(int) - (200, 30, 60)).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # PIL's
def test_unreadable_exif_leaves_the_image_as_it_is(tmp_path):
    RGB.save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\x01\x12" * 40)
    assert load_image(tmp_path / "x.jpg").size == (6, 4)


def test_sixteen_bits_become_the_nearest_of_256_levels(tmp_path):
    values = np.array([[0, 128, 129, 256, 257, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(load_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 0, 1, 1, 1, 254, 255, 255]


def test_float_greys_have_two_ranges_and_no_nan(tmp_path):
    Image.fromarray(np.array([[0.0, 300.0], [64.0, -5.0]], np.float32)).save(tmp_path / "x.tif")
    assert np.asarray(load_image(tmp_path / "x.tif"))[..., 0].tolist() == [[0, 255], [64, 0]]
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImageError, match="not finite"):
        load_image(tmp_path / "x.tif")


def write_bad(path, kind):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("\ufeff\n<!DOCTYPE html><html><body>404</body></html>")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "svg":
        path.write_text('<?xml version="1.0"?><svg/>')
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("truncated"):
        noise.save(path, kind.split()[1])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "bomb":
        noise.save(path, "png")
        data = bytearray(path.read_bytes())
        data[16:24] = (60000).to_bytes(4, "big") * 2  # IHDR says 60000 x 60000
        path.write_bytes(data)
    elif kind == "bad header":
        noise.save(path, "png")
        data = bytearray(path.read_bytes())
        data[24] = 99  # bit depth
        path.write_bytes(data)


BAD = {
    "empty": "empty file", "html": "an HTML page", "text": "not an image", "svg": "SVG", "folder": "a folder",
    "missing": "no such file", "truncated png": "cannot be decoded", "truncated jpeg": "truncated",
    "truncated webp": "", "truncated gif": "", "truncated tiff": "", "bomb": "", "bad header": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    write_bad(path, kind)
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert (
        str(caught.value).startswith(f"{path}: ") and BAD[kind] in str(caught.value) and "\n" not in str(caught.value)
    )


def test_an_image_above_max_pixels_is_refused_before_it_is_decoded(tmp_path):
    RGB.save(tmp_path / "x.png")
    with pytest.raises(BadImageError, match="6x4 is 24 pixels, more than max_pixels 23"):
        load_image(tmp_path / "x.png", max_pixels=23)


def test_a_wrong_extension_does_not_matter(tmp_path):
    RGB.save(tmp_path / "x.jpg", "png")
    assert (np.asarray(load_image(tmp_path / "x.jpg")) == COLORS).all()


@pytest.mark.filterwarnings("ignore")
def test_random_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.RandomState(0)
    noise = Image.fromarray(rng.randint(0, 256, (16, 16, 3), dtype=np.uint8))
    path = tmp_path / "x"
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"):
        noise.save(path, kind)
        whole = path.read_bytes()
        for i in range(40):
            data = bytearray(whole[: rng.randint(1, len(whole))] if i % 2 else whole)
            for place in rng.randint(0, min(len(data), 64), 4):
                data[place] = rng.randint(256)
            path.write_bytes(data)
            with contextlib.suppress(BadImageError):
                load_image(path, max_pixels=1 << 20)


def test_bad_image_error_survives_a_worker():
    error = BadImageError("/x/y.jpg", "empty file")
    assert str(pickle.loads(pickle.dumps(error))) == "/x/y.jpg: empty file"
    text = "Caught BadImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File a.py\n"
    assert str(BadImageError(f"{text}ldm.data.image.BadImageError: /x/y.jpg: empty file\n")) == "/x/y.jpg: empty file"


def test_arrays_and_images_are_inverse_and_rounded():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(rgb_of(levels))
    array = to_array(image)
    assert array.dtype == np.float32 and array.min() == -1 and array.max() == 1
    assert (np.asarray(from_array(array)) == np.asarray(image)).all()
    assert (np.asarray(from_tensor(torch.from_numpy(array).permute(2, 0, 1))) == np.asarray(image)).all()
    for offset in (-0.4, 0.4):  # in levels: the nearest one, where truncation would give the one below
        near = np.clip(array + offset / 127.5, -1, 1)
        assert (np.asarray(from_array(near)) == np.asarray(image)).all()


def test_values_out_of_range_are_clipped_and_nan_is_refused():
    assert np.asarray(from_array(np.array([[-3.0, 3.0]]))).tolist() == [[0, 255]]
    assert from_tensor(torch.zeros(1, 2, 3, dtype=torch.bfloat16)).size == (3, 2)
    with pytest.raises(ValueError, match="2 values are not finite"):
        from_array(np.array([[np.nan, np.inf, 0.0]]))
    with pytest.raises(ValueError, match="not a batch"):
        from_tensor(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected"):
        from_array(np.zeros((2, 2, 4)))


@pytest.mark.parametrize(("size", "expected"), [(8, (12, 8)), ((8, 30), (30, 20)), ((100, 8), (150, 100))])
def test_resize_covers_with_the_same_proportions(size, expected):
    assert cover(Image.new("RGB", (60, 40)), size) == expected


def test_odd_proportions_still_cover():
    for width in range(1, 60):
        size = cover(Image.new("RGB", (width, 37)), 16)
        left, top, right, bottom = crop_box(size, 16)
        assert min(size) == 16 == right - left == bottom - top


@pytest.mark.parametrize("how", ["bicubic", "lanczos", "bilinear", "box"])
def test_shrinking_is_antialiased(how):
    stripes = Image.fromarray(rgb_of(np.tile(np.array([0, 255], np.uint8), (64, 32))))
    pixels = np.asarray(View((8, 8), (0, 0, 8, 8)).apply(stripes, how)).astype(int)
    assert np.abs(pixels - 127).max() < 24  # picking single pixels would give 0 or 255


def test_crops_are_central_or_random_and_never_larger_than_the_image():
    assert crop_box((6, 4), (2, 4)) == (1, 1, 5, 3)
    random.seed(0)
    boxes = {crop_box((6, 4), 3, at_random=True) for _ in range(60)}
    assert len(boxes) == 8 and all(right - left == bottom - top == 3 for left, top, right, bottom in boxes)
    assert all(0 <= left <= 3 and 0 <= top <= 1 for left, top, _, _ in boxes)
    assert crop_box((6, 4), (4, 6), at_random=True) == (0, 0, 6, 4)
    with pytest.raises(ValueError, match="resize it first"):
        crop_box((6, 4), 5)
    with pytest.raises(ValueError, match="positive integer"):
        crop_box((6, 4), 0)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_a_map_of_class_numbers_is_read_as_it_is_stored(tmp_path, mode):
    numbers = np.array([[0, 7, 181], [182, 255, 3]])
    image = Image.fromarray(numbers.astype({"I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([k % 256 for k in range(768)])
    image.save(tmp_path / "map.png" if mode != "I" else tmp_path / "map.tif")
    assert (np.asarray(load_labels(next(tmp_path.iterdir()))) == numbers).all()


def test_a_map_in_color_or_of_too_large_numbers_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(BadImageError, match=r"a\.png: mode RGB"):
        load_labels(tmp_path / "a.png")
    with pytest.raises(BadImageError, match=r"b\.png: class numbers from 300 to 300"):
        load_labels(tmp_path / "b.png")
    with pytest.raises(BadImageError, match=r"c\.png: no such file"):
        load_labels(tmp_path / "c.png")


def test_a_view_scales_cuts_and_mirrors():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8))
    view = View((8, 6), (1, 2, 5, 6), mirrored=True)
    assert (np.asarray(view.apply(image)) == np.asarray(image)[2:6, 1:5][:, ::-1]).all()
    assert View((4, 3), (0, 0, 4, 3)).apply(image, "box").size == (4, 3)


def write_png(path, samples, bits, transparent):
    """Write grey (H, W) or RGB (H, W, 3) samples of 1 to 16 bits with a transparent color (a tRNS chunk)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if bits < 8:
        planes = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # the bits of each sample, the highest first
        lines = [np.packbits(row.astype(np.uint8)).tobytes() for row in planes.reshape(height, -1)]
    else:
        lines = [row.astype(f">u{bits // 8}").tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if samples.ndim == 3 else 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": np.asarray(transparent, ">u2").tobytes()}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)), b"IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items()))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_level_becomes_white_at_every_bit_depth(tmp_path, bits):
    levels = np.arange(min(2**bits, 16)).reshape(1, -1) * (4097 if bits == 16 else 17 if bits == 8 else 1)
    opaque = np.rint(levels * 255 / (2**bits - 1))
    for k, transparent in enumerate(levels[0]):
        expected = opaque.copy()
        expected[0, k] = 255
        loaded = np.asarray(load_image(write_png(tmp_path / "x.png", levels, bits, transparent)))
        assert (loaded == rgb_of(expected)).all(), transparent


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_color_becomes_white_at_every_bit_depth(tmp_path, bits):
    samples = COLORS.astype(int) if bits == 8 else COLORS.astype(int) * 256 + 15
    path = write_png(tmp_path / "x.png", samples, bits, samples[0, 0])
    expected = COLORS.copy()
    expected[0, 0] = 255
    assert (np.asarray(load_image(path)) == expected).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_white_is_zero_tiffs_are_inverted(tmp_path, dtype):
    grey = GREY.astype(dtype) * {"uint8": 1, "uint16": 257, "float32": 1 / np.float32(255)}[dtype]
    path = tmp_path / "x.tif"
    Image.fromarray(grey).save(path)
    content, entry = path.read_bytes(), struct.pack("<HHI", 262, 3, 1)
    assert content.count(entry + b"\1\0") == 1
    path.write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    np.testing.assert_allclose(np.asarray(load_image(path)), 255 - rgb_of(GREY), atol=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_class_numbers_are_the_stored_levels_at_every_bit_depth(tmp_path, bits):
    levels = np.arange(min(2**bits, 16)).reshape(1, -1)
    assert (np.asarray(load_labels(write_png(tmp_path / "x.png", levels, bits, 0))) == levels).all()
