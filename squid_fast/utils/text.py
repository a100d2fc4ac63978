"""Text and numbers in the form in which files, tables and JSON can hold them."""

from __future__ import annotations

import codecs
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

_BREAKS = re.compile(r" *[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029][\s\x1c-\x1f]*")
_LOOKED_AT = 4096
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins like UTF-16
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def utf8_text(text: str) -> str:
    r"""Spell out what UTF-8 or a table cannot hold, such as a file name's byte as ``\xff``, or NUL.

    >>> import os
    >>> print(utf8_text(os.fsdecode(b"caf\xe9.png")))
    caf\xe9.png
    """
    text = text.replace("\0", r"\x00")
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path as errors show it: in quotation marks where its characters would be lost.

    >>> print(shown("runs/zhang"), shown("runs/zhang "), shown("a\nb"))
    runs/zhang 'runs/zhang ' 'a\nb'
    """
    text = utf8_text(os.fspath(path))
    plain = text.isprintable() and text == text.strip() and "  " not in text
    return text if plain else repr(text)


def one_line(text: str) -> str:
    r"""``text`` with a space in place of tabs, line breaks and what is blank around them.

    Other blanks stay, for the names of files may have them in a row or at their end.

    >>> one_line("scan  7 .png\n   is empty\n")
    'scan  7 .png is empty'
    """
    return _BREAKS.sub(" ", text.strip("\r\n"))


def words(name: str) -> list[str]:
    """Words and numbers in a name, in lower case.

    >>> words("siteA-2 Normal_cases")
    ['site', 'a', '2', 'normal', 'cases']
    """
    return [word.lower() for word in _WORD.findall(name)]


def decoded(content: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 as Windows writes it, without a byte order mark.

    Bytes that are not UTF-8 are kept as surrogates, as in file names.

    >>> decoded("a.png".encode("utf-16")), decoded("a.png".encode("utf-16-be"))
    ('a.png', 'a.png')
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace")
    # Of text in UTF-16 every other byte is 0, but for what is neither Latin nor a line break.
    head = content[:_LOOKED_AT]
    even, odd = (head[start::2].count(0) * 2 / max(len(head), 1) for start in (0, 1))
    if max(even, odd) > 0.5 and min(even, odd) < 0.05:
        return content.decode("utf-16-be" if even > odd else "utf-16-le", "replace")
    return content.decode("utf-8", "surrogateescape")


def spellings(name: str) -> Iterator[str]:
    r"""What a file may be called that ``name`` stands for, likeliest first.

    A list may have been written with blanks to fill a column, in quotation marks, as file://
    addresses, or behind the mark that opens a file in UTF-8; on Windows, with backslashes or in its
    Western European code page; or with accents as characters of their own, as on macOS, where the
    file's name has them in one with the letter.

    >>> [ascii(name) for name in spellings("e\u0301.png")]
    ["'e\\u0301.png'", "'\\xe9.png'"]
    """
    yield name
    bare = name.removeprefix("\ufeff").strip()
    if bare[:1] in ("'", '"') and bare[-1] == bare[0]:
        bare = bare[1:-1]
    elif bare.lower().startswith("file://"):
        bare = unquote(bare[7:].removeprefix("localhost"))
    if bare not in ("", name):
        yield from spellings(bare)
    elif "\\" in name:
        yield from spellings(name.replace("\\", "/"))
    elif any("\udc80" <= letter <= "\udcff" for letter in name):
        yield name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    else:
        for form in ("NFC", "NFD"):
            if (other := unicodedata.normalize(form, name)) != name:
                yield other


def finite_or_none(value: float | None) -> float | None:
    """``value``, or None for NaN and infinity, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
