"""A student comes near its teacher, in batches of any make-up, and a killed run goes on bit for bit."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import nanovlm
import train
from nanovlm.config import (
    DataConfig,
    DistillConfig,
    EvalConfig,
    GroupConfig,
    MoEConfig,
    ProjectorConfig,
    TilingConfig,
    TrainConfig,
)
from nanovlm.data.chat import Processor
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.distill import LOSSES, Distill, feature_loss, tile_shares
from nanovlm.objectives.reference import check_fits
from nanovlm.train import init
from tests.conftest import TINY, make_batch, make_document
from tests.test_train import KILL_AT_STEP, KILL_IN_SAVE, SMALL, comparable, metrics

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = str(Path(__file__).parent.parent.parent)
CPU = torch.device("cpu")
# Half as wide, and one block where its teacher has two.
STUDENT = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, hidden_size=16, intermediate_size=32, num_hidden_layers=1),
    decoder=dataclasses.replace(TINY.decoder, hidden_size=16, intermediate_size=32, num_hidden_layers=1),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, processor):
    """The folder of a random tiny model, whose distributions are not uniform."""
    torch.manual_seed(7)
    model = VLM(TINY)
    nn.init.normal_(model.decoder.head_weight, std=0.5)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, model, processor)
    return folder


@pytest.fixture
def student():
    torch.manual_seed(1)
    return VLM(STUDENT)


@pytest.fixture(scope="module")
def documents(processor):
    pairs = [("what?", "a red circle"), ("how many are there?", "two"), ("and where?", "above the blue square")]
    made = [make_document(processor, i, pair, images=1 + i % 2) for i, pair in enumerate(pairs * 2)]
    made.append(make_document(processor, 9, ("no picture?", "none"), images=0))
    made.append(make_document(processor, 11, ("first?", "a"), ("second?", "b c"), independent=True))
    return made


def make(teacher, processor, *losses, model=STUDENT, precision="fp32", **settings):
    settings = DistillConfig(teacher=str(teacher), losses=losses, **settings)
    settings.validate()
    config = TrainConfig(objective="distill", distill=settings, model=model, precision=precision)
    return Distill(config, processor, CPU)


def maps(objective):
    return [x for x in objective.state.values() if isinstance(x, nn.Parameter)]


def named(extras):
    return {name: float(total / number) for name, (total, number) in extras.means.items()}


def every_loss():
    return [f"{name}={0.5 + i / 4}" for i, name in enumerate(LOSSES)]


def test_every_loss_is_what_its_formula_says(teacher, processor, student, documents):
    batch, extras = make_batch(documents, rows=2), Extras()
    objective = make(teacher, processor, *every_loss())
    loss = objective.loss(student, batch, extras)
    theirs, _processor = nanovlm.load(teacher)
    is_trained = batch.labels >= 0
    q, p = (model.logits(batch)[is_trained].log_softmax(-1) for model in (student, theirs))
    mixture = ((p.exp() + q.exp()) / 2).log()
    kl = lambda q, p: F.kl_div(q, p, reduction="batchmean", log_target=True)  # noqa: E731
    expected = {
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "jensen_shannon": (kl(mixture, p) + kl(mixture, q)) / 2,
        "next_token": F.nll_loss(q, batch.labels[is_trained]),
    }
    pixels = batch.pixel_values.float() / 127.5 - 1
    ours, seen = student.vision(pixels), theirs.vision(pixels)
    gaps = (ours @ objective.state["features"].T - seen).square().mean((1, 2))
    shown = (student.projector(ours) @ objective.state["projector"].T - theirs.projector(seen)).square().mean((1, 2))
    # A document's tiles share its trained tokens.
    documents_of = batch.doc_ids[is_trained]
    shares = torch.tensor(
        [(documents_of == i).sum() / (batch.tile_doc_ids == i).sum() for i in batch.tile_doc_ids.tolist()]
    )
    assert len(set(shares.tolist())) > 2 and int(shares.sum()) < len(batch.trained)
    expected |= {"features": gaps @ shares / shares.sum(), "projector": shown @ shares / shares.sum()}
    found = named(extras)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name
    assert found["agreement"] == float((q.argmax(-1) == p.argmax(-1)).float().mean())
    number = {"features": shares.sum(), "projector": shares.sum()}
    total = sum(objective.weights[name] * found[name] * number.get(name, len(batch.trained)) for name in LOSSES)
    assert float(loss) == pytest.approx(float(total), rel=1e-4)
    loss.backward()
    learned = [*student.parameters(), *maps(objective)]
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in learned)
    assert all(x.grad is None for x in objective.teacher.parameters()) and not objective.teacher.training


def test_rows_and_micro_batches_change_nothing(teacher, processor, student, documents):
    objective = make(teacher, processor, *every_loss(), temperature=2.0)
    whole = objective.loss(student, make_batch(documents, rows=2), Extras())
    alone, extras = torch.zeros(()), Extras()
    for document in documents:
        alone = alone + objective.loss(student, make_batch([document], row_length=len(document) + 5), extras)
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-4)
    learned = [*student.parameters(), *maps(objective)]
    for one, other in zip(*(torch.autograd.grad(x, learned) for x in (alone, whole)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    padding = make_batch(documents[:1])
    padding = dataclasses.replace(
        padding, labels=padding.labels * 0 - 100, pixel_values=padding.pixel_values[:0],
        tile_doc_ids=padding.tile_doc_ids[:0], input_ids=padding.input_ids * 0, doc_ids=padding.doc_ids * 0 - 1,
        trained=None,
    )  # fmt: skip
    nothing = objective.loss(student, padding, extras)
    assert float(nothing) == 0 and nothing.requires_grad


def test_gradients_of_features_are_those_of_finite_differences(documents):
    shares = tile_shares(make_batch(documents[:2])).double()
    shape = len(shares), 3
    ours, theirs = (torch.randn(*shape, width, dtype=torch.float64, requires_grad=True) for width in (4, 5))
    matrix = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def loss(x, y, matrix):
        return feature_loss({"a": x}, {"a": y}, "a", shares, matrix)

    assert torch.autograd.gradcheck(loss, (ours, theirs, matrix))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, None), (ours, torch.randn_like(ours)))


def learn(objective, model, batch, steps=60, freeze=()):
    """Return the metrics before and after some steps of AdamW, the learned parameters among them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(freeze) if freeze else True)
    learned = [x for x in [*model.parameters(), *objective.state.values()] if x.requires_grad]
    optimizer, seen = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0), []
    for _ in range(steps):
        extras = Extras()
        (objective.loss(model, batch, extras) / objective.count(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(named(extras))
    return seen[0], seen[-1]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_smaller_student_learns_what_its_teacher_says(teacher, processor, student, documents, name):
    objective = make(teacher, processor, f"{name}=1")
    before, after = learn(objective, student, make_batch(documents[:2]))
    assert after[name] < 0.2 * before[name] and after["agreement"] > 0.8 > 0.4 > before["agreement"]


def test_features_alone_train_the_encoder_before_a_frozen_decoder(teacher, processor, student, documents):
    """The first of two stages: --optim.freeze ^decoder --distill.losses features=1 projector=1."""
    frozen = {name: x.clone() for name, x in student.decoder.state_dict().items()}
    objective = make(teacher, processor, "features=1", "projector=1")
    student.always_sees = True  # as parallelize sets it
    batch, ran = make_batch(documents[:2]), []
    objective.teacher.decoder.register_forward_hook(lambda *_: ran.append(1))
    before, after = learn(objective, student, batch, freeze=("decoder.",))
    assert after["features"] < 0.5 * before["features"] and after["projector"] < 0.5 * before["projector"]
    assert all(x.equal(frozen[name]) for name, x in student.decoder.state_dict().items()) and not ran
    text = make_batch(documents[-2:-1])
    assert objective.loss(student, text, Extras()).requires_grad


def test_equal_widths_need_no_map(teacher, processor):
    objective = make(teacher, processor, "features=1", "projector=1", model=TINY)
    assert objective.state.keys() == {"frozen.teacher"}
    model, _processor = nanovlm.load(teacher)
    batch = make_batch([make_document(processor, 3, ("what?", "that"))])
    assert float(objective.loss(model.train(), batch, Extras())) == 0
    model.requires_grad_(True).decoder.requires_grad_(False)
    model.always_sees = True  # as parallelize sets it where the decoder is frozen
    text = make_batch([make_document(processor, 3, ("what?", "that"), images=0)])
    assert objective.loss(model, text, Extras()).requires_grad


def test_a_table_that_is_filled_up_is_no_other_vocabulary(teacher, processor, documents):
    """The rows of the larger table that are no tokens are left out."""
    torch.manual_seed(1)
    student = VLM(dataclasses.replace(STUDENT, decoder=dataclasses.replace(STUDENT.decoder, vocab_size=576)))
    batch, extras = make_batch(documents, rows=2), Extras()
    objective = make(teacher, processor, "forward_kl=1", model=student.config)
    loss = objective.loss(student, batch, extras)
    is_trained = batch.labels >= 0
    q = student.logits(batch)[is_trained][:, :512].log_softmax(-1)
    p = objective.teacher.logits(batch)[is_trained].log_softmax(-1)
    assert float(loss) == pytest.approx(float(F.kl_div(q, p, reduction="sum", log_target=True)), rel=1e-4)
    loss.backward()
    assert not student.decoder.head_weight.grad[512:].any() and student.decoder.head_weight.grad[:512].any()


def test_a_mixture_keeps_its_load_even(teacher, processor, documents):
    decoder = dataclasses.replace(STUDENT.decoder, moe=MoEConfig(num_experts=4, intermediate_size=16, experts="loop"))
    model, extras = VLM(dataclasses.replace(STUDENT, decoder=decoder)).train(), Extras()
    objective = make(teacher, processor, "forward_kl=1", model=model.config)
    loss = objective.loss(model, make_batch(documents), extras)
    assert float(extras.router_loss) > 0
    kl = extras.means["forward_kl"][0]
    assert float(loss) == pytest.approx(float(kl + extras.router_loss), rel=1e-6)


def change(part, **fields):
    return dataclasses.replace(STUDENT, **{part: dataclasses.replace(getattr(STUDENT, part), **fields)})


@pytest.mark.parametrize(
    ("losses", "settings", "message"),
    [
        (["forward_kl=x"], {}, "distill.losses has 'forward_kl=x', which must be name or name=weight"),
        (["=1"], {}, "distill.losses has '=1', which must be name or name=weight"),
        (["forward_kl=-1"], {}, "the weight -1.0 of forward_kl in distill.losses must be at least 0"),
        (["kl=1"], {}, "distill.losses = 'kl' is unknown; there are forward_kl, "),
        (["forward_kl=1", "forward_kl=2"], {}, "distill.losses names forward_kl twice"),
        (["forward_kl=0"], {}, "learn nothing: give one a weight"),
        (["next_token=1"], {}, "teaches nothing"),
        (["jensen_shannon=1"], {"beta": 1.0}, "distill.beta = 1.0 must be between 0 and 1"),
        (["forward_kl=1"], {"temperature": 0.0}, "distill.temperature = 0.0 must be positive"),
        (["forward_kl=1"], {"model": change("vision", image_size=32)}, "the side of a tile: 16 of .*, 32 of the stud"),
        (["forward_kl=1"], {"model": change("vision", patch_size=2)}, "the image tokens of a tile: 4 of .*, 16 of the"),
        (["features=1"], {"model": change("vision", patch_size=8)}, "the patches of a tile: 16 of .*, 4 of the stud"),
        (
            ["features=1"],
            {"model": dataclasses.replace(STUDENT, vision=None, image_token_id=None)},
            "the student is a language model, which has no features to compare",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(teacher, processor, losses, settings, message):
    with pytest.raises(ValueError, match=message):
        make(teacher, processor, *losses, **settings)


ANYRES = {
    "tiling": TilingConfig("anyres", longest_edge=32, max_tiles=2),
    "projector": ProjectorConfig("mlp", has_newline=True),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tiling": TINY.tiling, "projector": ProjectorConfig(scale_factor=4)},
            r"whether tiling.policy is anyres: True of .*, False of",
        ),
        (
            {"tiling": dataclasses.replace(ANYRES["tiling"], max_tiles=3)},
            r"tiling.max_tiles: 2 of .*, 3 of the student",
        ),
        (
            {"projector": dataclasses.replace(ANYRES["projector"], scale_factor=1)},
            r"the image features of a tile: 4 of",
        ),
        ({}, ""),
    ],
)
def test_image_tokens_of_anyres_pictures_are_compared(tmp_path, processor, change, message):
    """Whose number a config does not know: that of a tile is 1 for all."""
    config = dataclasses.replace(TINY, **ANYRES).validate()
    save_model(tmp_path / "teacher", VLM(config), Processor(processor.tokenizer, processor.chat_template, config))
    student = dataclasses.replace(config, **change).validate()
    own = Processor(processor.tokenizer, processor.chat_template, student)
    if not message:
        assert make(tmp_path / "teacher", own, "forward_kl=1", model=student)
        assert check_fits("it", Processor.load(tmp_path / "teacher", config), own) is None
        return
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "teacher", own, "forward_kl=1", model=student)
    with pytest.raises(ValueError, match=r"the reference it has (has_grids|num_image_features|tiling.max_tiles) = "):
        check_fits("it", Processor.load(tmp_path / "teacher", config), own)


def test_features_of_earlier_blocks_have_maps_of_their_width(processor, tmp_path):
    """DeepStack's stand beside those of the last block: of one model, and of another number of blocks."""

    def stacked(config, layers):
        return dataclasses.replace(
            config,
            tiling=TilingConfig("qwen", min_pixels=64, max_pixels=64 * 16),
            projector=ProjectorConfig("merger", norm="layer", deepstack_layers=layers),
        ).validate()

    config, wider = stacked(STUDENT, ()), stacked(TINY, (1,))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_hidden_layers=2)).validate()
    save_model(tmp_path / "teacher", VLM(wider), Processor(processor.tokenizer, processor.chat_template, wider))
    for student in (config, stacked(config, (0,))):
        own, batch_model = Processor(processor.tokenizer, processor.chat_template, student), VLM(student)
        objective = make(tmp_path / "teacher", own, "features=1", "projector=1", model=student)
        batch = make_batch([make_document(own, 3, ("what?", "that"))])
        assert torch.isfinite(objective.loss(batch_model, batch, Extras()))
        assert {x.shape[1] for x in maps(objective)} == {16 * (1 + len(student.projector.deepstack_layers))}


