"""Text from data, models and file names, made safe to show: nothing in it can steer a terminal or turn lines around.

Rich prints escape sequences as they come, so whatever danlu did not write itself goes through here before it is shown.

    console.print(Text(visible(reason)))
"""

import re

# C0 without tab and line feed, DEL, C1; the signs that set a direction of writing; halves of surrogate pairs, which no
# terminal can be sent.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters (escape sequences of terminals among them) shown as signs."""
    return _HIDDEN.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x7F:
        return "␡"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
