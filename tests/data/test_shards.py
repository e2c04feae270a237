"""Tar shards as a stream: each record once a pass, exact resume, losses counted, shards written the same each time."""

import contextlib
import dataclasses
import fcntl
import functools
import http.server
import io
import itertools
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data import shard_cache, shards
from nanovlm.data.loader import Loader
from nanovlm.data.members import members_of
from nanovlm.data.shard_cache import CacheOptions, fetch, find, read_whole
from nanovlm.data.shard_index import format_members, parse_index, parse_members
from nanovlm.data.shard_writer import ShardSize, ShardWriter
from nanovlm.data.source import Order
from nanovlm.data.source_lines import TextFiles
from nanovlm.data.source_shards import ShardOptions, Shards, check_header
from nanovlm.data.source_tar import Tar
from nanovlm.data.sources import open_source, open_sources
from nanovlm.data.types import Document
from nanovlm.errors import UserError
from tests.conftest import noise

SHUFFLED, IN_ORDER = Order(0, shuffle=True), Order()
NUM, PER_SHARD = 47, 5  # ten shards, the last of two samples


def picture(number):
    file = io.BytesIO()
    noise(number).save(file, "PNG")
    return file.getvalue()


def record(number):
    return {"texts": [{"user": f"question {number}", "assistant": f"answer {number}"}], "images": [picture(number % 3)]}


def write(folder, num=NUM, per_shard=PER_SHARD):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, ShardSize(per_shard)) as writer:
        for number in range(num):
            writer.write(f"a/{number:04}", members_of(record(number)))
    return writer.shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards with an index."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write(folder)
    shards.index(shards.IndexConfig(folder))
    return folder


def opened(name, order=SHUFFLED, window=3, **cache):
    return Shards(str(name), order, ShardOptions(window, CacheOptions(**cache)))


def number_of(raw):
    return int(raw["texts"][0]["user"].split()[1])


def numbers(source, refs):
    return [number_of(source.read(ref.key)) for ref in refs]


def take(source, slots, num_slots, num, start=None):
    return list(itertools.islice(source.refs(slots, num_slots, start), num))


def read_all(source, num=NUM):
    return numbers(source, take(source, [0], 1, num))


# --- reading -------------------------------------------------------------------------------------------------


def test_a_folder_with_an_index_is_a_stream_of_what_is_in_its_shards(folder):
    source = open_source(str(folder))
    assert type(source) is Shards and source.counts == [5] * 9 + [2] and not source.damaged
    refs = take(source, [0], 1, NUM + 1)
    assert [ref.epoch for ref in refs] == [0] * NUM + [1]
    assert [source.read(ref.key) for ref in refs[:NUM]] == [record(number) for number in range(NUM)]
    assert refs[7].where == f"sample a/0007 of {folder}/000001.tar"


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("num_slots", [1, 2, 4, 5, 12])
def test_each_record_is_read_once_a_pass(folder, num_slots, window):
    """Also with more slots than shards, of which some share a line, and whatever slots are on a rank."""
    source, seen, passes = opened(folder, window=window), {0: [], 1: []}, {}
    for slots in ([*range(0, num_slots, 2)], [*range(1, num_slots, 2)]):
        if not slots:
            continue
        for ref in source.refs(slots, num_slots):
            if ref.epoch > 1:
                passes[ref.slot] = True
            elif ref.slot not in passes:
                seen[ref.epoch].append(number_of(source.read(ref.key)))
            if len(set(passes) & set(slots)) == len(slots):
                break
    assert sorted(seen[0]) == sorted(seen[1]) == [*range(NUM)] and seen[0] != seen[1]


def test_each_micro_batch_reads_shards_of_its_own_and_mixes_those_of_a_window(folder):
    source = opened(folder)
    read = {slot: [ref.key[0] for ref in take(source, [slot], 2, 22) if ref.epoch == 0] for slot in (0, 1)}
    assert len({*read[0]}) == len({*read[1]}) == 5 and not {*read[0]} & {*read[1]}
    for shards_read in read.values():
        first, rest = shards_read[:15], shards_read[15:]
        assert len({*first}) == 3 and not {*first} & {*rest}  # a window of three, of five samples or two
        assert len(list(itertools.groupby(first))) > 5  # not one shard after the other
    assert [ref.key for ref in take(source, [0], 1, 9)] != [
        ref.key for ref in take(opened(folder, Order(1, True)), [0], 1, 9)
    ]
    assert numbers(source, take(opened(folder, IN_ORDER), [0], 1, 60)) == [*range(NUM), *range(13)]


