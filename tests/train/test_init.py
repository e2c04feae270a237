"""Runs that start from an encoder and a language model of the hub, in stages with frozen parts."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import nanovlm
import train
from nanovlm.config import (
    DataConfig,
    DecoderConfig,
    InitConfig,
    MoEConfig,
    ProjectorConfig,
    QuantizationConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
)
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tilings import TILING
from nanovlm.data.tokenizer import CHATML_TEMPLATE, train_tokenizer
from nanovlm.hub import export, gguf
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import find_model
from nanovlm.hub.stored import fill_decoder
from nanovlm.model.build import empty_model
from nanovlm.model.moe import EXPERTS
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from nanovlm.objectives import NextToken
from nanovlm.presets import PRESETS
from nanovlm.sharded import Rows
from nanovlm.train import init
from nanovlm.train.optim import make_optimizers
from tests.conftest import TINY

STAGES = ("smolvlm_256m_stage1", "smolvlm_256m_stage2", "smolvlm_256m_stage3")
VISION = dict(
    image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)
DECODER = dict(
    vocab_size=400,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


def make_hub(folder):
    """Write a SigLIP encoder and a language model with its tokenizer, as folders of the hub."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)).save_pretrained(folder / "siglip")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(**DECODER, rope_parameters=rope, tie_word_embeddings=True, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 400, tokens)
    # A language model has no token for images.
    without = tokenizer.to_str().replace('"<image>"', '"<|unused|>"')
    (folder / "lm" / "tokenizer.json").write_text(without, encoding="utf-8")
    ids = {f"{name}_token": token for name, token in zip(("pad", "bos", "eos"), tokens, strict=True)}
    (folder / "lm" / "tokenizer_config.json").write_text(json.dumps(ids | {"chat_template": CHATML_TEMPLATE}))
    return folder


def stage(number, hub, tmp_path, **changes):
    """A stage's preset at the size of the tiny parts, on the scenes."""
    config = PRESETS[STAGES[number - 1]]()
    model = dataclasses.replace(
        config.model,
        vision=VisionConfig(**VISION),
        projector=dataclasses.replace(config.model.projector, scale_factor=2),
        tiling=TilingConfig(policy="idefics3", longest_edge=16),
        decoder=DecoderConfig(**DECODER | {"vocab_size": 416}, max_position_embeddings=512),
        pad_token_id=6,
        bos_token_id=7,
        eos_token_id=8,
        image_token_id=400,
    )
    first = InitConfig(vision=str(hub / "siglip"), decoder=str(hub / "lm"))
    later = InitConfig(model=str(tmp_path / str(number - 1) / "model"))
    data = dataclasses.replace(config.data, sources=("scenes",), row_length=320, batch_rows=2, max_tiles=0)
    optim = dataclasses.replace(config.optim, steps=3, warmup_steps=0, micro_batches=1)
    config = dataclasses.replace(
        config,
        run_dir=str(tmp_path / str(number)),
        model=model,
        init=first if number == 1 else later,
        data=data,
        optim=optim,
        threads=1,
        precision="fp32",
    )
    return dataclasses.replace(config, **changes)


def test_the_recipe_in_three_commands(hub, tmp_path, capsys):
    """Each stage starts with the weights of the one before; what is frozen does not change by a bit."""
    torch.manual_seed(0)  # as the run does
    weights = [dict(init.start(stage(1, hub, tmp_path), ())[0].state_dict())]
    for number in (1, 2, 3):
        train.main(stage(number, hub, tmp_path))
        weights.append(dict(nanovlm.load(tmp_path / str(number) / "model")[0].state_dict()))
    moving = [("projector.",), ("projector.", "decoder."), ("projector.", "decoder.", "vision.")]
    for before, after, parts in zip(weights[:-1], weights[1:], moving, strict=True):
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) != name.startswith(parts), name
    assert nanovlm.load(tmp_path / "3" / "model")[1].chat_template == CHATML_TEMPLATE


