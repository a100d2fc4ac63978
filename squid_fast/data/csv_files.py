"""CSV tables as people have them: whatever separates the cells, in UTF-8, UTF-16 or Latin-1."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from ..utils.text import decoded

_SEPARATORS = ",;\t|"
PATH_COLUMNS = ("image_path", "path", "filename", "file_name", "filepath", "file_path", "file")
"""Names of the column that names the images, the first that a table has."""


class TableError(ValueError):
    """A table cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Table:
    """A CSV table: its header, names in lower case without spaces around, and its rows.

    Attributes:
        origin: its path, for messages.
    """

    origin: str
    header: list[str]
    _lines: list[str]
    _separator: str

    @classmethod
    def parse(cls, content: bytes, origin: str) -> Table:
        r"""Read the header. That separator counts which gives a column of images, or most columns.

        Raises:
            TableError: the content is no text, or its first line no CSV.

        >>> Table.parse(b"filename;label\na.png;0\n", "set.csv").header
        ['filename', 'label']
        """
        text = decoded(content)
        if "\0" in text:
            raise TableError(f"{origin} holds NUL bytes, so it is no CSV")
        lines = io.StringIO(text, newline="").readlines()
        said = lines[0].strip().lower().removeprefix("sep=") if lines else ""
        if lines and lines[0].lower().startswith("sep=") and len(said) == 1:  # as Excel writes it
            return cls(origin, _header(lines[1:], said), lines[1:], said)
        headers = {one: _header(lines, one) for one in _SEPARATORS}
        separator = max(headers, key=lambda one: (_names_images(headers[one]), len(headers[one])))
        return cls(origin, headers[separator], lines, separator)

    @property
    def path_column(self) -> str:
        """The column that names the images, one of ``PATH_COLUMNS``.

        Raises:
            TableError: there is none.
        """
        for name in PATH_COLUMNS:
            if name in self.header:
                return name
        raise TableError(
            f"{self.origin} lacks the column image_path; it has {', '.join(self.header) or 'none'}"
        )

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        r"""Each row that is not blank, as (number of its last line in the file, cells by column).

        Raises:
            TableError: a line is no CSV, has more cells than the header, or other values in
                columns of one name.

        >>> table = Table.parse(b"image_path,label\na.png,0\n\n", "set.csv")
        >>> list(table.rows())
        [(2, {'image_path': 'a.png', 'label': '0'})]
        """
        reader = csv.reader(self._lines, delimiter=self._separator, strict=True)
        try:
            next(reader, None)
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, self._by_column(row, reader.line_num)
        except csv.Error as error:
            raise TableError(
                f"{self.origin}, line {reader.line_num} cannot be read as CSV: {error}; every "
                "quotation mark that opens a cell needs one that closes it"
            ) from error

    def _by_column(self, row: list[str], line: int) -> dict[str, str]:
        if any(cell.strip() for cell in row[len(self.header) :]):
            raise TableError(
                f"{self.origin}, line {line} has {len(row)} cells, the header {len(self.header)}; "
                f"a cell that holds {self._separator!r} has to stand in quotation marks"
            )
        cells: dict[str, str] = {}
        for name, cell in zip(self.header, row, strict=False):
            if name and cells.setdefault(name, cell) != cell:
                raise TableError(
                    f"{self.origin}, line {line} has {cells[name]!r} and {cell!r} in two columns "
                    f"that are both called {name}; one has to go"
                )
        return cells


def _names_images(header: list[str]) -> bool:
    return any(name in header for name in PATH_COLUMNS)


def _header(lines: list[str], separator: str) -> list[str]:
    reader = csv.reader(lines, delimiter=separator)
    try:
        return [name.strip().lower() for name in next(reader, [])]
    except csv.Error:  # a cell without an end, perhaps for want of the right separator
        return []
