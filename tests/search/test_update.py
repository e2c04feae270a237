"""An index that is brought up to date, after a kill at any moment too, has the bytes of one made from nothing."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nanovlm import files
from nanovlm.errors import UserError
from nanovlm.search.index import Index, open_index
from nanovlm.search.update import Item, Work, update

ABOUT = {"kind": "test", "folder": "x", "model": "m", "fingerprint": "f", "vector_size": 3, "dtype": "float16"}


class Fake:
    """Work on text files: an item for each of their words, and letters of it as its vector; notes what it embeds."""

    def __init__(self, **about):
        self.embedded = []
        self.work = Work(ABOUT | about, frozenset([".txt"]), self.read, self.embed, self.finish, part=3)

    def read(self, data: bytes, name: str) -> list[Item]:
        if b"bad" in data:
            raise UserError(f"{name} is bad")
        return [Item({"word": word}, word) for word in data.decode().split()]

    def embed(self, prepared: list[str]) -> torch.Tensor:
        self.embedded += prepared
        return torch.tensor([[*map(ord, (word * 3)[:3])] for word in prepared], dtype=torch.float32)

    @staticmethod
    def finish(folder: Path):
        (folder / "extra").write_text(" ".join(item["word"] for item in Index(folder).items()))


def write(folder: Path, **texts: str):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(len(text) * 10**9, len(text) * 10**9 + sum(map(ord, text))))


def contents(out: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in out.iterdir()) == ["index"]
    return {path.name: path.read_bytes() for path in (out / "index").iterdir()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "in", a="one two", b="three", c="", d="a bad one", e="four five six seven", f="eight")
    return tmp_path / "in"


def test_an_index_holds_items_vectors_and_their_files(folder, tmp_path, capsys):
    counts = update(folder, tmp_path / "out", (fake := Fake()).work)
    assert {name: number for name, number in counts.items() if number} == {"new": 6, "unreadable": 1}
    printed = capsys.readouterr().out
    assert "8 items of 6 files: 6 new, 1 unreadable" in printed and "not read: d.txt is bad" in printed
    index = open_index(tmp_path / "out")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert fake.embedded == words and len(index) == 8
    assert [item["word"] for item in index.items()] == words == (index.folder / "extra").read_text().split()
    found = [index.read(row) for row in range(8)]
    assert [file.name[0] for file, _ in found] == [*"aabeeeef"] and [item["word"] for _, item in found] == words
    assert index.vectors.tolist() == Fake().embed(words).tolist() and index.vectors.dtype == torch.float16


def test_what_is_known_is_not_embedded_again(folder, tmp_path, capsys):
    update(folder, tmp_path / "out", Fake().work)
    before = contents(tmp_path / "out")
    update(folder, tmp_path / "out", (fake := Fake()).work)
    assert contents(tmp_path / "out") == before and fake.embedded == []
    (folder / "a.txt").rename(folder / "z.txt")
    (folder / "b.txt").unlink()
    write(folder, d="good", e="four five", g="new")
    os.utime(folder / "f.txt")  # other time, same bytes
    capsys.readouterr()
    update(folder, tmp_path / "out", (fake := Fake()).work)
    assert fake.embedded == ["good", "four", "five", "new"]
    assert ": 2 as before, 1 new, 2 changed, 1 moved, 2 removed\n" in capsys.readouterr().out
    update(folder, tmp_path / "fresh", Fake().work)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_kill_at_any_moment_changes_no_byte(folder, tmp_path, monkeypatch):
    """Of a first run, and of one that updates: at every flush to disk, and within every call of the model."""
    update(folder, tmp_path / "old", Fake().work)
    write(folder, a="one two", b="changed", h="new words", i="more", d="now good")
    (folder / "f.txt").unlink()
    update(folder, tmp_path / "truth", Fake().work)
    truth, flush, embed = contents(tmp_path / "truth"), files.flush, Fake.embed

    def die_at(moment: int):
        passed = []

        def count(function):
            def counted(*args):
                passed.append(0)
                if len(passed) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return counted

        monkeypatch.setattr(files, "flush", count(flush))
        monkeypatch.setattr(Fake, "embed", count(embed))

    num_kills = 0
    for start in ("nothing", "old"):
        for moment in range(1, 1000):
            out = tmp_path / f"{start}{moment}"
            if start == "old":
                shutil.copytree(tmp_path / "old", out)
            if (child := os.fork()) == 0:
                try:
                    die_at(moment)
                    update(folder, out, Fake().work)
                finally:
                    os._exit(0)
            if os.waitpid(child, 0)[1] == 0:  # it ended before the moment came
                break
            num_kills += 1
            assert start == "nothing" or len(open_index(out)) in (8, 12)  # it can be searched at any time
            update(folder, out, (fake := Fake()).work)
            assert contents(out) == truth, (start, moment)
            num_done = sum(len(Fake().read(path.read_bytes(), "")) for path in folder.iterdir()) - len(fake.embedded)
            assert moment < 12 or num_done, "a killed run was for nothing"
    assert num_kills > 50


def test_an_index_made_otherwise_is_not_touched(folder, tmp_path):
    update(folder, tmp_path / "out", Fake().work)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was indexed with fingerprint = 'f', not 'g': name another folder"):
        update(folder, tmp_path / "out", Fake(fingerprint="g").work)
    update(folder, tmp_path / "out", Fake(folder="moved", model="elsewhere").work)
    assert contents(tmp_path / "out") == before
    # Parts of a run that did something else are no use.
    shutil.copytree(tmp_path / "out" / "index", tmp_path / "other" / "parts" / "0")
    update(folder, tmp_path / "other", (fake := Fake(fingerprint="g")).work)
    assert len(fake.embedded) == 8


def test_parts_are_not_open_at_a_time(tmp_path):
    """A run of millions has thousands of parts."""
    write(tmp_path / "in", **{f"f{i:03d}": f"{i} b c" for i in range(20)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 16, limits[1]))
    try:
        update(tmp_path / "in", tmp_path / "out", Fake().work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(open_index(tmp_path / "out")) == 60


def test_links_lead_nowhere_else_and_what_is_no_file_is_tried_again(folder, tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "within.txt").symlink_to(folder / "b.txt")
    out = folder / "out"  # the index itself is not indexed
    update(folder, out, (fake := Fake()).work)
    printed = capsys.readouterr().out
    assert "secret" not in fake.embedded and "outside the folder" in printed and "gone.txt" in printed
    (folder / "nothing").write_text("found")
    update(folder, out, (fake := Fake()).work)
    assert fake.embedded == ["found"]


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        update(tmp_path / "none", tmp_path / "out", Fake().work)
    with pytest.raises(UserError, match=r"has no index$"):
        open_index(tmp_path / "out")
    (tmp_path / "begun" / "parts").mkdir(parents=True)
    with pytest.raises(UserError, match="has no index yet: give the command that makes it again"):
        open_index(tmp_path / "begun")
    update(folder, tmp_path / "out", Fake().work)
    (tmp_path / "out" / "index" / "places.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        open_index(tmp_path / "out")
