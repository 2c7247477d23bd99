"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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


def markdown(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table as pages have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    return "-" if seconds is None else f"{seconds:.1f} s"


def accuracy(row: Mapping[str, object] | None) -> str:
    """`93.10 ± 0.20` of a comparison's row, without the spread where there is one seed; empty for None."""
    if row is None:
        return ""
    return f"{row['top1']:.2f}" + ("" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}")


def by_method(
    rows: Sequence[Mapping[str, object]], column: str
) -> tuple[list[object], dict[str, list[Mapping[str, object] | None]]]:
    """The values of `column` in a comparison's rows, and for each method its row at each of them, None for none."""
    cells = {(row["method"], row[column]): row for row in rows if "method" in row}
    methods, values = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    return values, {method: [cells.get((method, value)) for value in values] for method in methods}


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace(" s", "").replace("-", "", 1).isdigit()
