"""The invisible watermark: readable by the published reader, with minimal change of the image."""

import numpy as np
import pytest
from PIL import Image

from ldm.output.images import GeneratedImage, Output, read_metadata
from ldm.output.watermark import CONTENT, METHODS, Watermark


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def as_bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


@pytest.mark.parametrize("size", [(512, 512), (300, 261)])
@pytest.mark.parametrize("method", METHODS)
def test_the_package_reads_the_published_mark_out_of_a_sample(tmp_path, method, size):
    from imwatermark import WatermarkDecoder

    path = Output(tmp_path, Watermark(method)).save_sample(GeneratedImage(noise(512).crop((0, 0, *size)), {}))
    with Image.open(path) as image:
        assert WatermarkDecoder("bytes", 136).decode(as_bgr(image), method) == CONTENT == b"StableDiffusionV1"
        assert image.size == size and read_metadata(path)["watermark"] == f"StableDiffusionV1, {method}, 136 bits"


def test_the_coefficients_that_carry_the_bits_are_the_packages_own():
    import cv2
    import pywt
    from imwatermark import WatermarkEncoder

    def coefficients(bgr: np.ndarray) -> np.ndarray:
        return pywt.dwt2(cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV)[..., 1], "haar")[0]

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", CONTENT)
    smooth = noise(8).resize((512, 512), Image.Resampling.BICUBIC)
    plain, theirs = coefficients(as_bgr(smooth)), coefficients(encoder.encode(as_bgr(smooth), "dwtDct"))
    difference = np.abs(theirs - coefficients(as_bgr(Watermark()(smooth)[0])))
    assert difference.mean() < 1 and np.percentile(difference, 99) <= 4 < np.percentile(np.abs(theirs - plain), 99)


@pytest.mark.parametrize("method", METHODS)
def test_edges_of_saturated_color_show_no_specks(method):
    """The package's own way moves pixels there by up to 255."""
    y, x = np.mgrid[:512, :512]
    stripes = np.where(((x // 5 + y // 7) % 2)[..., None] > 0, [0, 0, 255], [255, 255, 0]).astype(np.uint8)
    for image in (Image.fromarray(stripes), noise(512)):
        marked = np.asarray(Watermark(method)(image)[0]).astype(int)
        assert np.abs(marked - np.asarray(image)).max() <= 40


def test_small_images_are_left_as_they_are_with_one_notice(tmp_path, caplog):
    output = Output(tmp_path, Watermark())
    with caplog.at_level("INFO"):
        paths = [output.save_sample(GeneratedImage(noise(side), {})) for side in (32, 255)]
    assert [r.message for r in caplog.records] == ["no watermark in images under 256x256 pixels"]
    assert read_metadata(paths[0])["watermark"] is None and np.array_equal(
        np.asarray(Image.open(paths[1])), np.asarray(noise(255))
    )
    with pytest.raises(ValueError, match="64x64 pixels: a watermark needs"):
        Watermark().read(noise(64))


def test_without_the_package_images_are_written_unmarked_and_say_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imwatermark", None)
    with caplog.at_level("INFO"):
        path = Output(tmp_path, Watermark()).save_sample(GeneratedImage(noise(256), {}))
    assert read_metadata(path)["watermark"] is None and "invisible-watermark" in caplog.text


def test_only_generated_pixels_are_marked_and_their_mark_can_still_be_read(tmp_path):
    results = Image.new("1", (512, 512), 0)
    results.paste(1, (0, 0, 512, 448))
    path = Output(tmp_path, Watermark()).save_sample(GeneratedImage(noise(512), {}, results))
    marked, plain, inside = np.asarray(Image.open(path)), np.asarray(noise(512)), np.asarray(results)
    assert np.array_equal(marked[~inside], plain[~inside]) and (marked[inside] != plain[inside]).any()
    assert Watermark().agreement(Watermark().read(Image.open(path))) == 136


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="watermark method rivaGan: choose one of dwtDct, dwtDctSvd"):
        Watermark("rivaGan")
