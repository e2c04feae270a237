"""Every container gives the records that were written, in any order and from the middle; damage is counted."""

import base64
import csv
import gzip
import io
import itertools
import json
import random
import shutil
import subprocess

import pyarrow as pa
import pytest
from PIL import Image

from nanovlm.data import source_index, source_lines, source_text
from nanovlm.data.mixture import Concatenation
from nanovlm.data.records import to_sample
from nanovlm.data.source import Order
from nanovlm.data.source_arrow import Arrow
from nanovlm.data.source_folder import Classes
from nanovlm.data.source_lines import TextFiles
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from tests.conftest import noise

datasets = pytest.importorskip("datasets")  # these tests are not for a machine without it


def encode(seed):
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


def make_record(i):
    """Text that brackets, quotes, separators and lines may mislead."""
    text = ('a "b" \\', "[{,", "}]\n\n[", "é日\u2028", "\t;,", "")[i % 6]
    return {"image": f"images/{i % 5}.png", "texts": [{"user": f"{i} {text}", "assistant": f"{text} {i}"}]}


RECORDS = [make_record(i) for i in range(40)]
ROWS = [{"image": r["image"], "question": r["texts"][0]["user"], "answer": r["texts"][0]["assistant"]} for r in RECORDS]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / f"images/{i}.png").write_bytes(encode(i))
    return tmp_path


def expected(records):
    """What reading gives: the images as bytes."""
    result = []
    for record in records:
        rest = {key: value for key, value in record.items() if key != "image"}
        number = int(record["image"].split("/")[1].split(".")[0])
        result.append({**rest, "images": [encode(number)]})
    return result


def lines(records, **options):
    return "".join(json.dumps(record, **options) + "\n" for record in records)


def table(rows, delimiter=",", **options):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# File -> (text, records).
TEXTS = {
    "a.jsonl": (lines(RECORDS), RECORDS),
    "a.ndjson": ("\n \n".join(lines(RECORDS, ensure_ascii=False).split("\n")), RECORDS),
    "lines.json": (lines(RECORDS), RECORDS),
    "crlf.json": (lines(RECORDS).replace("\n", "\r\n"), RECORDS),
    "one.json": (json.dumps(RECORDS[0]), RECORDS[:1]),
    "one-indented.json": (json.dumps(RECORDS[1], indent=2), RECORDS[1:2]),
    "list.json": (json.dumps(RECORDS), RECORDS),
    "indented.json": (json.dumps(RECORDS, indent=1, ensure_ascii=False), RECORDS),
    "list.jsonl": (json.dumps(RECORDS, indent=1), RECORDS),
    "list-in-a-line.jsonl": ("\n\n" + json.dumps(RECORDS, separators=(",", ":")) + "\n\n", RECORDS),
    "object.json": (json.dumps({"version": [1, {"a": []}], "data": RECORDS, "info": {"by": "us"}}), RECORDS),
    "object-indented.json": (json.dumps({"data": RECORDS}, indent="\t"), RECORDS),
    "a.csv": (table(ROWS), ROWS),
    "quoted.csv": (table(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n"), ROWS),
    "semicolon.csv": (table(ROWS, delimiter=";"), ROWS),
    "a.tsv": (table(ROWS, delimiter="\t"), ROWS),
}


@pytest.mark.parametrize("how", ["plain", "gz", "zst", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-16 gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_files(name, how, folder, monkeypatch):
    monkeypatch.setattr(source_text, "BLOCK", 64)  # so that every record spans blocks
    monkeypatch.setattr(source_index, "BLOCK", 1024)
    text, records = TEXTS[name]
    encoding, _, packing = how.partition(" ") if " " in how or how.startswith("utf") else ("utf-8", "", how)
    data = text.encode(encoding)
    file = folder / name
    if packing == "gz":
        file = folder / f"{name}.gz"
        half = len(data) // 2
        file.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))  # as joined files are
    elif packing == "zst":
        file = folder / f"{name}.zst"
        file.write_bytes(pa.compress(data, codec="zstd", asbytes=True))
    else:
        file.write_bytes(data)
    source = open_source(str(file))
    assert isinstance(source, TextFiles) and source.damaged == [] and source.name == str(file)
    assert [source.read(i) for i in range(len(source))] == expected(records)
    assert [source.read(i) for i in reversed(range(len(source)))] == expected(records)[::-1]
    for index in (-1, len(records)):
        with pytest.raises(IndexError):
            source.read(index)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the command zstd")
def test_zstd_of_the_command(folder):
    (folder / "a.jsonl").write_text(lines(RECORDS))
    subprocess.run(["zstd", "-q", "-19", "--long=27", "a.jsonl"], cwd=folder, check=True)
    assert [r["texts"] for r in read_all(open_source(str(folder / "a.jsonl.zst")))] == [r["texts"] for r in RECORDS]


def read_all(source):
    return [source.read(i) for i in range(len(source))]


def test_tables_are_what_csv_says(folder):
    """The module csv reads the whole file at once; ours reads row by row, by position."""
    for name in ("a.csv", "quoted.csv", "semicolon.csv", "a.tsv"):
        (folder / name).write_text(TEXTS[name][0], newline="")
        with open(folder / name, newline="") as file:
            rows = list(csv.DictReader(file, delimiter={"semicolon.csv": ";", "a.tsv": "\t"}.get(name, ",")))
        assert read_all(open_source(str(folder / name))) == expected(rows)


WRITERS = {
    "text": lambda folder: (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS).encode())),
    "list": lambda folder: (folder / "x.json").write_text(json.dumps(RECORDS)),
    "table": lambda folder: (folder / "x.csv").write_text(table(ROWS), newline=""),
    "arrow": lambda folder: write_arrow(folder / "x.arrow"),
    "saved": lambda folder: datasets.Dataset.from_list(CARRIED).save_to_disk(folder / "x.saved", num_shards=3),
    "classes": lambda folder: [write_image(folder / f"x.classes/{'abc'[i % 3]}/{i}.png", i) for i in range(40)],
}

