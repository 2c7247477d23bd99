"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str], source: Sequence[object]) -> str:
        parts = (
            cell.rjust(width) if isinstance(value, (int, float)) or _is_number(cell) else cell.ljust(width)
            for cell, width, value in zip(row, widths, source, strict=True)
        )
        return "  ".join(parts).rstrip()

    lines = [line(row, source) for row, source in zip(cells, (header, *rows), strict=True)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    return "-" if seconds is None else f"{seconds:.1f} s"


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace(" s", "").replace("-", "", 1).isdigit()
