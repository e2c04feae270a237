"""What a researcher adds takes one place: a new objective, task or source works from a file of its own.

Each class here is what one would write; nothing of ours is changed but the table that names it.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanovlm
import train
from nanovlm.config import EvalConfig, FusionConfig, ParamRule
from nanovlm.data.loader import Loader
from nanovlm.data.source import Ref
from nanovlm.eval.run import evaluate
from nanovlm.eval.tasks import TASKS, Question, open_task
from nanovlm.model import fusion, projector
from nanovlm.model.vlm import VLM
from nanovlm.objectives import OBJECTIVES
from tests.conftest import TINY, make_batch, make_document
from tests.infer.test_engine import GREEDY, ask, written_out
from tests.test_train import SMALL, metrics, run


class Focal:
    """A loss that cares less for what is known: (1 - p)^2 times cross-entropy (Lin et al. 2017, arXiv 1708.02002)."""

    learns_from, state = "answers", {}

    def __init__(self, config, processor, device):
        pass

    def count(self, batch):
        return len(batch.trained)

    def loss(self, model, batch, extras):
        hidden = model(batch, extras=extras).flatten(0, 1)[batch.trained]
        losses = F.cross_entropy(model.head(hidden).float(), batch.labels.flatten()[batch.trained], reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).sum()


def test_a_new_objective(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "focal", Focal)
    run(tmp_path / "focal", objective="focal")
    run(tmp_path / "plain")
    focal, plain = metrics(tmp_path / "focal"), metrics(tmp_path / "plain")
    assert focal[0]["loss"] < 0.999 * plain[0]["loss"] and focal[-1]["loss"] < 0.97 * focal[0]["loss"]


class Parity:
    """Is a number even? The answer counts when it begins rightly."""

    name = "parity"

    def __init__(self, limit):
        self.limit = limit

    def questions(self):
        for i in range(self.limit):
            yield Question(i, "parity", [], [{"role": "user", "content": f"is {i} even?"}], ("no" if i % 2 else "yes",))

    def score(self, question, answer):
        return {"accuracy": float(answer.strip().startswith(question.truth)), "short": float(len(answer) < 5)}


def test_a_new_task(tmp_path, monkeypatch, processor):
    monkeypatch.setitem(TASKS, "parity", lambda name, limit: Parity(limit))
    monkeypatch.setattr(
        "nanovlm.eval.run.answer", lambda model, processor, questions, *_, **__: ["yes"] * len(questions)
    )
    task = open_task("parity", 9)
    result = evaluate(None, None, task, list(task.questions()))
    assert (result["mean"], result["short"], result["n"]) == (pytest.approx(5 / 9), 1.0, 9)
    optim = dataclasses.replace(SMALL.optim, steps=4)
    results = run(tmp_path, optim=optim, eval=EvalConfig(("parity",), limit=4, every=2, controls=False))
    assert [line.get("accuracy_parity") for line in metrics(tmp_path)] == [None, 0.5, None, 0.5]
    assert results["tasks"]["parity"]["mean"] == 0.5


class Counting:
    """A source without an end that counts what is read of it: question i is answered with i."""

    name, damaged = "counting", ()

    def __init__(self):
        self.read_keys = []

    def refs(self, slots, num_slots, start=None):
        for number in itertools.count(start or 0):
            for slot in slots:
                yield Ref(slot, number, 0, number * num_slots + slot, self.name, f"number {number}", number + 1)

    def read(self, key):
        self.read_keys.append(key)
        return {"texts": [{"user": f"what is {key}?", "assistant": str(key)}]}


def test_a_new_source_and_each_record_is_read_once(processor):
    """One rank with four micro-batches a step."""
    source, data = Counting(), dataclasses.replace(SMALL.data, row_length=64, batch_rows=2, pack_buffer=8)
    config = dataclasses.replace(SMALL, data=data, optim=dataclasses.replace(SMALL.optim, micro_batches=4))
    loader = train.make_loader(source, processor, config)
    steps = [next(loader) for _ in range(5)]
    assert isinstance(loader, Loader) and [len(step) for step in steps] == [4] * 5
    assert len(source.read_keys) == len(set(source.read_keys)) and sorted(source.read_keys)[:20] == list(range(20))


class Mean(nn.Module):
    """The mean of each square of patches, then one linear map."""

    def __init__(self, config, vision_size, decoder_size):
        super().__init__()
        self.scale = config.scale_factor
        self.proj = nn.Linear(vision_size, decoder_size)

    def num_tokens(self, num_patches):
        return num_patches // self.scale**2

    def forward(self, x_IPD):
        return self.proj(projector.pixel_shuffle(x_IPD, self.scale).unflatten(-1, (self.scale**2, -1)).mean(2))


def test_another_projector(monkeypatch, processor):
    monkeypatch.setitem(projector.PROJECTORS, "mean", Mean)
    model = VLM(dataclasses.replace(TINY, projector=dataclasses.replace(TINY.projector, type="mean")))
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])
    OBJECTIVES["next_token"](None, None, None).loss(model, batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters())
    with pytest.raises(ValueError, match=r"projector\.type = 'maen' is unknown"):
        VLM(dataclasses.replace(TINY, projector=dataclasses.replace(TINY.projector, type="maen")))


class Abstractor(nn.Module):
    """A map, a scale and an offset of its own, and a table that is no parameter."""

    def __init__(self, config, vision_size, decoder_size):
        super().__init__()
        self.proj = nn.Linear(vision_size, decoder_size, bias=False)
        self.scale = nn.Parameter(torch.empty(decoder_size))
        self.offset = nn.Parameter(torch.empty(1, decoder_size))
        self.register_buffer("table", torch.empty(decoder_size))

    def initial_weights(self):
        yield self.scale, torch.ones(self.scale.shape)
        yield self.offset, torch.zeros(self.offset.shape)
        yield self.table, torch.linspace(0, 1, len(self.table))

    def num_tokens(self, num_patches):
        return num_patches

    def forward(self, x_IPD):
        return self.proj(x_IPD) * self.scale + self.offset + self.table


def test_a_projector_with_weights_of_its_own_trains(tmp_path, monkeypatch):
    """Muon is the preset's for all that no rule names, vectors left out; the table stays, and is saved."""
    monkeypatch.setitem(projector.PROJECTORS, "abstractor", Abstractor)
    kind = dataclasses.replace(SMALL.model.projector, type="abstractor", scale_factor=1)
    rules = (ParamRule("norm|bias|embed_tokens"), ParamRule("", optimizer="muon"))
    run(
        tmp_path,
        model=dataclasses.replace(SMALL.model, projector=kind),
        optim=dataclasses.replace(SMALL.optim, steps=3, rules=rules),
        eval=EvalConfig(),
    )
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]
    trained = nanovlm.load(tmp_path / "model")[0].projector
    assert torch.equal(trained.table, torch.linspace(0, 1, len(trained.table)))
    assert not torch.equal(trained.scale, torch.ones_like(trained.scale))


