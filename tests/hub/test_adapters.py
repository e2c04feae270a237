"""PEFT reads the adapters that we write, and we read those that PEFT writes: equal logits, both ways."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nanovlm
from nanovlm.config import AdapterConfig, MoEConfig, QuantizationConfig
from nanovlm.errors import UserError
from nanovlm.hub import export
from nanovlm.hub.adapters import attach, name_base, open_adapter, save_adapter
from nanovlm.model.adapters import adapt, adapted_layers, adapter_tensors, is_adapter, learns, remove
from nanovlm.model.build import meta_model
from nanovlm.model.quantized import quantize
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.train.adapt import draw_adapter
from tests.conftest import noise
from tests.hub.test_export import OWN, TEXT_ONLY, write_own

LORA = AdapterConfig(rank=4, alpha=8)
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=TEXT_ONLY.decoder.intermediate_size)
pytestmark = pytest.mark.usefixtures("one_thread")


def with_decoder(config, **changes):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


def mixture(**changes):
    return with_decoder(TEXT_ONLY, head_dim=8, moe=dataclasses.replace(MOE, experts="loop"), **changes)


BASES = {
    "text": TEXT_ONLY,
    "untied": with_decoder(TEXT_ONLY, tie_word_embeddings=False),
    "vlm": OWN,
    "mixtral": mixture(),
    "qwen3_moe": mixture(qk_norm="head"),
    "qwen3_moe, a dense layer": with_decoder(
        TEXT_ONLY, head_dim=8, qk_norm="head", moe=dataclasses.replace(MOE, experts="loop", layers=(1,))
    ),
    "olmoe": mixture(qk_norm="all"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Random models of ours, exported; each is written when it is first asked for."""
    folder = tmp_path_factory.mktemp("bases")

    def find(name):
        if not (folder / name).exists():
            write_own(folder / f"{name}-own", BASES[name])
            export.export(folder / f"{name}-own", folder / name)
        return folder / name

    return find


