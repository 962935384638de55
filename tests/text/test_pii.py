"""Masking of personal data. The numbers are made up; their check digits are right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.text.pii import PiiConfig, is_bank_card, is_id_card, mask


@pytest.mark.parametrize("text, masked", [
    ("write to jo.doe+x@mail.example.org.", "write to <email>."), ("邮箱：zhang@qq.com。", "邮箱：<email>。"),
    ("user@localhost, @name, a@b", "user@localhost, @name, a@b"),
    ("身份证号11010519491231002X。", "身份证号<id_card>。"), ("号码 440524188001010014", "号码 <id_card>"),
    ("110105194912310021", "110105194912310021"),  # wrong check digit
    ("11010519491331002X", "11010519491331002X"),  # no month 13
    ("卡号4111 1111 1111 1111，", "卡号<bank_card>，"), ("6222-0212-3456-7894", "<bank_card>"), ("6222-0212-3456-7895",
    "6222-0212-3456-7895"),
    ("6222 0212 3456 7890 128 是", "<bank_card> 是"), ("6222 0212 3456 7890 129", "6222 0212 3456 7890 129"),
    ("5500000000000004", "<bank_card>"), ("4111111111111112", "4111111111111112"),
    ("电话13812345678或+86 138 1234 5678", "电话<phone>或<phone>"), ("010-12345678，(021) 87654321", "<phone>，<phone>"),
    ("(010)12345678、（0755）12345678、010 12345678", "<phone>、<phone>、<phone>"), ("(010 12345678", "(<phone>"),
    ("call +44 20 7946 0958 now", "call <phone> now"), ("订单号 2138123456789", "订单号 2138123456789"),
    ("12345678901", "12345678901"), ("1.13812345678", "1.13812345678"),
    ("from 8.8.8.8:53 to 192.168.0.1", "from <ip>:53 to 192.168.0.1"),
    ("from 8.8.8.8 to 192.168.0.1, 127.0.0.1", "from <ip> to 192.168.0.1, 127.0.0.1"), ("version 1.2.3.4.5",
    "version 1.2.3.4.5"),
    ("at 2001:4860:4860::8888.", "at <ip>."), ("::1 and std::vector and 10:30:45", "::1 and std::vector and 10:30:45"),
    ("+100000 users, +20 5 3, v +25 000", "+100000 users, +20 5 3, v +25 000"),
    ("a::b, cafe::babe, dead::beef:1", "a::b, cafe::babe, dead::beef:1"), ("2a02::1", "<ip>"),
    ("电话：13812345678/13912345678", "电话：<phone>/<phone>"),
    ("手机 138 1234 5678/139 1234 5678", "手机 <phone>/<phone>"),
    ("010-12345678/87654321", "<phone>"), ("tel=13812345678&id=13812345678", "tel=<phone>&id=13812345678"),
    ("86-13812345678, 008613812345678", "<phone>, <phone>"),
    ("电话-13812345678，a-13812345678", "电话-<phone>，a-13812345678"),
    ("https://a.cn/13812345678.html", "https://a.cn/13812345678.html"),
    ("_zhang@y.com, 联系-a@b.com", "<email>, 联系<email>"), ("a@-, -@b, 1@2", "a@-, -@b, 1@2"),
    ("no.11010519491231002X, -11010519491231002X", "no.<id_card>, -<id_card>"),
    ("7-11010519491231002X, 7.11010519491231002X", "7-11010519491231002X, 7.11010519491231002X"),
    ("from ::ffff:8.8.8.8 and ::ffff:10.0.0.1", "from <ip> and ::ffff:10.0.0.1"),
    ("256.1.1.1 999.8.8.8", "256.1.1.1 999.8.8.8")])
def test_masking(text: str, masked: str) -> None:
    assert mask(text, PiiConfig())[0] == masked


def test_counts_kinds_and_the_mask() -> None:
    text = "a@b.cn, c@d.cn, 13812345678"
    assert mask(text, PiiConfig()) == ("<email>, <email>, <phone>", {"email": 2, "phone": 1})
    assert mask(text, PiiConfig(kinds=["phone"], mask="[{kind}]")) == ("a@b.cn, c@d.cn, [phone]", {"phone": 1})


@given(digits=st.lists(st.integers(0, 9), min_size=12, max_size=18))
def test_luhn_has_one_check_digit(digits: list[int]) -> None:
    """And any one wrong digit is seen."""
    body = "".join(map(str, digits))
    right = [check for check in "0123456789" if is_bank_card(body + check)]
    assert len(right) == (1 if len(set(body)) > 1 or (right and right[0] != body[0]) else 0)
    if right:
        other = str((int(body[3]) + 1) % 10)
        assert not is_bank_card(body[:3] + other + body[4:] + right[0])


@given(place=st.integers(0, 999999), day=st.dates(), order=st.integers(0, 999))
def test_an_id_card_has_one_check_digit(place: int, day, order: int) -> None:
    body = f"{place:06d}{day.year:04d}{day.month:02d}{day.day:02d}{order:03d}"
    right = [check for check in "0123456789X" if is_id_card(body + check)]
    assert len(right) == (1850 <= day.year <= 2100)


@given(text=st.text(st.sampled_from("1386@.ab:+- 电"), max_size=50))
def test_masking_twice_is_masking_once(text: str) -> None:
    once = mask(text, PiiConfig(mask="〈{kind}〉"))[0]
    assert mask(once, PiiConfig(mask="〈{kind}〉"))[0] == once