def test_frozen_parts_cost_no_gradients_and_keep_no_activations(hub, tmp_path, batch):
    def saved_bytes(config):
        model, _processor = init.start(config, ())
        make_optimizers(model, config.optim)
        sizes = {}  # by memory: what several operations save is there once

        def pack(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = NextToken().loss(model, batch)
        loss.backward()
        return model, sum(sizes.values())

    projector_alone, few = saved_bytes(stage(1, hub, tmp_path))
    assert [n for n, p in projector_alone.named_parameters() if p.grad is not None] == ["projector.proj.weight"]
    first = stage(1, hub, tmp_path).init
    everything, many = saved_bytes(stage(3, hub, tmp_path, init=first))
    assert all(p.grad is not None for p in everything.parameters())
    assert few < many
    # Without the encoder's activations: what all of it keeps is at least its residual stream at every block.
    tiles, patches, layers = len(batch.pixel_values), 16, VISION["num_hidden_layers"]
    assert many - few > tiles * patches * VISION["hidden_size"] * 4 * layers


@pytest.fixture
def batch(hub, tmp_path):
    config = stage(1, hub, tmp_path)
    _model, processor = init.start(config, ())
    loader = train.make_loader(Scenes("train", 50), processor, train.share_micro_batches(config))
    return next(loader)[0]


def test_new_tokens_begin_near_the_mean_of_the_old(hub, tmp_path):
    model, processor = init.start(stage(1, hub, tmp_path), ())
    table = model.decoder.embed_tokens.weight
    old = LlamaForCausalLM.from_pretrained(hub / "lm").model.embed_tokens.weight
    assert torch.equal(table[:400], old)
    assert (table[400:] - old.mean(0)).abs().max() < 0.06 * old.std()
    assert not torch.equal(table[400], table[401])
    assert processor.tokenizer.id_to_token(400) == "<image>"
    assert processor.tokenizer.token_to_id("<fake_token_around_image>") == 401


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_size=32), r"model.decoder.hidden_size: 24 against 32"),
        (dict(rope_theta=5.0), r"model.decoder.rope_theta: 10000.0 against 5.0"),
    ],
)
def test_a_decoder_that_differs_is_named(hub, tmp_path, change, message):
    config = stage(1, hub, tmp_path)
    model = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, **change))
    with pytest.raises(ValueError, match=message):
        init.start(dataclasses.replace(config, model=model), ())


@pytest.mark.parametrize("layout", ["ours", "idefics3"])
def test_parts_of_whole_models_are_taken(hub, tmp_path, layout):
    """Encoder and decoder of a model of ours, or of its export, with the tokenizer; the projector is drawn anew."""
    config = stage(1, hub, tmp_path)
    own, processor = init.start(config, ())
    folder = tmp_path / "own"
    save_model(folder, own, processor)
    if layout == "idefics3":
        export.export(folder, tmp_path / "exported")
        folder = tmp_path / "exported"
    decoder = dataclasses.replace(config.model.decoder, vocab_size=424, attention="flex")
    wanted = dataclasses.replace(config.model, decoder=decoder, projector=ProjectorConfig(scale_factor=1))
    parts = InitConfig(vision=str(folder), decoder=str(folder))
    model, again = init.start(dataclasses.replace(config, model=wanted, init=parts), ())
    old, new = own.state_dict(), model.state_dict()
    for name, tensor in old.items():
        if name.startswith(("vision.", "decoder.")):
            assert torch.equal(new[name][: len(tensor)], tensor), name
    rows = new["decoder.embed_tokens.weight"]
    mean = old["decoder.embed_tokens.weight"].mean(0)
    assert (
        rows.shape[0] == 424 and 0 < (rows[416:] - mean).abs().max() < 0.06 * old["decoder.embed_tokens.weight"].std()
    )
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    fresh = dataclasses.replace(wanted, pad_token_id=0, bos_token_id=None, eos_token_id=2, image_token_id=1)
    seeing = dataclasses.replace(config, model=fresh, init=InitConfig(vision=str(folder)))
    alone = init.start(seeing, sample_texts(Scenes("train"), 50))[0].state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in old.items() if name.startswith("vision."))
    name = "decoder.layers.0.mlp.up_proj.weight"
    assert torch.equal(new[name], old[name]) and not torch.equal(alone[name], old[name])


def test_each_rank_keeps_its_rows_of_a_decoder(hub, tmp_path):
    stored = find_model(hub / "lm")
    decoder = dataclasses.replace(stored.config.decoder, vocab_size=416)
    model = VLM(dataclasses.replace(stored.config, decoder=decoder))
    torch.manual_seed(0)
    fill_decoder(model.state_dict(), stored, stored.processor.token_ids())
    for rank in range(3):
        places = {}
        for name, tensor in model.state_dict().items():
            size = (len(tensor) + 2) // 3
            rows = torch.full_like(tensor, 7)[rank * size : (rank + 1) * size]
            places[name] = Rows(rows, tensor.shape, min(rank * size, len(tensor)))
        torch.manual_seed(0)
        fill_decoder(places, stored, stored.processor.token_ids())
        for name, rows in places.items():
            assert rows.equal(model.state_dict()[name]), (rank, name)


