"""The loader trains every sample once an epoch, loses none in silence, and goes on exactly where it was."""

import bisect
import itertools
import os
import signal

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data.images import normalize
from nanovlm.data.loader import CHUNK, Loader, Skipped, collate, flatten, is_validation, unflatten
from nanovlm.data.mixture import Mixture
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document, Filtered

CONFIG = DataConfig(row_length=64, batch_rows=3, pack_buffer=20)
WORKERS = [0, 1, 2, 3]


def numbered(i):
    """Document i: its length is pseudo-random, all its tokens are i."""
    length = 5 + (i * 7919) % 23
    ids = torch.full((length,), i)
    tile = torch.full((1, 1, 1, 1), i % 251, dtype=torch.uint8)
    return Document(ids, ids, torch.zeros(length, dtype=torch.int32), tile)


def record(number):
    return {"number": number, "images": [str(number).encode()]}


class Records:
    """A source of records that say nothing but their number."""

    name, damaged = "records", ()

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def raw(self, index):
        return record(index)


class Stream:
    name, damaged = "stream", ()

    def __init__(self, length):
        self.length = length

    def stream(self, start, epoch):
        yield from (record(i) for i in range(start, self.length))


@pytest.fixture(autouse=True)
def close_loaders():
    """Worker processes end with their test."""
    yield
    while LOADERS:
        LOADERS.pop().close()


LOADERS = []


def make_loader(source=None, process=None, seed=0, rank=0, num_ranks=1, split="train", num_epochs=None, **config):
    loader = Loader(
        source or Records(10**6),
        process or (lambda raw: numbered(raw["number"])),
        DataConfig(**{**vars(CONFIG), **config}),
        pad_token_id=-5,
        seed=seed,
        rank=rank,
        num_ranks=num_ranks,
        split=split,
        num_epochs=num_epochs,
    )
    LOADERS.append(loader)
    return loader


def documents(batches):
    """The numbers of the documents in batches, which must be whole and have their own pixels."""
    seen = []
    for batch in batches:
        for doc in range(int(batch.doc_ids.max()) + 1):
            tokens = batch.input_ids[batch.doc_ids == doc]
            assert len(tokens.unique()) == 1 and len(tokens) == len(numbered(int(tokens[0])))
            assert batch.pixel_values[doc] == normalize(tokens[0] % 251)
            seen.append(int(tokens[0]))
    return seen


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_every_document_once_and_none_waits_for_ever():
    loader = make_loader()
    seen = documents(next(loader) for _ in range(50))
    assert len(set(seen)) == len(seen)
    waiting = [int(document.input_ids[0]) for document in loader.buffer.values()]
    assert len(seen) + len(waiting) == loader.counts["read"] == len({*seen, *waiting})
    assert min(loader.buffer) > (0, loader.next_place[1] - 80)
    assert loader.counts["packed"] == len(seen)


@pytest.mark.parametrize("make_source", [Records, Stream])
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_epoch_is_the_training_split_once_each(make_source, num_workers, num_ranks):
    """Whatever the number of workers and ranks; what is held out is the rest, and is never trained."""
    options = {"num_workers": num_workers, "num_ranks": num_ranks, "num_epochs": 1, "val_fraction": 0.2}
    trained, held_out = (
        [
            i
            for rank in range(num_ranks)
            for i in documents(make_loader(make_source(301), rank=rank, split=split, **options))
        ]
        for split in ("train", "val")
    )
    assert sorted(trained + held_out) == list(range(301))
    assert 30 < len(held_out) < 90
    assert set(held_out) == {i for i in range(301) if is_validation({"images": [str(i).encode()]}, 0.2)}


@pytest.mark.parametrize("num_workers", WORKERS)
def test_batches_do_not_depend_on_the_workers(num_workers):
    expected = [next(loader) for loader in [make_loader(Records(100))] for _ in range(25)]
    loader = make_loader(Records(100), num_workers=num_workers)
    assert same(expected, [next(loader) for _ in range(25)])


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("make_source", [Records, Stream])
@pytest.mark.parametrize("rank", [0, 1])
def test_goes_on_where_it_was(num_workers, make_source, rank):
    """With any number of workers, at any batch, across the end of an epoch."""

    def process(raw):
        if raw["number"] % 7 == 3:
            raise Filtered
        return numbered(raw["number"])

    options = {"rank": rank, "num_ranks": 2, "num_workers": num_workers, "process": process}
    for num_batches in (0, 1, 6, 7):
        loader = make_loader(make_source(120), **options)
        for _ in range(num_batches):
            next(loader)
        state = loader.state_dict()
        expected = [next(loader) for _ in range(8)]
        assert loader.next_place[0] >= 1
        resumed = make_loader(make_source(120), **{**options, "num_workers": (num_workers + 2) % 4})
        resumed.load_state_dict(state)
        assert same(expected, [next(resumed) for _ in range(8)])
        assert resumed.state_dict() == loader.state_dict()


