"""Markdown tables."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown that is aligned as text, too."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"
        for cells in lines
    )
