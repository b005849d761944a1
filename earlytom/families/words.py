"""Numbers in English words."""

from __future__ import annotations

_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_SMALL = f"zero one two three four five six seven eight nine {_TEENS}".split()
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in British English: "three hundred and twenty-one"."""
    if number >= 1000:
        high, low = divmod(number, 1000)
        joint = "" if not low else f" and {in_words(low)}" if low < 100 else f", {in_words(low)}"
        return f"{in_words(high)} thousand{joint}"
    if number >= 100:
        high, low = divmod(number, 100)
        return f"{_SMALL[high]} hundred" + (f" and {in_words(low)}" if low else "")
    if number >= 20:
        high, low = divmod(number, 10)
        return _TENS[high - 2] + (f"-{_SMALL[low]}" if low else "")
    return _SMALL[number]