@pytest.mark.parametrize(("slots", "num_slots"), [([0], 1), ([1, 3], 4), ([5], 12)])
def test_it_goes_on_where_it_was(folder, tmp_path, slots, num_slots):
    """By the places in its state, and without them, as on another rank; with an index, and without."""
    bare = tmp_path / "bare"
    write(bare)
    without = [opened(f"{bare}/*.tar") for _ in range(2)]
    for source, again in ((opened(folder), opened(folder)), without):
        refs = take(source, slots, num_slots, 120)
        for at in (1, 14, 30, 100):
            at -= at % len(slots)
            after = json.loads(json.dumps(refs[at + len(slots) - 1].after))
            expected = [ref[:6] for ref in refs[at + len(slots) :]]
            for start in (after, after | {"places": {}}):
                assert [ref[:6] for ref in take(again, slots, num_slots, len(expected), start)] == expected


def test_going_on_opens_only_the_shards_that_come(folder, monkeypatch):
    after = take(opened(folder), [0], 1, 100)[-1].after
    source, looked_at = opened(folder), []
    find = source._find_samples
    monkeypatch.setattr(source, "_find_samples", lambda shard: looked_at.append(shard) or find(shard))
    take(source, [0], 1, 1, {"number": after["number"], "places": {}})
    assert len(looked_at) == 1
    source, looked_at = opened(folder), []
    source.counts = [None] * 10  # without an index it looks at the window that it is in
    find = source._find_samples
    monkeypatch.setattr(source, "_find_samples", lambda shard: looked_at.append(shard) or find(shard))
    take(source, [0], 1, 1, after)
    assert len(looked_at) == 3


def numbered(raw):
    ids = torch.full((5 + number_of(raw) % 7,), number_of(raw))
    tiles = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    return Document(ids, ids, torch.zeros(len(ids), dtype=torch.int32), tiles)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_with_other_workers_and_ranks(folder, num_workers):
    config = DataConfig(row_length=32, batch_rows=2, pack_buffer=6, num_workers=num_workers)
    make = lambda slots: Loader(opened(folder), numbered, config, 0, slots, 2)  # noqa: E731
    whole = make((0, 1))
    steps = [next(whole) for _ in range(6)]
    first = make((0, 1))
    for _ in range(3):
        next(first)
    ranks = [make((0,)), make((1,))]
    for rank in ranks:
        rank.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[3:]:
        for expected, rank in zip(step, ranks, strict=True):
            assert torch.equal(next(rank)[0].input_ids, expected.input_ids)
    states = ranks[0].state_dict() | ranks[1].state_dict()
    again = make((0, 1))
    again.load_state_dict(states)
    assert torch.equal(next(again)[1].input_ids, next(whole)[1].input_ids)
    for loader in (whole, first, again, *ranks):
        loader.close()


# --- losses --------------------------------------------------------------------------------------------------


def losses(source, num=NUM):
    found = []
    for ref in take(source, [0], 1, num):
        try:
            source.read(ref.key)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_is_damaged_is_a_loss_that_is_named(tmp_path):
    folder = tmp_path / "shards"
    write(folder)
    shards.index(shards.IndexConfig(folder))
    whole = (folder / "000002.tar").read_bytes()
    (folder / "000002.tar").write_bytes(whole[:-2000])  # in its last member
    (folder / "000005.tar").unlink()
    (folder / "000007.tar").write_bytes((folder / "000009.tar").read_bytes())
    (folder / "000003.idx").write_text("v1.2 1\njson 512 x\n")  # found by the headers
    found = losses(opened(folder, IN_ORDER))
    assert len(found) == 1 + 5 + 5
    assert "sample a/0014 of" in found[0] and "cut off" in found[0]
    assert all("000005.tar" in sentence for sentence in found[1:6])
    assert "is not where the index says: the shard has changed" in " ".join(found[6:])
    (folder / "index.json").unlink()
    source = Shards(f"{folder}/{{000000..000009}}.tar", IN_ORDER)  # without an index
    found = losses(source, 45)
    assert len(found) == 2 and "4 whole samples are before that" in found[0] and "No such file" in found[1]
    assert "the whole shard is lost, and nothing tells how many records it has: " in found[1]


@pytest.mark.parametrize("told", [b"00000000019", b"00000000006", b"", b"0000000000x"])
def test_a_size_that_is_another_or_none_is_told(told):
    head = tarfile.TarInfo("a.json")
    head.size = 5
    header = head.tobuf()
    check_header(header, "a.json", 5, "a")
    with pytest.raises(UserError, match="a is not where the index says"):
        check_header(header[:124] + told.ljust(12, b"\0") + header[136:], "a.json", 5, "a")


