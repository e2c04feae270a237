"""Damaged files of every kind, end to end: nothing raises, nothing hangs, every sample is counted, good ones trained.

The seed is another one in each run; a failure prints it, and `FUZZ_SEEDS` below can be set to it.
"""

import io
import json
import random
import tarfile
import time
from collections import Counter

import pytest
from PIL import Image

from nanovlm.config import DataConfig
from nanovlm.data.loader import Loader
from nanovlm.data.records import to_sample
from nanovlm.data.source_lines import TextFiles
from nanovlm.data.source_parquet import Parquet
from nanovlm.data.source_tar import Tar
from nanovlm.data.types import IGNORE
from tests.conftest import noise

FUZZ_SEEDS = [time.time_ns() % 10**9]
CONFIG = DataConfig(row_length=256, batch_rows=4, pack_buffer=32, max_bad_fraction=1.0)


@pytest.fixture(params=FUZZ_SEEDS, ids=lambda seed: "seed")
def rng(request):
    print(f"seed {request.param}")
    return random.Random(request.param)


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def damage_bytes(data, rng):
    """Cut a file, overwrite some of it, or replace it."""
    data = bytearray(data)
    choice = rng.randrange(4)
    if choice == 0:
        return bytes(data[: rng.randrange(len(data))])
    if choice == 1:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    return rng.randbytes(rng.randint(0, 100)) if choice == 2 else b""


def word(rng, number):
    """A text that no other sample has."""
    return f"n{number} " + "".join(rng.choices("abc äß日\n<|>{}\\\"'", k=rng.randint(0, 30)))


def train_all(source, processor, num_workers):
    """Read one epoch; return the counts and how often which trained text was seen, with the tiles of its document."""
    loader = Loader(
        source,
        lambda raw: processor.document(to_sample(raw)),
        DataConfig(**{**vars(CONFIG), "num_workers": num_workers}),
        processor.config.pad_token_id,
        num_epochs=1,
    )
    seen = Counter()
    try:
        for [batch] in loader:
            num_tokens = (batch.input_ids == processor.config.image_token_id).sum()
            assert num_tokens == len(batch.pixel_values) * processor.config.num_image_tokens
            for document in range(int(batch.doc_ids.max()) + 1):
                labels = batch.labels[(batch.doc_ids == document) & (batch.labels != IGNORE)].tolist()
                seen[processor.tokenizer.decode(labels, skip_special_tokens=False)] += 1
    finally:
        loader.close()
    counts = loader.counts
    skipped = counts["filtered"] + counts["too long"] + counts["corrupt"]
    assert counts["damaged"] == len(source.damaged)
    assert counts["read"] == len(source) == counts["documents"] + skipped
    assert counts["documents"] == counts["packed"] == seen.total() and not loader.slots[0].buffer
    return counts, seen


def check(source, processor, good, may_be_good=()):
    """Train without and with workers: the good exactly once with their own text, others not at all or so too."""
    results = [train_all(source, processor, num_workers) for num_workers in (0, 2)]
    assert results[0] == results[1]
    _counts, seen = results[0]
    expected = Counter(f"{answer}<end_of_utterance>" for answer in good)
    assert max(expected.values()) == 1
    assert not expected - seen, "a good sample was not trained"
    assert not (seen - expected) - Counter(f"{answer}<end_of_utterance>" for answer in may_be_good), (
        "a bad sample was trained"
    )