CARRIED = [{**row, "image": {"bytes": encode(i), "path": None}} for i, row in enumerate(ROWS)]


def write_arrow(path, rows=ROWS, kind="stream", size=7):
    rows = pa.Table.from_pylist(rows)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=size)


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(seed))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_goes_on_from_the_middle(kind, shuffle, folder):
    WRITERS[kind](folder)
    [path] = folder.glob("x.*")
    source = open_source(str(path), order=Order(3, shuffle))
    assert len(source) == 40
    refs = list(itertools.islice(source.refs([0, 2], 3), 70))
    in_first_pass = [
        ref.key for slot in range(3) for ref in itertools.takewhile(lambda r: not r.epoch, source.refs([slot], 3))
    ]
    assert sorted(in_first_pass) == list(range(40))
    again = open_source(str(path), order=Order(3, shuffle))
    for at in (1, 13, 45):
        after = json.loads(json.dumps(refs[at].after))
        going_on = list(itertools.islice(again.refs([0, 2], 3, after), 20))
        assert [ref[:6] for ref in going_on] == [ref[:6] for ref in refs[at + 1 : at + 21]]
        assert [again.read(ref.key) for ref in going_on] == [source.read(ref.key) for ref in going_on]


# --- many files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".csv", ".tsv.zst", ".arrow", ".parquet"])
def test_globs_and_braces_of_every_kind(suffix, folder):
    pieces = [ROWS[:15], ROWS[15:16], ROWS[16:]]
    for i, rows in enumerate(pieces):
        path = folder / f"part/shard-{i:03}{suffix}"
        path.parent.mkdir(exist_ok=True)
        text = (table(rows, "\t" if "tsv" in suffix else ",") if "sv" in suffix else lines(rows)).encode()
        if suffix == ".arrow":
            write_arrow(path, rows)
        elif suffix == ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_bytes(
                gzip.compress(text) if "gz" in suffix else pa.compress(text, "zstd", True) if "zst" in suffix else text
            )
    shutil.move(folder / "images", folder / "part/images")
    specs = [
        "part/*",
        "part/shard-*",
        "**/shard-*",
        "part/shard-{000..002}",
        "part/shard-00{0,1,2}",
        "{part,part}/shard-00{0..2}",
    ]
    for spec in specs:
        source = open_source(f"{folder}/{spec}" + suffix)
        want = expected(ROWS) * (2 if spec.startswith("{") else 1)
        assert read_all(source) == want, spec
    assert read_all(open_source(str(folder))) == read_all(open_source(str(folder / "part"))) == expected(ROWS)
    with pytest.raises(UserError, match=r"shard-\{000..003\}\S+ stands for 4 names, and there is no \S+shard-003"):
        open_source(f"{folder}/part/shard-{{000..003}}{suffix}")
    with pytest.raises(UserError, match=r"\{3..1\} in .* must count up, to at most 100000 names"):
        open_source(f"{folder}/part/shard-{{3..1}}{suffix}")
    with pytest.raises(UserError, match="stands for more than 100000 names"):
        open_source(f"{folder}/{{0..99999}}{{0..99999}}{suffix}")


