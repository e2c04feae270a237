"""Real files of every kind give the records that were written; damage is one clear sentence."""

import io
import itertools
import json
import multiprocessing
import os
import random
import re
import socket
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm.data import sources
from nanovlm.data.drawn import Drawn
from nanovlm.data.images import decode_image
from nanovlm.data.mixture import Concatenation, Mixture
from nanovlm.data.records import to_sample
from nanovlm.data.source_folder import Folder
from nanovlm.data.source_hub import Hub
from nanovlm.data.source_lines import TextFiles
from nanovlm.data.source_parquet import Parquet
from nanovlm.data.source_tar import Tar
from nanovlm.data.sources import open_source, open_sources, sample_texts
from nanovlm.data.types import Filtered
from tests.conftest import Numbers, noise

datasets = pytest.importorskip("datasets")  # these tests are not for a machine without it

TURNS = [{"user": "what is it?", "assistant": "noise"}, {"user": "sure?", "assistant": "yes"}]


def encode(seed, format="PNG"):
    buffer = io.BytesIO()
    noise(seed).save(buffer, format)
    return buffer.getvalue()


def make_record(i):
    """Record i has no image, one or two, as bytes, and its number in its text."""
    texts = [{"user": f"question {i}", "assistant": f"answer {i}"}, TURNS[i % 2]]
    return {"images": [encode(100 * i + k) for k in range(i % 3)], "texts": texts}


RECORDS = [make_record(i) for i in range(23)]


def write_json_lines(folder, records=RECORDS):
    (folder / "images").mkdir(exist_ok=True)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            names = [f"images/{i}-{k}.png" for k in range(len(record["images"]))]
            for name, data in zip(names, record["images"], strict=True):
                (folder / name).write_bytes(data)
            file.write("\n" * (i % 3) + json.dumps({**record, "images": names}) + "\n")
    return folder / "data.jsonl"


def write_parquet(folder, records=RECORDS, name="data.parquet"):
    rows = [{**r, "images": [{"bytes": b, "path": None} for b in r["images"]]} for r in records]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = pa.schema([("images", pa.list_(image)), ("texts", pa.list_(turn))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name, row_group_size=5)
    return folder / name


def write_parquet_files(folder):
    for part in range(3):
        write_parquet(folder, RECORDS[part * 9 : part * 9 + 9], f"{part}.parquet")
    return folder


def add_member(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(folder, records=RECORDS, name="data.tar", first=0):
    with tarfile.open(folder / name, "w") as tar:
        for i, record in enumerate(records, start=first):
            for k, image in enumerate(record["images"]):
                add_member(tar, f"./train/{i:04}.{k}.png", image)
            add_member(tar, f"./train/{i:04}.json", json.dumps({"texts": record["texts"]}).encode())
    return folder / name


def write_tar_files(folder):
    for part in range(3):
        write_tar(folder, RECORDS[part * 9 : part * 9 + 9], f"shard-{part}.tar", first=part * 9)
    return folder


FILES = {
    "json lines": (TextFiles, write_json_lines),
    "parquet": (Parquet, write_parquet),
    "parquet files": (Parquet, write_parquet_files),
    "tar": (Tar, write_tar),
    "tar files": (Tar, write_tar_files),
}


@pytest.fixture(params=FILES)
def path(request, tmp_path):
    return FILES[request.param][1](tmp_path), FILES[request.param][0]


def plain(record):
    """What two records must have in common."""
    return record.get("images") or [], record["texts"]


def read_all(source):
    return [plain(source.read(i)) for i in range(len(source))]


# --- files ---------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(path):
    source = path[1](path[0])
    assert read_all(source) == [plain(record) for record in RECORDS]
    assert source.damaged == [] and str(path[0]) in source.name
    again = open_source(str(path[0]))
    assert type(again) is path[1] and read_all(again) == read_all(source)
    for record, i in zip(RECORDS, range(len(source)), strict=True):
        sample = to_sample(source.read(i))
        assert [np.asarray(image).tolist() for image in sample.images] == [
            np.asarray(decode_image(data)).tolist() for data in record["images"]
        ]
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"has 23 records, there is no record {index}"):
            source.read(index)


def test_any_order_reads_the_same(path):
    source = path[1](path[0])
    order = random.Random(0).choices(range(len(source)), k=100)
    assert [plain(source.read(i)) for i in order] == [plain(RECORDS[i]) for i in order]


def _read(source, order, queue):
    queue.put([plain(source.read(i)) for i in order])


def test_forked_processes_share_a_source(path):
    source = path[1](path[0])
    source.read(3)
    context = multiprocessing.get_context("fork")
    orders = [random.Random(seed).choices(range(len(source)), k=200) for seed in range(3)]
    for order in orders:
        queue = context.Queue()
        process = context.Process(target=_read, args=(source, order, queue))
        process.start()
        mine = [plain(source.read(i)) for i in orders[0]]
        assert queue.get(timeout=600) == [plain(RECORDS[i]) for i in order]
        process.join(600)
        assert mine == [plain(RECORDS[i]) for i in orders[0]]


@pytest.mark.parametrize("image", ["struct", "binary", "one struct", "one binary", "datasets", "path"])
def test_parquet_images_of_every_kind(image, tmp_path):
    data = [encode(i) for i in range(4)]
    (tmp_path / "a.png").write_bytes(data[0])
    column = {
        "struct": ("images", [[{"bytes": x, "path": "x.png"}] for x in data]),
        "binary": ("images", [[x] for x in data]),
        "one struct": ("image", [{"bytes": x, "path": None} for x in data]),
        "one binary": ("image", data),
        "path": ("image", [{"bytes": None, "path": "a.png"}] * 4),
    }
    file = str(tmp_path / "data.parquet")
    if image == "datasets":
        features = datasets.Features(
            {
                "images": [datasets.Image()],
                "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
            }
        )
        rows = {"images": [[Image.open(io.BytesIO(x))] for x in data], "texts": [TURNS] * 4}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    else:
        pq.write_table(pa.table({column[image][0]: column[image][1], "texts": [TURNS] * 4, "source": ["x"] * 4}), file)
    source = Parquet(file)
    expected = [data[0]] * 4 if image == "path" else data
    decoded = [to_sample(source.read(i)).images[0].tobytes() for i in range(4)]
    assert decoded == [decode_image(x).tobytes() for x in expected]
    if image in ("struct", "datasets"):
        rows = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True, cache_dir=str(tmp_path))
        rows = [row if image == "datasets" else {"images": [decode_image(row["images"][0]["bytes"])]} for row in rows]
        assert decoded == [row["images"][0].convert("RGB").tobytes() for row in rows]