def test_another_tokenizer_is_named_and_does_not_matter_to_features(teacher):
    other = Processor(train_tokenizer(sample_texts(Scenes("train"), 50), 400), CHAT_TEMPLATE, STUDENT)
    with pytest.raises(ValueError, match="has other tokens than the student, so that their probabilities cannot"):
        make(teacher, other, "forward_kl=1")
    make(teacher, other, "features=1")


def test_a_teacher_reads_as_far_as_the_student_answers(teacher, processor):
    most = TINY.decoder.max_position_embeddings
    settings = DistillConfig(str(teacher), ("reverse_kl=1",), on_policy=True)
    group, data = GroupConfig(max_completion_length=64), DataConfig(row_length=most - 63)
    config = TrainConfig(objective="distill", distill=settings, model=STUDENT, group=group, data=data)
    Distill(config, processor, CPU)  # no longer than the student reads
    longer = change("decoder", max_position_embeddings=2 * most)
    message = f"reads {most} tokens at most, fewer than data.row_length [+] group.max_completion_length,.* = {most + 1}"
    with pytest.raises(ValueError, match=message):
        Distill(dataclasses.replace(config, model=longer), processor, CPU)


def test_a_language_model_teaches_no_one_who_reads_pictures(tmp_path, processor):
    text = dataclasses.replace(TINY, vision=None, image_token_id=None)
    save_model(tmp_path / "model", VLM(text), processor)
    with pytest.raises(ValueError, match="is a language model, and the student reads pictures"):
        make(tmp_path / "model", processor, "forward_kl=1")
    with pytest.raises(ValueError, match=r"prefix_attention: causal of .*, prompt of the student"):
        seen = dataclasses.replace(text, decoder=dataclasses.replace(text.decoder, prefix_attention="prompt"))
        make(tmp_path / "model", processor, "forward_kl=1", model=seen)
    objective = make(tmp_path / "model", processor, "forward_kl=1", model=text)
    batch = make_batch([make_document(processor, 0, ("what?", "that"), images=0)])
    assert float(objective.loss(VLM(text), batch, Extras())) > 0


