"""The published invisible watermark: a hint that a picture was drawn by a model, readable by the tools that read the original's."""

from __future__ import annotations

import logging

from PIL import Image

logger = logging.getLogger(__name__)

CONTENT = b"StableDiffusionV1"  # 17 bytes = 136 bits
METHODS = ("dwtDct", "dwtDctSvd")  # of invisible-watermark; the first is the published one
MIN_PIXELS = 256 * 256  # the package refuses less
STRENGTH = 36  # step of the quantized coefficients, the package's own; its readers know no other
BLUE_CHROMA = 1  # the channel of YUV that holds the mark


class Watermark:
    """`content` in the wavelet coefficients of the blue chroma, as the package invisible-watermark reads it.

    It is a hint, not a proof: docs/provenance.md has figures on what it survives. Coefficients are changed by the package; the way there
    and back is ours, since the package's own mixes up two of the wavelet's bands, which leaves specks at sharp edges of color, and cuts
    fractions off. Raises ValueError for a method that is none of METHODS.
    """

    def __init__(self, method: str = METHODS[0], content: bytes = CONTENT) -> None:
        if method not in METHODS:
            raise ValueError(f"watermark method {method}: choose one of {', '.join(METHODS)}")
        self.method, self.content = method, content
        self._told: set[str] = set()

    def __str__(self) -> str:
        return f"{self.content.decode()}, {self.method}, {8 * len(self.content)} bits"

    def __call__(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """(picture, whether it is marked): unmarked, with one notice, where it is too small or the package is missing."""
        if image.width * image.height < MIN_PIXELS:
            return image, self._skip("no watermark on pictures under 256x256 pixels")
        try:
            return self._mark(image), True
        except ImportError as error:
            return image, self._skip(f"no watermark ({error}): pip install invisible-watermark brings it")

    def read(self, image: Image.Image) -> bytes:
        """As many bytes as the mark has, read out of a picture; noise where there is none. ValueError where it is too small for one."""
        if image.width * image.height < MIN_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels hold no watermark: it needs 256x256 or more")
        import numpy as np
        from imwatermark import WatermarkDecoder

        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        return WatermarkDecoder("bytes", 8 * len(self.content)).decode(bgr, self.method)

    def agreement(self, read: bytes) -> int:
        """How many bits of `read` are the mark's; about half of them by chance."""
        return sum(8 - (a ^ b).bit_count() for a, b in zip(read, self.content, strict=True))

    def _mark(self, image: Image.Image) -> Image.Image:
        import cv2
        import numpy as np
        import pywt
        from imwatermark import dwtDctSvd, maxDct

        bits = np.unpackbits(np.frombuffer(self.content, np.uint8)).astype(int).tolist()
        embed = {"dwtDct": maxDct.EmbedMaxDct, "dwtDctSvd": dwtDctSvd.EmbedDwtDctSvd}[self.method](
            bits, wmLen=len(bits)
        )
        yuv = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2YUV)
        height, width = (side // 4 * 4 for side in yuv.shape[:2])  # the package's, which reads no more of it
        chroma = yuv[:height, :width, BLUE_CHROMA]
        approximation, details = pywt.dwt2(chroma, "haar")
        embed.encode_frame(approximation, STRENGTH)
        chroma[:] = np.rint(pywt.idwt2((approximation, details), "haar")).clip(
            0, 255
        )  # rounded, and never wrapped around
        return Image.fromarray(cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB))

    def _skip(self, notice: str) -> bool:
        if notice not in self._told:
            self._told.add(notice)
            logger.info(notice)
        return False