def test_tar_reads_what_datasets_reads(tmp_path):
    records = [{"images": [encode(i)], "texts": TURNS} for i in range(6)]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, record in enumerate(records):
            add_member(tar, f"{'sub/' * 40}{i}.png", record["images"][0])  # a name of more than one header
            add_member(tar, f"{'sub/' * 40}{i}.json", json.dumps({"texts": TURNS}).encode())
    source = Tar(tmp_path / "a.tar")
    rows = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "a.tar"), split="train", streaming=True, cache_dir=str(tmp_path)
    ).decode(False)
    assert read_all(source) == [([row["png"]["bytes"]], row["json"]["texts"]) for row in rows]


def test_tar_members(tmp_path):
    small = [encode(i) for i in range(12)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("folder.jpg/"))
        add_member(tar, "._a.jpg", b"what a Mac leaves")
        add_member(tar, "README", b"no key")
        for k in (*range(1, 12), 0):
            add_member(tar, f"a.{k}.JPG", small[k])
        add_member(
            tar,
            "a.json",
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image"}] * 12},
                        {"role": "assistant", "content": "many"},
                    ]
                }
            ).encode(),
        )
        add_member(tar, "b.webp", small[0])
        add_member(tar, "b.json", b'{"width": 16}')
        add_member(tar, "b.txt", "Größe\n".encode())
        add_member(tar, "b.npy", b"...")
        add_member(tar, "c.cls", b"1")
        add_member(tar, "d.png", small[0])
        add_member(tar, "d.json", b"{}")
        add_member(tar, "e.json", b'{"texts": [{"user": "1 + 1?", "assistant": "2"}]}')
        add_member(tar, "f.txt", b"1")
        add_member(tar, "f.txt", b"2")
        for name in ("./g.png", "/g.txt", ".g/h.png", ".g/h.txt", "g/h.png", "./g/h.txt"):
            add_member(tar, name, small[1] if name.endswith("png") else name.encode())
    source = Tar([tmp_path / "a.tar"])
    assert [source.read(key)["texts"][0]["assistant"] for key in (5, 6, 7)] == ["/g.txt", ".g/h.txt", "./g/h.txt"]
    assert len(source) == 8 and source.damaged == []
    assert source.read(0)["images"] == small and len(to_sample(source.read(0)).images) == 12
    assert source.read(1) == {"images": small[:1], "texts": [{"user": "describe the image.", "assistant": "Größe"}]}
    with pytest.raises(ValueError, match=r"sample d of .*a.tar needs a .json with a record, or a .txt"):
        source.read(2)
    assert to_sample(source.read(3)).images == []
    with pytest.raises(ValueError, match=r"sample f of .*a.tar has two members .txt"):
        source.read(4)


