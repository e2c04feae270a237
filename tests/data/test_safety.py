"""What a stranger's data may do is an image, or one sentence: no file, program, address or memory beyond it."""

import base64
import contextlib
import gzip
import http.server
import io
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import pytest
from PIL import EpsImagePlugin, Image

from nanovlm.config import DataConfig
from nanovlm.data import source_address, source_names, source_parquet, source_tar
from nanovlm.data.images import decode_image, to_rgb
from nanovlm.data.loader import Loader
from nanovlm.data.pictures import FORMATS
from nanovlm.data.records import to_sample
from nanovlm.data.source_address import is_public
from nanovlm.data.source_tar import Tar
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from tests.conftest import noise

TURNS = [{"user": "what is it?", "assistant": "noise"}]


def encode(seed, kind="PNG"):
    file = io.BytesIO()
    noise(seed).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder of data with what is not its own around it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/a.png").write_bytes(encode(9))
    (tmp_path / "secret/a.txt").write_text("a secret")
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.png").write_bytes(encode(0))
    return folder


def read_image(folder, name, **options):
    """Read the only record of a file that names an image, and decode it."""
    (folder / "a.jsonl").write_text(json.dumps({"image": name, "texts": TURNS}))
    return to_sample(open_source(str(folder / "a.jsonl"), **options).read(0)).images[0]


# --- files ---------------------------------------------------------------------------------------------------


def test_names_stay_in_the_folder_of_their_file(folder):
    (folder / "link.png").symlink_to(folder / "sub/a.png")
    (folder / "out.png").symlink_to(folder.parent / "secret/a.png")
    (folder / "away").symlink_to(folder.parent / "secret")
    (folder / "chain.png").symlink_to(folder / "away/a.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in (
        "sub/a.png",
        "./sub/../sub/a.png",
        str(folder / "sub/a.png"),
        f"{folder}/../data/sub/a.png",
        "link.png",
    ):
        assert read_image(folder, name).tobytes() == noise(0).tobytes()
    outside = ["../secret/a.png", str(folder.parent / "secret/a.png"), "out.png", "away/a.png", "chain.png"]
    for name in (*outside, "sub/../../secret/a.png", "/dev/zero", "/dev/stdin", "/proc/self/environ"):
        with pytest.raises(
            UserError, match=rf"line 1 of {folder}/a.jsonl names .* outside .*: it must be in {folder} or"
        ):
            read_image(folder, name)
    for name in ("loop.png", "gone.png", "a\0b", "x" * 300, "../secret/gone.png"):
        with pytest.raises(UserError, match=r"line 1 of .*a.jsonl names a file that cannot be read"):
            read_image(folder, name)