def damage_line(record, folder, rng, number):
    """Damage a record; return its line and the answer that it may still train, or None."""
    answer = record["texts"][0]["assistant"]
    line = json.dumps(record).encode()
    choice = rng.randrange(9)
    if choice == 0:
        return line[: rng.randrange(1, len(line))], None
    if choice == 1:
        noise_bytes = rng.randbytes(rng.randint(1, 60)).replace(b"\n", b"").replace(b"\r", b"")
        return noise_bytes.strip() or b"\xff", None
    if choice == 2:
        return json.dumps(record | {"images": ["gone.png"]}).encode(), None
    if choice == 3:
        (folder / f"bad{number}.png").write_bytes(damage_bytes(encode(noise(number, 16)), rng))
        return json.dumps(record | {"images": [f"bad{number}.png"]}).encode(), answer
    if choice == 4:
        wrong = rng.choice([None, 3, "text", [], {}, [3], [[]], True, 1e400, [{"user": 3, "assistant": None}]])
        name = rng.choice(["texts", "images", "independent", "image"])
        return json.dumps({**record, name: wrong}).encode(), answer
    if choice == 5:
        return json.dumps(
            {"messages": [{"role": rng.choice(["robot", None, 3, []]), "content": answer}]}
        ).encode(), None
    if choice == 6:
        return json.dumps({"texts": [{"user": "?", "assistant": rng.choice(["", " ", "\n\t"])}]}).encode(), None
    if choice == 7:
        return json.dumps({"texts": [{"user": "x" * 100_000, "assistant": answer}]}).encode(), None
    return b'{"texts": ' + b"[" * rng.choice([10, 100_000]) + b"}", None


@pytest.fixture
def jsonl(tmp_path, rng):
    """200 lines, a third of them damaged; the answers of the good and of those that may survive their damage."""
    sizes = [(1, 1), (10_000, 50), (50, 3000), (16, 16), (5, 40)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (rng.randrange(256), 0, 0)).save(tmp_path / f"{i}.png")
    bad = set(rng.sample(range(200), rng.randint(60, 70)))
    lines, good, may_be_good = [], [], []
    for number in range(200):
        answer = word(rng, number)
        strange = rng.choice(["<end_of_utterance>", "<|assistant|>", "<|pad|>", ""])
        record = {"texts": [{"user": f"{strange}{word(rng, number)}", "assistant": answer + strange}]}
        if rng.random() < 0.7:
            record["images"] = [f"{rng.randrange(len(sizes))}.png" for _ in range(rng.randint(1, 3))]
        if number in bad:
            line, survivor = damage_line(record, tmp_path, rng, number)
            lines.append(line)
            may_be_good += [] if survivor is None else [survivor]
        else:
            lines.append(json.dumps(record, ensure_ascii=rng.random() < 0.5).encode())
            good.append(answer + strange)
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "data.jsonl", good, may_be_good


def test_jsonl(jsonl, processor):
    path, good, may_be_good = jsonl
    source = TextFiles(path)
    assert len(source) == 200
    check(source, processor, good, may_be_good)


def test_tar_that_is_cut_anywhere(tmp_path, processor, rng):
    file = io.BytesIO()
    answers, ends = [], []
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for number in range(30):
            answers.append(word(rng, number))
            texts = json.dumps({"texts": [{"user": "?", "assistant": answers[-1]}]}).encode()
            for name, data in ((f"{number:03}.json", texts), (f"{number:03}.png", encode(noise(number)))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            ends.append(tar.offset - -len(data) % tarfile.BLOCKSIZE)  # without the zeros that fill the last block
    whole = file.getvalue()
    # Of a single sample it could not be told whether it is whole.
    for cut in (rng.randrange(ends[1], ends[-1]), rng.choice(ends[1:-1]), len(whole)):
        print(f"cut at {cut} of {len(whole)}")
        (tmp_path / "shard.tar").write_bytes(whole[:cut])
        source = Tar(tmp_path / "shard.tar")
        assert bool(source.damaged) == (cut < len(whole))
        check(source, processor, [answer for answer, end in zip(answers, ends, strict=True) if end <= cut])


def test_parquet_with_broken_images(tmp_path, processor, rng):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows, good, may_be_good = [], [], []
    for number in range(60):
        answer, image = word(rng, number), encode(noise(number), rng.choice(["PNG", "JPEG", "WEBP"]))
        is_bad = rng.random() < 0.3
        (may_be_good if is_bad else good).append(answer)
        image = {"bytes": damage_bytes(image, rng) if is_bad else image, "path": None}
        rows.append({"images": [image], "texts": [{"user": "?", "assistant": answer}]})
    path = tmp_path / "data.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=7)
    check(Parquet(path), processor, good, may_be_good)