def write_members(path, **members):
    """Write a tar of members whose dots are given as underscores."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add_member(tar, name.replace("_", "."), data)
    return path


def test_tar_images_of_every_format(tmp_path):
    for i, suffix in enumerate(("gif", "BMP", "tif", "tiff", "jp2", "ppm", "jfif", "0.gif", "gif.0", "left.tga")):
        format = {"jp2": "JPEG2000", "ppm": "PPM", "jfif": "JPEG", "tif": "TIFF", "left.tga": "TGA"}.get(suffix)
        data = encode(i, format or suffix.strip(".0"))
        write_members(tmp_path / "a.tar", **{f"a.{suffix}": data, "a.txt": b"noise", "a.mpg": b"", "b.json": b"{}"})
        record = Tar(tmp_path / "a.tar").read(0)
        assert record["images"] == [data] and to_sample(record).images[0].size == noise(i).size


def test_tar_samples_that_lack_their_image(tmp_path):
    def record(**images):
        return json.dumps({"texts": TURNS, **images}).encode()

    image = encode(0)
    write_members(
        tmp_path / "a.tar",
        a_txt=b"a caption",
        b_txt=b"a caption",
        b_json=b'{"width": 16}',
        c_json=record(image="b.bmp"),
        d_json=record(images=["b.bmp"]),
        e_json=record(image={"path": "b.bmp"}),
        f_json=record(images=["0.png", "1.png"]),
        f_0_png=image,
        g_json=record(image="g.gif"),
        g_gif=image,
        h_json=record(image="", images=[]),
        i_json=record(image=None),
    )
    source = Tar(tmp_path / "a.tar")
    assert len(source) == 9 and source.damaged == []
    for index, sentence in enumerate(
        [
            "sample a of .* has a caption and no image",
            "sample b of .* has a caption and no image",
            "sample c of .* names 1 images in 'image' and has 0",
            "sample d of .* names 1 images in 'images' and has 0",
            "sample e of .* names 1 images in 'image' and has 0",
            "sample f of .* names 2 images in 'images' and has 1",
        ]
    ):
        with pytest.raises(ValueError, match=sentence):
            source.read(index)
    assert source.read(6) == {"images": [image], "texts": TURNS}
    assert source.read(7) == source.read(8) == {"texts": TURNS}


def test_tar_images_without_text_are_counted(tmp_path):
    image = encode(0)
    first = write_members(
        tmp_path / "0.tar", a_gif=image, b_txt=b"b", b_gif=image, c_0_gif=image, c_1_gif=image, d_x=b""
    )
    second = write_members(tmp_path / "1.tar", e_jpg=image)
    third = write_members(tmp_path / "2.tar", f_jpg=image, f_txt=b"f")
    source = Tar([first, second, third])
    assert [sample[1] for sample in source.samples] == ["b", "f"]
    assert source.damaged == [
        f"{first}: 2 samples have images and no .txt or .json, the first is a",
        f"{second}: 1 samples have images and no .txt or .json, the first is e",
    ]
    with pytest.raises(ValueError, match=r"1 samples have images and no .txt or .json, the first is e"):
        Tar(second)


@pytest.mark.parametrize("order", ["texts first", "images first", "any"])
def test_tar_members_in_any_order(order, tmp_path):
    members = [(f"{i}.txt", f"caption {i}".encode()) for i in range(9)] + [(f"{i}.png", encode(i)) for i in range(9)]
    members = members if order == "texts first" else members[9:] + members[:9]
    if order == "any":
        random.Random(0).shuffle(members)
    write_members(tmp_path / "a.tar", **dict(members))
    source = Tar(tmp_path / "a.tar")
    expected = [([encode(i)], [{"user": "describe the image.", "assistant": f"caption {i}"}]) for i in range(9)]
    assert source.damaged == [] and sorted(read_all(source), key=repr) == sorted(expected, key=repr)
    assert [sample[1] for sample in source.samples] == list(dict.fromkeys(name[0] for name, _data in members))
    # Of a shard that is cut, only samples remain that have both members.
    whole, places = (tmp_path / "a.tar").read_bytes(), {sample[1]: sample[2] for sample in source.samples}
    for length in range(512 * 25, len(whole), 700):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        kept = [key for key, group in places.items() if all(start + size <= length for _, start, size in group)]
        if kept and len(kept) < 9:
            cut = Tar(tmp_path / "a.tar")
            assert read_all(cut) == [expected[int(key)] for key in kept]
            assert len(cut.damaged) == 1 and f": {len(kept)} whole samples" in cut.damaged[0]


def test_tar_keys_that_come_again_are_other_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for part in range(2):
            for key in "ab":
                add_member(tar, f"{key}.png", encode(part))
                add_member(tar, f"{key}.txt", f"{key}{part}".encode())
    answers = [record["texts"][0]["assistant"] for record in map(Tar(tmp_path / "a.tar").read, range(4))]
    assert answers == ["a0", "b0", "a1", "b1"]


def test_folder_images_of_every_format(tmp_path):
    for i, (suffix, format) in enumerate({"BMP": "BMP", "gif": "GIF", "tif": "TIFF"}.items()):
        (tmp_path / f"{i}.{suffix}").write_bytes(encode(i, format))
        (tmp_path / f"{i}.txt").write_text("noise")
        (tmp_path / f"alone-{i}.{suffix}").write_bytes(encode(i, format))
    source = Folder(tmp_path)
    assert [len(to_sample(source.read(i)).images) for i in range(len(source))] == [1, 1, 1]
    assert source.damaged == [f"{tmp_path}: 3 of 6 images have no .txt or .json beside them"]


def test_folder(tmp_path):
    for i, name in enumerate(("b.png", "sub/a.JPG", "alone.png", "c.webp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(i))
    (tmp_path / "b.txt").write_text("a caption\n")
    (tmp_path / "sub/a.json").write_text(json.dumps({"texts": TURNS}))
    (tmp_path / "c.json").write_text(json.dumps({"images": ["c.webp", "b.png"], "texts": TURNS}))
    source = open_source(str(tmp_path))
    assert isinstance(source, Folder) and len(source) == 3
    assert source.damaged == [f"{tmp_path}: 1 of 4 images have no .txt or .json beside them"]
    assert read_all(source) == [
        ([encode(0)], [{"user": "describe the image.", "assistant": "a caption"}]),
        ([encode(3), encode(0)], TURNS),
        ([encode(1)], TURNS),
    ]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match=r"the .json of .*c.webp must be a JSON object, .* not an empty list"):
        source.read(1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": "b.png", "texts": TURNS}))
    assert read_all(open_source(str(tmp_path))) == [([encode(0)], TURNS)]


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "list.json").write_text("[\n \n]")
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "a.doc").write_text("")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "images").mkdir()
    for spec, sentence in {
        "empty.jsonl": "empty.jsonl has no records",
        "list.json": "list.json has no records",
        "a.csv": "a.csv has no records",
        "a.doc": r"a.doc' is of no kind that is understood: give scenes, .*\.jsonl.*hub:owner/name",
        "missing.jsonl": r"missing.jsonl' does not exist: give scenes",
        "*.tar.bz2": r"does not exist: give scenes",
        "a.tar.gz": r"a.tar.gz' cannot be read: unpack it",
        "*.jsonl*": "empty.jsonl has no records",
        "*.???": "stands for files of more than one kind",
        "bad.parquet": "bad.parquet is damaged or no parquet file",
        "bad.tar": "bad.tar is cut off, damaged or compressed",
        "images": "images has 0 images and nothing about them: it needs",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            open_source(str(tmp_path / spec))
    with pytest.raises(ValueError, match="the source 'scene' does not exist: give scenes"):
        open_source("scene")
    with pytest.raises(ValueError, match="'hub:' names no dataset"):
        open_source("hub:")


def test_a_record_that_names_a_device_or_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        for name in ("pipe.png", "folder.png", ".", "s.png"):
            (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "texts": TURNS}))
            with pytest.raises(
                ValueError, match=r"line 1 of .*a.jsonl names a file that cannot be read: .* not a regular file"
            ):
                TextFiles(tmp_path / "a.jsonl").read(0)


def test_a_tar_with_a_negative_size_ends(tmp_path):
    """The next header would be at or before this one, again and again."""
    write_members(tmp_path / "a.tar", **{f"{key}_{kind}": encode(0) for key in "abc" for kind in ("txt", "png")})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"c.txt")
    data[at + 124 : at + 136] = b"\xff" * 11 + b"\x00"  # -256, in base 256
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "a.tar").write_bytes(data)
    source = Tar(tmp_path / "a.tar")
    assert len(source) == 2 and "c.txt has a size of -256" in source.damaged[0]


def test_a_record_of_the_hub_names_no_file_of_this_machine(tmp_path):
    (tmp_path / "own.png").write_bytes(encode(0))
    hub = Hub("hub:parquet", data_files=str(write_parquet(tmp_path)), cache_dir=str(tmp_path))
    hub.name, hub.own_files = "hub:a/b", "hf://datasets/a/b"
    for name in (
        *(str(tmp_path / "own.png"), f"file://{tmp_path / 'own.png'}", "local://x", "memory://x", "own.png"),
        *("hf://datasets/a/private/x.png", "hf://datasets/a/bb/x.png", "hf://datasets/a/b/../private/x.png"),
        f"zip://x.png::file://{tmp_path}/own.zip",
    ):
        with pytest.raises(ValueError, match=r"a record of hub:a/b names .* is not a file of the dataset"):
            hub._read_named(name)


# --- damage --------------------------------------------------------------------------------------------------


def test_cut_parquet(tmp_path):
    file = write_parquet(tmp_path)
    whole = file.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or no parquet file"):
            Parquet(file)
    source = (file.write_bytes(whole), Parquet(file))[1]
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"row 0 of row group 0 of .*data.parquet cannot be read"):
        source.read(0)


def test_cut_tar(tmp_path):
    """Every sample whose members are all whole is read, however the file is cut; the first needs a header after it."""
    records = [{"images": [encode(i), encode(i + 50)], "texts": TURNS} for i in range(8)]
    file = write_tar(tmp_path, records)
    whole = file.read_bytes()
    samples = Tar(file).samples
    ends = [max(offset + size for _suffix, offset, size in members) for _file, _key, members in samples]
    end_mark = -(-ends[-1] // 512) * 512 + 512
    edges = [end + d for end in ends for d in (-1, 0, 1, 511, 512, 513)]
    for length in sorted({*random.Random(0).sample(range(len(whole)), 300), *edges, end_mark}):
        file.write_bytes(whole[:length])
        expected = sum(end <= length for end in ends)
        if length < -(-ends[0] // 512) * 512 + 512:
            with pytest.raises(ValueError, match=r"data.tar (is cut off|has no further header)"):
                Tar(file)
            continue
        source = Tar(file)
        assert read_all(source) == [plain(record) for record in records[:expected]], length
        assert len(source.damaged) == (length < end_mark), length
        if source.damaged:
            assert str(file) in source.damaged[0] and f"{expected} whole samples are before" in source.damaged[0]


def test_half_a_sample_at_a_cut_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            add_member(tar, f"{i}.json", json.dumps({"texts": TURNS}).encode())
            add_member(tar, f"{i}.png", encode(i))
    whole = (tmp_path / "a.tar").read_bytes()
    image = Tar(tmp_path / "a.tar").samples[2][2][1]
    for length in range(image[1] - 1024, image[1] + image[2], 100):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        assert read_all(Tar(tmp_path / "a.tar")) == [([encode(i)], TURNS) for i in range(2)]


def test_damaged_tar(tmp_path):
    """Bytes changed anywhere: some records, other records or a ValueError."""
    file = write_tar(tmp_path)
    whole = file.read_bytes()
    for seed in range(200):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(20):
            data[512 * rng.randrange(len(data) // 512) + rng.choice([rng.randrange(160), rng.randrange(512)])] ^= (
                1 << rng.randrange(8)
            )
        file.write_bytes(data)
        try:
            source = Tar(file)
        except ValueError:
            continue
        for i in range(len(source)):
            try:
                to_sample(source.read(i))
            except ValueError:
                continue


def test_a_damaged_line_is_named_when_it_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps({"texts": TURNS}).encode()
    bad = [
        b'{"texts": [',
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"images": ["no.png"]}',
        b'{"image": "a\\u0000"}',
    ]
    file.write_bytes(good + b"\n\n" + b"\n".join(bad) + b"\r\n" + good)
    source = TextFiles(file)
    assert len(source) == 8 and plain(source.read(0)) == plain(source.read(7))
    for i in range(1, 7):
        with pytest.raises(ValueError, match=f"line {i + 2} of {re.escape(str(file))}"):
            source.read(i)


WORDS = "images image texts messages independent user assistant role content type text path bytes relevance_ratings"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS.split()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS.split()), inner, max_size=4),
    max_leaves=20,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image"])}, optional={"text": st.text() | JSON, "image": JSON}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.lists(PART) | JSON}
)
TURN = st.fixed_dictionaries({"user": st.text() | JSON, "assistant": st.text() | JSON})
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "images": st.lists(st.sampled_from(["a.png", "b.txt", "."]) | JSON, max_size=3) | JSON,
        "texts": st.lists(TURN | JSON, max_size=3) | JSON,
        "messages": st.lists(MESSAGE | JSON, max_size=5) | JSON,
        "independent": st.booleans() | JSON,
        "relevance_ratings": st.lists(st.integers(1, 5) | st.none(), max_size=3) | JSON,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.png").write_bytes(encode(0))
    (folder / "b.txt").write_text("no image")
    return folder


@settings(max_examples=200, deadline=None)
@example({"texts": [{"user": "\ud800", "assistant": "b"}]})
@example({"messages": [{"role": ["user"], "content": "a"}]})
@example(
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "b.txt"}]},
            {"role": "assistant", "content": "b"},
        ]
    }
)
@given(RECORD | JSON)
def test_any_json_is_a_sample_or_a_value_error(folder, value):
    (folder / "data.jsonl").write_text(json.dumps(value))
    try:
        sample = to_sample(TextFiles(folder / "data.jsonl").read(0), {"relevance_ratings": 3})
    except ValueError as error:
        assert "\n" not in str(error).replace(str(value), "")
        return
    shown = [
        part
        for m in sample.messages
        if isinstance(m["content"], list)
        for part in m["content"]
        if part["type"] == "image"
    ]
    pairs = len(sample.messages) // 2 if sample.independent else 1
    assert len(shown) == pairs * len(sample.images)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_any_bytes_are_an_image_or_a_value_error(data, format, draw):
    whole = encode(0, format)
    start = draw.draw(st.integers(0, len(whole)))
    for candidate in (data, whole[:start] + data, whole[:start] + data + whole[start + len(data) :]):
        try:
            assert decode_image(candidate).mode == "RGB"
        except ValueError as error:
            assert "cannot be read as an image" in str(error) and "0x" not in str(error)


def test_an_image_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image 0 cannot .*: it has 256 pixels, more than data.max_pixels = 100"):
        to_sample({"images": [encode(0)], "texts": TURNS})


# --- records -------------------------------------------------------------------------------------------------


def contents(sample):
    """The conversation as text, with # for an image."""
    return [
        m["content"] if isinstance(m["content"], str) else "".join(part.get("text", "#") for part in m["content"])
        for m in sample.messages
    ]