def shake(tensors, seed=1):
    """Change tensors to what they might have learned: no matrix is zero, no magnitude that of the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in sorted(tensors.items()):
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            x.copy_(x * (1 + 0.2 * noise) if "magnitude" in name else x + 0.1 * noise)


def learned(model, config, name="default", seed=1):
    adapt(model, config, name)
    draw_adapter(model, name)
    beside = {key: x for key, x in model.named_parameters() if not is_adapter(key) and learns(key, config)}
    shake({**adapter_tensors(model, name), **beside}, seed)
    return model


def read_theirs(folder, config):
    kind = transformers.AutoModelForCausalLM if config.vision is None else transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model, processor, theirs=None):
    """Logits of a question, about a picture where the model sees; those of `theirs` if given."""
    sees = model.config.vision is not None
    batch = processor([{"role": "user", "content": "what color is the circle?"}], [noise(0, 64)] if sees else [])
    if theirs is None:
        return model.logits(batch)
    pixels = {"pixel_values": normalize(batch.pixel_values)[None]} if sees else {}
    return theirs(input_ids=batch.input_ids, **pixels).logits


def assert_near(ours, theirs, limit=1e-5):
    assert (ours - theirs).norm() <= limit * theirs.norm()


# --- ours, in peft --------------------------------------------------------------------------------------------

WRITTEN = {
    "LoRA": ("text", LORA),
    "rsLoRA": ("text", dataclasses.replace(LORA, use_rslora=True)),
    "DoRA": ("vlm", dataclasses.replace(LORA, use_dora=True, alpha=7.5)),
    "some layers": ("vlm", dataclasses.replace(LORA, target=r"vision\..*(q_proj|fc1)|decoder\.layers\.1.*down_proj")),
    "projector and norm": ("vlm", dataclasses.replace(LORA, train=(r"^projector\.", r"decoder\.norm"))),
    "position table": ("vlm", dataclasses.replace(LORA, train=(r"position_embedding", r"decoder\.norm"))),
    "tied embeddings": ("text", dataclasses.replace(LORA, train=(r"embed_tokens",))),
    "head": ("untied", dataclasses.replace(LORA, train=(r"lm_head",))),
    "mixtral": ("mixtral", LORA),
    "qwen3_moe": ("qwen3_moe", dataclasses.replace(LORA, use_rslora=True)),
    "qwen3_moe, a dense layer": (
        "qwen3_moe, a dense layer",
        dataclasses.replace(LORA, target=r"self_attn\..*_proj$"),
    ),
    "olmoe": ("olmoe", dataclasses.replace(LORA, target=r"layers.*mlp\.(gate|up|down)_proj$")),
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")  # about PEFT's own renaming
def test_peft_reads_ours(hub, tmp_path, case):
    base, config = WRITTEN[case]
    model, processor = nanovlm.load(hub(base))
    before = logits_of(model, processor)
    learned(model, config).adapters.base = str(hub(base))
    save_adapter(tmp_path / "adapter", model)
    expected = logits_of(model, processor)
    theirs = peft.PeftModel.from_pretrained(read_theirs(hub(base), model.config), tmp_path / "adapter").eval()
    assert_near(logits_of(model, processor, theirs), expected)
    assert (expected - before).norm() > 0.01 * before.norm()
    names = {name.partition(".lora_")[0] for name, _ in theirs.named_parameters() if ".lora_" in name}
    layers = [path for path, _ in adapted_layers(model)]
    assert len(names) == len(layers) + sum(path.endswith(".mlp") for path in layers)  # of a mixture two; and no others
    assert_near(logits_of(model, processor, theirs.merge_and_unload()), expected)
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["ensure_weight_tying"] is (case == "tied embeddings")  # so that they stay one where it learns on
    again = attach(nanovlm.load(hub(base))[0], tmp_path / "adapter")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


def test_an_adapter_of_a_dense_layer_among_mixtures_is_for_us(hub, tmp_path):
    """PEFT would silently leave a part of it out, so it is told that all is missing."""
    base = hub("qwen3_moe, a dense layer")
    model, processor = nanovlm.load(base)
    learned(model, LORA).adapters.base = str(base)
    save_adapter(tmp_path / "adapter", model)
    expected = logits_of(model, processor)
    assert_near(logits_of(attach(nanovlm.load(base)[0], tmp_path / "adapter"), processor), expected, 1e-6)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.decoder.layers.") for name in names)
    with pytest.warns(UserWarning, match=r"Found missing adapter keys .*layers\.1\.self_attn\.q_proj"):
        peft.PeftModel.from_pretrained(read_theirs(base, model.config), tmp_path / "adapter")


def test_peft_reads_a_reward_model(hub, tmp_path):
    base, processor = nanovlm.load(hub("text"))
    model = VLM(dataclasses.replace(base.config, has_score_head=True)).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    learned(model, LORA)
    save_adapter(tmp_path / "adapter", model)
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(hub("text"), num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    batch = processor([{"role": "user", "content": "what color is the circle?"}])
    with torch.no_grad():
        expected, score = model.score(model(batch))[:, -1], theirs(input_ids=batch.input_ids).logits
    assert_near(score, expected)
    assert expected.abs().min() > 1e-3
    again = VLM(model.config).eval()
    again.load_state_dict(base.state_dict(), strict=False)
    attach(again, tmp_path / "adapter")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    with pytest.raises(UserError, match=r"score\.weight is unknown"):
        attach(base, tmp_path / "adapter")


def test_the_base_has_its_name_on_the_hub(tmp_path):
    (tmp_path / "a@b").mkdir()
    for name, base, revision in (
        ("smolvlm-256m", "HuggingFaceTB/SmolVLM-256M-Instruct", None),
        ("owner/name@main", "owner/name", "main"),
        (str(tmp_path / "a@b"), str(tmp_path / "a@b"), None),
        ("", None, None),
    ):
        assert name_base(name) == {"base_model_name_or_path": base, "revision": revision}


def test_what_the_files_say(hub, tmp_path):
    config = dataclasses.replace(LORA, dropout=0.05, train=(r"^projector\.",), init="gaussian")
    model = learned(nanovlm.load(hub("vlm"))[0], config).bfloat16()
    model.adapters.base = "owner/name"
    save_adapter(tmp_path / "adapter", model)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["base_model_name_or_path"] == "owner/name" and data["lora_alpha"] == 8 and data["r"] == 4
    assert data["init_lora_weights"] == "gaussian" and data["lora_dropout"] == 0.05
    assert data["modules_to_save"] == ["model.connector.modality_projection.proj"]
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert theirs.r == 4 and theirs.task_type is None and theirs.target_modules == data["target_modules"]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


# --- peft's, in ours ------------------------------------------------------------------------------------------

READ = {
    "LoRA": ("text", dict(target_modules=["q_proj", "v_proj"])),
    "rsLoRA": ("text", dict(target_modules=r".*layers\.1\..*proj", use_rslora=True, lora_alpha=3)),
    "DoRA": ("vlm", dict(target_modules=r".*text_model.*(k|up|down)_proj", use_dora=True)),
    "all": ("vlm", dict(target_modules="all-linear", init_lora_weights="gaussian")),
    "projector": ("vlm", dict(target_modules=["q_proj"], modules_to_save=["connector", "text_model.norm"])),
    "head": ("untied", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "tied": ("text", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "attention of a mixture": ("mixtral", dict(target_modules=["q_proj", "o_proj"])),
}


@pytest.mark.parametrize("case", READ)
def test_we_read_peft(hub, tmp_path, case):
    base, options = READ[case]
    model, processor = nanovlm.load(hub(base))
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)
    theirs = peft.get_peft_model(read_theirs(hub(base), model.config), lora).eval()
    shake({name: x for name, x in theirs.named_parameters() if x.requires_grad})
    theirs.save_pretrained(tmp_path)
    expected = logits_of(model, processor, theirs)
    assert (expected - logits_of(model, processor)).norm() > 0.01 * expected.norm()
    assert_near(logits_of(attach(model, tmp_path), processor), expected)


def test_a_file_of_another_base_is_not_ours(hub, tmp_path):
    """Each mistake is one sentence, and leaves the model as it was."""
    model = learned(nanovlm.load(hub("text"))[0], dataclasses.replace(LORA, train=("decoder.norm",)))
    save_adapter(tmp_path / "good", model)
    remove(model, "default")
    assert not adapted_layers(model) and model.state_dict().keys() == nanovlm.load(hub("text"))[0].state_dict().keys()

    def refused(edit, match, base=model):
        data = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
        edit(data, tensors)
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(data))
        save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
        before = {key: x.clone() for key, x in base.state_dict().items()}
        with pytest.raises(UserError, match=match):
            attach(base, tmp_path / "bad")
        assert before.keys() == base.state_dict().keys() and not adapted_layers(base)
        assert all(torch.equal(x, before[key]) for key, x in base.state_dict().items())

    first = "base_model.model.model.layers.0.self_attn.q_proj"
    other = {**load_file(tmp_path / "good" / "adapter_model.safetensors")}
    for field, value in (
        *(("peft_type", "IA3"), ("bias", "lora_only"), ("fan_in_fan_out", True), ("lora_bias", True)),
        *(("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("layer_replication", [[0, 1], [0, 2]])),
        *(("target_parameters", ["experts.down_proj"]), ("trainable_token_indices", [1]), ("use_something_new", 1)),
    ):
        refused(
            lambda data, _, new=(field, value): data.update([new]), rf"adapter_config.json: {field} = .* is not supp"
        )
    refused(lambda data, _: data.update(init_lora_weights="pissa"), "init_lora_weights = 'pissa' changed the base too")
    refused(lambda data, _: data.update(r="4"), "adapter_config.json: .*rank")
    refused(
        lambda data, _: data.update(r=8), r"q_proj.lora_A.weight has shape \[4, 32\], the model with r = 8 says \[8"
    )
    refused(lambda _, x: x.update({f"{first}.lora_A.weight": torch.zeros(4, 48)}), r"has shape \[4, 48\], .* \[4, 32\]")
    refused(lambda _, x: x.pop(f"{first}.lora_B.weight"), rf"{first}.lora_B.weight is missing")
    refused(lambda _, x: x.update({"base_model.model.score.weight": torch.zeros(2)}), "score.weight is unknown")
    refused(lambda _, x: x.update({f"{first}.lora_C.weight": torch.zeros(2)}), "lora_C.weight is unknown")
    embedding = "base_model.model.model.embed_tokens"
    refused(
        lambda _, x: x.update({f"{embedding}.lora_embedding_A": torch.zeros(2)}), "embed_tokens, which is no linear"
    )
    whole = {f"{embedding}.weight": torch.zeros(512, 32)}
    refused(
        lambda _, x: x.update(whole), "embeddings or a head without the other, and the model has one tensor for bot"
    )
    whole |= {"base_model.model.lm_head.weight": torch.ones(512, 32)}
    refused(lambda _, x: x.update(whole), "embeddings or a head without the other")
    refused(lambda data, _: data.update(r=10**12), r"q_proj.lora_A.weight has shape \[4, 32\], the model with r = 1000")
    refused(lambda _, x: x.clear(), "has no tensors of an adapter")
    vlm = nanovlm.load(hub("vlm"))[0]
    refused(lambda *_: None, "which is no linear layer of the model", base=vlm)
    assert other.keys() == load_file(tmp_path / "good" / "adapter_model.safetensors").keys()
    attach(model, tmp_path / "good")  # the model takes the good one still


def test_what_is_no_adapter_is_named(hub, tmp_path):
    model = meta_model(OWN)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    for name, match in (
        ("nothing", "there is no model folder"),
        ("run", "is the folder of a run; its adapter is .*run/ad"),
    ):
        with pytest.raises(UserError, match=match):
            open_adapter(tmp_path / name, model)
    with pytest.raises(UserError, match=r"holds no adapter: it has no adapter_config\.json"):
        open_adapter(hub("text"), model)
    with pytest.raises(UserError, match=r"there is no .*adapter_model.safetensors"):
        open_adapter(tmp_path / "run" / "adapter", model)
    (tmp_path / "run" / "adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.bin, which could run any code when read"):
        open_adapter(tmp_path / "run" / "adapter", model)


# --- ours alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_without_a_hub_layout_has_our_names(tmp_path, use_dora):
    """A mixture with a shared expert; its experts' adapters are stacked, and may be DoRA, which PEFT has not."""
    config = with_decoder(OWN, moe=dataclasses.replace(MOE, experts="loop", num_shared_experts=1))
    torch.manual_seed(0)
    model = VLM(config).eval()
    plain = {key: x.clone() for key, x in model.state_dict().items()}
    learned(model, dataclasses.replace(LORA, use_dora=use_dora, train=(r"\.router\.",)))
    save_adapter(tmp_path / "adapter", model)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names["base_model.model.decoder.layers.0.mlp.gate_proj.lora_A.weight"].shape == (3, 4, 32)
    assert "base_model.model.decoder.layers.0.mlp.router.weight" in names
    again = VLM(config)
    again.load_state_dict(plain)
    attach(again, tmp_path / "adapter")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