def test_own_answers_are_asked_for_by_a_switch(teacher, processor):
    assert make(teacher, processor, "reverse_kl=1").learns_from == "answers"
    assert make(teacher, processor, "reverse_kl=1", on_policy=True).learns_from == "own"


# --- whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of SMALL, whose model teaches."""
    folder = tmp_path_factory.mktemp("large")
    train.main(dataclasses.replace(SMALL, run_dir=str(folder), eval=EvalConfig()))
    return folder / "model"


def distilled(large, **changes):
    """SMALL with half its widths, which learns from it."""
    vision = dataclasses.replace(SMALL.model.vision, hidden_size=16)
    decoder = dataclasses.replace(SMALL.model.decoder, hidden_size=16)
    return dataclasses.replace(
        SMALL,
        model=dataclasses.replace(SMALL.model, vision=vision, decoder=decoder),
        objective="distill",
        distill=DistillConfig(str(large), ("forward_kl=1", "features=0.5", "projector=0.5", "next_token=0.1")),
        optim=dataclasses.replace(SMALL.optim, steps=8),
        eval=EvalConfig(),
        **changes,
    )


def test_a_new_student_takes_the_tokens_of_its_teacher(tmp_path, large):
    """Those that its own data would give are others."""
    config = distilled(large)
    processor, _fill = init.prepare(config, ["was ist 1? Zahl"] * 9)
    theirs = nanovlm.load(large)[1]
    assert processor.tokenizer.to_str() == theirs.tokenizer.to_str()
    assert processor.chat_template == theirs.chat_template
    features = dataclasses.replace(config, distill=DistillConfig(str(large), ("features=1",)))
    processor, _fill = init.prepare(features, ["was ist 1? Zahl"] * 9)
    assert processor.tokenizer.get_vocab() != theirs.tokenizer.get_vocab()