def test_a_name_that_has_braces_is_that_name(folder):
    (folder / "a{0..3}.jsonl").write_text(lines(RECORDS))
    assert read_all(open_source(str(folder / "a{0..3}.jsonl"))) == expected(RECORDS)


def test_folders_by_a_glob(folder):
    for name in ("one", "two"):
        write_image(folder / name / "a.png", 1)
        (folder / name / "a.txt").write_text(name)
    source = open_source(str(folder / "{one,two}"))
    assert isinstance(source, Concatenation)
    assert [record["texts"][0]["assistant"] for record in read_all(source)] == ["one", "two"]


# --- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_image_folders(name, tmp_path):
    for part in ("train", "train/more"):
        rows = [{"file_name": f"sub/{i}.png", "text": f"{part} {i}"} for i in range(3)]
        for i in range(3):
            write_image(tmp_path / part / f"sub/{i}.png", i)
        (tmp_path / part / name).write_text(table(rows) if "csv" in name else lines(rows), newline="")
    source = open_source(str(tmp_path))
    read = read_all(source)
    assert read == [{"images": [encode(i)], "text": f"{p} {i}"} for p in ("train", "train/more") for i in range(3)]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    theirs = sorted((row["image"].convert("RGB").tobytes(), row["text"]) for row in theirs)
    texts = [{"user": "?", "assistant": "a"}]
    ours = sorted((to_sample({**r, "texts": texts}).images[0].tobytes(), r["text"]) for r in read)
    assert ours == theirs


def test_file_names_of_several_images(folder):
    texts = RECORDS[0]["texts"]
    names = [f"images/{i}.png" for i in range(3)]
    rows = [
        ({"file_names": names, "texts": texts}, [0, 1, 2]),
        ({"images_file_names": names[:2], "texts": texts}, [0, 1]),
        ({"image_file_name": names[2], "texts": texts}, [2]),
        ({"file_name": names[1], "images": [names[0]], "texts": texts}, [0]),
        ({"file_name": "", "texts": texts}, []),
    ]
    (folder / "metadata.jsonl").write_text(lines(record for record, _images in rows))
    source = open_source(str(folder))
    for record, (_row, images) in zip(read_all(source), rows, strict=True):
        assert [image.tobytes() for image in to_sample(record).images] == [noise(i).tobytes() for i in images]


def test_class_folders(tmp_path):
    for i, place in enumerate(("big dog/1.png", "cat/1.png", "cat/2.png")):
        write_image(tmp_path / place, i)
    write_image(tmp_path / ".cache/x.png", 0)
    source = open_source(str(tmp_path))
    assert isinstance(source, Classes) and source.damaged == []
    question = "what is in the image?"
    answers = ["big dog", "cat", "cat"]
    assert read_all(source) == [
        {"images": [encode(i)], "texts": [{"user": question, "assistant": answer}]} for i, answer in enumerate(answers)
    ]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / ".c"))
    names = theirs.features["label"].names
    assert sorted(names[label] for label in theirs["label"]) == sorted(answers)
    write_image(tmp_path / "train/fish/1.png", 3)  # of any depth
    assert open_source(str(tmp_path)).read(3)["texts"] == [{"user": question, "assistant": "fish"}]
    write_image(tmp_path / "alone.png", 0)
    assert open_source(str(tmp_path)).damaged == [f"{tmp_path}: 1 of 5 images are in no folder of a class"]


