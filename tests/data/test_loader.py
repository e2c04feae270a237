"""The loader trains every sample once an epoch, loses none in silence, and goes on exactly where it was."""

import bisect
import contextlib
import itertools
import json
import os
import re
import signal

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data import reader, types
from nanovlm.data.loader import Loader, collate
from nanovlm.data.mixture import Concatenation, Mixture
from nanovlm.data.packing import make_row
from nanovlm.data.reader import CHUNK, Skipped, flatten, unflatten
from nanovlm.data.source import Order, Ref, deal
from nanovlm.data.split import is_validation
from nanovlm.data.types import Document, Filtered

SHUFFLED = Order(0, shuffle=True)
CONFIG = DataConfig(row_length=64, batch_rows=3, pack_buffer=20)
WORKERS = [0, 1, 2, 3]


def numbered(i):
    """Document i: its length is pseudo-random, all its tokens are i."""
    length = 5 + (i * 7919) % 23
    ids = torch.full((length,), i)
    tile = torch.full((1, 1, 1, 1), i % 251, dtype=torch.uint8)
    return Document(ids, ids, torch.zeros(length, dtype=torch.int32), tile)


def record(number):
    turns = [{"user": "which?", "assistant": "this"}]
    return {"number": number, "images": [str(number).encode()], "texts": turns}


class Records:
    """A source of records that say nothing but their number."""

    damaged, blocks = (), None

    def __init__(self, length, order=SHUFFLED, name="records"):
        self.length, self.order, self.name = length, order, name
        self.reads = []

    def __len__(self):
        return self.length

    def refs(self, slots, num_slots, start=None):
        return deal(self, slots, num_slots, start)

    def read(self, key):
        self.reads.append(key)
        return record(key)


class Stream:
    """Records in their order, as many as there are; what goes on knows how many were read."""

    name, damaged = "stream", ()

    def __init__(self, length):
        self.length, self.opened = length, 0

    def refs(self, slots, num_slots, start=None):
        self.opened += 1
        if not self.length:
            raise ValueError("stream has no records")
        for number in itertools.count(start or 0):
            for slot in range(num_slots):
                epoch, i = divmod(number * num_slots + slot, self.length)
                if slot in slots:
                    yield Ref(slot, number, epoch, record(i), self.name, f"record {i} of pass {epoch}", number + 1)

    def read(self, key):
        return key


@pytest.fixture(autouse=True)
def close_loaders():
    """Worker processes end with their test."""
    yield
    while LOADERS:
        LOADERS.pop().close()


LOADERS = []


def make_loader(source=None, process=None, slots=(0,), num_slots=1, split="train", num_epochs=None, **config):
    loader = Loader(
        source or Records(10**6),
        process or (lambda raw: numbered(raw["number"])),
        DataConfig(**{**vars(CONFIG), **config}),
        pad_token_id=-5,
        slots=slots,
        num_slots=num_slots,
        split=split,
        num_epochs=num_epochs,
    )
    LOADERS.append(loader)
    return loader


def waiting(slot):
    return [int(document.input_ids[0]) for _name, document in slot.buffer.values()]


def documents(steps):
    """The numbers of the documents in the batches of steps, which must be whole and have their own pixels."""
    seen = []
    for batch in itertools.chain(*steps):
        for doc in range(int(batch.doc_ids.max()) + 1):
            tokens = batch.input_ids[batch.doc_ids == doc]
            assert len(tokens.unique()) == 1 and len(tokens) == len(numbered(int(tokens[0])))
            assert batch.pixel_values[doc] == tokens[0] % 251
            seen.append(int(tokens[0]))
    return seen


def are_same(a, b):
    """Are two batches or documents the same, bit for bit?"""
    plain = [{"values": torch.tensor(len(x.values)), "grids": torch.tensor(x.grids)} for x in (a, b)]
    mine, others = ({**vars(x), **x.values, **more} for x, more in zip((a, b), plain, strict=True))
    return all(torch.equal(x, others[name]) if x is not None else others[name] is None for name, x in mine.items())