def test_every_source_stays_in_its_folder(folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    name = {"image": "../secret/a.png", "texts": TURNS}
    good = {"image": "sub/a.png", "texts": TURNS}
    (folder / "a.json").write_text(json.dumps([name, good]))
    (folder / "a.csv").write_text("image,question,answer\n../secret/a.png,a,b\nsub/a.png,a,b\n")
    rows = pa.Table.from_pylist([{**r, "image": {"bytes": None, "path": r["image"]}} for r in (name, good)])
    pq.write_table(rows, folder / "a.parquet")
    with pa.ipc.new_stream(str(folder / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    for file in ("a.json", "a.csv", "a.parquet", "a.arrow"):
        source = open_source(str(folder / file))
        assert source.read(1)["images"] == [encode(0)]
        with pytest.raises(UserError, match=r"names \S+secret/a.png, which is outside the folder of its record"):
            source.read(0)
        (folder / file).unlink()
    for kind in ("described", "classes"):
        pictures = folder / kind
        (pictures / "b").mkdir(parents=True)
        (pictures / "a").symlink_to(folder.parent / "secret")
        (pictures / "c").mkdir()
        (pictures / "c/2.png").symlink_to(folder.parent / "secret/a.png")
        for name in ("b/1.png", "b/4.png"):
            (pictures / name).write_bytes(encode(0))
        if kind == "described":
            (pictures / "b/1.txt").write_text("noise")
            (pictures / "b/4.json").write_text(json.dumps({"images": ["../b/1.png", "4.png"], "texts": TURNS}))
            (pictures / "c/2.txt").write_text("noise")
            (pictures / "b/3.png").write_bytes(encode(0))
            (pictures / "b/3.txt").symlink_to(folder.parent / "secret/a.txt")
        source = open_source(str(pictures))
        results = []
        for i in range(len(source)):
            try:
                results.append(len(source.read(i)["images"]))
            except UserError as error:
                assert "is outside the folder" in str(error)
                results.append("outside")
        assert results == ([1, "outside", 2, "outside"] if kind == "described" else [1, 1, "outside"])


def test_nothing_but_files_is_opened(folder, monkeypatch):
    opened, of_system = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **named: [opened.append(str(path)), of_system(path, *rest, **named)][1]
    )
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
        for name in ("pipe.png", "socket.png", "sub"):
            with pytest.raises(UserError, match=rf"names a file that cannot be read: \S+{name} is not a regular file"):
                read_image(folder, name)
    assert not opened
    assert read_image(folder, "sub/a.png").size == noise(0).size and opened == [str(folder / "sub/a.png")]


def test_a_file_that_is_exchanged_for_a_pipe_is_not_waited_for(folder, monkeypatch):
    """Between the look at a file and opening it."""
    os.mkfifo(folder / "pipe.png")
    of_system = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: of_system(str(path).replace("sub/a.png", "pipe.png"), flags))
    with pytest.raises(UserError, match="is not a regular file"):
        read_image(folder, "sub/a.png")


def test_large_files_are_refused(folder, monkeypatch):
    size = len(encode(0))
    monkeypatch.setattr(source_names, "LARGEST_FILE", size)
    assert read_image(folder, "sub/a.png").size == noise(0).size
    monkeypatch.setattr(source_names, "LARGEST_FILE", size - 1)
    with pytest.raises(UserError, match=rf"names \S+a.png, which has more than {size - 1} bytes"):
        read_image(folder, "sub/a.png")


# --- images --------------------------------------------------------------------------------------------------


def test_what_is_read_is_a_list_and_nothing_else():
    for kind in FORMATS:
        with contextlib.suppress(KeyError, OSError):  # PIL does not write all that it reads
            assert decode_image(encode(0, kind)).size == noise(0).size
    others = [kind for kind in Image.SAVE if kind not in (*FORMATS, "MPO")]
    tried = 0
    for kind in others:
        try:
            data = encode(0, kind)
            with Image.open(io.BytesIO(data)) as image:
                found = image.format
        except Exception:
            continue
        if found not in (*FORMATS, "MPO"):
            tried += 1
            with pytest.raises(UserError, match="have no format that is read"):
                decode_image(data)
    assert tried >= 5


def test_no_image_starts_a_program(folder, monkeypatch):
    """PIL has Ghostscript draw EPS, which is a program; it must not even look into such a file."""
    eps, calls = encode(0, "EPS"), []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **named: calls.append(1) or noise(0).im)
    opened = EpsImagePlugin.EpsImageFile._open
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda image: [calls.append(0), opened(image)][1])
    for name in ("a.eps", "a.png"):
        (folder / name).write_bytes(eps)
        with pytest.raises(UserError, match="no format that is read"):
            read_image(folder, name)
    with pytest.raises(UserError, match="no format that is read"):
        read_image(folder, "data:image/png;base64," + base64.b64encode(eps).decode())
    assert not calls
    image = Image.open(io.BytesIO(eps))  # as a record of another's code may hold it
    assert calls == [0]
    with pytest.raises(UserError, match="it is of the format EPS"):
        to_rgb(image)
    with pytest.raises(UserError, match="image 0 cannot be read: it is of the format EPS"):
        to_sample({"images": [image], "texts": TURNS})
    assert calls == [0]
    image.load()
    assert calls == [0, 1]


def test_the_limit_of_pixels_is_that_of_the_config_alone(monkeypatch):
    """A picture of 95 megapixels: PIL would warn at 89, and refuse at 179."""
    file = io.BytesIO()
    Image.new("1", (10_000, 9_500)).save(file, "PNG")
    assert Image.MAX_IMAGE_PIXELS == DataConfig().max_pixels >= 200_000_000
    assert decode_image(file.getvalue()).size == (10_000, 9_500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 94_000_000)
    with pytest.raises(UserError, match=r"it has 95000000 pixels, more than data.max_pixels = 94000000"):
        decode_image(file.getvalue())


