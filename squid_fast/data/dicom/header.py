"""Elements of a DICOM data set: what is empty is absent, and errors name the element."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from ...utils.extras import require
from ..pixels import ImageReadError

_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_BLANK = " \0\t\r\n"


class Header:
    """The elements of a data set, or of an item of one, by keyword.

    Values are taken from their bytes, by the value representation (VR) that stands beside them.
    pydicom's own conversion fails or warns on texts that people's files have, such as ``2047,5``.
    """

    def __init__(
        self, data_set: Any, path: Path, implicit: bool = False, little_endian: bool = True
    ) -> None:
        self.data_set, self._path = data_set, path
        self.implicit, self.little_endian = implicit, little_endian

    def name(self, keyword: str) -> str:
        """Name and tag of an element, such as ``Rows (0028,0010)``."""
        dictionary = require("pydicom.datadict", "screen")
        tag = dictionary.tag_for_keyword(keyword)
        return f"{dictionary.dictionary_description(tag)} ({tag >> 16:04X},{tag & 0xFFFF:04X})"

    def error(self, problem: str, **details: object) -> ImageReadError:
        """An error that says what keeps the image from being read; see ``ImageReadError``."""
        message = f"{{path}} could not be decoded as DICOM: {problem}"
        return ImageReadError(message, path=self._path, **details)

    def _element(self, keyword: str | int) -> tuple[str, bytes]:
        """VR and bytes of an element, given by keyword or tag; no bytes if it is absent."""
        dictionary = require("pydicom.datadict", "screen")
        tag = keyword if isinstance(keyword, int) else dictionary.tag_for_keyword(keyword)
        element = self.data_set.get_item(tag)
        if element is None:
            return "", b""
        value, vr = element.value, element.VR or "UN"
        if vr == "UN":
            vr = dictionary.dictionary_VR(tag)
        return vr, value if isinstance(value, bytes) else b""

    def raw(self, keyword: str | int) -> bytes:
        """The value as it is stored; empty if the element is absent."""
        return self._element(keyword)[1]

    def vr(self, keyword: str) -> str:
        """The value representation, two letters."""
        return self._element(keyword)[0]

    def words(self, keyword: str | int) -> list[int]:
        """The value as unsigned numbers of 16 bits, whatever its VR."""
        value = self.raw(keyword)
        order = "<" if self.little_endian else ">"
        return list(struct.unpack(f"{order}{len(value) // 2}H", value[: len(value) // 2 * 2]))

    def values(self, keyword: str) -> list[str]:
        """The values as texts without blanks around them; a value may be empty."""
        vr, value = self._element(keyword)
        code = _BINARY.get(vr[:2])  # of "US or SS" the first
        if code is None:
            parts = value.decode("latin-1").split("\\")
            texts = [part.strip(_BLANK) for part in parts]
            return texts if any(texts) else []
        code = ("<" if self.little_endian else ">") + code
        whole = len(value) // struct.calcsize(code) * struct.calcsize(code)
        return [str(number) for (number,) in struct.iter_unpack(code, value[:whole])]

    def text(self, keyword: str) -> str:
        """The first value in capital letters; empty if the element is absent."""
        return next(iter(self.values(keyword)), "").upper()

    def number(self, keyword: str, index: int = 0) -> float | None:
        """A value as a number; None if it is absent.

        Raises:
            ImageReadError: it is no finite number.
        """
        text = "".join(self.values(keyword)[index : index + 1])
        if not text:
            return None
        try:
            number = float(text.replace(",", "."))  # some software writes a decimal comma
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(
                f"{self.name(keyword)} is {{value}}, and a finite number is needed", value=text
            )
        return number

    def integer(self, keyword: str) -> int | None:
        """The first value as a whole number; None if it is absent.

        Raises:
            ImageReadError: it is no whole number.
        """
        number = self.number(keyword)
        if number is not None and number != int(number):
            raise self.error(
                f"{self.name(keyword)} is {{value}}, and a whole number is needed", value=number
            )
        return None if number is None else int(number)

    def needed(self, keyword: str) -> int:
        """The first value as a whole number.

        Raises:
            ImageReadError: it is absent or no whole number.
        """
        number = self.integer(keyword)
        if number is None:
            raise self.error(f"{self.name(keyword)} is missing")
        return number

    def items(self, keyword: str) -> list[Header]:
        """The items of a sequence; none if it is absent."""
        tag = require("pydicom.datadict", "screen").tag_for_keyword(keyword)
        if tag not in self.data_set:
            return []
        sequence = self.data_set[tag]
        if sequence.VR != "SQ":
            return []
        return [
            Header(item, self._path, self.implicit, self.little_endian) for item in sequence.value
        ]
