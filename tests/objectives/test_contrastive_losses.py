"""Contrastive losses against transformers', and their gradients on one, two and four ranks, whole and in chunks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nanovlm.objectives import contrastive_losses
from nanovlm.objectives.contrastive_losses import cached_loss, sigmoid_loss, softmax_loss

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent.parent
WIDTH, SIZES = 16, (5, 1, 0, 7)  # pairs of each of four ranks
LOSSES = {
    "softmax": lambda x, y, scale, bias, **how: softmax_loss(x, y, scale, **how) + 0 * bias.sum(),
    "sigmoid": sigmoid_loss,
}


def make_pairs(num, dtype=torch.float32):
    """Embeddings of pairs that are somewhat alike, a factor and a bias, all of which learn."""
    torch.manual_seed(0)
    x = torch.randn(num, WIDTH, dtype=dtype)
    y = x + torch.randn(num, WIDTH, dtype=dtype)
    numbers = torch.tensor(7.0, dtype=dtype), torch.tensor([-3.0], dtype=dtype)
    return [t.requires_grad_() for t in (F.normalize(x, dim=1), F.normalize(y, dim=1), *numbers)]


class Towers(nn.Module):
    """Two towers with dropout, from parts: tensors of pairs [n, 2, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.scale, self.bias = nn.Parameter(torch.tensor(7.0)), nn.Parameter(torch.tensor(-3.0))

    def embed(self, part):
        return F.normalize(self.image(part[:, 0]), dim=1), F.normalize(self.text(part[:, 1]), dim=1)

    def forward(self, parts, name, group=None):
        return cached_loss(self.embed, parts, lambda x, y: LOSSES[name](x, y, self.scale, self.bias, group=group))


def gradients(name, num, mine=slice(None), **how):
    """The loss of this rank's pairs, and the gradients of its embeddings and of what it shares with all."""
    inputs = make_pairs(num)
    images, texts, scale, bias = inputs
    loss = LOSSES[name](images[mine], texts[mine], scale, bias, **how)
    (3 * loss).backward()
    x, y, *numbers = (t.grad for t in inputs)
    return {"loss": loss.detach(), "x": x[mine], "y": y[mine]} | dict(zip(("scale", "bias"), numbers, strict=True))


# --- one rank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model"), [("softmax", "CLIP"), ("sigmoid", "Siglip")])
def test_a_loss_is_that_of_transformers(name, model):
    import transformers  # not above, as ranks import this file

    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = part | {"vocab_size": 32, "max_position_embeddings": 8, "projection_size": 16, "eos_token_id": 31}
    torch.manual_seed(0)
    config = getattr(transformers, f"{model}Config")(
        text_config=text, vision_config=part | {"image_size": 8, "patch_size": 4}
    )
    model = getattr(transformers, f"{model}Model")(config).eval()
    ids, pixels = torch.randint(32, (6, 8)), torch.randn(6, 3, 8, 8)
    out = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), return_loss=True)
    images, texts = (F.normalize(x, dim=-1) for x in (out.image_embeds, out.text_embeds))
    bias = model.logit_bias if name == "sigmoid" else torch.zeros(())
    torch.testing.assert_close(LOSSES[name](images, texts, model.logit_scale.exp(), bias) / 6, out.loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_gradients_are_those_of_the_loss(name, chunk):
    inputs = make_pairs(6, torch.float64)
    assert torch.autograd.gradcheck(lambda *args: LOSSES[name](*args, chunk=chunk), inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_equal_texts_are_no_wrong_answers(name, chunk):
    """The logits of an image with a text that says what its own does are left out of the formula, and of gradients."""
    numbers = torch.tensor([3, 5, 3, 2**24 - 1, 5, 3])
    inputs = make_pairs(6, torch.float64)
    images, texts, scale, bias = inputs
    is_left_out = (numbers == numbers[:, None]) & ~torch.eye(6, dtype=torch.bool)
    logits = scale * images @ texts.T
    if name == "sigmoid":
        each = -F.logsigmoid((2 * torch.eye(6) - 1) * (logits + bias))
        expected = each.masked_fill(is_left_out, 0).sum()
    else:
        logits, right = logits.masked_fill(is_left_out, -torch.inf), torch.arange(6)
        sides = (F.cross_entropy(x, right, reduction="sum") for x in (logits, logits.T))
        expected = sum(sides) / 2 + 0 * bias.sum()
    loss = LOSSES[name](*inputs, chunk=chunk, numbers=numbers)
    torch.testing.assert_close(loss, expected)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[name](*inputs, chunk=chunk, numbers=numbers), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_gradients_is_the_same(name):
    inputs = make_pairs(9)
    with torch.no_grad():
        alone = LOSSES[name](*inputs)
    assert torch.equal(alone, LOSSES[name](*inputs).detach())


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_gradients(name):
    x = torch.eye(4, WIDTH).requires_grad_()
    y = x.detach().roll(1, 0).requires_grad_()  # every text belongs to another image
    LOSSES[name](x, y, torch.tensor(1e4), torch.tensor(0.0)).backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all() and x.grad.norm() > 1e4


@pytest.mark.parametrize("name", LOSSES)
def test_small_losses_keep_their_gradients(name):
    """Pairs that are told apart nearly surely: losses near 1e-9 and their gradients in fp32, against fp64."""
    exact, single = (
        [t.to(dtype).requires_grad_() for t in (torch.eye(5), torch.eye(5), torch.tensor(21.0), torch.tensor(0.0))]
        for dtype in (torch.float64, torch.float32)
    )
    if name == "sigmoid":  # negatives are at the bias, positives at scale + bias
        exact[2:], single[2:] = (
            [torch.tensor(42.0, dtype=x.dtype), torch.tensor(-21.0, dtype=x.dtype)] for x in (exact[0], single[0])
        )
    for inputs in (exact, single):
        loss = LOSSES[name](*inputs)
        loss.backward()
        inputs.append(loss.detach())
    assert exact[-1] < 1e-7
    for ours, expected in ((single[0].grad, exact[0].grad), (single[-1], exact[-1])):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round_logits(name):
    x, y, scale, bias = make_pairs(9)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = LOSSES[name](x, y, scale, bias)
    assert torch.equal(rounded, LOSSES[name](x, y, scale, bias))


def test_logits_of_one_chunk_alone_are_in_memory(monkeypatch):
    """Of 64 pairs by default as many images at once as have MAX_LOGITS logits."""
    monkeypatch.setattr(contrastive_losses, "MAX_LOGITS", 64 * 5)
    x, y, *_ = make_pairs(64)
    assert {len(x[rows]) for rows in contrastive_losses.chunks(x, y, None)} == {5, 4}
    assert {len(x[rows]) for rows in contrastive_losses.chunks(x, y, 16)} == {16}


# --- gradient caching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_cached_gradients_are_those_of_the_whole_batch(name):
    torch.manual_seed(0)
    towers, pairs = Towers().eval(), torch.randn(10, 2, WIDTH)
    whole, parts = (take(towers, name, parts) for parts in ([pairs], pairs.split([4, 1, 5])))
    for key, x in whole.items():
        torch.testing.assert_close(parts[key], x, rtol=1e-6, atol=1e-7 * float(x.norm()), msg=key)


def test_cached_gradients_have_the_dropout_of_their_loss():
    """With a graph over all parts, and with one part at a time: the same random numbers, so the same gradients."""
    torch.manual_seed(0)
    towers, parts = Towers(), torch.randn(10, 2, WIDTH).split([4, 1, 5])
    torch.manual_seed(1)
    cached = take(towers, "sigmoid", parts)
    torch.manual_seed(1)
    images, texts = map(torch.cat, zip(*map(towers.embed, parts), strict=True))
    towers.zero_grad()
    loss = sigmoid_loss(images, texts, towers.scale, towers.bias)
    loss.backward()
    assert torch.equal(loss.detach(), cached["loss"])
    for key, p in towers.named_parameters():
        assert torch.equal(p.grad, cached[key]), key
    other = take(towers, "sigmoid", parts)
    assert not torch.equal(other["loss"], loss)


def test_cached_activations_are_of_one_part_at_a_time():
    """What the backward pass keeps of ten parts is their inputs and embeddings, no hidden layer."""
    torch.manual_seed(0)
    towers, parts, kept = Towers(), torch.randn(40, 2, WIDTH).split(4), []

    def keep(x):
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        towers(parts, "sigmoid")
    assert kept and not [shape for shape in kept if shape[-1:] == (32,)]


def take(towers, name, parts):
    towers.zero_grad()
    loss = towers(parts, name)
    loss.backward()
    named = {key: p.grad.clone() for key, p in towers.named_parameters() if p.requires_grad}
    return named | {"loss": loss.detach()}


# --- ranks ---------------------------------------------------------------------------------------------------------

# One process imports torch and becomes four, which is three imports less.
WORKER = """
import multiprocessing
from tests.objectives.test_contrastive_losses import compute
multiprocessing.set_start_method("fork")
processes = [multiprocessing.Process(target=compute, args=(rank, {folder!r})) for rank in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0
"""


def compute(rank, folder):
    """Write what a rank computes with three others, and with one other in a group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pairs, results = [dist.new_group([0, 1]), dist.new_group([2, 3])], {}
    for num_ranks, group, sizes in ((4, None, SIZES), (2, pairs[rank // 2], SIZES[rank // 2 * 2 :][:2])):
        start = sum(sizes[: rank % num_ranks])
        mine = slice(start, start + sizes[rank % num_ranks])
        for name in LOSSES:
            for chunk in (None, 2):
                got = gradients(name, sum(sizes), mine, group=group, chunk=chunk)
                results |= {f"{num_ranks} {name} {chunk} {key}": x for key, x in got.items()}
    torch.manual_seed(0)
    towers, mine = Towers().eval(), torch.randn(12, 2, WIDTH)[rank * 3 :][:3]
    for name in LOSSES:
        towers.bias.requires_grad_(name == "sigmoid")
        replica = DistributedDataParallel(towers)
        for _ in range(2):  # the wrapper's second step too
            replica.zero_grad()
            loss = replica(mine.split(2), name)
            (4 * loss).backward()  # the wrapper divides by four
        named = {key: p.grad for key, p in towers.named_parameters() if p.requires_grad}
        results |= {f"towers {name} {key}": x.clone() for key, x in (named | {"loss": loss.detach()}).items()}
    save_file(results, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = [sys.executable, "-c", WORKER.format(folder=str(folder))]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{rank}.safetensors") for rank in range(4)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("members", [range(4), range(2), range(2, 4)])
def test_ranks_have_the_gradients_of_one(ranks, name, chunk, members):
    """Unequal numbers of pairs on each rank, one without any, against all on one."""
    theirs = [
        {key: ranks[rank][f"{len(members)} {name} {chunk} {key}"] for key in ("loss", "x", "y", "scale", "bias")}
        for rank in members
    ]
    ours = gradients(name, sum(SIZES[rank] for rank in members))
    for key, expected in ours.items():
        each = [part[key] for part in theirs]
        found = torch.cat(each) if key in "xy" else torch.stack(each).sum(0)
        # Those of scale and bias are sums of terms near 1 of both signs.
        assert (found - expected).norm() <= 1e-6 * max(1, expected.norm()), key


@pytest.mark.parametrize("name", LOSSES)
def test_cached_ranks_have_the_gradients_of_one(ranks, name):
    """Three pairs on each of four ranks in parts of two and one, under DDP, against twelve at once."""
    torch.manual_seed(0)
    towers = Towers().eval()
    towers.bias.requires_grad_(name == "sigmoid")
    for key, expected in take(towers, name, [torch.randn(12, 2, WIDTH)]).items():
        each = [results[f"towers {name} {key}"] for results in ranks]
        found = sum(each) if key == "loss" else each[0]
        assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-8, key
