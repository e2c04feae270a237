"""An image encoder learns from masked patches: the loss of transformers' ViTMAE, and no look at what is masked."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from safetensors.torch import load_file, save_file

import nanovlm
import train
from nanovlm.config import EvalConfig, InitConfig, MaskedConfig, OptimConfig, TilingConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.model.vision import VisionEncoder
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.masked import Masked, patch_errors, positions_2d
from nanovlm.train.parallel import Replica
from tests.conftest import TINY, make_batch, make_document
from tests.test_train import SMALL, metrics

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent.parent
FREEZE = ("^(projector|decoder)",)
ENCODERS = {
    "learned positions": TINY.vision,
    "rotary positions": dataclasses.replace(TINY.vision, positions="rotary"),
    "class token, registers": dataclasses.replace(TINY.vision, class_token=True, num_registers=2),
}


def make_encoder(config):
    torch.manual_seed(0)
    encoder = VisionEncoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def test_the_loss_is_that_of_transformers():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {f"decoder_{name}": value for name, value in size.items()}
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(image_size=16, patch_size=4, norm_pix_loss=True, **size, **decoder))
    pixels = torch.rand(3, 3, 16, 16)
    out = theirs(pixels)
    masked = out.mask.nonzero()[:, 1].view(3, 12)
    predicted = out.logits.gather(1, masked[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(patch_errors(predicted, pixels, masked).mean(), out.loss)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_sees_the_patches_that_stay_alone(name):
    """Bit for bit the same, whatever the others show; in the order in which they are named."""
    encoder = make_encoder(ENCODERS[name])
    pixels, kept = torch.randn(2, 3, 16, 16), torch.tensor([[3, 14, 0, 7], [1, 2, 15, 4]])
    is_kept = torch.zeros(2, 16).scatter(1, kept, 1.0)
    is_kept = rearrange(is_kept, "I (y x) -> I 1 y x", y=4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    features = encoder.forward_all(pixels, kept)
    others = encoder.forward_all(torch.where(is_kept > 0, pixels, torch.nan), kept)
    assert torch.equal(features, others) and not features.isnan().any()
    beside = encoder.config.num_tokens_beside
    turned = encoder.forward_all(pixels, kept.flip(1))
    torch.testing.assert_close(features[:, beside:], turned[:, beside:].flip(1))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_keeps_all_is_the_encoder(name):
    encoder, pixels = make_encoder(ENCODERS[name]), torch.randn(2, 3, 16, 16)
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder.forward_all(pixels, every), encoder.forward_all(pixels))


def test_positions_are_sines_and_cosines_of_rows_and_columns():
    positions = positions_2d(3, 8)
    row, column = [torch.tensor([i / 10000 ** (2 * k / 4) for k in range(2)]) for i in (2.0, 1.0)]
    expected = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()])
    torch.testing.assert_close(positions[2 * 3 + 1], expected)


def test_each_masked_patch_has_a_prediction_of_its_own():
    """In the order in which the masked patches are named, and whatever that of the others is."""
    decoder = make_both()[1].decoder
    features, (kept, masked) = torch.randn(1, 4, 32), torch.randperm(16)[None].split([4, 12], 1)
    predicted = decoder(features, kept, masked)
    assert predicted.shape == (1, 12, 48)
    torch.testing.assert_close(decoder(features, kept, masked.flip(1)), predicted.flip(1))
    torch.testing.assert_close(decoder(features.flip(1), kept.flip(1), masked), predicted)
    assert (decoder(features.flip(1), kept, masked) - predicted).norm() > 1e-3


# --- the objective -------------------------------------------------------------------------------------------------


def make_batches(processor, *num_images):
    return [make_batch([make_document(processor, 7 * n, ("what?", "that"), images=n)]) for n in num_images]


def take_step(model, objective, batches, wrap=lambda model: model):
    """Return the loss and all gradients of a model whose encoder alone learns."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision."))
    replica = wrap(model)
    torch.manual_seed(1)
    loss = sum(objective.loss(replica, batch, Extras()) for batch in batches)
    loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad} | objective.state
    return {name: p.grad for name, p in named.items()} | {"loss": loss.detach()}


def make_both():
    torch.manual_seed(0)
    return VLM(TINY), Masked(TrainConfig(model=TINY, optim=OptimConfig(freeze=FREEZE)))


def test_three_quarters_are_masked_and_counted(processor):
    (batch,) = make_batches(processor, 3)
    assert make_both()[1].count(batch) == 3 * 12
    assert {MaskedConfig(0.01).count(9), MaskedConfig(0.99).count(9)} == {1, 8}