def test_a_teacher_for_another_objective_is_named(large):
    with pytest.raises(ValueError, match=r"distill\.teacher is given, but objective = next_token does not read it"):
        dataclasses.replace(distilled(large), objective="next_token").validate()


def test_a_student_learns_from_its_own_answers(tmp_path, large):
    config = distilled(large, run_dir=str(tmp_path), group=GroupConfig(max_completion_length=6, num_questions=4))
    distill = DistillConfig(str(large), ("reverse_kl=1",), on_policy=True)
    train.main(dataclasses.replace(config, distill=distill, optim=dataclasses.replace(config.optim, steps=4)))
    seen = metrics(tmp_path)
    assert seen[-1]["reverse_kl"] < seen[0]["reverse_kl"] and all(line["trained_tokens"] <= 24 for line in seen)
    for losses, teacher, message in (
        (("next_token=1", "forward_kl=1"), large, "next_token would teach the student its own answers"),
        (("forward_kl=1",), "", "on_policy needs a teacher of the student's own answers"),
    ):
        with pytest.raises(ValueError, match=message):
            make(teacher, nanovlm.load(large)[1], *losses, model=config.model, on_policy=True)


RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import dataclasses
import train
from tests.objectives.test_distill import distilled
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
train.main(distilled({large!r}, run_dir={run_dir!r}))
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, large):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.main(distilled(large, run_dir=str(whole)))
    seen = metrics(whole)
    assert {"forward_kl", "features", "projector", "next_token", "agreement"} <= seen[0].keys()
    assert seen[-1]["forward_kl"] < seen[0]["forward_kl"]
    for hook in (KILL_AT_STEP.format(4), KILL_IN_SAVE.format(2, 3), KILL_AT_STEP.format(7)):
        script = RUN.format(root=ROOT, hook=hook, large=str(large), run_dir=str(broken))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
    train.main(distilled(large, run_dir=str(broken)))
    assert comparable(metrics(broken)) == comparable(seen)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (whole, broken)]
    assert models[0].keys() == models[1].keys() == VLM(distilled(large).model).state_dict().keys()
    assert all(x.equal(models[1][name]) for name, x in models[0].items())
    kept = [sorted((folder / "checkpoints").iterdir())[-1] / "rng.safetensors" for folder in (whole, broken)]
    maps = [{n: x for n, x in load_file(f).items() if n.startswith("objective.")} for f in kept]
    assert maps[0].keys() == {"objective.features", "objective.projector", "objective.frozen.teacher"}
    assert all(x.equal(maps[1][name]) for name, x in maps[0].items())
    begun = load_file(sorted((whole / "checkpoints").iterdir())[0] / "rng.safetensors")
    assert not begun["objective.features"].equal(maps[0]["objective.features"])
