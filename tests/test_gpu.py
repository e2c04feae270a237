"""What the tests of parts cannot show: a whole run and a whole answer on a GPU, with the kernels, beside the CPU's."""

import copy
import dataclasses

import pytest
import torch

import train
from nanovlm import config
from nanovlm.infer.draft_model import DraftModel
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.infer.speculate import PromptLookup
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_document, noise
from tests.test_train import SMALL, metrics

pytestmark = pytest.mark.gpu
MOE = config.MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=32)


def losses(run_dir, device, backends, **changes):
    """Train for some steps in fp32, with the backends of attention, loss and experts; return the losses."""
    attention, cross_entropy, experts = backends
    moe = dataclasses.replace(MOE, experts=experts)
    model = dataclasses.replace(
        SMALL.model,
        vision=dataclasses.replace(SMALL.model.vision, attention=attention),
        decoder=dataclasses.replace(SMALL.model.decoder, attention=attention, cross_entropy=cross_entropy, moe=moe),
    )
    optim = dataclasses.replace(SMALL.optim, steps=6)
    settings = dict(
        model=model, optim=optim, precision="fp32", eval=config.EvalConfig(), device=device, run_dir=str(run_dir)
    )
    train.main(dataclasses.replace(SMALL, **settings | changes))
    return [line["loss"] for line in metrics(run_dir)]


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_with_kernels_learns_as_on_the_cpu(tmp_path, compile):
    ours = losses(tmp_path / "gpu", "cuda", ("triton",) * 3, parallel=config.ParallelConfig(compile=compile))
    assert ours == pytest.approx(losses(tmp_path / "cpu", "cpu", ("sdpa", "torch", "loop")), rel=1e-2)


def test_the_same_run_gives_the_same_bits(tmp_path):
    one, two = (losses(tmp_path / name, "cuda", ("triton",) * 3) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_weights_in_few_bits_give_the_hidden_states_of_the_cpu(processor, format):
    torch.manual_seed(0)
    model = quantize(VLM(TINY).eval(), config.QuantizationConfig(format))
    batch = make_batch([make_document(processor, 1, ("what?", "a red circle"), ("where?", "left"))])
    with torch.no_grad():
        ours = copy.deepcopy(model).to("cuda")(batch.to("cuda")).cpu()
        theirs = model(batch)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("draft", ["none", "lookup", "model"])
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_an_engine_waits_for_the_device_only_to_read_tokens(processor, monkeypatch, attention, draft):
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.decoder, attention=attention)
    model = VLM(dataclasses.replace(TINY, decoder=decoder)).eval().cuda()
    drafts = {"none": lambda: None, "lookup": lambda: PromptLookup(3, 3, 1), "model": lambda: DraftModel(model, 3)}
    engine = Engine(model, draft=drafts[draft]())
    for i, temperature in enumerate((0, 0.7, 0)):
        prompt = processor.prompt([{"role": "user", "content": "is it? " * 4}], [noise(i)])
        sampling = config.SamplingConfig(
            max_new_tokens=20, temperature=temperature, top_k=5, repetition_penalty=1 + 0.2 * (i > 0)
        )
        engine.submit(Request(prompt, sampling))

    def read(function):
        def call(*args):
            torch.cuda.set_sync_debug_mode("default")
            result = function(*args)
            torch.cuda.set_sync_debug_mode("error")
            return result

        return call

    monkeypatch.setattr(engine, "_take", read(engine._take))
    if draft == "model":  # it reads what it guessed
        monkeypatch.setattr(engine, "_guess", read(engine._guess))
    try:  # from the first tokens on
        while not engine.is_idle:
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