def same(first, second):
    """Are two lists of steps the same, bit for bit?"""
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=True)
    return all(are_same(a, b) for a, b in pairs)


def test_every_document_once_and_none_waits_for_ever():
    loader = make_loader()
    seen = documents(next(loader) for _ in range(50))
    assert len(set(seen)) == len(seen)
    [slot] = loader.slots.values()
    assert len(seen) + len(waiting(slot)) == loader.counts["read"] == len({*seen, *waiting(slot)})
    assert min(slot.buffer) > slot.next - 80
    assert loader.counts["packed"] == len(seen)


@pytest.mark.parametrize("make_source", [Records, Stream])
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("slots", [[(0,)], [(0,), (1,)], [(0, 1)], [(0, 2), (1, 3)]])
def test_an_epoch_is_the_training_split_once_each(make_source, num_workers, slots):
    """Whatever the number of workers, micro-batches and ranks; what is held out is the rest, and is never trained."""
    num_slots = sum(map(len, slots))
    options = {"num_workers": num_workers, "num_slots": num_slots, "num_epochs": 1, "val_fraction": 0.2}
    trained, held_out = (
        [i for mine in slots for i in documents(make_loader(make_source(301), slots=mine, split=split, **options))]
        for split in ("train", "val")
    )
    assert sorted(trained + held_out) == list(range(301))
    assert 30 < len(held_out) < 90
    assert set(held_out) == {i for i in range(301) if is_validation(record(i), 0.2)}


@pytest.mark.parametrize("num_workers", WORKERS)
def test_batches_do_not_depend_on_the_workers(num_workers):
    expected = [next(loader) for loader in [make_loader(Records(100))] for _ in range(25)]
    loader = make_loader(Records(100), num_workers=num_workers)
    assert same(expected, [next(loader) for _ in range(25)])


def drop_some(raw):
    """Uneven slots: what one of them drops, the others do not."""
    if raw["number"] % 7 == 3 or (raw["number"] % 4 == 1 and raw["number"] < 60):
        raise Filtered
    return numbered(raw["number"])


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("make_source", [Records, Stream, lambda n: mixed(n)])
def test_batches_do_not_depend_on_how_slots_fall_on_ranks(make_source, num_workers):
    steps = {}
    for ranks in (1, 2, 4):
        batches = [[] for _ in range(10)]
        for rank in range(ranks):
            options = {"slots": range(rank, 4, ranks), "num_slots": 4, "num_workers": num_workers}
            loader = make_loader(make_source(200), drop_some, **options)
            for step in batches:
                step += zip(loader.slots, next(loader), strict=True)
            loader.close()
        steps[ranks] = [[batch for _slot, batch in sorted(step, key=lambda pair: pair[0])] for step in batches]
    assert same(steps[1], steps[2]) and same(steps[1], steps[4])


