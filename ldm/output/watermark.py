"""The published invisible watermark, a hint that an image was generated; the original's tools can read it."""

from __future__ import annotations

import logging

from PIL import Image

logger = logging.getLogger(__name__)

CONTENT = b"StableDiffusionV1"  # 17 bytes = 136 bits
METHODS = ("dwtDct", "dwtDctSvd")  # of invisible-watermark; the first is the published one
MIN_PIXELS = 256 * 256  # minimum of the package
STRENGTH = 36  # quantization step of the coefficients, the package's default, which its decoder expects
CHROMA = 1  # the YUV channel that holds the watermark


class Watermark:
    """`content` in the wavelet coefficients of a chroma channel, as the package invisible-watermark reads it.

    It is a hint, not a proof: docs/provenance.md says what it survives. The package changes the coefficients; the
    transform is ours, since the package's swaps two wavelet bands (specks at sharp color edges) and truncates.
    """

    def __init__(self, method: str = METHODS[0], content: bytes = CONTENT) -> None:
        if method not in METHODS:
            raise ValueError(f"watermark method {method}: choose one of {', '.join(METHODS)}")
        self.method, self.content = method, content
        self._logged: set[str] = set()

    def __str__(self) -> str:
        return f"{self.content.decode()}, {self.method}, {8 * len(self.content)} bits"

    def __call__(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """(image, True) with the watermark; (image, False) and a log line if that is impossible."""
        if image.width * image.height < MIN_PIXELS:
            return image, self._skip("no watermark in images under 256x256 pixels")
        try:
            return self._mark(image), True
        except ImportError as error:
            return image, self._skip(f"no watermark ({error}): pip install invisible-watermark")

    def read(self, image: Image.Image) -> bytes:
        """Decode the watermark's bytes (noise if there is none); raise ValueError for images that are too small."""
        if image.width * image.height < MIN_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels: a watermark needs at least 256x256")
        import numpy as np
        from imwatermark import WatermarkDecoder  # optional, and it imports torch

        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        return WatermarkDecoder("bytes", 8 * len(self.content)).decode(bgr, self.method)

    def agreement(self, read: bytes) -> int:
        """Number of bits of `read` that match the watermark; half of them match by chance."""
        return sum(8 - (a ^ b).bit_count() for a, b in zip(read, self.content, strict=True))

    def _mark(self, image: Image.Image) -> Image.Image:
        import cv2
        import numpy as np
        import pywt
        from imwatermark import dwtDctSvd, maxDct

        bits = np.unpackbits(np.frombuffer(self.content, np.uint8)).astype(int).tolist()
        method = {"dwtDct": maxDct.EmbedMaxDct, "dwtDctSvd": dwtDctSvd.EmbedDwtDctSvd}[self.method]
        embed = method(bits, wmLen=len(bits))
        yuv = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2YUV)
        height, width = (side // 4 * 4 for side in yuv.shape[:2])  # the part that the package reads
        chroma = yuv[:height, :width, CHROMA]
        approximation, details = pywt.dwt2(chroma, "haar")
        embed.encode_frame(approximation, STRENGTH)
        chroma[:] = np.rint(pywt.idwt2((approximation, details), "haar")).clip(0, 255)
        return Image.fromarray(cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB))

    def _skip(self, notice: str) -> bool:
        if notice not in self._logged:
            self._logged.add(notice)
            logger.info(notice)
        return False