class AddedMean(nn.Module):
    """Each token has the mean of the features of the pictures before it added to its embedding."""

    looks_back = True

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, x, features, batch, places):
        visible = fusion.find_visible(batch, places, only_latest=False).to(x.dtype)
        tiles = batch.row_tiles.clamp(min=0) if len(places) else visible.new_zeros(len(x), 1).long()
        return x + visible @ self.keep(features)[tiles], None

    def keep(self, features):
        return features.mean(1)

    def see(self, x, views):
        for view in views:
            for tile, kept in view.kept.items():
                first = max(view.places[tile][0] - view.start, 0)
                x[0, view.offset + first : view.offset + view.num] += kept
        return x, None


def test_a_new_fusion(tmp_path, monkeypatch, processor):
    """It trains, and answers over a cache as without one."""
    monkeypatch.setitem(fusion.FUSION, "mean", AddedMean)
    model = dataclasses.replace(SMALL.model, fusion=FusionConfig("mean"))
    run(tmp_path, model=model, optim=dataclasses.replace(SMALL.optim, steps=3), eval=EvalConfig())
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]
    model, theirs = nanovlm.load(tmp_path / "model")
    prompts = [ask(theirs, text, *range(num)) for num, text in enumerate(("why?", "what color?", "where is it?"))]
    found = nanovlm.generate(model, theirs.batch(prompts), GREEDY)
    assert found == [written_out(model, theirs, prompt)[0] for prompt in prompts]
