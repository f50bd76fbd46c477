"""Numbers as people read them."""

import math
from typing import Any

UNKNOWN = "–"
PREFIXES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
BIDI_CONTROLS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def fixed(value: float | None, digits: int) -> str:
    """With this number of digits after the point."""
    return UNKNOWN if not is_number(value) else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """Three or four digits and a prefix: "512 k", "4.42 k", "1.11 G"."""
    if value is None or not is_number(value):
        return UNKNOWN
    for size, prefix in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def power(value: float | None) -> str:
    """With a power of ten: "5.1 × 10¹³"."""
    if value is None or not is_number(value):
        return UNKNOWN
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}" if value else "0"


def duration(seconds: float | None) -> str:
    """ "45 s", "1 min 56 s", "3 h 20 min"."""
    if seconds is None or not is_number(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain(text: str) -> str:
    """A name without characters that are invisible or change the direction of what follows: each becomes U+FFFD."""
    return "".join(
        character if character.isprintable() and ord(character) not in BIDI_CONTROLS else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