def test_an_unreadable_image_is_named_with_its_file_and_line(folder, processor, capsys):
    (folder / "bad.png").write_bytes(encode(1)[:60])
    records = [{"image": "sub/a.png", "texts": TURNS}, {"image": "bad.png", "texts": TURNS}]
    (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    loader = Loader(
        open_source(str(folder / "a.jsonl")),
        lambda raw: processor.document(to_sample(raw)),
        DataConfig(row_length=256, batch_rows=1, max_bad_fraction=1.0),
        processor.config.pad_token_id,
        num_epochs=1,
    )
    assert len(list(loader)) == 1 and loader.counts["corrupt"] == 1
    sentence = (
        rf"skipped as corrupt: \S+a.jsonl, sample 1: image 0 \(bad.png, line 3 of {folder}/a.jsonl\) cannot be read"
    )
    assert re.search(sentence, capsys.readouterr().out)


# --- data: URLs and addresses --------------------------------------------------------------------------------


def test_data_urls(folder):
    data = base64.b64encode(encode(3)).decode()
    for url in (f"data:image/png;base64,{data}", f"data:image/png;charset=x;BASE64,{data}"):
        assert read_image(folder, url).tobytes() == noise(3).tobytes()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "url": url},
        {"type": "text", "text": "?"},
    ]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]}
    (folder / "b.jsonl").write_text(json.dumps(record))
    images = to_sample(open_source(str(folder / "b.jsonl")).read(0)).images
    assert [image.tobytes() for image in images] == [noise(3).tobytes()] * 2
    for url, sentence in (
        (f"data:image/png;base64,{data[:400]}!", "is damaged"),
        ("data:image/png;base64," + "A" * 300_000 + "\x1b", "is damaged"),
        ("data:image/svg+xml,<svg/>", "a data: URL must be data:image/...;base64"),
        ("data:" + "x" * 300_000, "a data: URL must be data:image/...;base64"),
        ("data:image/png;base64," + "A" * 300_000, "no format that is read"),
        ("/9j/" + "A" * 300_000 + "=!", "is damaged"),
        ("x" * 300_000, "cannot be read"),
        ("http://" + "x" * 300_000, "names the address"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            read_image(folder, url)
        assert len(str(error.value)) < 600 and "line 1 of" in str(error.value) and str(error.value).isprintable()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012
    num_redirects = 0

    def log_message(self, *_args):
        pass

    def do_GET(self):
        Server.asked.append((self.headers["Host"].split(":")[0], self.path))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest if ":" in rest else f"/{rest}")
            self.end_headers()
        elif kind == "again":
            left = int(rest)
            self.send_response(307)
            self.send_header("Location", f"/again/{left - 1}" if left else "/a.png")
            self.end_headers()
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif kind == "slow-head":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(encode(4))
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 2**16)
        elif self.path in ("/a.png", "/a%20b.png?x=%C3%A9"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encode(4))
        else:
            self.send_error(404)


@pytest.fixture
def server(monkeypatch):
    """The address of a server, of which 127.0.0.1 counts as public and 127.0.0.2 does not."""
    monkeypatch.setattr(source_address, "is_public", lambda address: address == "127.0.0.1")
    Server.asked = []
    running = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Server)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_addresses_are_fetched_where_the_user_allows_them(folder, server):
    with pytest.raises(UserError, match=r"line 1 of .*a.jsonl names the address http://.*: add --data.allow-urls"):
        read_image(folder, f"{server}/a.png")
    assert not Server.asked
    for path in ("a.png", "a b.png?x=é", "to/a.png", f"to/{server}/a.png", "again/4"):
        image = read_image(folder, f"{server}/{path}", allow_urls=True)
        assert image.tobytes() == noise(4).tobytes(), path
    assert len(Server.asked) == 2 + 2 + 2 + 6