def test_a_decoder_of_a_gguf_file_or_of_a_package_is_taken(hub, tmp_path, monkeypatch):
    """`--init.decoder smollm2` is the file of a package; here it is a tiny one."""
    pytest.importorskip("gguf")
    from tests.hub.test_gguf import DECODER as OF_GGUF
    from tests.hub.test_gguf import make_model, write

    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), OF_GGUF.vocab_size)
    theirs = make_model()
    write(tmp_path / "tiny.gguf", theirs, tokenizer)
    monkeypatch.setattr(gguf, "find_smollm2", lambda: tmp_path / "tiny.gguf")
    config = stage(1, hub, tmp_path)
    wanted = dataclasses.replace(
        config.model,
        decoder=dataclasses.replace(OF_GGUF, vocab_size=420),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        image_token_id=1,
    )
    for name in ("smollm2", str(tmp_path / "tiny.gguf")):
        parts = InitConfig(vision=str(hub / "siglip"), decoder=name)
        model, processor = init.start(dataclasses.replace(config, model=wanted, init=parts), ())
        for name, tensor in theirs.decoder.state_dict().items():
            assert torch.equal(model.decoder.state_dict()[name][: len(tensor)], tensor), name
        assert processor.tokenizer.token_to_id("<fake_token_around_image>") is not None


def test_a_tied_decoder_with_a_head_of_its_own_is_refused(hub, tmp_path):
    folder = shutil.copytree(hub / "lm", tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    config = stage(1, hub, tmp_path, init=InitConfig(decoder=str(folder)))
    for shift in (0, 1):
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + shift}
        save_file(tensors | head, folder / "model.safetensors")
        if shift == 0:
            init.start(config, ())
    with pytest.raises(ValueError, match=r"lm_head.weight of its own, but the config says tie_word_embeddings = true"):
        init.start(config, ())


def test_parts_that_one_side_lacks_are_named(hub, tmp_path):
    config = stage(1, hub, tmp_path)
    model, processor = init.start(config, ())
    save_model(tmp_path / "own", model, processor)
    blind = dataclasses.replace(config.model, vision=None, image_token_id=None)
    config = dataclasses.replace(config, model=blind, init=InitConfig(model=str(tmp_path / "own")))
    with pytest.raises(ValueError, match=r"differs from the config: model.vision: VisionConfig\(.*\) against None"):
        init.start(config, ())


@pytest.mark.parametrize(
    ("policy", "ways"),
    [
        ("square", r"set it to at least \d+ or data.too_long"),
        ("fit", r"set it to at least \d+ or data.too_long"),
        ("qwen", r"set it to at least \d+, model.tiling.max_pixels = 1003520 to less, or data.too_long"),
    ],
)
def test_only_settings_that_a_tiling_reads_are_advised(policy, ways):
    model = dataclasses.replace(TINY, tiling=TilingConfig(policy))
    config = TrainConfig(model=model, data=DataConfig(row_length=2, too_long="skip"), init=InitConfig(model="it"))
    processor = Processor(train_tokenizer(["a b"], 400, marker_tokens(model)), CHATML_TEMPLATE, model)
    with pytest.raises(ValueError, match=ways):
        init.check_room(processor, config)
    assert {*init.SIZES.values()} <= {*init.FREE_OF_TILING} and {*init.SIZES} <= {*TILING}


def mixture_of(config):
    return MoEConfig(num_experts=3, intermediate_size=config.model.decoder.intermediate_size)


def test_a_run_goes_on_from_a_dense_model_or_a_mixture(hub, tmp_path):
    """Upcycled with the noise of the config; of a mixture, how it is trained may change, and what it is may not."""
    config = stage(1, hub, tmp_path)

    def go_on(name, noise=0.0, **changes):
        moe = MoEConfig(num_experts=3, intermediate_size=DECODER["intermediate_size"], **changes)
        decoder = dataclasses.replace(config.model.decoder, moe=moe, attention="flex", cross_entropy="triton")
        model = dataclasses.replace(config.model, decoder=decoder)
        from_there = InitConfig(model=str(tmp_path / name), upcycle_noise=noise)
        return init.start(dataclasses.replace(config, model=model, init=from_there), ())

    dense, processor = init.start(config, ())
    save_model(tmp_path / "dense", dense, processor)
    matrix = dense.decoder.layers[0].mlp.gate_proj.weight
    assert all(torch.equal(expert, matrix) for expert in go_on("dense")[0].decoder.layers[0].mlp.gate_proj)
    mixture, _processor = go_on("dense", noise=0.1)
    assert not any(torch.equal(expert, matrix) for expert in mixture.decoder.layers[0].mlp.gate_proj)
    save_model(tmp_path / "mixture", mixture, processor)
    again, _processor = go_on("mixture", experts="loop", balance_weight=0.5)
    assert again.config.decoder.moe.balance_weight == 0.5
    assert (again.config.decoder.attention, again.config.decoder.cross_entropy) == ("flex", "triton")
    assert again.decoder.layers[0].mlp.run_experts is EXPERTS["loop"]
    old, new = mixture.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(ValueError, match=r"decoder.moe.num_experts_per_tok: 2 against 1"):
        go_on("mixture", num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"can become a mixture where decoder.moe.has_bias = False, not True"):
        go_on("dense", has_bias=True, experts="loop")
    with pytest.raises(ValueError, match=r"where decoder.hidden_act = silu, not gelu_tanh: experts are SwiGLU"):
        init.check_upcycling(dataclasses.replace(config.model.decoder, hidden_act="gelu_tanh"), mixture_of(config))


