"""The colours of all pages and pictures: Okabe and Ito's, which people who see colours differently can tell apart.

Source: Okabe and Ito, "Color universal design" (2008). Yellow is left out: it cannot be seen on white.
"""

PALETTE = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
INK = "#1e2227"  # of text and axes in pictures; on a page the page's own colour takes its place
DASHES = {"-": (), "--": (6, 3), "-.": (6, 3, 1, 3), ":": (2, 3)}  # line styles, drawn and left out by turns


def look(number: int) -> tuple[str, str]:
    """(colour, line style) of one of several curves: no two of the first 24 look alike.

    Example:
      >>> look(0), look(7)
      (('#0072b2', '-'), ('#d55e00', '--'))
    """
    colours, styles = list(PALETTE.values()), list(DASHES)
    return colours[number % len(colours)], styles[number // len(colours) % len(styles)]