def test_addresses_have_limits(folder, server, monkeypatch):
    monkeypatch.setattr(source_address, "SECONDS", 0.5)
    monkeypatch.setattr(source_address, "LARGEST_DOWNLOAD", len(encode(4)))
    assert read_image(folder, f"{server}/a.png", allow_urls=True).tobytes() == noise(4).tobytes()
    private = server.replace("127.0.0.1", "127.0.0.2")
    for path, sentence in (
        ("gone.png", "the server answers 404 Not Found"),
        ("again/5", "there are more than 5 redirects"),
        ("to/to/to/to/to/to/to/a.png", "there are more than 5 redirects"),
        ("slow", "it takes more than 0.5 s"),
        ("slow-head", "it takes more than 0.5 s"),
        ("short", r"it ends \d+ bytes too early"),
        ("endless", r"it has more than \d+ bytes"),
        ("to/file:///etc/passwd", "an address must begin with http:// or https://, not file:///etc/passwd"),
        ("to/ftp://127.0.0.1/a.png", "an address must begin with http:// or https://"),
        (f"to/{private}/a.png", "127.0.0.2 is 127.0.0.2, which is not a public address"),
    ):
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"names {server}/.*, which cannot be fetched: {sentence}"):
            read_image(folder, f"{server}/{path}", allow_urls=True)
        assert time.monotonic() - start < 20
    for address in (
        f"{private}/a.png",
        "http:///a.png",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:1/",
    ):
        with pytest.raises(UserError, match="which cannot be fetched"):
            read_image(folder, address, allow_urls=True)
    for address in ("file:///etc/passwd", f"file://{folder}/sub/a.png", "ftp://127.0.0.1/a.png", "zip://a::http://b/c"):
        with pytest.raises(UserError, match=r"must begin with http:// or https://|names the address"):
            read_image(folder, address, allow_urls=True)
    assert "127.0.0.2" not in {host for host, _path in Server.asked}


def test_addresses_may_be_asked_for_less(server):
    """No redirect, fewer bytes, one kind of file: what a server fetches for its clients."""
    address, data = f"{server}/a.png", encode(4)
    download = source_address.download
    assert download(address, "x", most_redirects=0, most_bytes=len(data)) == data
    for options, sentence in (
        ({"most_bytes": len(data) - 1}, f"it has more than {len(data) - 1} bytes"),
        ({"kind": "image/"}, "its type is not told, not image/..."),
    ):
        with pytest.raises(UserError, match=f"x names {address}, which cannot be fetched: {sentence}"):
            download(address, "x", **options)
    asked = len(Server.asked)
    with pytest.raises(UserError, match="cannot be fetched: it redirects"):
        download(f"{server}/to/a.png", "x", most_redirects=0)
    assert len(Server.asked) == asked + 1


def test_public_addresses():
    for address in ("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"):
        assert not is_public(address) and not is_public(f"::ffff:{address}"), address
    for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "224.0.0.1", "255.255.255.255", "ff02::1", "2002:7f00:1::"):
        assert not is_public(address), address
    for address in ("8.8.8.8", "151.101.1.140", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(address), address


def test_an_address_is_that_of_the_host_which_was_looked_up(monkeypatch):
    """A name may have another address when it is asked for again."""
    answers = iter([("8.8.8.8", 80), ("127.0.0.1", 80)])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_named: [(2, 1, 6, "", next(answers))])
    connected = []
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: connected.append(address) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source_address.download("http://rebound.example/a.png", "line 1")
    assert connected == [("8.8.8.8", 80)]


# --- sizes ---------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from nanovlm.data.sources import open_source

def peak():  # of this program alone; what getrusage says includes the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
try:
    source = open_source(sys.argv[1])
    for i in range(min(len(source), 3)):
        try:
            source.read(i)
        except ValueError as error:
            print(error)
except ValueError as error:
    print(error)
print((peak() - before) // 1024)
"""


def measure(path):
    """Return the megabytes that opening a source and reading some of it takes, in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_a_value_that_parquet_repeats_is_in_memory_once(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": b"x" * 10_000_000, "path": None}, "texts": TURNS}]
    table = pa.concat_tables([pa.Table.from_pylist(rows)] * 200)
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**30)
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    assert measure(tmp_path / "a.parquet") < 500  # of 2 GB


def test_row_groups_have_a_limit(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"image": encode(0), "texts": TURNS}]), tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet")).read(0)["texts"] == TURNS
    monkeypatch.setattr(source_parquet, "LARGEST_GROUP", 100)
    with pytest.raises(UserError, match=r"row 0 .* cannot be read: its row group has \d+ bytes, more than 100"):
        open_source(str(tmp_path / "a.parquet")).read(0)


def test_long_lines_and_lists_are_not_in_memory(tmp_path):
    """300 MB in one line, of a file with 60 kB; and 40 lists of 8 MB each."""
    blank = b'{"texts": "' + b"x" * 300_000_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(blank + b'"}\n{"a": 1}\n', 1))
    assert measure(tmp_path / "a.jsonl.gz") < 150
    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ", ".join(json.dumps({"a": "x" * 8_000_000}) for _ in range(40)) + "]")
    assert measure(tmp_path / "a.json") < 150


