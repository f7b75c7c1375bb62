"""Draw docs/criss_cross.svg: what a pixel sees after one and after two loops of criss-cross attention.

python docs/draw_criss_cross.py
"""

from pathlib import Path

ROWS, COLUMNS, CELL = 7, 10, 26
PIXEL = (2, 3)  # the pixel whose view is drawn
SOURCE = (5, 8)  # off its cross: reached in two steps, by two ways
EMPTY, CROSS, REACHED, DARK = "#f3f1ec", "#8fb8de", "#cfe0f0", "#1f4e79"


def cell(row: int, column: int, fill: str) -> str:
    size = CELL - 2
    return f'<rect x="{column * CELL}" y="{row * CELL}" width="{size}" height="{size}" rx="3" fill="{fill}"/>'


def centre(position: tuple[int, int]) -> tuple[int, int]:
    row, column = position
    return column * CELL + CELL // 2 - 1, row * CELL + CELL // 2 - 1


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = centre(start), centre(end)
    # Ends at the edge of its cell, where the head is seen.
    x2 += (x1 > x2) * CELL // 2 - (x1 < x2) * CELL // 2
    y2 += (y1 > y2) * CELL // 2 - (y1 < y2) * CELL // 2
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{DARK}" stroke-width="2" marker-end="url(#head)"/>'


def panel(left: int, title: str, *, loops: int) -> str:
    parts = [f'<g transform="translate({left},36)">', f'<text x="0" y="-12">{title}</text>']
    for row in range(ROWS):
        for column in range(COLUMNS):
            on_cross = row == PIXEL[0] or column == PIXEL[1]
            parts.append(cell(row, column, CROSS if on_cross else REACHED if loops == 2 else EMPTY))
    parts.append(cell(*PIXEL, DARK))
    if loops == 2:
        parts.append(cell(*SOURCE, "#d98841"))
        for corner in ((PIXEL[0], SOURCE[1]), (SOURCE[0], PIXEL[1])):
            parts += [arrow(SOURCE, corner), arrow(corner, PIXEL)]
    return "\n".join([*parts, "</g>"])


def main() -> None:
    width, height = 2 * COLUMNS * CELL + 60, ROWS * CELL + 46
    head = f'<path d="M0 0 L8 4 L0 8 z" fill="{DARK}"/>'
    marker = 'id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto"'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    picture = f"""<svg xmlns="http://www.w3.org/2000/svg" {size}>
<defs><marker {marker}>{head}</marker></defs>
<rect width="{width}" height="{height}" fill="white"/>
<g font-family="sans-serif" font-size="14" fill="#222">
{panel(10, "one loop: row and column", loops=1)}
{panel(COLUMNS * CELL + 50, "two loops: every pixel, by two ways", loops=2)}
</g>
</svg>
"""
    Path(__file__).with_name("criss_cross.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