def test_memory_that_holds_anything_is_filled_as_a_new_model():
    """Whatever a model has: biases, norms, experts, buffers."""
    moe = MoEConfig(num_experts=4, intermediate_size=16, num_shared_experts=1, balance="bias")
    wide = dict(qkv_bias=True, o_bias=True, qk_norm="head", tie_word_embeddings=False)
    for changes in ({}, wide, dict(moe=moe)):
        config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, **changes))
        model = empty_model(config, "cpu", torch.float32)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float("nan"))
        torch.manual_seed(3)
        init.draw(model)
        rng = torch.get_rng_state()
        torch.manual_seed(3)
        expected = VLM(config).state_dict()
        assert torch.equal(torch.get_rng_state(), rng)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    model.decoder.scale = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"vlm.py\) has no values for decoder.scale$"):
        init.draw(model)


def test_mistakes_are_named(hub, tmp_path):
    config = stage(1, hub, tmp_path)
    vision = dataclasses.replace(config.model.vision, patch_size=8)
    with pytest.raises(
        ValueError, match=r"siglip, which differs from the config: model.vision.patch_size: 4 against 8"
    ):
        init.start(dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision)), ())
    with pytest.raises(ValueError, match="image_token_id = 405, but <image> is token 400 of the tokenizer"):
        init.start(dataclasses.replace(config, model=dataclasses.replace(config.model, image_token_id=405)), ())
    with pytest.raises(ValueError, match=r"lm/config.json: model_type = 'llama' is no image encoder"):
        init.start(dataclasses.replace(config, init=InitConfig(vision=str(hub / "lm"))), ())
    blind = dataclasses.replace(config.model, vision=None, image_token_id=None)
    model, processor = init.start(
        dataclasses.replace(config, model=blind, init=InitConfig(decoder=str(hub / "lm"))), ()
    )
    save_model(tmp_path / "blind", model, processor)
    with pytest.raises(ValueError, match=r"encoder from .*/blind, which is a language model"):
        init.start(dataclasses.replace(config, init=InitConfig(vision=str(tmp_path / "blind"))), ())
    quantize(model, QuantizationConfig(format="int8"))
    save_model(tmp_path / "int8", model, processor)
    with pytest.raises(
        ValueError, match=r"cannot start from .*/int8, which is quantised, to int8: name the model that"
    ):
        init.start(dataclasses.replace(config, init=InitConfig(decoder=str(tmp_path / "int8"))), ())
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for part in (InitConfig(vision=str(tmp_path / "lora")), InitConfig(decoder=str(tmp_path / "lora"))):
        with pytest.raises(ValueError, match=r"lora is no model but an adapter \(LORA\): name its model and beside it"):
            init.start(dataclasses.replace(config, init=part), ())
    small = dataclasses.replace(config.model.decoder, vocab_size=399)
    small = dataclasses.replace(config.model, decoder=small, image_token_id=9)
    with pytest.raises(ValueError, match=r"has 400 tokens, more than decoder.vocab_size = 399"):
        init.start(dataclasses.replace(config, model=small), ())
    with pytest.raises(ValueError, match="there is no model folder"):
        init.start(stage(2, hub, tmp_path), ())
    with pytest.raises(ValueError, match=r"init.model = 'a' brings all parts: init.vision = 'b'"):
        dataclasses.replace(config, init=InitConfig(model="a", vision="b")).validate()


def test_the_presets_are_whole_and_their_layouts_exist():
    for name in STAGES:
        config = PRESETS[name]().validate()
        with torch.device("meta"):
            model = VLM(config.model)
        assert sum(p.numel() for p in model.parameters()) == 228_099_648  # the head is tied, as SmolLM2's is
        make_optimizers(model, config.optim)  # every rule holds for some parameter