def test_where_images_stand():
    images = [noise(0), encode(1)]
    assert contents(to_sample({"images": images, "texts": TURNS})) == ["##what is it?", "noise", "sure?", "yes"]
    independent = to_sample({"images": images, "texts": TURNS, "independent": True})
    assert contents(independent) == ["##what is it?", "noise", "##sure?", "yes"] and independent.independent
    assert len(independent.images) == 2
    for raw in ({"texts": TURNS}, {"images": [], "texts": TURNS}, {"images": None, "texts": TURNS, "messages": None}):
        sample = to_sample(raw)
        assert contents(sample) == ["what is it?", "noise", "sure?", "yes"] and sample.images == []
    text, image = [{"type": "text", "text": "a"}], [{"type": "image", "text": None}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": text + image + text},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": image + text + image},
        {"role": "assistant", "content": text},
    ]
    sample = to_sample({"images": [*images, noise(2)], "messages": messages})
    assert contents(sample) == ["s", "a#a", "b", "#a#", "a"]
    assert [image.tobytes() for image in sample.images] == [noise(i).tobytes() for i in range(3)]
    messages = [messages[0], messages[4] | {"role": "user"}, messages[2]]
    assert contents(to_sample({"images": images, "messages": messages})) == ["s", "##a", "b"]