def test_folders_that_say_nothing_about_their_images(tmp_path):
    for places in (["a.png"], ["images/a.png"], ["train/a.png", "val/b.png"]):
        folder = tmp_path / str(len(places)) / places[0].replace("/", "-")
        for place in places:
            write_image(folder / place, 0)
        with pytest.raises(UserError, match=r"has \d images and nothing about them: it needs .* at least two classes"):
            open_source(str(folder))


def test_a_folder_of_images_and_files_of_records(folder):
    """A file of records belongs to the folder; if images have texts beside them, it is named as not read."""
    (folder / "llava.json").write_text(json.dumps(RECORDS[:20]))
    (folder / "more.csv.gz").write_bytes(gzip.compress(table(ROWS[20:]).encode()))
    (folder / "dataset_infos.json").write_text("{}")
    source = open_source(str(folder))
    assert source.damaged == [] and read_all(source) == expected([*RECORDS[:20], *ROWS[20:]])
    for i in range(5):
        (folder / f"images/{i}.txt").write_text("noise")
    source = open_source(str(folder))
    assert len(source) == 5
    assert source.damaged == [
        f"{folder}: {folder / 'llava.json'} is not read, as images have texts beside them: name it itself"
    ]


# --- Arrow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow(kind, folder):
    write_arrow(folder / "a.arrow", kind=kind)
    source = open_source(str(folder / "a.arrow"))
    assert isinstance(source, Arrow) and source.damaged == [] and read_all(source) == expected(ROWS)
    whole = (folder / "a.arrow").read_bytes()
    ends = [place for _file, place in source.batches[1:]]
    for length in (*ends, ends[0] - 1, ends[2] + 9, ends[3] - 100):
        (folder / "a.arrow").write_bytes(whole[:length])
        num = 7 * sum(end <= length for end in ends)
        if not num:
            with pytest.raises(UserError, match=r"a.arrow is cut off or damaged .*: 0 whole records are before that"):
                Arrow(folder / "a.arrow")
            continue
        cut = Arrow(folder / "a.arrow")
        assert read_all(cut) == expected(ROWS[:num]) and len(cut.damaged) == (length not in ends)
    (folder / "a.arrow").write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match=r"a.arrow is damaged or no Arrow file"):
        Arrow(folder / "a.arrow")


