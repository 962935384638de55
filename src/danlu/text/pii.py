"""What names a person or a machine is masked: e-mail, phone, Chinese ID card, bank card, IP address.

A number is masked only where its checksum says that it is one: an ID card by ISO 7064 MOD 11-2 and its date of birth
(GB 11643-1999), a bank card by Luhn's (ISO/IEC 7812-1). Phone numbers are China's (mobile, and landline with area code)
and those that are written with a leading + (ITU-T E.164). Reserved and private addresses (127.0.0.1, ::1) name nobody.

    masked, found = mask("mail a@b.cn", PiiConfig())         # "mail <email>", {"email": 1}
"""

import ipaddress
import re
from collections.abc import Callable
from datetime import date
from typing import Literal

from pydantic import Field

from danlu.core.config import Config

Kind = Literal["email", "id_card", "bank_card", "phone", "ip"]


class PiiConfig(Config):
    """What is masked, and by what: `{kind}` stands for the kind."""

    kinds: list[Kind] = Field(default=["email", "id_card", "bank_card", "phone", "ip"], min_length=1,
                              description="what is masked")
    mask: str = Field(default="<{kind}>", description="what stands in its place")


_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # 2^(17−i) mod 11
_CHECKS = "10X98765432"
_GIVEN_OUT = ipaddress.ip_network("2000::/3")


def is_id_card(number: str) -> bool:
    """Whether 18 digits (the last may be X) are a Chinese ID card's: a date that exists, and the check digit."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number[:17]))
    return 1850 <= born.year <= 2100 and _CHECKS[total % 11] == number[17].upper()


def is_bank_card(number: str) -> bool:
    """Whether 13 to 19 digits, blanks and hyphens left out, pass Luhn's test and are not one digit over and over."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [2 * digit - 9 if digit > 4 else 2 * digit for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_public_ip(address: str) -> bool:
    """Whether this is an address that the whole world can reach; of version 6 only those that are given out (2000::/3,
    RFC 4291, section 2.4), for `cafe::babe` is rather a name in a program."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_global and (found.version == 4 or found in _GIVEN_OUT)


def is_phone(number: str) -> bool:
    """Whether this is as long as a telephone number: what begins with + has 8 to 15 digits (E.164), or is a sum."""
    return not number.startswith("+") or 8 <= sum(map(str.isdigit, number)) <= 15


def _always(found: str) -> bool:
    return True


_NOT_IN_NUMBER, _NUMBER_ENDS = r"(?=\d)(?<![0-9A-Za-z_])(?<!\d[.+-])", r"(?![0-9A-Za-z_]|[.-]\d)"
# What a number may begin with is looked for first: of most places that is all there is to do.
# Not in an address (/138…, ?id=138…), but behind another number (…/138…), a Chinese word or what says that it is one
_BEGINS = (r"(?=[\d+(（])(?:(?<![\dA-Za-z_.+=/-])|(?<=\d/)|(?<=[^\x00-\x7f][./=-])|(?<=(?i:tel)=)|(?<=(?i:phone)=)|"
           r"(?<=(?i:mobile)=))")
_AREA = r"0(?:10|2\d|[3-9]\d\d)"
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
                    r"(?![A-Za-z0-9])")
_ID_CARD = re.compile(_NOT_IN_NUMBER + r"[1-9]\d{5}[12]\d{3}[01]\d[0-3]\d{4}[\dXx](?![\dA-Za-z])", re.ASCII)
_BANK_CARD = re.compile(
    _NOT_IN_NUMBER + r"(?:[3-6]\d{3}|2[2-7]\d\d)(?:([ -]?)\d{4})(?:\1\d{4})(?:\1\d{4}\1\d{1,3}|\1\d{1,7})" +
    _NUMBER_ENDS, re.ASCII)
_PHONE = re.compile(
    _BEGINS + r"(?:(?:(?:\+|00)?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4}|"
    r"(?:[(（]" + _AREA + r"[)）][ -]?|" + _AREA + r"[ -])\d{7,8}(?:/\d{7,8})*|"
    r"\+[1-9]\d{0,2}(?:[ -]?\(?\d{1,4}\)?){2,4})" + _NUMBER_ENDS, re.ASCII)
_IP = re.compile(
    r"(?=[0-9A-Fa-f:])(?<![A-Za-z0-9_.:-])(?:(?:::[Ff]{4}:)?(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_]|\.\d)|"
    r"(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![A-Za-z0-9_:]))", re.ASCII)
_FINDERS: dict[Kind, tuple[re.Pattern[str], Callable[[str], bool]]] = {  # the form, and the test of what has it
    "email": (_EMAIL, _always), "id_card": (_ID_CARD, is_id_card), "bank_card": (_BANK_CARD, is_bank_card),
    "phone": (_PHONE, is_phone), "ip": (_IP, is_public_ip)}
_ANY_NUMBER = re.compile(r"\d{4}|\d\.\d|[0-9A-Fa-f]:|::|\d[ -]\d")


def mask(text: str, config: PiiConfig) -> tuple[str, dict[str, int]]:
    """The text with what was found masked, and how many of each kind."""
    found: dict[str, int] = {}
    numbers = _ANY_NUMBER.search(text) is not None
    for kind in config.kinds:
        form, test = _FINDERS[kind]
        if not ("@" in text if kind == "email" else numbers):
            continue
        count = 0

        def replaced(match: re.Match[str], test: Callable[[str], bool] = test, kind: str = kind) -> str:
            nonlocal count
            if not test(match[0]):
                return match[0]
            count += 1
            return config.mask.replace("{kind}", kind)

        text = form.sub(replaced, text)
        if count:
            found[kind] = count
    return text, found