def test_the_encoder_and_the_small_decoder_learn(processor):
    model, objective = make_both()
    for name, gradient in take_step(model, objective, make_batches(processor, 2)).items():
        assert gradient.any() or name.endswith("k_proj.bias"), name  # which moves no softmax
    assert model.forward.__func__ is VLM.forward


def test_masks_are_new_in_training_and_the_same_in_validation(processor):
    (model, objective), (batch,) = make_both(), make_batches(processor, 2)
    losses = [objective.loss(model.train(), batch, Extras()).item() for _ in range(2)]
    assert losses[0] != losses[1]
    losses = [objective.loss(model.eval(), batch, Extras()).item() for _ in range(2)]
    assert losses[0] == losses[1]


def test_a_batch_without_pictures_has_no_loss_and_gradients_of_zero(processor):
    model, objective = make_both()
    found = take_step(model, objective, make_batches(processor, 0))
    assert not any(x.any() for x in found.values())


# --- ranks ---------------------------------------------------------------------------------------------------------

# One process imports torch and becomes two.
WORKER = """
import multiprocessing
from tests.objectives.test_masked import compute
multiprocessing.set_start_method("fork")
processes = [multiprocessing.Process(target=compute, args=(rank, {folder!r})) for rank in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0
"""


def compute(rank, folder):
    """Write the gradients of a rank's own pictures, after DDP has averaged them over both ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = make_batches(Processor.load(folder, TINY), rank + 1)
    found = take_step(*make_both(), batches, lambda model: Replica(model, broadcast_buffers=False))
    save_file(found, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_ranks_exchange_the_gradients_of_the_encoder(tmp_path, processor):
    processor.save(tmp_path)
    worker = [sys.executable, "-c", WORKER.format(folder=str(tmp_path))]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    theirs = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    alone = [take_step(*make_both(), make_batches(processor, rank + 1)) for rank in range(2)]
    for name in make_both()[0].vision.state_dict():
        name = f"vision.{name}"
        mean = (alone[0][name] + alone[1][name]) / 2
        for found in theirs:
            assert (found[name] - mean).norm() <= 1e-6 * mean.norm() + 1e-8, name


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_a_run_learns_to_predict_and_its_encoder_is_where_another_begins(tmp_path):
    config = dataclasses.replace(
        SMALL,
        objective="masked",
        masked=MaskedConfig(hidden_size=32, num_hidden_layers=1),
        optim=dataclasses.replace(SMALL.optim, steps=12, lr=1e-2, freeze=FREEZE),
        eval=EvalConfig(),
        run_dir=str(tmp_path / "masked"),
    )
    train.main(config)
    losses = [line["loss"] for line in metrics(tmp_path / "masked")]
    assert 0.3 < losses[-1] < losses[0] - 0.05
    begun = dataclasses.replace(SMALL, init=InitConfig(vision=str(tmp_path / "masked" / "model")), eval=EvalConfig())
    optim = dataclasses.replace(SMALL.optim, steps=1, freeze=("^vision",))
    train.main(dataclasses.replace(begun, optim=optim, run_dir=str(tmp_path / "next")))
    first, second = (nanovlm.load(tmp_path / name / "model")[0].vision.state_dict() for name in ("masked", "next"))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": SMALL.optim}, r"must have '\^\(projector\|fusion\|decoder\)'.* reach the projector"),
        ({"model": dataclasses.replace(TINY, vision=None, image_token_id=None)}, "model.vision = None"),
        ({"model": dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, second=TINY.vision))}, "second"),
        (
            {"model": dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, patches="convolution"))},
            "model.vision.patches = convolution must be patch",
        ),
        ({"model": dataclasses.replace(TINY, tiling=TilingConfig("qwen"))}, "tiling.policy = qwen has no tiles of one"),
    ],
)
def test_what_cannot_learn_is_told(changes, message):
    config = dataclasses.replace(SMALL, objective="masked", optim=dataclasses.replace(SMALL.optim, freeze=FREEZE))
    with pytest.raises(UserError, match=message):
        Masked(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "masked.ratio = 1.0 must be above 0 and below 1"),
        ({"num_hidden_layers": 0}, "masked.num_hidden_layers = 0 must be at least 1"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "masked.hidden_size = 6"),
    ],
)
def test_settings_that_contradict_each_other_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, objective="masked", masked=MaskedConfig(**settings)).validate()
    with pytest.raises(UserError, match=r"masked.* is given, but objective = next_token does not read it"):
        dataclasses.replace(SMALL, masked=MaskedConfig(ratio=0.5)).validate()