def test_one_image_stands_for_images(tmp_path):
    for none in ({}, {"images": None}, {"images": []}):
        for image in (encode(0), noise(0), [encode(0)], [noise(0), encode(1)]):
            sample = to_sample({"image": image, "texts": TURNS, **none})
            assert len(sample.images) == (len(image) if isinstance(image, list) else 1)
            assert sample.images[0].tobytes() == noise(0).tobytes()
            assert contents(sample)[0] == "#" * len(sample.images) + "what is it?"
        for image in (None, "", []):
            assert to_sample({"image": image, "texts": TURNS, **none}).images == []
        for image in ("a.png", ["a.png"], {"path": "a.png"}, 0, b"", [None]):
            with pytest.raises(ValueError, match=r"image 0 (must be an encoded file|cannot be read)"):
                to_sample({"image": image, "texts": TURNS, **none})
    assert (
        to_sample({"image": "a.png", "images": [encode(1)], "texts": TURNS}).images[0].tobytes() == noise(1).tobytes()
    )
    (tmp_path / "a.png").write_bytes(encode(0))
    (tmp_path / "a.jsonl").write_text(json.dumps({"images": [], "image": "a.png", "texts": TURNS}))
    assert TextFiles(tmp_path / "a.jsonl").read(0)["images"] == [encode(0)]


