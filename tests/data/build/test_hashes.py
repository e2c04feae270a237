"""Perceptual hashes have the bits of the published formula, and those near to others are all found."""

import functools
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm.data.build import hashes
from nanovlm.data.build.hashes import HashIndex, digest_pixels, digest_text, hash_picture, parse_hashes
from nanovlm.errors import UserError


@functools.cache
def picture(seed, size=(97, 80)):
    """A picture of random colours, of which as much is coarse as is fine, as in photographs."""
    rng, total = np.random.default_rng(seed), 0
    for cells in (3, 6, 12, 24, 48):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total = total + np.asarray(field.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / cells
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) / (high - low) * 255).astype(np.uint8))


def to_bits(text):
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))


@pytest.mark.parametrize("seed", range(5))
def test_the_hash_has_the_bits_of_the_cosine_transform(seed):
    image = picture(seed)
    luma = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.LANCZOS), dtype=np.float64)
    x, u = np.meshgrid(np.arange(64), np.arange(16))
    basis = np.cos(np.pi * (2 * x + 1) * u / 128)
    low = basis @ luma @ basis.T
    assert np.array_equal(to_bits(hash_picture(image)), (low > np.median(low)).flatten())


@pytest.mark.parametrize("seed", range(5))
def test_the_hash_is_that_of_imagehash(seed):
    imagehash = pytest.importorskip("imagehash", reason="needs the package ImageHash, and scipy")
    pytest.importorskip("scipy", reason="ImageHash needs scipy")
    assert hash_picture(picture(seed)) == str(imagehash.phash(picture(seed), hash_size=16))


def test_a_picture_of_one_grey_has_no_hash():
    assert hash_picture(Image.new("RGB", (50, 40), "white")) == ""
    assert hash_picture(Image.new("RGB", (50, 40), (120, 119, 121))) == ""


def test_digests_know_pixels_and_not_files():
    image, files = picture(0), []
    for options in ({"format": "PNG"}, {"format": "PNG", "compress_level": 1}, {"format": "WEBP", "lossless": True}):
        file = io.BytesIO()
        image.save(file, **options)
        files.append(file)
    assert len({file.getvalue() for file in files}) == 3
    assert {digest_pixels(Image.open(file).convert("RGB")) for file in files} == {digest_pixels(image)}
    other = image.copy()
    other.putpixel((50, 30), (1, 2, 3))
    assert digest_pixels(other) != digest_pixels(image)
    turned = Image.frombytes("RGB", (80, 97), image.tobytes())
    assert digest_pixels(turned) != digest_pixels(image)
    assert digest_text(" A red\n circle") == digest_text("a RED circle") != digest_text("a redcircle")


@given(seed=st.integers(0, 2**32 - 1), most_bits=st.sampled_from((0, 1, 15, 16, 31, 40)), tail=st.sampled_from((8, 64)))
@settings(max_examples=12, deadline=None)
def test_all_that_is_near_is_found(seed, most_bits, tail):
    """Hashes lie in clusters around few centres, at all distances up to beyond the limit; many share a band."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2, (6, 256), dtype=np.uint8)
    bits = centres[rng.integers(0, 6, 200)]
    for row in bits:
        row[rng.choice(256, rng.integers(0, 50), replace=False)] ^= 1
    found = np.packbits(bits, axis=1).view(np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes, "TAIL", tail)
        patch.setattr(hashes, "FOUND_AT_ONCE", 50)
        index = HashIndex(most_bits)
        for start in range(0, 150, 7):
            index.add(found[start : min(150, start + 7)])
        assert bool(index.bands) and len(index) == 150
        pairs = set(zip(*(x.tolist() for x in index.find(found[150:])), strict=True))
    near = (bits[150:, None] != bits[None, :150]).sum(-1) <= most_bits
    assert pairs == set(map(tuple, np.argwhere(near).tolist()))


def test_hashes_of_the_text_form_keep_their_distances():
    texts = [hash_picture(picture(seed)) for seed in range(6)]
    parsed = parse_hashes(texts)
    for i in range(6):
        for j in range(6):
            assert hashes.distances(parsed[i], parsed[j]) == (to_bits(texts[i]) != to_bits(texts[j])).sum()
    assert parse_hashes([]).shape == (0, 4)
    with pytest.raises(UserError, match="'abc' is no perceptual hash: it must have 64 hexadecimal digits"):
        parse_hashes(["abc"])
    with pytest.raises(UserError, match="most_bits = 50 must be from 0 to 47"):
        HashIndex(50)
