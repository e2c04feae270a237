"""An engine whose cache holds codes of 8 or 4 bits: shared prefixes, answers side by side, evictions."""

import copy

import pytest
import torch

from nanovlm.config import SamplingConfig
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.cache_codes import Codes, encode
from nanovlm.model.decoder import Attention
from nanovlm.model.vlm import VLM
from tests.conftest import TINY
from tests.infer.test_engine import ASKED, ask, branch_logprobs, check_blocks, with_branches

BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(3)
    return VLM(TINY).eval()


def run(engine, *requests):
    """Return tokens and log-probabilities of each answer, and how many tokens of its prompt were cached."""
    for request in requests:
        engine.submit(request)
    found, cached = {}, {}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Token):
                found.setdefault((event.request, event.answer), []).append((event.id, event.logprob))
            else:
                cached[event.request, event.answer] = event.usage.cached_tokens
    check_blocks(engine)
    return found, cached


def rounding(model, num_bits):
    """A copy of the model whose attention, without a cache, sees keys and values as the cache gives them back."""

    def round_trip(x):
        return Codes(*encode(x[0], num_bits), num_bits, x.dtype).read(0, x.shape[1])[None]

    model = copy.deepcopy(model)
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            attend = module.attend
            module.attend = lambda q, k, v, mask, attend=attend: attend(q, round_trip(k.float()), round_trip(v), mask)
    return model


@pytest.mark.parametrize("format", BITS)
def test_answers_are_branches_that_see_rounded_keys_and_values(random_model, processor, format):
    """Three answers to one prompt, however it is cut. Where a sum is rounded in another way a code may be the next one,
    which is little beside what all the rounding does."""
    prompt = ask(processor, ASKED[2], 1, 2)
    engine = Engine(random_model, num_rows=2, chunk=9, cache_format=format)
    found, cached = run(engine, Request(prompt, SamplingConfig(max_new_tokens=8, temperature=1), 3, num_logprobs=0))
    ids = [[token for token, _ in found[0, i]] for i in range(3)]
    assert all(cached[0, i] >= 16 for i in (1, 2)) and len({tuple(one) for one in ids}) > 1
    document = with_branches(prompt, ids)
    ours = torch.tensor([logprob for i in range(3) for _, logprob in found[0, i]])
    plain, expected = (
        torch.tensor([x for branch in branch_logprobs(model, processor, document) for x in branch])
        for model in (random_model, rounding(random_model, BITS[format]))
    )
    assert (ours - expected).abs().max() <= 0.25 * (ours - plain).abs().max()


@pytest.mark.parametrize("format", BITS)
def test_neighbours_change_no_bit(random_model, processor, format):
    """The row beside it asks the same of another picture."""
    found = []
    for picture in (2, 7):
        prompts = [ask(processor, ASKED[1], 1), ask(processor, ASKED[0], picture)]
        engine = Engine(random_model, num_rows=2, cache_format=format)
        config = SamplingConfig(max_new_tokens=6)
        found.append(run(engine, *(Request(prompt, config, num_logprobs=0) for prompt in prompts))[0])
    one, other = found
    assert one[0, 0] == other[0, 0] and one[1, 0] != other[1, 0]


@pytest.mark.parametrize("format", BITS)
def test_evicted_blocks_are_written_anew(random_model, processor, format):
    """A prompt has the same bits in blocks that others have used, and once it has to be computed again."""
    first, second = ("red circle " * 20, "blue cross " * 20)
    engine, fresh = (Engine(random_model, num_rows=1, cache_tokens=64, cache_format=format) for _ in range(2))

    def answer(text, engine=engine):
        prompt = ask(processor, text)
        assert 32 < len(prompt) < 58
        found, cached = run(engine, Request(prompt, SamplingConfig(max_new_tokens=64 - len(prompt)), num_logprobs=0))
        return next(iter(found.values())), next(iter(cached.values()))

    before, other, again = answer(first), answer(second), answer(first)
    assert before[1] == other[1] == again[1] == 0
    assert before[0] == again[0] != other[0] == answer(second, fresh)[0]
    assert answer(first)[1] >= 16
