"""A mixture keeps the shares of every stage, leaves out what was read often enough, and goes on exactly."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from nanovlm.config import DataConfig
from nanovlm.data.mixture import Mixture, by_temperature
from nanovlm.data.source import deal
from nanovlm.data.sources import open_sources
from tests.conftest import Numbers


def sources(*lengths):
    return [Numbers(name, length) for name, length in zip("abcd", lengths, strict=False)]


def names(mixture, num, slots=(0,), num_slots=1):
    return [ref.source for ref in itertools.islice(mixture.refs(slots, num_slots), num)]


def shares(read):
    counts = Counter(read)
    return [counts[name] / len(read) for name in "abc"]


@pytest.mark.parametrize("num_slots", [1, 4])
def test_each_stage_has_its_weights(num_slots):
    """Of 3000 samples, 1500 and the rest; a stage that is no whole number of rounds is rounded up."""
    weights = [1, 0, 0, 1, 3, 0, 0, 1, 1]
    mixture = Mixture(sources(7, 8, 9), weights, stages=[3000, 1498])
    read = names(mixture, 8000, range(num_slots), num_slots)
    first, second = 3000, 3000 + num_slots * -(-1498 // num_slots)
    assert set(read[:first]) == {"a"}
    np.testing.assert_allclose(shares(read[first:second]), [0.25, 0.75, 0], atol=0.01)
    np.testing.assert_allclose(shares(read[second:]), [0, 0.5, 0.5], atol=0.01)


def test_weights_go_over_to_those_of_the_next_stage():
    """In a stage of 10,000 the share of a falls from 1 to 0: the mean of each tenth lies on that line."""
    read = names(Mixture(sources(7, 8, 9), [1, 0, 0, 0, 1, 1], stages=[10_000], is_gradual=True), 12_000)
    for tenth in range(10):
        now = shares(read[tenth * 1000 : (tenth + 1) * 1000])
        t = (tenth + 0.5) / 10
        expected = np.array([1 - t, t, t]) / (1 + t)  # the weights, and their sum
        np.testing.assert_allclose(now, expected, atol=0.03)
    np.testing.assert_allclose(shares(read[10_000:]), [0, 0.5, 0.5], atol=0.01)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_source_that_was_read_often_enough_is_left_out(num_slots):
    """a twice, b three times, c without end: what is left shares by its weights."""
    mixture = Mixture(sources(10, 20, 1000), [2, 1, 1], most=[20, 60, None])
    read = names(mixture, 900, range(num_slots), num_slots)
    counts = Counter(read)
    assert counts["a"] == num_slots * -(-20 // num_slots) and counts["b"] == 60
    last_a = len(read) - 1 - read[::-1].index("a")
    last_b = len(read) - 1 - read[::-1].index("b")
    assert abs(last_a - 40) <= 3 * num_slots and set(read[last_b + 1 :]) == {"c"}
    np.testing.assert_allclose(shares(read[last_a + 1 : last_b])[1], 0.5, atol=0.05)
    if num_slots == 1:
        seen = Counter(ref.key for ref in itertools.islice(mixture.refs([0], 1), 900))
        assert {n for (k, _), n in seen.items() if k == 0} == {2} and {n for (k, _), n in seen.items() if k == 1} == {3}


def test_a_mixture_ends_with_its_last_source():
    mixture = Mixture(sources(10, 20), [1, 1], most=[10, 40])
    refs = list(mixture.refs([0], 1))
    assert Counter(ref.source for ref in refs) == {"a": 10, "b": 40} and refs[-1].epoch == 1
    staged = Mixture(sources(10, 20), [1, 0, 0, 1], stages=[500], most=[10, 40])  # b begins where a has ended
    assert [name for name, _ in itertools.groupby(names(staged, 1000))] == ["a", "b"]


OPTIONS = {
    "stages": {"weights": [3, 1, 0, 0, 1, 2], "stages": [50]},
    "gradual": {"weights": [3, 1, 0, 0, 1, 2], "stages": [50], "is_gradual": True},
    "most": {"weights": [3, 1, 1], "most": [14, 20, None]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_goes_on_where_it_was_and_slots_are_the_same_on_any_rank(name):
    make = lambda: Mixture(sources(7, 8, 9), **OPTIONS[name])  # noqa: E731
    whole = list(itertools.islice(make().refs([0, 1], 2), 200))
    for at in (1, 21, 49, 51, 99):
        after = json.loads(json.dumps(whole[at].after))
        again = itertools.islice(make().refs([0, 1], 2, after), 100 - at)
        assert list(again) == whole[at + 1 : at + 101 - at]
    for slot in (0, 1):
        alone = list(itertools.islice(make().refs([slot], 2), 100))
        assert [ref.key for ref in alone] == [ref.key for ref in whole if ref.slot == slot]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_pass_ends_at_the_same_record_for_any_number_of_ranks(is_stream):
    """The shortest source has its pass in few rounds, the longest ends within a round; also where a run goes on."""

    class Stream(Numbers):
        __len__ = None

        def refs(self, slots, num_slots, start=None):
            return deal(Numbers(self.name, self.length), slots, num_slots, start)

    def read(slots, start=None):
        kinds = [Stream if is_stream else Numbers] * 2
        mixture = Mixture([kind(name, length) for kind, name, length in zip(kinds, "ab", (5, 41), strict=True)], [1, 1])
        return list(itertools.takewhile(lambda ref: ref.number < 60, mixture.refs(slots, 4, start)))

    whole = read([0, 1, 2, 3])
    ends = [next(ref.number for ref in whole if ref.slot == slot and ref.epoch == 1) for slot in range(4)]
    assert len({*ends}) > 1, "the pass ends within a round"
    for ranks in ([(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]):
        for slots in ranks:
            for at in (None, 7, 4 * ends[0] + 3, 4 * ends[0] + 7):
                start = None if at is None else json.loads(json.dumps(whole[at].after))
                found = [(ref.slot, ref.number, ref.epoch, ref.key) for ref in read(slots, start)]
                first = start["number"] if start else 0
                assert found == [
                    (ref.slot, ref.number, ref.epoch, ref.key)
                    for ref in whole
                    if ref.slot in slots and ref.number >= first
                ]


def test_temperature():
    """mT5's: the shares of sizes 8 and 1 are as their cube roots at a temperature of 3."""
    np.testing.assert_allclose(by_temperature([8, 1], 3), [2 / 3, 1 / 3])
    np.testing.assert_allclose(by_temperature([8, 1], 1), [8 / 9, 1 / 9])
    np.testing.assert_allclose(by_temperature([1e6, 0, 1], 1e9), [1 / 2, 0, 1 / 2], atol=1e-6)
    np.testing.assert_allclose(by_temperature([2, 1], 0.001), [1, 0], atol=1e-12)


