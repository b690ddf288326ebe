"""What tokenizers say of texts that do not fit."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

_SHOWN = 500  # characters of a dropped text
_REMEMBERED = 10_000  # texts; so many warnings are enough


class CutTexts:
    """One warning for each text that is cut, so that a caption that is seen in every epoch is reported in the first."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, text: str, fits: int, dropped: Callable[[], str]) -> None:
        """fits: tokens of the text that are kept; dropped() gives its end, and is called only for a text that is new."""
        if text in self._told or len(self._told) >= _REMEMBERED:
            return
        self._told.add(text)
        lost = dropped()
        more = f"... and {len(lost) - _SHOWN:,} more characters" if len(lost) > _SHOWN else ""
        logger.warning("text cut to the %d tokens that fit; dropped: %r%s", fits, lost[:_SHOWN], more)
