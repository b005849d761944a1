"""The colours of all drawings, and the opacity of dimmed cells.

Pages use them as `var(--NAME)` from `css`, light or dark by the reader's preference; pictures are light. Charts use
the colour-blind-safe palette of Okabe and Ito.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#fbfaf8",
    "card": "#ffffff",
    "ink": "#1d1c1a",
    "soft": "#6d6a64",
    "line": "#e4e0d9",
    "accent": "#b4491f",
    "on": "#ffffff",
    "wash": "#f1ede6",
    "bad": "#a3182b",
    "good": "#2f6b3a",
}
DARK = {
    "paper": "#161513",
    "card": "#1f1d1b",
    "ink": "#eeebe5",
    "soft": "#9c978e",
    "line": "#35322e",
    "accent": "#f08a5d",
    "on": "#1d120c",
    "wash": "#2a2724",
    "bad": "#ff8b94",
    "good": "#8fce9b",
}
DIMMED = 0.74  # opacity of the paper colour over a cell that was not kept

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PINK, BLACK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#000000", "#999999"


def css() -> str:
    """The colours as CSS variables, and `--dimmed`."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in one.items()) for one in (LIGHT, DARK))
    return (
        f":root{{color-scheme:light dark;{light}--dimmed:{DIMMED}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )


def rgb(name: str) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a colour of `LIGHT`."""
    red, green, blue = bytes.fromhex(LIGHT[name][1:])
    return red, green, blue