def test_parts_carry_their_images(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(0))
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "or"}, {"type": "image", "image": "a.png"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    sample = to_sample(TextFiles(tmp_path / "a.jsonl").read(0))
    assert (
        contents(sample) == ["#or#", "b"] and [image.tobytes() for image in sample.images] == [noise(0).tobytes()] * 2
    )
    for carried in ({"bytes": encode(1)}, {"image": noise(1)}):
        messages[0]["content"] = [{"type": "image", **carried}]
        assert to_sample({"messages": messages}).images[0].tobytes() == noise(1).tobytes()
    messages[0]["content"] = [{"type": "image"}, {"type": "image", "bytes": encode(1)}]
    with pytest.raises(ValueError, match="image parts that carry their image must all do so"):
        to_sample({"messages": messages})


def say(*roles, content="x"):
    return [{"role": role, "content": content} for role in roles]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ([], "a record must be a dict, not an empty list"),
        ({}, "no layout has the keys of this record: none; name its columns"),
        ({"image": 1, "text": "a"}, "image 0 must be an encoded file .*, not int"),
        ({"texts": TURNS, "messages": []}, "can be read as texts and as messages: decide by --data.layout texts"),
        ({"texts": []}, "at least one turn, not an empty list"),
        ({"texts": [{"user": "a", "assistant": None}]}, "turn 0 of texts must be a dict with the strings"),
        ({"texts": TURNS, "images": "a.png"}, "images must be a list, not str"),
        ({"texts": TURNS, "images": [None]}, "image 0 must be an encoded file .*, not nothing"),
        ({"texts": TURNS, "images": [encode(0), {"path": "a"}]}, "image 1 must be .*, not only the name 'a'"),
        ({"texts": TURNS, "images": [encode(0)[:-30]]}, "image 0 cannot be read as an image: "),
        ({"texts": TURNS, "images": [b"hello"]}, "image 0 cannot .*: its 5 bytes have no format that is read"),
        ({"texts": TURNS, "independent": "yes"}, "independent must be true or false, not str"),
        ({"texts": [{"user": "a", "assistant": " "}]}, "every answer of the record is empty"),
        ({"messages": "hello"}, "messages must be a list, not str"),
        ({"messages": []}, "needs an assistant turn; its messages are of: nobody"),
        ({"messages": say("user")}, "needs an assistant turn; its messages are of: user"),
        ({"messages": say("robot", "gpt")}, "message 0 must have the role system, user or assistant, not 'robot'"),
        ({"messages": say("user", "user", "assistant")}, "message 1 is of user; .* must take turns"),
        ({"messages": say("assistant", "user")}, "message 0 is of assistant"),
        ({"messages": say("user", "assistant", "system")}, "message 2 is of system"),
        ({"messages": say("system", "user", "assistant"), "independent": True}, "must be pairs of user and assistant"),
        ({"messages": say("user", "assistant", content=None)}, "content of message 0 must be a string or a list"),
        ({"messages": say("user", "assistant", content=[{"type": "video"}])}, "each part of message 0 must be"),
        ({"messages": say("user", "assistant", content=[{"type": "text"}])}, "each part of message 0 must be"),
        ({"messages": say("user", "assistant", content=[{"type": "image"}])}, "show 2 images, the record has 0"),
        ({"texts": [{"user": "\udc80", "assistant": "a"}]}, "message 0 has half a surrogate pair"),
    ],
)  # fmt: skip
def test_malformed_records_are_explained(raw, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        to_sample(raw)
    assert "\n" not in str(error.value)


def test_independent_questions_show_every_image():
    image = [{"type": "image"}]
    messages = [*say("user", content=[*image, {"type": "text", "text": "a"}]), *say("assistant")] * 2
    assert contents(to_sample({"images": [noise(0)], "messages": messages, "independent": True})) == ["#a", "x"] * 2
    messages = [*messages[:2], *say("user", "assistant")]
    with pytest.raises(ValueError, match="message 2 shows 0 images, the record has 1"):
        to_sample({"images": [noise(0)], "messages": messages, "independent": True})


def test_turns_of_low_rating_are_dropped(tmp_path):
    texts = [{"user": f"q{i}", "assistant": f"a{i}"} for i in range(4)]
    ratings = {
        "relevance_ratings": [2, 3, None, 5],
        "formatting_ratings": [5, 5, 5, 1],
        "visual_dependency_ratings": None,
    }
    raw = {"images": [noise(0)], "texts": texts, **ratings}

    def kept(raw, **minimum):
        return contents(to_sample(raw, minimum))[1::2]

    assert kept(raw) == ["a0", "a1", "a2", "a3"]
    assert kept(raw, relevance_ratings=3) == ["a1", "a2", "a3"]
    assert contents(to_sample(raw, {"relevance_ratings": 3}))[0] == "#q1"
    assert kept(raw, relevance_ratings=3, formatting_ratings=2, visual_dependency_ratings=5) == ["a1", "a2"]
    assert kept(raw, image_correspondence_ratings=5) == ["a0", "a1", "a2", "a3"]
    assert kept({"texts": [{**texts[0], "relevance_ratings": 1}, texts[1]]}, relevance_ratings=2) == ["a1"]
    with pytest.raises(Filtered, match="all 4 turns are rated below the minimum"):
        kept({**raw, "relevance_ratings": [1] * 4}, relevance_ratings=2)
    with pytest.raises(ValueError, match="unknown rating 'relevance'; there are relevance_ratings"):
        kept(raw, relevance=2)
    for ratings in ([1], 3, ["a"] * 4):
        with pytest.raises(ValueError, match="relevance_ratings must be a list of one number for each of 4 turns"):
            kept({**raw, "relevance_ratings": ratings}, relevance_ratings=2)
    table = pa.Table.from_pylist([{**raw, "images": [encode(0)]}])
    pq.write_table(table, tmp_path / "a.parquet")
    assert kept(Parquet(tmp_path / "a.parquet").read(0), relevance_ratings=3) == ["a1", "a2", "a3"]


def test_scenes_are_records():
    source = open_source("scenes")
    assert isinstance(source, Drawn) and source.name == "scenes" and not source.damaged
    assert to_sample(source.read(30_000)).independent and len(source) == 1_000_000


def test_several_sources_are_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"texts": [{"user": "q", "assistant": "a"}]}\nno JSON\n')
    path = str(tmp_path / "a.jsonl")
    assert isinstance(open_sources([path]), TextFiles)
    assert len(open_sources([path, "scenes"])) == 1_000_002
    assert open_sources([path, "scenes"], [1, 3]).counts == [250, 750]
    assert list(sample_texts(open_sources([path]), 10)) == ["q", "a"]  # the damaged line is left to the loader
    assert len(list(sample_texts(open_sources(["scenes"]), 10))) > 40
    lessons = open_sources(["scenes:cells", "scenes:color,count", "scenes"], lessons=[5, 3], shuffle=False)
    assert [part.name for part in lessons.sources] == ["scenes:cells", "scenes:color,count", "scenes"]
    assert [ref.key for ref in itertools.islice(lessons.refs([0], 1), 9)] == [
        *((0, i) for i in range(5)),
        *((1, i) for i in range(3)),
        (2, 0),
    ]
    assert {text.split()[0] for text in sample_texts(lessons, 30)} >= {"what", "how"}  # of all of them
    assert all(open_source("scenes:relation").read(i)["texts"] for i in range(50))  # not every scene allows one
    with pytest.raises(ValueError, match=r"scenes:color:shape: unknown kind 'color:shape'"):
        open_source("scenes:color:shape")
    with pytest.raises(ValueError, match=r"scenes:cell: unknown kind 'cell'; there are color, shape, .*, cells"):
        open_source("scenes:cell")