def test_a_quantised_base_takes_the_same_files(hub, tmp_path):
    plain, processor = nanovlm.load(hub("vlm"))
    config = dataclasses.replace(LORA, use_dora=True)
    quantised = quantize(nanovlm.load(hub("vlm"))[0], QuantizationConfig("nf4"))
    expected = logits_of(learned(quantised, config), processor)
    save_adapter(tmp_path / "adapter", quantised)
    again = quantize(nanovlm.load(hub("vlm"))[0], QuantizationConfig("nf4"))
    assert torch.equal(logits_of(attach(again, tmp_path / "adapter"), processor), expected)
    assert_near(logits_of(attach(plain, tmp_path / "adapter"), processor), expected, 0.5)


def test_an_adapter_is_opened_for_a_model_without_memory(hub, tmp_path):
    model = learned(nanovlm.load(hub("vlm"))[0], dataclasses.replace(LORA, target=r"layers\.1\..*(q|down)_proj"))
    save_adapter(tmp_path / "adapter", model)
    stored = open_adapter(tmp_path / "adapter", meta_model(model.config))
    expected = {path for path, _ in adapted_layers(model)}
    assert {path for path, _ in adapted_layers(adapt(meta_model(model.config), stored.config))} == expected
    assert stored.beside == [] and stored.base == ""