def epochs(shuffle, seed=0):
    """The documents of three epochs, in the order in which they are read."""
    loader = make_loader(Records(40), shuffle=shuffle, seed=seed)
    return [[task for _place, task in itertools.islice(loader._tasks(epoch, 0), 40)] for epoch in range(3)]


def test_every_pass_shows_everything_in_another_order():
    first, second, third = epochs(shuffle=True)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(40))
    assert first != second != third != first
    assert epochs(shuffle=True, seed=1)[0] != first


def test_blocks_stay_together():
    """Of a source that reads whole blocks (row groups), alone and in a mixture."""
    source = Records(100)
    source.blocks = [0, 7, 50, 51, 100]
    order = [int(i) for i in make_loader(source)._order(0)]
    assert sorted(order) == list(range(100)) and order != list(range(100))
    block_of = [bisect.bisect_right(source.blocks, i) for i in order]
    assert len(list(itertools.groupby(block_of))) == 4
    mixture = Mixture([Records(30), source])
    order = [int(i) for i in make_loader(mixture)._order(0)]
    assert sorted(order) == list(range(130))
    block_of = [bisect.bisect_right(source.blocks, i - 30) for i in order if i >= 30]
    assert len(list(itertools.groupby(block_of))) == 4
    assert [i for i in order if i < 30] != sorted(i for i in order if i < 30)


def test_without_shuffle_the_order_is_kept():
    assert epochs(shuffle=False) == 3 * [[*range(40)]]


def test_it_knows_what_it_has_read():
    for shuffle in (False, True):
        loader = make_loader(Records(40), shuffle=shuffle)
        batch = next(loader)
        waiting = {int(document.input_ids[0]) for document in loader.buffer.values()}
        assert set(loader.places_read()) == set(documents([batch])) | waiting
        while loader.next_place[0] < 2:
            next(loader)
        assert sorted(loader.places_read()) == [*range(40)]