def test_an_index_that_says_too_much_loses_nothing_in_silence(tmp_path):
    folder = tmp_path / "shards"
    write(folder)
    shards.index(shards.IndexConfig(folder))
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace('"nsamples": 2', '"nsamples": 4'))
    found = losses(opened(folder, IN_ORDER), NUM + 2)
    assert found == [f"{folder}/000009.tar has 2 samples, and its index says 4"] * 2


@pytest.mark.parametrize("has_idx", [True, False])
def test_an_index_that_says_too_little_loses_nothing_in_silence(folder, tmp_path, has_idx):
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "index.json").read_text()
    (other / "index.json").write_text(text.replace('"nsamples": 5', '"nsamples": 3', 1))
    if not has_idx:
        (other / "000000.idx").unlink()
    found = losses(opened(other, IN_ORDER), NUM - 2)
    told = f"{other}/000000.tar has 5 samples, and its index says 3: the last 3 are not read"
    assert found == [f"{told}, as the shard has changed since, so write its index anew"]


def test_an_index_that_cannot_be_read_is_done_without(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "000000.idx").unlink()
    (other / "000000.idx").mkdir()
    source = opened(other, IN_ORDER)
    assert numbers(source, take(source, [0], 1, NUM)) == [*range(NUM)]


def test_a_loader_counts_the_losses(tmp_path, capsys):
    write(tmp_path, 10)
    shards.index(shards.IndexConfig(tmp_path))
    (tmp_path / "000001.tar").write_bytes((tmp_path / "000001.tar").read_bytes()[:4000])
    config = DataConfig(row_length=32, batch_rows=9, pack_buffer=20, max_bad_fraction=0.9)
    loader = Loader(opened(tmp_path), numbered, config, 0, num_epochs=1)
    list(loader)
    assert loader.counts["read"] == 10 and 0 < loader.counts["corrupt"] == 10 - loader.counts["packed"]
    assert "skipped as corrupt: " in capsys.readouterr().out


def count_all(source, most_lost=1.0, **config):
    """Read a pass over shards without an index with a loader; return what it counts."""
    source.options = source.options._replace(most_lost=most_lost)
    loader = Loader(
        source, numbered, DataConfig(row_length=32, batch_rows=9, pack_buffer=20, **config), 0, num_epochs=1
    )
    list(loader)
    return loader.counts


def test_a_shard_without_an_index_is_lost_as_a_whole(folder, remote, tmp_path, capsys):
    """It is no record: how many there were nobody knows, and the share of lost shards decides whether a run goes on."""
    fs, name = remote[0], "memory://data/{000000..000009}.tar"
    for file in ("index.json", "000004.tar", "000007.tar"):
        fs.rm(f"/data/{file}")
    fs.pipe("/data/000002.tar", b"no tar" * 1000)
    counts = count_all(opened(name, folder=str(tmp_path)), 0.3)
    assert (counts["read"], counts["documents"], counts["damaged"], counts["corrupt"]) == (NUM - 15, NUM - 15, 3, 0)
    said = capsys.readouterr().out.splitlines()
    lost = "the whole shard is lost, and nothing tells how many records it has: there is no"
    assert f"skipped as damaged: {name}, memory://data/000004.tar: {lost} memory://data/000004.tar" in said
    assert sum("the whole shard is lost" in line for line in said) == 3
    fails = r"\d of the 10 shards of memory://data/\S+ cannot be read at all, more than .* = 0.2 allows: .*000\d\.tar"
    with pytest.raises(ValueError, match=fails):
        count_all(opened(name, folder=str(tmp_path)), 0.2)
    half = opened(name, folder=str(tmp_path))  # of a rank that reads half of the shards
    half.options = half.options._replace(most_lost=0.2)
    with pytest.raises(ValueError, match="2 of the 10 shards"):
        [half.read(ref.key) for ref in take(half, [0], 2, NUM) if ref.key[2]]
    for number in range(10):
        fs.store.pop(f"/data/{number:06}.tar", None)
    with pytest.raises(
        ValueError, match=r"^10 of the 10 shards of \S+ cannot be read at all: there is no memory://data"
    ):
        count_all(opened(name, folder=str(tmp_path)), max_bad_fraction=1.0)