def mixed(length):
    """Three records of a stream for every one of a shuffled source."""
    return Mixture([Records(length), Stream(length // 2)], weights=[1, 3])


def test_a_rank_reads_each_record_once():
    source = Records(10**6)
    loader = make_loader(source, slots=range(4), num_slots=4)
    for _ in range(10):
        assert len(next(loader)) == 4
    assert len(source.reads) == len(set(source.reads)) == loader.counts["read"]
    stream = Stream(1000)
    loader = make_loader(stream, slots=range(4), num_slots=4)
    for _ in range(10):
        next(loader)
    assert stream.opened == 1


def test_what_is_left_in_one_slot_is_trained():
    """Sorted data: one slot ends long before the others."""

    def process(raw):
        if raw["number"] % 2 and raw["number"] < 350:
            raise Filtered
        return numbered(raw["number"])

    loader = make_loader(Records(400, Order()), process, slots=(0, 1), num_slots=2, num_epochs=1)
    steps = list(loader)
    assert sorted(documents(steps)) == [i for i in range(400) if not i % 2 or i >= 350]
    assert [len(step) for step in steps] == sorted((len(step) for step in steps), reverse=True)
    assert len(steps[-1]) == 1


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("make_source", [Records, Stream, mixed])
@pytest.mark.parametrize("slots", [(0,), (1,), (0, 1)])
def test_goes_on_where_it_was(num_workers, make_source, slots):
    """With any number of workers, at any batch, across the end of an epoch."""
    options = {"slots": slots, "num_slots": 2, "num_workers": num_workers, "process": drop_some}
    for num_steps in (0, 1, 6, 7):
        loader = make_loader(make_source(120), **options)
        for _ in range(num_steps):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [next(loader) for _ in range(8)]
        resumed = make_loader(make_source(120), **{**options, "num_workers": (num_workers + 2) % 4})
        resumed.load_state_dict(state)
        assert same(expected, [next(resumed) for _ in range(8)])
        assert resumed.state_dict() == loader.state_dict()


@pytest.mark.parametrize("make_source", [Records, Stream, mixed])
def test_goes_on_with_other_ranks(make_source):
    """Four micro-batches of one rank, then of two, then of one again."""
    whole = make_loader(make_source(120), drop_some, slots=range(4), num_slots=4)
    expected = [next(whole) for _ in range(12)]
    first = make_loader(make_source(120), drop_some, slots=range(4), num_slots=4)
    seen = [next(first) for _ in range(3)]
    ranks = [make_loader(make_source(120), drop_some, slots=mine, num_slots=4) for mine in ((0, 2), (1, 3))]
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
    for _ in range(5):
        (a, c), (b, d) = (next(loader) for loader in ranks)
        seen.append([a, b, c, d])
    last = make_loader(make_source(120), drop_some, slots=range(4), num_slots=4)
    last.load_state_dict(ranks[0].state_dict() | ranks[1].state_dict())
    assert same(seen + [next(last) for _ in range(4)], expected)
    assert last.counts == whole.counts


def passes(order, num=3):
    """The numbers of so many passes, in the order in which they are read."""
    refs = itertools.islice(Records(40, order).refs([0], 1), num * 40)
    return [[ref.key for ref in group] for _epoch, group in itertools.groupby(refs, lambda ref: ref.epoch)]


def test_every_pass_shows_everything_in_another_order():
    first, second, third = passes(Order(0, shuffle=True))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(40))
    assert first != second != third != first
    assert passes(Order(1, shuffle=True))[0] != first != passes(Order(0, shuffle=True, part=1))[0]


def test_blocks_stay_together():
    """Of a source that reads whole blocks (row groups), alone and after another one."""
    source = Records(100)
    source.blocks = [0, 7, 50, 51, 100]
    order = [ref.key for ref in itertools.islice(source.refs([0], 1), 100)]
    assert sorted(order) == list(range(100)) and order != list(range(100))
    block_of = [bisect.bisect_right(source.blocks, i) for i in order]
    assert len(list(itertools.groupby(block_of))) == 4
    both = Concatenation([Records(30), source], SHUFFLED)
    order = [ref.key for ref in itertools.islice(both.refs([0], 1), 130)]
    assert sorted(order) == list(range(130))
    block_of = [bisect.bisect_right(source.blocks, i - 30) for i in order if i >= 30]
    assert len(list(itertools.groupby(block_of))) == 4
    assert [i for i in order if i < 30] != sorted(i for i in order if i < 30)


def test_without_shuffle_the_order_is_kept():
    assert passes(Order()) == 3 * [[*range(40)]]


def test_it_knows_what_it_has_read():
    for order in (SHUFFLED, Order()):
        loader = make_loader(Records(40, order))
        [slot] = loader.slots.values()
        seen = documents([next(loader)])
        assert {ref.key for ref in loader.refs_read()} == {*seen, *waiting(slot)}
        while slot.next < 90:
            next(loader)
        assert sorted(ref.key for ref in loader.refs_read()) == [*range(40)]


def a_and_b(**options):
    """Two sources, of which the second is read three times as often."""
    return Mixture([Records(10, Order(0, True, 0), "a"), Records(7, Order(0, True, 1), "b")], **options)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_a_mixture_keeps_its_proportions_in_every_slot_and_each_source_its_epochs(num_slots):
    counts = {"a": [0] * 10, "b": [0] * 7}
    for slot in range(num_slots):
        refs = list(itertools.islice(a_and_b(weights=[1, 3]).refs([slot], num_slots), 4000 // num_slots))
        assert sum(ref.source == "b" for ref in refs) == 0.75 * len(refs)
        for ref in refs:
            counts[ref.source][ref.key[1]] += 1
    assert counts["a"] == [100] * 10 and set(counts["b"]) <= {428, 429}
    loader = make_loader(a_and_b(weights=[1, 3]))
    for _ in range(20):
        next(loader)
    share = loader.counts["documents of b"] / loader.counts["documents"]
    assert abs(share - 0.75) < 0.01


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_lessons_end_for_all_slots_at_once(num_slots, shuffle):
    """Twelve records of a, which has ten, then five of b, rounded up to whole rounds, and then c without end."""
    seen = {}
    for slot in range(num_slots):
        lengths = {"a": 10, "b": 7, "c": 9}
        parts = [Records(n, Order(0, shuffle, k), name) for k, (name, n) in enumerate(lengths.items())]
        for ref in itertools.islice(Mixture(parts, lengths=[12, 5]).refs([slot], num_slots), 80 // num_slots):
            seen[ref.number * num_slots + slot] = ref.source, ref.key[1]
    order = [seen[place] for place in range(80)]
    of_b = {1: 5, 2: 6, 4: 8}[num_slots]
    assert [name for name, _ in order[: 12 + of_b]] == ["a"] * 12 + ["b"] * of_b
    assert {name for name, _ in order[12 + of_b :]} == {"c"}
    assert sorted(order[:10]) == [("a", i) for i in range(10)]
    first = [i for _, i in order[12 + of_b :][:9]]
    assert sorted(first) == [*range(9)]
    assert ([i for _, i in order[:10]] != [*range(10)]) == shuffle


def test_a_resumed_lesson_goes_on():
    def make(workers):
        parts = [Records(10, SHUFFLED, "a"), Records(50, SHUFFLED, "b")]
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
        if raw["number"] == 8:
            raise ValueError("broken")
        return numbered(raw["number"])

    next(make_loader(a_and_b(weights=[3, 1]), process))
    assert "skipped as corrupt: a, sample 8: broken" in capsys.readouterr().out


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
def test_whatever_a_record_raises_is_counted_and_named(num_workers, capsys):
    for error, named in ((KeyError("a\x1b[31mkey"), r"KeyError: 'a\x1b[31mkey'"), (MemoryError(), "MemoryError: ")):
        loader = make_loader(Records(101), poisoned(error), num_workers=num_workers, num_epochs=1)
        assert len(documents(loader)) == 100 and loader.counts["corrupt"] == 1
        shown = capsys.readouterr().out
        assert shown.startswith(f"skipped as corrupt: records, sample 33: {named}") and "(test_loader.py, line" in shown


def test_what_cannot_be_read_counts_once_with_a_split():
    class Broken(Records):
        def read(self, key):
            if key % 40 == 0:
                raise ValueError("no such file")
            return super().read(key)

    for split in ("train", "val"):
        loader = make_loader(Broken(400), num_epochs=1, split=split, val_fraction=0.02)
        documents(loader)
        assert loader.counts["corrupt"] == (10 if split == "train" else 0)


def test_a_pass_is_judged_where_it_ends_and_not_where_a_run_goes_on():
    """2 of 40 are as many as may be corrupt; early in a pass they are more, for a while."""

    def process(raw):
        if raw["number"] in (0, 1):
            raise ValueError("no such image")
        return numbered(raw["number"])

    options = {"process": process, "pack_buffer": 4}
    loader = make_loader(Records(40, Order()), **options)
    while loader.counts["read"] <= 44:
        next(loader)
    resumed = make_loader(Records(40, Order()), **options)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    while loader.counts["read"] < 70:  # from 100 on, all records are judged as they are read
        assert torch.equal(next(resumed)[0].input_ids, next(loader)[0].input_ids)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_that_takes_too_long_is_corrupt(num_workers, capsys, monkeypatch):
    monkeypatch.setattr(reader, "RECORD_SECONDS", 0.5)

    def process(raw):
        while raw["number"] == 33:
            pass
        return numbered(raw["number"])

    loader = make_loader(Records(101), process, num_workers=num_workers, num_epochs=1)
    assert len(documents(loader)) == 100 and loader.counts["corrupt"] == 1
    assert "sample 33: the record took more than 0.5 s" in capsys.readouterr().out


def test_few_records_are_judged_at_the_end_of_a_pass():
    """29 of 30 are below the number of records from which on all are judged as they are read."""

    def process(raw):
        if raw["number"]:
            raise ValueError("no such image")
        return numbered(raw["number"])

    for num_epochs in (1, None):
        with pytest.raises(ValueError, match=r"29 of 30 samples are unusable, more than data.max_bad_fraction"):
            documents(make_loader(Records(30), process, num_epochs=num_epochs))
    assert len(documents(make_loader(Records(30), poisoned(ValueError("x")), num_epochs=1))) == 30
    assert len(documents(make_loader(Records(34), poisoned(ValueError("x")), num_epochs=1))) == 33


def test_a_killed_worker_stops_the_run():
    def process(raw):
        if raw["number"] == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(raw["number"])

    with pytest.raises(ValueError, match=r"a process that reads samples was ended from outside.*data.num_workers"):
        documents(make_loader(Records(10**6, Order()), process, num_workers=2))


def test_too_many_bad_samples_stop_the_run_with_a_list():
    def process(raw):
        if raw["number"] % 5 == 0:
            raise ValueError("broken")
        return numbered(raw["number"])

    with pytest.raises(
        ValueError, match=r"2\d of 1\d\d samples are unusable.*0\.1 allows.*sample 0: broken; .*sample 5: broken"
    ):
        documents(make_loader(Records(10**6, Order()), process, max_bad_fraction=0.1))
    loader = make_loader(Records(300), process, max_bad_fraction=0.3, num_epochs=1)
    assert len(documents(loader)) == 240 and loader.counts["corrupt"] == 60


def test_too_long_is_told_from_corrupt_where_both_are_too_many_and_few_are_listed():
    def process(raw):
        if raw["number"] % 5 == 0:
            raise ValueError("broken")
        return numbered(raw["number"])

    with pytest.raises(ValueError, match=r"\d+ of 1\d\d samples are unusable") as caught:
        documents(make_loader(Records(10**6, Order()), process, row_length=20, max_bad_fraction=0.1))
    message = str(caught.value)
    bad, read, num_long, num_corrupt = map(
        int, re.search(r"(\d+) of (\d+) .* \((\d+) too long, (\d+) corrupt\)", message).groups()
    )
    assert num_corrupt == len(range(0, read, 5)) and bad == num_long + num_corrupt
    assert num_long == sum(len(numbered(i)) > 20 for i in range(read) if i % 5)
    assert message.count("records, sample") == 3 and "; and others. For what is too long, raise data.row" in message


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
    for [batch] in loader:
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
    with pytest.raises(ValueError, match="stream has no records"):
        next(make_loader(Stream(0)))


def test_nothing_usable_is_said_for_every_kind_of_source():
    def process(raw):
        raise Filtered

    with pytest.raises(ValueError, match=r"no sample of a \+ b could be used: \d+ filtered"):
        next(make_loader(a_and_b(weights=[1, 3]), process))
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
        (make_loader(Records(120), num_slots=2), "micro_batches = 1, now it is 2"),
        (make_loader(Stream(120)), "source = records, now it is stream"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    changed = make_loader(Records(120), lambda raw: numbered(raw["number"] + 1))
    for other in (make_loader(Records(30)), make_loader(Records(120, Order(1, shuffle=True))), changed):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"records, sample \d+ is not what it was when the run was stopped"):
            next(other)


def test_a_waiting_document_that_is_gone_is_counted():
    loader = make_loader(Records(120))
    next(loader)
    gone = waiting(loader.slots[0])[0]

    def process(raw):
        if raw["number"] == gone:
            raise ValueError("the file is gone")
        return numbered(raw["number"])

    resumed = make_loader(Records(120), process)
    resumed.load_state_dict(loader.state_dict())
    assert gone not in documents([next(resumed)])
    assert resumed.counts["corrupt"] == 1


def test_damage_of_the_source_is_counted(capsys):
    source = Records(50)
    source.damaged = ["a.tar is cut off behind sample 49"]
    assert make_loader(source).counts["damaged"] == 1
    assert "a.tar is cut off" in capsys.readouterr().out


def test_documents_travel_whole():
    results = [numbered(1), Skipped("corrupt", "why"), numbered(2), numbered(3)]
    for i in (0, 2, 3):
        results[i].values = {
            "weights": torch.arange(len(results[i])) + i + 0.5,
            "old_logprobs": -results[i].labels.float(),
        }
    back = unflatten(flatten(results))
    assert back[1] == results[1]
    for i in (0, 2, 3):
        assert are_same(results[i], back[i]) and results[i].values["weights"].any()
    assert unflatten(flatten([results[1]])) == [results[1]]
    assert CHUNK > 1 and back[0].span_ids is None


def test_spans_travel_too():
    """Those of a document may end before it, and one beside it may have none."""
    results = [numbered(1), numbered(2), numbered(3)]
    results[1].span_ids = torch.tensor([1, 1], dtype=torch.int32)
    back = unflatten(flatten(results))
    for document, spans in zip(back, ([], [1, 1], []), strict=True):
        assert document.span_ids.tolist() == spans + [0] * (len(document) - len(spans))


def test_a_large_batch_of_a_small_source():
    [batch] = next(make_loader(Records(4), pack_buffer=2, batch_rows=6))
    assert set(batch.input_ids.unique().tolist()) == {0, 1, 2, 3, -5}


def test_with_a_gpu_batches_are_page_locked(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    [batch] = next(make_loader())
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 9 and all(a is b for a, b in zip(pinned, tensors, strict=True))


def test_a_batch_goes_to_a_gpu_on_a_stream_of_its_own(monkeypatch):
    """With a stand-in for the GPU: every tensor is copied and then belongs to the stream that computes, too."""
    [batch] = next(make_loader())
    batch.values = {"weights": torch.rand(batch.labels.shape)}
    copied, recorded, to = [], [], torch.Tensor.to
    stream = contextlib.nullcontext()
    stream.wait_stream = lambda other: None
    monkeypatch.setattr(types, "copy_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: copied.append(x) or to(x, "cpu", copy=True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: recorded.append(x))
    moved = batch.to("cuda")
    assert are_same(moved, batch) and len(copied) == len(recorded) == 10
    assert all(any(x is y for y in recorded) for x in (moved.trained, moved.pixel_values, moved.values["weights"]))


def test_documents_are_numbered_through():
    rows = [make_row([numbered(0), numbered(1)], 40, 0), make_row([numbered(2)], 40, 0)]
    batch = collate(rows)
    doc_ids = batch.doc_ids
    assert batch.tile_doc_ids.tolist() == [0, 1, 2] and batch.tile_doc_ids.dtype == torch.int32
    assert batch.pixel_values.dtype == torch.uint8
    assert doc_ids[0].unique().tolist() == [-1, 0, 1] and doc_ids[1].unique().tolist() == [-1, 2]