class Weighted:
    """Two sources, of which the second is read three times as often."""

    name, damaged, is_scheduled = "a + b", (), True
    starts = (0, 10, 17)

    def __init__(self):
        self.sources = [Records(10), Records(7)]
        self.sources[0].name, self.sources[1].name = "a", "b"

    def __len__(self):
        return 17

    def find(self, index):
        return (self.sources[0], index) if index < 10 else (self.sources[1], index - 10)

    def locate(self, position, rank, num_ranks):
        cycle, slot = divmod(position, 4)
        part, count = (0, cycle) if slot == 0 else (1, 3 * cycle + slot - 1)
        return part, count * num_ranks + rank

    def raw(self, index):
        return {"number": index}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_mixture_keeps_its_proportions_on_every_rank_and_each_source_its_epochs(num_ranks):
    counts = [0] * 17
    for rank in range(num_ranks):
        loader = make_loader(Weighted(), rank=rank, num_ranks=num_ranks)
        tasks = [task for _place, task in itertools.islice(loader._tasks(0, 0), 560 // num_ranks)]
        assert sum(task >= 10 for task in tasks) == 0.75 * len(tasks)
        for task in tasks:
            counts[task] += 1
    assert counts[:10] == [14] * 10 and counts[10:] == [60] * 7
    loader = make_loader(Weighted())
    for _ in range(20):
        next(loader)
    share = loader.counts["documents of b"] / loader.counts["documents"]
    assert abs(share - 0.75) < 0.01
    with pytest.raises(ValueError, match=r"a \+ b is read by weights or as lessons, so it has no epochs"):
        make_loader(Weighted(), num_epochs=1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_lessons_end_for_all_ranks_at_once(num_ranks, shuffle):
    """Twelve samples of a, which has ten, then five of b, and then c without end; each sample once an epoch."""
    parts = [Records(10), Records(7), Records(9)]
    for name, part in zip("abc", parts, strict=True):
        part.name = name
    seen = {}
    for rank in range(num_ranks):
        loader = make_loader(Mixture(parts, lengths=[12, 5]), rank=rank, num_ranks=num_ranks, shuffle=shuffle)
        for (epoch, number), task in itertools.islice(loader._tasks(0, 0), 80 // num_ranks):
            assert epoch == 0
            seen[number * num_ranks + rank] = task
    tasks = [seen[place] for place in range(80)]
    assert sorted(tasks[:10]) == [*range(10)] and all(task < 10 for task in tasks[:12])
    assert len({*tasks[12:17]}) == 5 and all(10 <= task < 17 for task in tasks[12:17])
    assert sorted(tasks[17:26]) == sorted(tasks[26:35]) == [*range(17, 26)] and min(tasks[17:]) == 17
    assert (tasks[:10] != [*range(10)]) == shuffle


def test_a_resumed_lesson_goes_on():
    def make(workers):
        parts = [Records(10), Records(50)]
        parts[0].name, parts[1].name = "a", "b"
        return make_loader(Mixture(parts, lengths=[25]), num_workers=workers)

    whole = make(0)
    expected = [documents([next(whole)]) for _ in range(12)]
    loader = make(2)
    assert [documents([next(loader)]) for _ in range(5)] == expected[:5]
    again = make(0)
    again.load_state_dict(loader.state_dict())
    loader.close()
    assert [documents([next(again)]) for _ in range(7)] == expected[5:]
    assert whole.counts["documents of a"] == 25 and whole.counts["documents of b"] == whole.counts["documents"] - 25 > 0


def test_a_bad_sample_of_a_mixture_is_named_in_its_own_source(capsys):
    def process(raw):
        if raw["number"] == 13:
            raise ValueError("broken")
        return numbered(raw["number"])

    next(make_loader(Weighted(), process))
    assert "skipped as corrupt: b, sample 3: broken" in capsys.readouterr().out


def poisoned(error):
    def process(raw):
        if raw["number"] == 33:
            raise error
        return numbered(raw["number"])

    return process


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_bad_sample_is_counted_and_named_once_and_training_goes_on(num_workers, capsys):
    loader = make_loader(Records(101), poisoned(ValueError("no such image")), num_workers=num_workers, num_epochs=2)
    seen = documents(loader)
    assert sorted(seen) == sorted(2 * [i for i in range(101) if i != 33])
    assert loader.counts["corrupt"] == 2 and loader.counts["read"] == 202 and loader.counts["documents"] == 200
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["skipped as corrupt: records, sample 33: no such image"]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_bug_in_a_worker_reaches_the_training(num_workers):
    loader = make_loader(process=poisoned(KeyError("the original error")), num_workers=num_workers, shuffle=False)
    with pytest.raises(KeyError, match="the original error"):
        documents(loader)


def test_a_killed_worker_stops_the_run():
    def process(raw):
        if raw["number"] == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(raw["number"])

    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        documents(make_loader(process=process, num_workers=2, shuffle=False))


def test_too_many_bad_samples_stop_the_run_with_a_list():
    def process(raw):
        if raw["number"] % 5 == 0:
            raise ValueError("broken")
        return numbered(raw["number"])

    with pytest.raises(
        ValueError, match=r"2\d of 1\d\d samples are unusable.*0\.1 allows.*sample 0: broken; .*sample 5: broken"
    ):
        documents(make_loader(process=process, max_bad_fraction=0.1, shuffle=False))
    loader = make_loader(Records(300), process, max_bad_fraction=0.3, num_epochs=1)
    assert len(documents(loader)) == 240 and loader.counts["corrupt"] == 60


def test_too_long_and_too_many_tiles_are_counted(capsys):
    loader = make_loader(Records(90), row_length=20, max_bad_fraction=1.0, num_epochs=1)
    assert sorted(documents(loader)) == [i for i in range(90) if len(numbered(i)) <= 20]
    assert loader.counts["too long"] == sum(len(numbered(i)) > 20 for i in range(90)) > 10
    assert "tokens, more than data.row_length = 20" in capsys.readouterr().out

    def process(raw):
        document = numbered(raw["number"])
        document.tiles = document.tiles.expand(1 + raw["number"] % 3, 1, 1, 1)
        return document

    loader = make_loader(Records(30), process, max_tiles=2, max_bad_fraction=1.0, num_epochs=1)
    most = 0
    for batch in loader:
        for ids in batch.input_ids:
            tiles = sum(1 + i % 3 for i in ids.unique().tolist() if i >= 0)
            most = max(most, tiles)
            assert tiles <= 2
    assert most == 2
    assert loader.counts["too long"] == 10 and loader.counts["packed"] == 20


def test_a_source_without_a_usable_sample_says_so():
    def process(raw):
        raise Filtered

    with pytest.raises(ValueError, match="no sample of records could be used: 50 filtered, 50 read"):
        next(make_loader(Records(50), process))
    with pytest.raises(ValueError, match="records has too few samples: none for rank 1"):
        next(make_loader(Records(1), rank=1, num_ranks=2))
    with pytest.raises(ValueError, match="stream has too few samples"):
        next(make_loader(Stream(0)))


def test_nothing_usable_is_said_for_every_kind_of_source():
    def process(raw):
        raise Filtered

    with pytest.raises(ValueError, match=r"no sample of a \+ b could be used: \d+ filtered"):
        next(make_loader(Weighted(), process))
    with pytest.raises(ValueError, match="no sample of stream could be used: 5 filtered, 5 read"):
        next(make_loader(Stream(5), process))

    def broken(raw):
        raise ValueError("broken")

    for split in ("train", "val"):
        loader = make_loader(Records(60), broken, num_epochs=1, split=split, val_fraction=0.5)
        with pytest.raises(ValueError, match=r"could be used: .*records, sample .*: broken"):
            next(loader)


def test_other_data_is_not_taken_for_the_same():
    loader = make_loader(Records(120))
    next(loader)
    state = loader.state_dict()
    for other, message in (
        (make_loader(Records(30)), "the run was started with samples = 120, now it is 30"),
        (make_loader(Records(120), seed=1), "seed = 0, now it is 1"),
        (make_loader(Records(120), num_ranks=2), "num_ranks = 1, now it is 2"),
        (make_loader(Stream(120)), "source = records, now it is stream"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_a_waiting_document_that_is_gone_is_counted():
    loader = make_loader(Records(120))
    next(loader)
    gone = int(next(iter(loader.buffer.values())).input_ids[0])

    def process(raw):
        if raw["number"] == gone:
            raise ValueError("the file is gone")
        return numbered(raw["number"])

    resumed = make_loader(Records(120), process)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.counts["corrupt"] == 1 and len(resumed.buffer) == len(loader.buffer) - 1
    next(resumed)


def test_damage_of_the_source_is_counted(capsys):
    source = Records(50)
    source.damaged = ["a.tar is cut off behind sample 49"]
    assert make_loader(source).counts["damaged"] == 1
    assert "a.tar is cut off" in capsys.readouterr().out


def test_the_split_depends_on_the_contents_alone():
    one = {"texts": [{"user": "a", "assistant": "b"}], "images": [b"x"]}
    records = [one, {**one, "images": [b"y"]}, {**one, "texts": []}]
    sides = [[is_validation(record, fraction / 100) for fraction in range(101)] for record in records]
    assert len({side.index(True) for side in sides}) == 3  # each has a threshold of its own
    assert all(side == sorted(side) for side in sides)
    again = {"id": 7, **dict(reversed(one.items())), "texts": [{"assistant": "b", "user": "a", "kind": "x"}]}
    assert all(is_validation(again, f / 100) == is_validation(one, f / 100) for f in range(101))


def test_documents_travel_whole():
    results = [numbered(1), Skipped("corrupt", "why"), numbered(2), numbered(3)]
    back = unflatten(flatten(results))
    assert back[1] == results[1]
    for i in (0, 2, 3):
        assert all(torch.equal(x, y) for x, y in zip(vars(results[i]).values(), vars(back[i]).values(), strict=True))
    assert unflatten(flatten([results[1]])) == [results[1]]
    assert CHUNK > 1


def test_a_large_batch_of_a_small_source():
    batch = next(make_loader(Records(4), pack_buffer=2, batch_rows=6))
    assert set(batch.input_ids.unique().tolist()) == {0, 1, 2, 3, -5}


def test_with_a_gpu_batches_are_page_locked(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = next(make_loader())
    assert len(pinned) == len(vars(batch)) == 7
    assert all(a is b for a, b in zip(pinned, vars(batch).values(), strict=True))


def test_documents_are_numbered_through():
    rows = [make_row([numbered(0), numbered(1)], 40, 0), make_row([numbered(2)], 40, 0)]
    doc_ids = collate(rows).doc_ids
    assert doc_ids[0].unique().tolist() == [-1, 0, 1] and doc_ids[1].unique().tolist() == [-1, 2]