def test_shards_without_samples_are_named(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "000000.idx").write_text("v1.2 0\n")
    (tmp_path / "index.json").write_text(
        '{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "000000.tar", "nsamples": 0}]}'
    )
    with pytest.raises(ValueError, match="has no samples in the 1 shards"):
        take(opened(tmp_path), [0], 1, 1)


@pytest.mark.parametrize("url", ["../a.tar", "a/../../b.tar", "a\\b.tar", "/", "/etc/..", "a//b.tar", 3])
def test_an_index_names_files_beside_it(url):
    index = {"__kind__": "wids-shard-index-v1", "shardlist": [{"url": url, "nsamples": 1}]}
    with pytest.raises(ValueError, match="url of shard 0 must be the name of a file beside it"):
        parse_index(json.dumps(index).encode(), "index.json")
    for url, name in {"b/a.tar": "b/a.tar", "/etc/a.tar": "a.tar", "http://a.org/b/a.tar": "a.tar"}.items():
        index["shardlist"] = [{"url": url, "nsamples": 3}]
        assert parse_index(json.dumps(index).encode(), "index.json")[0].name == name


def test_an_index_is_what_it_must_be():
    for data in (b"{", b"[]", b'{"__kind__": "wids-shard-index-v1", "shardlist": []}'):
        with pytest.raises(ValueError, match=r"^index.json is n"):
            parse_index(data, "index.json")
    for text in ("", "v1.2 2\n", "v1.2 1\njson 5 1 a.json\n", "v1.2 1\njson 512 -1 a.json\n", "v1.2 1\njson 512\n"):
        with pytest.raises(ValueError, match=r"^a.idx is no index of a shard"):
            parse_members(text.encode(), "a.idx")


# --- writing -------------------------------------------------------------------------------------------------


def test_others_read_what_is_written(folder):
    """tarfile finds the same members in the same places as the index says; webdataset the same samples."""
    for name in ("000000", "000009"):
        with tarfile.open(folder / f"{name}.tar") as tar:
            expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
        lines = (folder / f"{name}.idx").read_text().splitlines()
        assert lines[0] == f"v1.2 {len(lines) - 1}"
        told = [line.split()[i : i + 4] for line in lines[1:] for i in (0, 4)]
        assert [(name, int(offset), int(size)) for _suffix, offset, size, name in told] == expected
    index = json.loads((folder / "index.json").read_text())
    assert sum(shard["nsamples"] for shard in index["shardlist"]) == NUM
    assert all(os.path.getsize(folder / shard["url"]) == shard["filesize"] for shard in index["shardlist"])
    assert len(Tar(folder)) == NUM  # our reader of tar files without an index
    wds = pytest.importorskip("webdataset", reason="needs webdataset to compare with")
    samples = list(wds.WebDataset(f"{folder}/{{000000..000009}}.tar", shardshuffle=False))
    assert [json.loads(sample["json"]) | {"images": [sample["0.png"]]} for sample in samples] == [
        record(number) for number in range(NUM)
    ]


def test_shards_are_of_limited_size(tmp_path):
    def sizes(**limits):
        folder = tmp_path / str(limits)
        folder.mkdir()
        with ShardWriter(folder, ShardSize(**limits)) as writer:
            for number, length in enumerate([100, 4000, 20_000, 100, 9000, 100]):
                writer.write(str(number), {"txt": bytes(length), "json": b"{}"})
        assert [os.path.getsize(folder / shard.name) for shard in writer.shards] == [s.num_bytes for s in writer.shards]
        return [shard.num_samples for shard in writer.shards], [shard.num_bytes for shard in writer.shards]

    assert sizes(max_samples=4)[0] == [4, 2]
    counts, lengths = sizes(max_mb=0.016)
    assert counts == [2, 1, 3] and lengths == [8704, 23_040, 15_872]  # one sample is too large by itself


