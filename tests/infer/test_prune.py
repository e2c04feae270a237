"""Leaving image tokens out: exact where none are, what is left where some are, and what it saves."""

import dataclasses

import pytest
import torch

import nanovlm
from nanovlm.config import MoEConfig, SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer.prune import answer_pruned, choose_kept
from nanovlm.model.decoder import rope_table
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

QUESTION = [{"role": "user", "content": "what color is the circle?"}]
DEEP = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, num_hidden_layers=3))
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, layers=(1,))


def make_model(config=DEEP):
    torch.manual_seed(0)
    model = VLM(config).eval()
    with torch.no_grad():  # answers of many different tokens
        for parameter in model.decoder.parameters():
            parameter.mul_(2.0)
    return model


def ask(processor, *seeds):
    return processor.prompt(QUESTION, [noise(seed) for seed in seeds])


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=12),
        SamplingConfig(max_new_tokens=12, temperature=0.8, seed=3, repetition_penalty=1.3),
    ],
    ids=["greedy", "drawn"],
)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "mixture"])
def test_without_pruning_the_answer_is_the_engines(processor, moe, sampling):
    model = make_model(dataclasses.replace(DEEP, decoder=dataclasses.replace(DEEP.decoder, moe=moe)))
    tokens = set()
    for prompt in (ask(processor, 0, 1), ask(processor, 2), ask(processor)):
        expected = nanovlm.generate(model, processor.batch([prompt]), sampling)[0]
        found = answer_pruned(model, prompt, 0.0, 1, sampling)
        assert found.ids == expected
        assert len(found.kept) == len(prompt) and found.cached_bytes == found.whole_bytes
        tokens.update(expected)
    assert len(tokens) > 8


@torch.no_grad()
def next_slowly(model, batch, ids, share, after):
    """The next token by a pass over all of the row: later blocks do not see what is left out, by a mask."""
    decoder, T, num_prompt = model.decoder, len(ids), batch.input_ids.shape[1]
    x_BTD = torch.cat(
        (model.embed(batch), decoder.embed_tokens(torch.tensor([ids[num_prompt:]], dtype=torch.int64))), dim=1
    )
    rope = rope_table(torch.arange(T)[None], decoder.config)
    mask, is_image = torch.ones(1, 1, T, T).tril().bool(), batch.input_ids[0] == TINY.image_token_id
    before_BTD = x_BTD
    for index, layer in enumerate(decoder.layers):
        if index == after:
            block = decoder.layers[index - 1]
            attention, y_BTD = block.self_attn, block.input_layernorm(before_BTD)
            q, k = (f(y_BTD).unflatten(-1, (-1, 8)) for f in (attention.q_proj, attention.k_proj))
            q, k = (x * rope[0] + torch.cat((x[..., 4:], x[..., :4]), -1) * rope[1] for x in (q, k))
            scores = torch.einsum("nh,snh->ns", q[0, num_prompt - 1], k[0, :num_prompt].repeat_interleave(2, 1))
            shares = (scores / 8**0.5).softmax(-1).mean(0)
            ranked = sorted((float(shares[i]), i) for i in range(num_prompt) if is_image[i])
            gone = [i for _, i in ranked[: int(share * len(ranked))]]
            mask = mask.clone()
            mask[..., gone] = False
            mask[..., gone, gone] = True  # no row without a key
        before_BTD = x_BTD
        x_BTD, _routing = layer(x_BTD, rope, mask, None, None)
    logits = model.head(decoder.norm(x_BTD[0, -1]))
    logits[[TINY.pad_token_id, TINY.image_token_id]] = -torch.inf
    return int(logits.argmax()), gone


@pytest.mark.parametrize(("share", "after"), [(0.5, 1), (0.8, 2), (1.0, 1)])
def test_later_blocks_do_without_what_the_last_token_looks_at_least(processor, share, after):
    model, prompt = make_model(), ask(processor, 0, 1, 2)
    found = answer_pruned(model, prompt, share, after, SamplingConfig(max_new_tokens=5))
    batch, ids = processor.batch([prompt]), prompt.input_ids.tolist()
    for token in found.ids:
        expected, gone = next_slowly(model, batch, ids, share, after)
        assert token == expected
        ids.append(token)
    assert found.kept.tolist() == [i for i in range(len(prompt)) if i not in gone] and len(gone) == int(12 * share)
    a_token = 2 * 2 * 8 * 4
    assert found.whole_bytes - found.cached_bytes == a_token * (3 - after) * len(gone)


def test_ties_and_text():
    weights, is_image = torch.tensor([0.0, 0.2, 0.1, 0.1, 0.1, 0.0]), torch.tensor([0, 1, 1, 1, 1, 0]).bool()
    assert choose_kept(weights, is_image, 2).tolist() == [0, 1, 4, 5]
    assert choose_kept(weights, is_image, 4).tolist() == [0, 5]


def test_what_cannot_be_done_is_told(processor):
    model, prompt = make_model(), ask(processor, 0)
    for share, after, message in (
        (1.5, 1, "the share of image tokens to leave out, 1.5, must be from 0 to 1"),
        (0.5, 3, "after 1 to 2 blocks of this model's 3, not 3"),
        (0.5, 0, "after 1 to 2 blocks of this model's 3, not 0"),
    ):
        with pytest.raises(UserError, match=message):
            answer_pruned(model, prompt, share, after)