def test_damaged_arrow_files_are_records_or_losses(tmp_path):
    """Their offsets say where values are, and Arrow believes them: one that leads out of the file ends the process."""
    pa = pytest.importorskip("pyarrow")
    rows = pa.Table.from_pylist(
        [{"image": encode(i), "texts": [{"user": "a" * i, "assistant": "b"}]} for i in range(12)]
    )
    file = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(file), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)
    whole, counts = file.read_bytes(), Counter()
    for seed in range(300):
        rng, data = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at, size = rng.randrange(len(data)), rng.choice([1, 4, 8])
            data[at : at + size] = rng.choice([b"\xff" * size, bytes(size), rng.randbytes(size), b"\x7f" * size])
        file.write_bytes(data)
        try:
            source = open_source(str(file))
        except UserError:
            counts["refused"] += 1
            continue
        for i in range(len(source)):
            try:
                source.read(i)
                counts["read"] += 1
            except UserError:
                counts["lost"] += 1
    assert counts["read"] > 1000 and counts["lost"] > 50 and counts["refused"] > 20
    data = bytearray(whole)
    at = data.index(b"".join(i.to_bytes(4, "little") for i in (0, 0, 1, 3, 6)))  # of the texts of the first batch
    data[at + 16 : at + 20] = (10**9).to_bytes(4, "little")
    file.write_bytes(data)
    source = open_source(str(file))
    assert source.read(4)["images"] == [encode(4)]  # of the second batch
    with pytest.raises(UserError, match=r"row 3 of the batch at byte \d+ of .*a.arrow cannot be read: "):
        source.read(3)


# --- tar files -----------------------------------------------------------------------------------------------


def write_tar(kind, folder=""):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for i in range(6):
            for suffix, data in (("png", encode(i)), ("json", json.dumps({"texts": TURNS}).encode())):
                member = tarfile.TarInfo(f"{folder}{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def damage_size(whole, rng):
    """Change the size of a member, sometimes also its kind, and make the sum of its header right."""
    data = bytearray(whole)
    at = rng.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
    octal = b"%011o\0" % rng.choice([0, 1, 511, 512, 513, 2**20, 2**30, 8**11 - 1])
    large = b"\x80" + rng.choice([2**31, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, rng.getrandbits(88)]).to_bytes(
        11
    )
    negative = b"\xff" + (2**88 - rng.choice([1, 255, 512, 1024, 1536, 4096, rng.getrandbits(87) + 1])).to_bytes(11)
    data[at + 124 : at + 136] = rng.choice([octal, large, negative, rng.randbytes(12)])
    if rng.random() < 0.2:
        data[at + 156 : at + 157] = rng.choice([b"x", b"g", b"L", b"K", b"S", b"5", b"1", b"V"])
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def test_tar_files_with_damaged_sizes_end(tmp_path):
    """Each mutant is read to its end in the time and the memory of a whole file, and its losses are counted."""
    wholes = [write_tar(tarfile.USTAR_FORMAT)]
    wholes += [
        write_tar(kind, folder) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for folder in ("", "a/" * 80)
    ]
    file, opened, refused = tmp_path / "a.tar", 0, 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if sys.platform == "linux" else None
    try:
        if used is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
        for seed in range(600):
            rng = random.Random(seed)
            file.write_bytes(damage_size(rng.choice(wholes), rng))
            start = time.process_time()
            try:
                source = Tar(file)
                records = [source.read(i) for i in range(len(source))]
                assert len(records) == 6 or source.damaged, seed
                opened += 1
            except UserError:
                refused += 1
            assert time.process_time() - start < 5, seed
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert opened > 100 and refused > 20
    for whole in wholes:
        file.write_bytes(whole)
        assert len(Tar(file)) == 6 and not Tar(file).damaged


def test_members_of_too_many_bytes_are_losses(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(write_tar(tarfile.USTAR_FORMAT))
    source = Tar(tmp_path / "a.tar")
    assert source.read(0)["images"] == [encode(0)]
    monkeypatch.setattr(source_tar, "LARGEST_FILE", 300)
    with pytest.raises(UserError, match=r"sample 0 of .*a.tar has a member .png of more than 300 bytes"):
        source.read(0)