def test_a_name_with_a_space_is_found_by_its_header(tmp_path):
    assert format_members([("a b", [("json", 512, 2)])]) is None
    with ShardWriter(tmp_path) as writer:
        writer.write("a b", members_of(record(3)))
    shards.index(shards.IndexConfig(tmp_path))
    assert not list(tmp_path.glob("*.idx")) and read_all(opened(tmp_path), 1) == [3]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{**record(number), "images": [f"{number}.png"]} for number in range(23)]
    for number in range(23):
        (tmp_path / f"{number}.png").write_bytes(picture(number % 3))
    (tmp_path / "4.png").unlink()
    (tmp_path / "11.png").write_bytes(b"no picture")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_command_that_was_killed_writes_the_same_bytes(lines, tmp_path, monkeypatch, capsys):
    """At any record; the losses are counted as in one go."""
    limits = ["--max-samples", "4", "--max-bad-fraction", "0.2"]
    shards.main(["write", str(lines), str(tmp_path / "whole"), *limits])
    expected, said = contents(tmp_path / "whole"), capsys.readouterr().out
    assert "wrote 21 of 23 records to 6 shards" in said and ".progress.jsonl" not in expected
    for at in (0, 3, 4, 9, 12, 20):
        config = shards.WriteConfig(4, source=str(lines), folder=tmp_path / f"cut{at}", max_bad_fraction=0.2)
        read = TextFiles.read

        def stop(self, key, at=at, read=read):
            if key == at:
                raise KeyboardInterrupt
            return read(self, key)

        monkeypatch.setattr(TextFiles, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            shards.write(config)
        monkeypatch.undo()
        assert not (config.folder / "index.json").exists() and not list(config.folder.glob(".*.tmp"))
        if list(config.folder.glob("*.tar")):
            with pytest.raises(ValueError, match=r"begun with other settings \(max_samples: 4 against 7"):
                shards.write(dataclasses.replace(config, max_samples=7))
        shards.write(config)
        assert contents(config.folder) == expected
        assert "wrote 21 of 23 records to 6 shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"index.json is there already"):
        shards.write(config)


def test_what_is_written_is_the_record_of_any_layout(tmp_path):
    parts = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "noise"}]
    pair = {"prompt": "which?", "chosen": "this", "rejected": "that", "image": picture(2)}
    rows = [record(5), {"messages": messages}, pair, {"text": "no picture"}]
    with ShardWriter(tmp_path) as writer:
        for number, raw in enumerate(rows):
            writer.write(str(number), members_of(raw))
    shards.index(shards.IndexConfig(tmp_path))
    source = opened(tmp_path, IN_ORDER)
    first, second, third, fourth = (source.read(ref.key) for ref in take(source, [0], 1, 4))
    assert first == record(5) and fourth == {"text": "no picture"}
    assert second["images"] == [picture(1)] and second["messages"][0]["content"][0] == {"type": "image"}
    assert third == {"prompt": "which?", "chosen": "this", "rejected": "that", "images": [picture(2)]}


def test_a_command_that_lost_too_much_goes_on_with_a_larger_share(tmp_path, monkeypatch):
    monkeypatch.setattr("nanovlm.data.shard_writer.JUDGED_AFTER", 4)
    rows = [record(0), record(1), {"texts": 3}, record(2), {"texts": 4}, record(3)]
    rows = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = shards.WriteConfig(1, source=str(tmp_path / "a.jsonl"), folder=tmp_path / "out", max_bad_fraction=0.3)
    with pytest.raises(ValueError, match="2 of 5 records are unusable"):
        shards.write(config)
    shards.write(dataclasses.replace(config, max_bad_fraction=0.5))
    assert len(open_source(str(tmp_path / "out")).files) == 4  # pyright: ignore[reportAttributeAccessIssue]