def test_sources_are_opened_as_the_config_says(tmp_path):
    specs = []
    for name, num in (("a", 27), ("b", 8), ("c", 1)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' * num)
        specs.append(str(tmp_path / f"{name}.jsonl"))
    assert open_sources(specs, temperature=3).counts == [500, 333, 167]
    assert open_sources(specs, [1, 1, 4], temperature=2).counts == [250, 250, 500]
    mixture = open_sources(specs, [1, 1, 0, 0, 0, 1], stages=[10], max_passes=[2], is_gradual=True)
    assert mixture.most == [54, 16, 2] and mixture.is_gradual
    assert open_sources(specs, [1, 1, 1], max_passes=[0, 1.5, 3]).most == [None, 12, 3]
    for temperature in (0, 2):
        with pytest.raises(ValueError, match="the weights of a stage are all 0: 0, 0, 0"):
            open_sources(specs, [1, 1, 1, 0, 0, 0], stages=[10], temperature=temperature)
        with pytest.raises(ValueError, match=r"the weight of .*a.jsonl is -1; it must be positive"):
            open_sources(specs, [-1, 1, 1], temperature=temperature)
    with pytest.raises(ValueError, match=r"c.jsonl is 0.001, too little of 10.001: it must be at least 1/1000"):
        open_sources(specs, [1, 1, 1, 10, 0, 0.001], stages=[10])


def test_a_stream_has_no_size(tmp_path):
    class Stream(Numbers):
        __len__ = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovlm.data.sources.Hub", lambda spec, *rest: Stream(spec, 5))
        with pytest.raises(
            ValueError, match=r"hub:x is a stream of unknown size: give data.weights in place of data.temp"
        ):
            open_sources(["hub:x", "scenes"], temperature=2)
        with pytest.raises(ValueError, match=r"hub:x is a stream of unknown size: give 0 for it in data.max_passes"):
            open_sources(["hub:x", "scenes"], [1, 1], max_passes=[1, 0])
        assert open_sources(["hub:x", "scenes"], [1, 1], max_passes=[0, 1]).most == [None, 1_000_000]
        assert open_sources(["hub:x", "scenes"], [4, 1], temperature=2).counts == [667, 333]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": (1, 1), "stages": (5,)}, r"data.weights has 2 entries, data.sources 2 and data.stages 2 with"),
        ({"weights": (1, 1, 1, 1), "stages": (0,)}, r"data.stages = \(0,\) must be positive"),
        ({"weights": (1, 1), "stage_change": "linear"}, "data.stage_change = linear needs data.stages"),
        ({"temperature": -1.0}, "data.temperature = -1.0 must be above 0, or 0"),
        ({"temperature": 2.0, "lessons": (3,)}, "data.temperature = 2.0 is of a mixture, and data.lessons makes none"),
        ({"max_passes": (1.0,)}, r"data.max_passes = \(1.0,\) is of a mixture: give data.weights, or data.temperature"),
        (
            {"weights": (1, 1), "max_passes": (1.0, 2.0, 3.0)},
            "must be one number, or one for each of the 2 data.sources",
        ),
        ({"sources": ("a",), "temperature": 2.0}, "data.temperature = 2.0 is of a mixture: give several data.sources"),
        ({"shard_cache_gb": 0.0}, "data.shard_cache_gb = 0.0 must be above 0"),
    ],
)
def test_mistakes_in_the_config_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**{"sources": ("a", "b"), **change}).validate()