def test_streams_are_mixed_by_weights(hub, monkeypatch):
    monkeypatch.setattr("nanovlm.data.sources.Hub", lambda spec, split, order, allow_urls: hub)
    assert open_sources(["hub:a/b"]) is hub
    assert next(iter(sample_texts(hub, 2)))
    with pytest.raises(ValueError, match=r"hub:parquet is a stream of unknown size: mix it .* by data.weights"):
        open_sources(["scenes", "hub:a/b"])
    mixture = open_sources(["scenes", "hub:a/b"], weights=[1, 1])
    refs = list(itertools.islice(mixture.refs([0], 1), 80))
    assert [ref.source for ref in refs[:4]] == 2 * ["scenes", "hub:parquet"]
    of_stream = [ref for ref in refs if ref.source == "hub:parquet"]
    assert sorted(repr(plain(mixture.read(ref.key))) for ref in of_stream[:23]) == sorted(
        map(repr, map(plain, RECORDS))
    )
    for at in (0, 7, 40, 60):
        again = itertools.islice(mixture.refs([0], 1, refs[at].after), 10)
        assert [(ref.key, ref.number) for ref in again] == [(r.key, r.number) for r in refs[at + 1 : at + 11]]


# --- mixtures ------------------------------------------------------------------------------------------------