def test_mistakes_of_a_command_are_named(lines, tmp_path):
    config = functools.partial(shards.WriteConfig, source=str(lines), folder=tmp_path / "out")
    for change, sentence in {
        "max_samples": (0, "--max-samples 0 must be at least 1"),
        "max_mb": (0, "--max-mb 0 must be above 0"),
        "num": (-1, "--num -1 must be at least 0"),
        "max_bad_fraction": (0.01, "2 of 23 records are unusable, more than --max-bad-fraction 0.01 allows"),
    }.items():
        with pytest.raises(ValueError, match=sentence[1]):
            shards.write(config(**{change: sentence[0]}))
    with pytest.raises(ValueError, match="2 of 23 records are unusable"):
        shards.write(config(max_samples=7))  # nothing was written, so it is not held to the settings before
    with pytest.raises(ValueError, match=r"is there, which an index would hide from readers: name a new or empty"):
        shards.write(config(folder=lines.parent, max_bad_fraction=0.2))
    with pytest.raises(ValueError, match="there is no command 'wirte'; there are write, index"):
        shards.main(["wirte"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.tar files"):
        shards.index(shards.IndexConfig(tmp_path / "empty"))


# --- at an address -------------------------------------------------------------------------------------------


@pytest.fixture
def remote(folder, monkeypatch):
    """The shards in the memory of fsspec, and how often each is fetched."""
    monkeypatch.setattr("nanovlm.data.shard_cache.WAITS", (0.0, 0.0))
    fs, fetched = fsspec.filesystem("memory"), Counter()
    fs.store.clear()
    for path in folder.iterdir():
        fs.pipe(f"/data/{path.name}", path.read_bytes())
    get = type(fs).get_file
    count = lambda self, path, *rest, **more: fetched.update([path[-10:]]) or get(self, path, *rest, **more)  # noqa: E731
    monkeypatch.setattr(type(fs), "get_file", count)
    return fs, fetched


@pytest.mark.parametrize("name", ["memory://data", "memory://data/{000000..000009}.tar", "memory://data/*.tar"])
def test_an_address_is_as_a_folder(folder, remote, tmp_path, name):
    fs, fetched = remote
    source = open_source(name, order=SHUFFLED, shards=ShardOptions(3, CacheOptions(str(tmp_path))))
    here = opened(folder)
    assert numbers(source, take(source, [0], 1, 60)) == numbers(here, take(here, [0], 1, 60))
    assert set(fetched.values()) == {1}  # a second pass fetches nothing
    again = Shards(name, SHUFFLED, ShardOptions(3, CacheOptions(str(tmp_path))))
    fs.pipe("/data/000000.tar", fs.cat("/data/000001.tar"))
    assert sorted(fetched) == sorted(path.name for path in folder.glob("*.tar"))
    read = [ref for ref in take(again, [0], 1, NUM) if ref.key[0] == 0]
    with pytest.raises(ValueError, match=r"a/000\d of memory:.*/000000.tar is not where the index says: the shard has"):
        again.read(read[0].key)
    assert fetched["000000.tar"] == 2


def test_without_an_index_there(folder, remote, tmp_path):
    fs, _fetched = remote
    for path in folder.glob("*.idx"):
        fs.rm(f"/data/{path.name}")
    fs.rm("/data/index.json")
    source = opened("memory://data/{000000..000009}.tar", folder=str(tmp_path))
    assert sorted(numbers(source, take(source, [0], 1, NUM))) == [*range(NUM)]
    with pytest.raises(ValueError, match=r"there is no memory://data/index.json, which says what shards are there"):
        opened("memory://data")


def test_the_cache_makes_room(folder, remote, tmp_path):
    _fs, fetched = remote
    size = os.path.getsize(folder / "000000.tar")
    options = CacheOptions(str(tmp_path), 2.5 * size / 1e9)
    for time, name in enumerate((0, 1, 0, 2)):  # of the two that are there 1 was not used for longest
        os.utime(fetch(f"memory://data/00000{name}.tar", options), (1000 + time,) * 2)
    assert fetched == {"000000.tar": 1, "000001.tar": 1, "000002.tar": 1} and len(list(tmp_path.iterdir())) == 2
    fetch("memory://data/000000.tar", options)
    assert fetched["000000.tar"] == 1
    fetch("memory://data/000001.tar", options)
    assert fetched["000001.tar"] == 2
    source = opened("memory://data", IN_ORDER, 2, folder=str(tmp_path), most_gb=1.5 * size / 1e9)
    source._fetch_ahead = lambda shards: None
    assert numbers(source, take(source, [0], 1, NUM)) == [*range(NUM)]  # one at a time
    assert sum(file.stat().st_size for file in tmp_path.glob("*.tar")) <= 1.5 * size


def test_who_waited_for_another_holds_the_next_one_back(remote, tmp_path, monkeypatch):
    """While it waits, the file is fetched by another process, renamed, and removed for lack of room."""
    wait, download, waits = fcntl.flock, shard_cache._download, []

    def wait_long(held, how):
        wait(held, how)
        if waits.append(1) or len(waits) == 1:
            Path(held.name).unlink()

    def download_alone(fs, path, part, *rest):
        with open(part, "ab") as third, pytest.raises(BlockingIOError):
            wait(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return download(fs, path, part, *rest)

    monkeypatch.setattr(shard_cache.fcntl, "flock", wait_long)
    monkeypatch.setattr(shard_cache, "_download", download_alone)
    assert fetch("memory://data/000000.tar", CacheOptions(str(tmp_path))).exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"]


def test_a_shard_that_went_in_this_moment_comes_again(remote, tmp_path, monkeypatch):
    source = opened("memory://data", IN_ORDER, folder=str(tmp_path / "cache"))
    local, gone = source._local, [tmp_path / "gone.tar"]
    monkeypatch.setattr(source, "_local", lambda shard: gone.pop() if gone else local(shard))
    assert read_all(source, 2) == [0, 1] and not gone


def test_what_cannot_be_fetched_is_a_loss(folder, remote, tmp_path):
    fs, _fetched = remote
    fs.rm("/data/000004.tar")
    source = opened("memory://data", IN_ORDER, folder=str(tmp_path))
    found = losses(source)
    assert found == ["there is no memory://data/000004.tar"] * 5
    get, tries = type(fs).get_file, []

    def fails(self, path, local, **more):
        tries.append(path)
        if len(tries) < 3:
            raise OSError("the line is cut")
        return get(self, path, local, **more)

    type(fs).get_file = fails
    assert fetch("memory://data/000000.tar", CacheOptions(str(tmp_path / "other"))).stat().st_size
    assert len(tries) == 3
    tries[:] = [None] * -9
    type(fs).get_file = lambda *args, **more: (_ for _ in ()).throw(OSError("the line is cut"))
    with pytest.raises(ValueError, match=r"000001\.tar cannot be read, tried 3 times: the line is cut"):
        fetch("memory://data/000001.tar", CacheOptions(str(tmp_path / "other")))
    type(fs).get_file = get


def test_a_file_system_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://bucket/index\.json needs the package s3fs: pip install s3fs"):
        open_source("s3://bucket")
    with pytest.raises(ValueError, match=r"nothing://a/index.json cannot be opened: Protocol not known: nothing"):
        open_source("nothing://a")


def test_shards_are_mixed_with_others(folder):
    mixture = open_sources([str(folder), "scenes"], weights=[1, 1])
    refs = take(mixture, [0], 1, 20)
    assert [ref.source for ref in refs[:4]] == 2 * [str(folder), "scenes"]
    again = take(open_sources([str(folder), "scenes"], weights=[1, 1]), [0], 1, 10, refs[9].after)
    assert [ref[:6] for ref in again] == [ref[:6] for ref in refs[10:]]


def test_a_server_that_is_not_there_or_fails_is_asked_again(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")
    monkeypatch.setattr("nanovlm.data.shard_cache.WAITS", (0.0, 0.0))
    asked = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            self.send_error(int(self.path[1:4]))

        do_HEAD, log_message = do_GET, lambda *args: None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=r"there is no \S+/404.tar"):
            fetch(f"{address}/404.tar", CacheOptions(str(tmp_path)))
        with pytest.raises(UserError, match=r"503.tar cannot be read, tried 3 times: 503"):
            fetch(f"{address}/503.tar", CacheOptions(str(tmp_path)))
        assert asked["/503.tar"] == 3 * asked["/404.tar"]
        server.shutdown()
    with pytest.raises(UserError, match=r"404.tar cannot be read, tried 3 times: Cannot connect"):
        fetch(f"{address}/404.tar", CacheOptions(str(tmp_path)))


class Server(http.server.SimpleHTTPRequestHandler):
    """Shows files, and what goes on at some servers.

    Those of /moved/ are at the end of a redirect that is another one each time, as if it were signed, and those of /to/
    at an address that follows. What is in /unsized/ comes without a length: large.tar has 16 MiB, cut.tar is cut off
    the first `cuts` times.
    """

    signed, asked, cuts = itertools.count(), [], 0

    def log_message(self, *_args):
        pass

    def copyfile(self, source, outputfile):
        with contextlib.suppress(ConnectionError):  # it was enough
            super().copyfile(source, outputfile)

    def send_head(self):
        self.asked.append((self.server.server_address, self.path))
        if self.path.startswith("/unsized/"):
            return self.send_unsized(self.path.rpartition("/")[2])
        if not self.path.startswith(("/moved/", "/to/")):
            return super().send_head()
        self.send_response(302)
        moved = f"{self.path.removeprefix('/moved')}?signed={next(self.signed)}"
        self.send_header("Location", moved if self.path.startswith("/moved/") else self.path.removeprefix("/to/"))
        self.end_headers()
        return None

    def send_unsized(self, name):
        if name not in ("large.tar", "cut.tar"):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if name == "large.tar":
            return io.BytesIO(bytes(2**24))
        data = Path(self.directory, "000000.tar").read_bytes()
        is_cut, Server.cuts = self.cuts > 0, self.cuts - (self.command == "GET")
        return io.BytesIO(data[: len(data) // 2] if is_cut else data)


@contextlib.contextmanager
def serve(folder, host="127.0.0.1"):
    """Yield the address of a server of a folder."""
    try:
        server = http.server.ThreadingHTTPServer((host, 0), functools.partial(Server, directory=str(folder)))
    except OSError:
        pytest.skip(f"{host} is no address of this machine")
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://{host}:{server.server_port}"
        server.shutdown()


def test_shards_come_by_http(folder, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")
    with serve(folder) as address:
        source = opened(f"{address}/", folder=str(tmp_path))
        here = opened(folder)
        assert numbers(source, take(source, [0], 1, 20)) == numbers(here, take(here, [0], 1, 20))
        options = CacheOptions(str(tmp_path / "moved"))
        first, again = (fetch(f"{address}/moved/000000.tar", options) for _ in range(2))
        assert first == again and first.read_bytes() == (folder / "000000.tar").read_bytes()


def test_a_public_server_redirects_to_public_ones_alone(folder, tmp_path, monkeypatch):
    """One of this network may redirect within it; a connection that is open already is no way around."""
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")
    monkeypatch.setattr(shard_cache, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(shard_cache, "is_public", lambda address: address == "127.0.0.2")
    monkeypatch.setattr(Server, "asked", asked := [])
    options = CacheOptions(str(tmp_path))
    with serve(folder) as inside, serve(folder, "127.0.0.2") as outside:
        for way in (f"{inside}/to/{inside}", f"{inside}/to/{outside}", f"{outside}/to/{outside}"):
            assert fetch(f"{way}/000000.tar", options).stat().st_size
            assert read_whole(f"{way}/000000.idx", 2**20)
        # Asked for twice, as it has no size: the second time begins anew.
        assert fetch(f"{inside}/to/{outside}/unsized/cut.tar", options).stat().st_size
        asked.clear()
        refused = r"^127\.0\.0\.2 redirects to {}, which is 127\.0\.0\.1, not a public address$"
        for way in (
            f"{outside}/to/{inside}",
            f"{outside}/to/{outside}/to/{inside}",
            f"{inside}/to/{outside}/to/{inside}",
        ):
            for call in (lambda url: fetch(url, options), lambda url: read_whole(url, 2**20), find):
                with pytest.raises(ValueError, match=refused.format(r"127\.0\.0\.1")):
                    call(f"{way}/00000{'*' if call is find else 0}.tar")
        with pytest.raises(ValueError, match=refused.format("localhost")):
            fetch(f"{outside}/to/{inside.replace('127.0.0.1', 'localhost')}/000000.tar", options)
        assert asked and all(path.startswith("/to/") for _server, path in asked)  # nothing was sent where they led


def test_a_shard_of_unknown_size_has_an_end(folder, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")
    monkeypatch.setattr(shard_cache, "WAITS", (0.0, 0.0))
    whole = (folder / "000000.tar").read_bytes()
    with serve(folder) as address:
        options = CacheOptions(str(tmp_path / "a"), 0.001)
        with pytest.raises(ValueError, match=r"unsized/large.tar has more than 1000000 bytes, all that .*/a has room"):
            fetch(f"{address}/unsized/large.tar", options)
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match="tried 3 times: more than its 9 bytes came"),
        ):
            # A server that tells one size and sends another.
            patch.setattr(shard_cache.connect(address)[0], "info", lambda _path: {"size": 9})
            fetch(f"{address}/unsized/large.tar", options)
        assert not list((tmp_path / "a").iterdir())
        monkeypatch.setattr(Server, "cuts", 2)  # the first is the one that asks for its size
        assert fetch(f"{address}/unsized/cut.tar", options).read_bytes() == whole and Server.cuts == -1
        monkeypatch.setattr(Server, "cuts", 99)
        source = opened(f"{address}/unsized/cut.tar", IN_ORDER, folder=str(tmp_path / "b"))
        found = losses(source, 3)
        assert len(found) == 1 and "cut.tar: " in found[0] and "whole samples are before that" in found[0]


def test_a_shard_is_as_long_as_its_server_says(remote, tmp_path, monkeypatch):
    fs, info = remote[0], type(remote[0]).info
    for size in (100, 10**6):
        monkeypatch.setattr(type(fs), "info", lambda *args, size=size, **more: info(*args, **more) | {"size": size})
        with pytest.raises(
            ValueError, match=rf"000000.tar cannot be read, tried 3 times: \d+ of its {size} bytes came"
        ):
            fetch("memory://data/000000.tar", CacheOptions(str(tmp_path)))
        assert not list(tmp_path.iterdir())


def test_no_room_leaves_nothing(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "FREE_SPACE", 2**60)
    with pytest.raises(ValueError, match=r"has no room for a shard of \d+ bytes"):
        fetch("memory://data/000000.tar", CacheOptions(str(tmp_path)))
    assert not list(tmp_path.iterdir())
