"""The baselines: known sizes, a proper distribution, and an n-gram model that learns and is fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.evals.baselines import ORDER, ByteNgram, gzip_bits, kneser_ney_discounts, xz_bits

TEXT = "春眠不觉晓，处处闻啼鸟。The spring sleeper hardly knows it is dawn. ".encode() * 20


def test_compressors_are_the_command_line_tools() -> None:
    import gzip
    import lzma

    data = bytes(range(256)) * 40
    assert gzip.decompress(gzip.compress(data, compresslevel=9, mtime=0)) == data
    assert gzip_bits(data) == 8 * len(gzip.compress(data, 9))
    assert xz_bits(data) == 8 * len(lzma.compress(data))
    assert gzip_bits(b"a" * 10_000) < 8 * 100


@pytest.mark.parametrize("context", [b"", b"The", "春眠".encode(), b"never seen \xff\x00\x01", TEXT[:40]])
def test_distribution_sums_to_one(context: bytes) -> None:
    model = ByteNgram.train([TEXT, b"another text of the same kind", b"x"])
    distribution = model.distribution(context)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.binary(max_size=12),
       st.integers(1, ORDER))
def test_distribution_sums_to_one_for_any_text(texts: list[bytes], context: bytes, order: int) -> None:
    distribution = ByteNgram.train(texts, order).distribution(context)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1.0, abs=1e-9)


def test_bits_are_the_sum_over_bytes_and_do_not_look_ahead() -> None:
    model = ByteNgram.train([TEXT])
    text = "春眠 hello".encode()
    assert model.bits(text).sum() == pytest.approx(sum(-np.log2(model.distribution(text[:i])[text[i]])
                                                 for i in range(len(text))))
    assert np.array_equal(model.probabilities(text)[:4], model.probabilities(text[:4]))


def test_documents_are_counted_apart() -> None:
    joined, apart = ByteNgram.train([b"abcdabcd" * 9]), ByteNgram.train([b"abcd", b"abcd"] * 9)
    # only in the joined text did an `a` ever follow `abcd`
    assert joined.distribution(b"abcd")[ord("a")] > 0.5 > apart.distribution(b"abcd")[ord("a")]


def test_learns() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, 20_000, np.uint8).tobytes()
    assert ByteNgram.train([noise[:10_000]]).bits(noise[10_000:]).sum() / 10_000 == pytest.approx(8, abs=0.4)
    assert ByteNgram.train([TEXT]).bits(TEXT).sum() / len(TEXT) < 0.2


def test_order_one_is_frequencies() -> None:
    model = ByteNgram.train([b"a" * 700 + b"b" * 300], order=1)
    distribution = model.distribution(b"")
    assert distribution[ord("a")] == pytest.approx(0.7, abs=0.005)
    assert distribution[ord("b")] == pytest.approx(0.3, abs=0.005)


def test_discounts_stay_below_their_counts() -> None:
    for counts in ([1], [2, 2], [5, 9], [1, 1, 1, 2, 3, 4], [1] * 100 + [3] * 50):
        discounts = kneser_ney_discounts(np.array(counts))
        assert discounts[0] == 0 and np.all(discounts[1:] > 0) and np.all(discounts[1:] <= [1, 2, 3])


def test_megabytes_in_seconds() -> None:
    generator = np.random.default_rng(1)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 9), np.uint8)) for _ in range(3000)]
    text = b" ".join(words[i] for i in (generator.pareto(1.2, 300_000) * 30).astype(int) % 3000)
    started = time.process_time()
    model = ByteNgram.train([text])
    rate = model.bits(text[:100_000]).sum() / 100_000
    assert rate < 3
    assert time.process_time() - started < 20