def test_without_weights_sources_follow_each_other():
    both = Concatenation([Numbers("a", 3), Numbers("b", 1), Numbers("c", 2)])
    order = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)]
    assert len(both) == 6 and [both.read(i)["number"] for i in range(6)] == order
    assert [(ref.source, ref.where) for ref in itertools.islice(both.refs([0], 1), 7)] == [
        (name, f"sample {i}") for name, i in [*order, order[0]]
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
@example([1 / 3, 1 / 3, 1 / 3])
@example([0.001, 0.999])
def test_proportions_of_a_mixture(weights):
    mixture = Mixture([Numbers(str(k), 7 + k) for k in range(len(weights))], weights)
    shares = np.array(weights) / sum(weights)
    seen = np.zeros(len(weights), dtype=int)
    for position, ref in enumerate(itertools.islice(mixture.refs([0], 1), 3000)):
        number, place = ref.key
        assert place == seen[number] % (7 + number)  # each source goes on where it was
        seen[number] += 1
        assert ref.epoch == min(max(0, n - 1) // (7 + k) for k, n in enumerate(seen))
        if (position + 1) % 1000 == 0:
            assert np.abs(seen / (position + 1) - shares).max() <= 0.001 + 1e-9
        assert np.abs(seen - shares * (position + 1)).max() <= 1.5 + len(weights) / 4 + position / 1000


def test_mistakes_in_a_mixture_are_named():
    a, b = Numbers("a", 3), Numbers("b", 3)
    for weights in ([1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match=r"the weight of b is .*; it must be positive"):
            Mixture([a, b], weights)
    with pytest.raises(ValueError, match="the weight of b is 1, too little of 10001: it must be at least 1/1000"):
        Mixture([a, b], [10_000, 1])
    with pytest.raises(ValueError, match="there are 2, 1 weights"):
        Mixture([a, b], [1])
    with pytest.raises(ValueError, match="needs either weights or the lengths of its lessons"):
        Mixture([a, b])
    with pytest.raises(ValueError, match="there are 0, no weights"):
        Mixture([])


# --- streams -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    turn = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    features = datasets.Features({"images": [datasets.Image()], "texts": [turn]})
    for part in range(3):
        records = RECORDS[part * 9 : part * 9 + 9]
        rows = [{**r, "images": [{"bytes": data, "path": None} for data in r["images"]]} for r in records]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / f"{part}.parquet"))
    return Hub("hub:parquet", data_files=str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache"))


def read(source, num, start=None, slots=(0,), num_slots=1):
    """So many records of a stream, plain."""
    return [plain(source.read(ref.key)) for ref in itertools.islice(source.refs(slots, num_slots, start), num)]


def test_hub_streams_the_bytes_of_files(hub):
    written = [plain(record) for record in RECORDS]
    assert sorted(read(hub, 23), key=repr) == sorted(written, key=repr)
    assert len(to_sample(next(r for ref in hub.refs([0], 1) if (r := hub.read(ref.key))["images"])).images) > 0


@pytest.mark.parametrize(("slots", "num_slots"), [((0,), 1), ((0, 1), 2), ((1,), 2), ((2, 0), 3), ((1,), 3)])
def test_hub_goes_on_where_it_was(hub, capfd, slots, num_slots):
    """Three files: three slots have one each, of two each gets every second record."""
    refs = list(itertools.islice(hub.refs(slots, num_slots), 80))
    for at in (0, 1, 7, 21, 22, 23, 45):
        at = at - at % len(slots) + len(slots) - 1
        again = itertools.islice(hub.refs(slots, num_slots, json.loads(json.dumps(refs[at].after))), 20)
        assert [ref[:6] for ref in again] == [ref[:6] for ref in refs[at + 1 : at + 21]]
    assert "buffer" not in capfd.readouterr().err


def test_hub_does_not_begin_anew_for_a_slot_of_another_rank(hub):
    after = next(hub.refs([1], 3)).after
    with pytest.raises(ValueError, match=r"hub:parquet are shared out .*: go on with as many ranks as before"):
        next(hub.refs([0, 1], 3, after))
    assert next(hub.refs([1], 3, next(hub.refs([0, 1, 2], 3)).after)).number == 1


def test_hub_does_not_go_on_in_another_number_of_files(hub, tmp_path):
    """Shared out by file, three files among three slots; or two files, of which all three slots read all."""
    fewer = Hub("hub:parquet", data_files=str(tmp_path / "[01].parquet"), cache_dir=str(tmp_path / "cache"))
    for before, now in ((hub, fewer), (fewer, hub)):
        after = next(before.refs([0, 1, 2], 3)).after
        with pytest.raises(ValueError, match="the number of files of hub:parquet has changed since the run stopped"):
            next(now.refs([0, 1, 2], 3, after))


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_hub_shares_every_record_out_once(hub, num_slots):
    written = sorted(repr(plain(record)) for record in RECORDS)
    first_pass = []
    for slot in range(num_slots):
        refs = itertools.takewhile(lambda ref: ref.epoch == 0, hub.refs([slot], num_slots))
        first_pass += [repr(plain(hub.read(ref.key))) for ref in refs]
    assert sorted(first_pass) == written


def test_hub_order_is_of_the_seed_or_of_the_files(hub, tmp_path, monkeypatch):
    options = {"data_files": str(tmp_path / "*.parquet"), "cache_dir": str(tmp_path / "cache")}

    class LocalHub(Hub):
        def __init__(self, *args):
            super().__init__(*args, **options)

    monkeypatch.setattr("nanovlm.data.sources.Hub", LocalHub)
    shuffled = open_sources(["hub:parquet"], seed=0)
    passes = read(shuffled, 92)
    assert any(passes[i : i + 23] != passes[:23] for i in (23, 46, 69))
    assert any(read(open_sources(["hub:parquet"], seed=seed), 23) != passes[:23] for seed in range(1, 5))
    written = [plain(record) for record in RECORDS]
    assert read(open_sources(["hub:parquet"], shuffle=False), 92) == 4 * written == read(hub, 92)


def test_hub_reads_the_files_of_the_dataset_and_addresses_if_they_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(0))
    opened = fsspec.open
    monkeypatch.setattr(
        fsspec, "open", lambda name, mode: opened(name.replace("hf://datasets/parquet@1", str(tmp_path)), mode)
    )
    monkeypatch.setattr("nanovlm.data.source_names.download", lambda name, where: encode(1))
    names = ["hf://datasets/parquet@1/a.png", "hf://datasets/parquet@1/no.png", "https://a.org/a.png"]
    images = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "texts": [TURNS] * 3}), tmp_path / "a.parquet")
    for allow_urls in (False, True):
        hub = Hub("hub:parquet", allow_urls=allow_urls, data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
        keys = [ref.key for ref in itertools.islice(hub.refs([0], 1), 3)]
        assert to_sample(hub.read(keys[0])).images[0].tobytes() == noise(0).tobytes()
        with pytest.raises(ValueError, match=r"a record of hub:parquet names .*no.png, which cannot be read"):
            hub.read(keys[1])
        if allow_urls:
            assert to_sample(hub.read(keys[2])).images[0].tobytes() == noise(1).tobytes()
            continue
        with pytest.raises(ValueError, match=r"names the address https://a.org/a.png: add --data.allow-urls"):
            hub.read(keys[2])


def test_hub_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"hub:parquet, split 'dev', cannot be opened"):
        Hub("hub:parquet", "dev", data_files=str(write_parquet(tmp_path)), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"hub:parquet, split 'train', cannot be opened"):
        Hub("hub:parquet", data_files=str(tmp_path / "missing.parquet"), cache_dir=str(tmp_path))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        open_source("hub:a/b")
    with pytest.raises(ValueError, match="files need the package pyarrow: pip install pyarrow"):
        sources.Parquet("a.parquet")