def test_saved_datasets(folder):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = [{"image": {"bytes": encode(i), "path": None}, "question": str(i), "label": i % 2} for i in range(10)]
    whole = datasets.Dataset.from_list(rows, features=features)
    want = [{"images": [encode(i)], "question": str(i), "label": ["no", "yes"][i % 2]} for i in range(10)]
    whole.select([4, 2, 9]).save_to_disk(folder / "chosen")  # by an index, which save_to_disk applies
    assert read_all(open_source(str(folder / "chosen"))) == [want[i] for i in (4, 2, 9)]
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(folder / "dict")
    assert read_all(open_source(str(folder / "dict"))) == want
    assert read_all(open_source(str(folder / "dict"), split="test")) == want[:3]
    assert read_all(open_source(str(folder / "dict/test"))) == want[:3]
    with pytest.raises(UserError, match=r"dict has no split 'val': name the folder of one of train, test in it"):
        open_source(str(folder / "dict"), split="val")
    whole.to_parquet(folder / "a.parquet")
    assert read_all(open_source(str(folder / "a.parquet"))) == want
    state = json.loads((folder / "chosen/state.json").read_text())
    for name, sentence in (
        ("../x.arrow", "which is not a file of its folder"),
        ("gone.arrow", "there is no .arrow file"),
    ):
        state["_data_files"] = [{"filename": name}]
        (folder / "chosen/state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=sentence):
            open_source(str(folder / "chosen"))


# --- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".csv.gz", ".json.zst"])
def test_a_compressed_file_that_is_cut_keeps_its_whole_records(suffix, folder):
    rows = [{**row, "noise": random.Random(i).randbytes(8000).hex()} for i, row in enumerate(ROWS)]
    text = (
        table(rows, quoting=csv.QUOTE_ALL)
        if "csv" in suffix
        else json.dumps(rows, indent=1)
        if suffix.startswith(".json.")
        else lines(rows)
    )
    data = gzip.compress(text.encode()) if "gz" in suffix else pa.compress(text.encode(), "zstd", asbytes=True)
    file = folder / f"a{suffix}"
    for share in (0.3, 0.7, 0.95):
        file.write_bytes(data[: int(share * len(data))])
        source = TextFiles(file)
        assert 0 < len(source) < 40 and read_all(source) == expected(rows[: len(source)])
        assert len(source.damaged) == 1
        assert f"{file} is cut off or damaged after " in source.damaged[0]
        assert f": {len(source)} whole records are before that" in source.damaged[0]
    file.write_bytes(b"no gzip, no zstd")
    with pytest.raises(UserError, match=r"a\.\S+ is cut off or damaged after 0 bytes .*: 0 whole records"):
        TextFiles(file)


def test_a_list_that_is_cut_or_has_damaged_elements(folder):
    text = json.dumps(RECORDS, indent=1)
    file = folder / "a.json"
    at = text.index('"7 ')  # within record 7
    file.write_text(text[:at])
    source = TextFiles(file)
    assert read_all(source) == expected(RECORDS[:7])
    assert source.damaged == [f"{file} is cut off or damaged: its list has no end: 7 whole records are before that"]
    file.write_text(text + "\n[]")
    assert (
        re_damage(file, 40)
        == f"{file} has more after the end of its list at byte {len(text)}: 40 whole records are before that"
    )
    file.write_text(
        "["
        + ",".join(
            [
                json.dumps(RECORDS[0]),
                "3",
                '{"a" 1}',
                "",
                "[[]]",
                '"[{"',
                "[" * 99_999 + "]" * 99_999,
                json.dumps(RECORDS[1]),
            ]
        )
        + "]"
    )
    source = TextFiles(file)
    assert len(source) == 8 and [source.read(0), source.read(7)] == expected(RECORDS[:2])
    for i in range(1, 7):
        with pytest.raises(UserError, match=f"record {i + 1} of {file} (is not valid JSON|must be a JSON object)"):
            source.read(i)


def re_damage(file, num):
    source = TextFiles(file)
    assert len(source) == num
    [sentence] = source.damaged
    return sentence


def test_lists_that_are_no_records(folder):
    (folder / "lines.jsonl").write_text("[1]\n[2]\n" + json.dumps(RECORDS[0]))
    source = TextFiles(folder / "lines.jsonl")  # each line is a record, and two of them are lists
    assert len(source) == 3 and source.read(2) == expected(RECORDS[:1])[0]
    coco = {"images": [{"file_name": "a.png"}], "annotations": [{"caption": "a"}], "licenses": []}
    (folder / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(
        UserError, match=r"coco.json is a JSON object with 2 lists of objects: images, annotations; it must"
    ):
        TextFiles(folder / "coco.json")
    (folder / "messages.json").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert TextFiles(folder / "messages.json").read(0) == {"messages": [{"role": "user", "content": "a"}]}


def test_a_damaged_row_is_one_loss(folder):
    good = [table(ROWS[i : i + 1]).split("\r\n", 1)[1] for i in (0, 7, 8)]
    bad = ['x,"open\r\n', 'x,"a"b,c\r\n', "a,b\r\n", "a,b,c,d\r\n"]
    (folder / "a.csv").write_text(
        "image,question,answer\r\n" + good[0] + bad[0] + "".join(good[1:2]) + "".join(bad[1:]) + good[2], newline=""
    )
    source = TextFiles(folder / "a.csv")
    assert len(source) == 7
    results = []
    for i in range(7):
        try:
            results.append(source.read(i))
        except UserError as error:
            assert f" of {folder}/a.csv" in str(error) and str(error).startswith("line ")
            results.append(str(error).split(f"{folder}/a.csv ")[1])
    assert [r for r in results if isinstance(r, dict)] == [expected(ROWS)[i] for i in (0, 7, 8)]
    assert sum("is not a row of a table" in r for r in results) == 2
    assert "has 2 fields, and the header names 3: image, question, answer" in results
    (folder / "a.csv").write_bytes(b"image,question,answer\r\nimages/0.png,caf\xe9,b\r\nimages/0.png,a,b\r\n")
    source = TextFiles(folder / "a.csv")
    with pytest.raises(UserError, match=r"line 2 of .*a.csv is not UTF-8 text, as the file must be"):
        source.read(0)
    assert source.read(1)["question"] == "a"
    (folder / "a.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"the header of .*a.csv must name each column once, not a, b, a"):
        TextFiles(folder / "a.csv")


def test_a_row_without_an_end_is_one_loss_and_those_after_it_are_read(folder):
    rows = [f'images/{i % 5}.png,"{i}",{i}\n' if i != 10 else 'images/0.png,"open,10\n' for i in range(40)]
    rows[11:] = [f"images/{i % 5}.png,{i},{i}\n" for i in range(11, 40)]
    (folder / "a.csv").write_text("image,question,answer\n" + "".join(rows))
    source = TextFiles(folder / "a.csv")
    assert len(source) == 40
    with pytest.raises(UserError, match=r"line 12 of .*a.csv is not a row of a table"):
        source.read(10)
    assert [source.read(i)["answer"] for i in range(40) if i != 10] == [str(i) for i in range(40) if i != 10]


def test_records_of_too_many_bytes_are_losses(folder, monkeypatch):
    for module in (source_index, source_lines):
        monkeypatch.setattr(module, "LARGEST_RECORD", 1000)
    limit = csv.field_size_limit(1000)
    try:
        for name, number in (("a.jsonl", 10), ("a.json", 10), ("a.csv", 10)):
            rows = [{**row, "more": "x" * (3000 if i == number else 1)} for i, row in enumerate(ROWS)]
            text = {"a.jsonl": lines(rows), "a.json": json.dumps(rows), "a.csv": table(rows)}[name]
            (folder / name).write_text(text, newline="")
            monkeypatch.setattr(source_index, "BLOCK", 100)
            source = TextFiles(folder / name)
            if name == "a.json":  # where a string that long ends is not looked for
                assert read_all(source) == expected(rows[:10]) and len(source.damaged) == 1
                continue
            assert len(source) == 40
            with pytest.raises(UserError, match=r"has \d+ bytes, more than 1000|is not a row"):
                source.read(number)
            assert [source.read(i) for i in range(40) if i != number] == expected(rows[:number] + rows[number + 1 :])
    finally:
        csv.field_size_limit(limit)


def test_a_bomb_does_not_fill_the_disk(folder, monkeypatch):
    monkeypatch.setattr(source_text, "ALWAYS_ALLOWED", 10_000)
    text = lines(RECORDS)[:9_000]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(TextFiles(folder / "a.jsonl.gz"))
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", lambda data: pa.compress(data, "zstd", True))):
        (folder / name).write_bytes(pack(b"\n" * 10_000_000))
        with pytest.raises(
            UserError, match=rf"{name} unpacks to more than \d+ bytes: if that is right, unpack it yourself"
        ):
            TextFiles(folder / name)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(source_text, "FREE_SPACE", 2**62)
    with pytest.raises(UserError, match=r"is too large to be unpacked in \S+: set TMPDIR to a larger folder"):
        TextFiles(folder / "a.jsonl.gz")


def test_base64_in_a_table(folder):
    """As VLMEvalKit writes its tables."""
    rows = [{"image": base64.b64encode(encode(i)).decode(), "question": "?", "answer": str(i)} for i in range(3)]
    (folder / "a.tsv").write_text(table(rows, "\t"), newline="")
    assert [r["images"] for r in read_all(open_source(str(folder / "a.tsv")))] == [[encode(i)] for i in range(3)]


@pytest.mark.parametrize(
    "record",
    [
        {"query": "how many?", "response": "3"},
        {"instruction": "count", "output": "3"},
        {"prompt": "q", "completion": "3"},
    ],
)
def test_a_conversation_beside_an_image_counts_before_its_caption(tmp_path, record):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert to_sample(open_source(str(tmp_path)).read(0)).messages[-1]["content"] == "3"
