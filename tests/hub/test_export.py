"""What is exported is what transformers reads, and importing it again gives the same folder."""

import copy
import dataclasses
import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytest.importorskip("tyro")  # of benchmarks/export.py; a machine that is lent for minutes may lack it
import nanovlm
from benchmarks.export import ask_transformers
from nanovlm import cli
from nanovlm.config import DecoderConfig, FusionConfig, MoEConfig, ProjectorConfig, TilingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import TILING, marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, CONTINUATION_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.eval.run import answer
from nanovlm.eval.tasks import open_task
from nanovlm.hub import check, export, families
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.presets import PRESETS
from nanovlm.train import init
from tests.conftest import TINY, assert_ranks_fill_their_rows, noise
from tests.data.chat_templates import SMOLVLM

OWN = dataclasses.replace(
    TINY,
    tiling=TilingConfig("idefics3", longest_edge=64),
    decoder=dataclasses.replace(TINY.decoder, head_dim=16, rope_theta=5e3),
)
TEXT_ONLY = VLMConfig(vision=None, image_token_id=None, decoder=OWN.decoder)
TOKENIZER = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(OWN))
SIZES = [(16, 16), (100, 64), (40, 130), (300, 7), (1, 1)]


def randomize(model):
    """Give all parameters, biases and norms too, values that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
            parameter.add_(0.5 * noise.to(parameter.dtype))
    return model.eval()


def write_own(folder, config=OWN, tokenizer=TOKENIZER, template=CHAT_TEMPLATE):
    """Write a random model of ours; return it."""
    torch.manual_seed(0)
    model = randomize(VLM(config))
    save_model(folder, model, Processor(tokenizer, template, config))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of ours, its processor, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("own")
    write_own(folder / "model")
    export.export(folder / "model", folder / "hub")
    return *nanovlm.load(folder / "model"), folder / "hub"


# ---- models of transformers, imported and exported ----

TEXT = dict(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=2,
    bos_token_id=3,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=128)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama tied, llama3, biases": ("LlamaConfig", dict(attention_bias=True, head_dim=10, rope_parameters=LLAMA3)),
    "qwen2": ("Qwen2Config", dict(rope_parameters=YARN)),
    "qwen2 tied, own head_dim": ("Qwen2Config", dict(head_dim=16, num_key_value_heads=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=12, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "qwen3 tied, biases": ("Qwen3Config", dict(head_dim=32, attention_bias=True)),
    "smollm3": ("SmolLM3Config", dict(no_rope_layers=[1, 0, 0, 1])),
    "smollm3 tied, biases, yarn": (
        "SmolLM3Config",
        dict(attention_bias=True, rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)),
    ),
    "mixtral": ("MixtralConfig", dict(num_local_experts=3, router_jitter_noise=0.1)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    "qwen3_moe, some layers dense": (
        "Qwen3MoeConfig",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0, 2]),
    ),
    "qwen3_moe tied, normalised": (
        "Qwen3MoeConfig",
        dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, head_dim=16),
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=3, router_aux_loss_coef=0.02)),
}


def write_theirs(folder, name, sees, dtype):
    """Let transformers write a random checkpoint."""
    kind, options = FAMILIES[name]
    text = getattr(transformers, kind)(**TEXT | {"tie_word_embeddings": "tied" in name} | options)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, bos_token="<|system|>", eos_token="<end_of_utterance>", pad_token="<|pad|>"
    )
    if not sees:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(text, dtype=dtype)
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})
        transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM).save_pretrained(
            folder
        )
        architecture = kind.replace("Config", "ForCausalLM")
        vision = dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            layer_norm_eps=1e-5,
        )
        config = transformers.Idefics3Config(
            text_config=text.to_dict() | {"architectures": [architecture]},
            vision_config=vision,
            image_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=text.tie_word_embeddings,
        )
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    randomize(model).save_pretrained(folder)


def read_their_config(folder):
    """All fields as transformers reads them, but those that say where they were read, and by which version."""

    def keep(value):
        if not isinstance(value, dict):
            return value
        return {k: keep(v) for k, v in value.items() if k not in ("transformers_version", "_name_or_path")}

    return keep(transformers.AutoConfig.from_pretrained(folder).to_dict())


@pytest.mark.parametrize("sees", [False, True], ids=["text", "idefics3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(tmp_path, name, sees):
    dtype = torch.bfloat16 if name == "qwen3" else torch.float32
    x, y = tmp_path / "x", tmp_path / "y"
    write_theirs(x, name, sees, dtype)
    export.export(x, y)
    assert_ranks_fill_their_rows(find_model(y))
    config = read_their_config(x)
    assert config == read_their_config(y)
    written = json.loads((y / "config.json").read_text())
    text, rope = written.get("text_config", written), config.get("text_config", config)["rope_parameters"]
    older = {"rope_type": "default"} | (text["rope_scaling"] or {}) | {"rope_theta": text["rope_theta"]}
    assert text["rope_parameters"] == older == rope
    tensors, expected = load_file(y / "model.safetensors"), load_file(x / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key]), key
    stops = [transformers.GenerationConfig.from_pretrained(folder) for folder in (x, y)]
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(stops[0], field) == getattr(stops[1], field)
    theirs, again = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (x, y))
    assert theirs.get_vocab() == again.get_vocab() and theirs.all_special_ids == again.all_special_ids
    assert theirs.special_tokens_map == again.special_tokens_map
    part = {"type": "text", "text": "what color\n is it? <image> 42 日本"}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": [part]}]
    rendered, ids = [], []
    for tokenizer in (theirs, again):
        rendered.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids.append(tokenizer(rendered[-1])["input_ids"])
    assert rendered[0] == rendered[1] and ids[0] == ids[1] and len(ids[0]) > 10
    if sees:
        one, two = (transformers.AutoProcessor.from_pretrained(folder).image_processor.to_dict() for folder in (x, y))
        fields = (
            "size",
            "max_image_size",
            "image_mean",
            "image_std",
            "resample",
            "do_image_splitting",
            "rescale_factor",
        )
        assert {field: one[field] for field in fields} == {field: two[field] for field in fields}


@torch.inference_mode()
def test_a_mistral_becomes_a_llama(tmp_path, monkeypatch):
    """Which computes the same, as the model has no window."""
    monkeypatch.setitem(FAMILIES, "mistral", ("MistralConfig", dict(sliding_window=None, head_dim=16)))
    write_theirs(tmp_path / "x", "mistral", False, torch.float32)
    export.export(tmp_path / "x", tmp_path / "y")
    x, y = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in "xy")
    assert (x.config.model_type, y.config.model_type) == ("mistral", "llama")
    ids = torch.randint(4, 512, (1, 100))
    expected = x(input_ids=ids).logits
    assert (y(input_ids=ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_base_model_gets_no_chat_template(tmp_path):
    write_own(tmp_path / "model", TEXT_ONLY, template=CONTINUATION_TEMPLATE)
    export.export(tmp_path / "model", tmp_path / "hub")
    assert not (tmp_path / "hub" / "chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hub").chat_template is None
    assert nanovlm.load(tmp_path / "hub")[1].chat_template == CONTINUATION_TEMPLATE


# ---- models of ours, in transformers ----


@pytest.mark.parametrize("preset", ["scenes", "scenes_moe"])
def test_a_preset_answers_the_same_through_transformers(tmp_path, preset):
    """With random weights, whose answers are 48 tokens that go wrong at the smallest difference."""
    model, processor = init.start(PRESETS[preset](), sample_texts(Scenes("train"), 50))
    save_model(tmp_path / "model", randomize(model), processor)
    export.export(tmp_path / "model", tmp_path / "out")
    model, processor = nanovlm.load(tmp_path / "model")
    questions = list(open_task("scenes", 3).questions())
    ours = answer(model, processor, questions)
    images, texts = [question.images[0] for question in questions], [question.text for question in questions]
    assert ask_transformers(tmp_path / "out", images, texts) == ours
    assert len(set(ours)) > 10


def test_transformers_computes_the_same(exported):
    ours, processor, folder = exported
    theirs, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    their_processor = transformers.AutoProcessor.from_pretrained(folder)
    assert len(their_processor.tokenizer) == TOKENIZER.get_vocab_size()
    for i, (width, height) in enumerate(SIZES):
        image = noise(i, 300).resize((width, height))
        batch = processor([{"role": "user", "content": "what color is the circle?"}], [image])
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is the circle?"}]
        inputs = their_processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        assert torch.allclose(inputs["pixel_values"].flatten(0, 1), normalize(batch.pixel_values), rtol=0, atol=1e-6)
        with torch.no_grad():
            logits, expected = ours.logits(batch), theirs(**inputs).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        answer = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        mine = nanovlm.generate(ours, batch, max_new_tokens=32)[0]
        assert mine == answer.tolist()[: len(mine)] and len(mine) in (len(answer), len(answer) - 1)


def test_older_and_newer_readers_find_their_fields(exported):
    config = json.loads((exported[2] / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    settings = json.loads((exported[2] / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (exported[2] / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert json.loads((exported[2] / "processor_config.json").read_text())["image_seq_len"] == OWN.num_image_tokens


def test_dtype_and_shards(tmp_path, exported):
    export.export(exported[2], tmp_path / "out", dtype="bfloat16", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sorted(tensors) == sorted(name for name, at in index["weight_map"].items() if at == file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        total += size
    assert total == index["metadata"]["total_size"]
    expected = {name: tensor.bfloat16() for name, tensor in exported[0].state_dict().items()}
    again = nanovlm.load(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    theirs, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading.values()) and theirs.dtype == torch.bfloat16


def test_the_card_says_what_a_run_was(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_own(run / "model")
    (run / "config.json").write_text(
        json.dumps({"commit": "abc123", "seed": 7, "data": {"sources": ["scenes", "a.tar"]}})
    )
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1200, "tokens": 34567, "loss": 0.25}\n')
    scores = {"mean": 0.5, "kinds": {"color": {"accuracy": 0.75}, "digits": {"accuracy": 0.25}}}
    environment = {"device": "a processor", "precision": "bf16", "date": "2026-01-02"}
    results = {"train_seconds": 12.5, "environment": environment, "test": scores}
    (run / "eval.json").write_text(json.dumps(results))
    for source in (run, run / "model"):
        export.export(source, tmp_path / f"from_{source.name}")
        card = (tmp_path / f"from_{source.name}" / "README.md").read_text()
        for line in ("| data | scenes, a.tar |", "| steps | 1,200 |", "| tokens | 34,567 |", "| commit | abc123 |"):
            assert line in card
        assert "| loss of the last step | 0.2500 |" in card
        assert "| date | 2026-01-02 |" in card and "| test | 50.0 | 75.0 | 25.0 |" in card
        assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n")
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": null}\n')  # of a last step that was not finite
    export.export(run, tmp_path / "not_finite")
    card = (tmp_path / "not_finite" / "README.md").read_text()
    assert "| steps | 7 |" in card and "| loss of the last step" not in card


# ---- refusals ----


def other(**decoder):
    return dataclasses.replace(OWN, decoder=dataclasses.replace(OWN.decoder, **decoder))


def vision(**changes):
    return dataclasses.replace(OWN, vision=dataclasses.replace(OWN.vision, **changes))


REFUSED = {
    "tiling.policy = 'fit'": dataclasses.replace(OWN, tiling=TilingConfig("fit")),
    "fusion.type = 'cross_attention'": dataclasses.replace(OWN, fusion=FusionConfig("cross_attention")),
    "vision.image_size / vision.patch_size = 38": vision(image_size=38, patch_size=1),
    "no family of language models has decoder.qkv_bias = True, o_bias = False, qk_norm = head": other(
        qkv_bias=True, qk_norm="head"
    ),
    "qkv_bias = False, o_bias = True": other(o_bias=True),
    r"qk_norm = head and layers_without_rope = \(1,\)": other(qk_norm="head", layers_without_rope=(1,)),
    "num_attention_heads = 6 must divide decoder.hidden_size = 32": other(num_attention_heads=6),
    "qk_norm = all and layers_without_rope": other(qk_norm="all"),
    r"layers_without_rope = \(1,\) in a mixture": other(moe=MoEConfig(), layers_without_rope=(1,)),
    "o_bias = True, .* in a mixture": other(moe=MoEConfig(), qkv_bias=True, o_bias=True),
    "decoder.moe.scores = sigmoid cannot be exported: mixtral has softmax": other(moe=MoEConfig(scores="sigmoid")),
    "decoder.moe.norm_topk_prob = False cannot be exported: mixtral": other(moe=MoEConfig(norm_topk_prob=False)),
    "decoder.moe.balance = bias cannot be exported": other(moe=MoEConfig(balance="bias")),
    "decoder.moe.intermediate_size = 144 cannot be exported: olmoe": other(moe=MoEConfig(), qk_norm="all"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_no_layout_holds_is_refused(tmp_path, sentence):
    config = REFUSED[sentence]
    write_own(tmp_path / "model", config)
    with pytest.raises(ValueError, match=sentence):
        export.export(tmp_path / "model", tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# Another value of every field of decoders that no layout is written with.
OTHERWISE = {
    "rope_sections": (2, 3, 3),
    "hidden_act": "gelu_tanh",
    "sliding_window": 8,
    "attention_scale": 0.5,
    "attention_softcap": 30.0,
    "attention_sinks": True,
    "norm_offset": 1.0,
    "sandwich_norms": True,
    "embedding_scale": 8.0,
    "residual_scale": 0.5,
    "logit_scale": 0.5,
}


@pytest.mark.parametrize("field", families.NOT_WRITTEN)
def test_a_decoder_of_other_families_is_refused(field):
    text = dataclasses.replace(other(**{field: OTHERWISE[field]}), vision=None, image_token_id=None)
    with pytest.raises(UserError, match=rf"^decoder\.{field} = .* cannot be exported"):
        export.check_exportable(Processor(TOKENIZER, CHAT_TEMPLATE, text))


def test_every_field_of_a_decoder_is_written_or_refused():
    """A field that is in none of these sets is new, and would be lost in silence."""
    refused_otherwise = {"moe", "qkv_bias", "o_bias", "qk_norm", "layers_without_rope", "prefix_attention"}
    of_others = {"full_attention_layers", "window_rope_theta", "rope_interleaved"}  # for a window, and for sections
    changes_nothing = {"attention", "cross_entropy"}
    written = {*families.DECODER_FIELDS, "rope_theta", "rope_scaling"}
    known = [*families.NOT_WRITTEN, *refused_otherwise, *of_others, *changes_nothing, *written]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(DecoderConfig))
    with pytest.raises(UserError, match=r"decoder\.moe\.has_bias = True cannot be exported: mixtral has False"):
        families.find_family(other(moe=MoEConfig(has_bias=True, experts="loop")).decoder)


@pytest.mark.parametrize("policy", sorted(TILING.keys() - {"idefics3"}))
def test_other_tilings_are_refused(policy):
    projector = ProjectorConfig("mlp", has_newline=True) if policy == "anyres" else OWN.projector
    config = dataclasses.replace(OWN, tiling=TilingConfig(policy, longest_edge=64), projector=projector).validate()
    processor = Processor(train_tokenizer(["a b"], 400, marker_tokens(config)), CHAT_TEMPLATE, config)
    wrong = "projector.type = 'mlp'" if policy == "anyres" else f"tiling.policy = '{policy}'"
    with pytest.raises(UserError, match=f"^{wrong} cannot be exported"):
        export.check_exportable(processor)
    with pytest.raises(UserError, match=f"^tiling.policy = '{policy}' cannot be exported"):
        export.check_tiling(processor)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    older = train_tokenizer(["a b"], 400, marker_tokens(OWN)).to_str().replace("<end_of_utterance>", "<|end|>")
    from tokenizers import Tokenizer

    template = CHAT_TEMPLATE.replace("<end_of_utterance>", "<|end|>")
    write_own(tmp_path / "model", tokenizer=Tokenizer.from_str(older), template=template)
    with pytest.raises(ValueError, match="but lacks <end_of_utterance>"):
        export.export(tmp_path / "model", tmp_path / "hub")
    config = dataclasses.replace(OWN, image_token_id=3)
    write_own(tmp_path / "second", config, template=CHAT_TEMPLATE.replace("<image>", "<|system|>"))
    with pytest.raises(ValueError, match="but image_token_id = 3"):
        export.export(tmp_path / "second", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, exported):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine.txt").write_text("mine")
    for out in (tmp_path / "hub", tmp_path / "hub" / "mine.txt"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            export.export(exported[2], out)
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="shard_size = 0 must be above 0"):
        export.export(exported[2], tmp_path / "other", shard_bytes=0)
    (tmp_path / "empty").mkdir()
    export.export(exported[2], tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_killed_export_leaves_nothing_under_its_name(tmp_path, exported):
    script = (
        "import os, signal, sys\nfrom nanovlm.hub import export\nsave = export.save_file\n"
        "def save_and_die(*args):\n    save(*args)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.save_file = save_and_die\nexport.export(sys.argv[1], sys.argv[2], shard_bytes=20_000)\n"
    )
    command = [sys.executable, "-c", script, str(exported[2]), str(tmp_path / "hub")]
    assert subprocess.run(command, cwd=cli.PROJECT).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".hub.tmp"]
    export.export(exported[2], tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    assert len(nanovlm.load(tmp_path / "hub")[0].state_dict()) == len(exported[0].state_dict())


def test_a_tensor_without_a_name_is_refused(tmp_path, exported, monkeypatch):
    model, processor, _ = exported
    more = copy.deepcopy(model)
    more.adapter = torch.nn.Linear(2, 2, bias=False)
    monkeypatch.setattr(export, "load", lambda *_args, **_options: (more, processor))
    with pytest.raises(ValueError, match=r"the layout has no name for adapter.weight, which would be lost"):
        export.export(tmp_path / "own", tmp_path / "hub")
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path, exported, capsys):
    arguments = [str(exported[2]), str(tmp_path / "hub")]
    command = [sys.executable, "-m", "nanovlm.hub.export", *arguments]
    first = subprocess.run(command, cwd=cli.PROJECT, capture_output=True, text=True)
    assert (
        first.returncode == 0
        and first.stderr == ""
        and first.stdout.startswith(f"wrote {tmp_path / 'hub'}: an Idefics3")
    )
    assert (tmp_path / "hub" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: export.main(arguments))
    assert capsys.readouterr().err == f"error: {tmp_path / 'hub'} exists and is not an empty folder: name a new one\n"
    export.main([arguments[0], str(tmp_path / "second"), "--check", "--dtype", "float16", "--shard-size", "1e-5"])
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 3
    assert "tensors are equal bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onnx --dtype float16", "dtype = 'float16' is not for format = onnx"),
        ("--format onnx --shard-size 1", "shard_size = 1 is not for format = onnx"),
        ("--format gguf --shard-size 1", "shard_size = 1 is not for format = gguf"),
        ("--format gguf --graphs q4", r"graphs = \('q4',\) are those of format = onnx, not of gguf"),
        ("--graphs q4", r"graphs = \('q4',\) are those of format = onnx, not of hub"),
        ("--format onnx --graphs", r"graphs = \(\) must be one or more of fp32, q8, q4"),
        ("--shard-size nan", "shard_size = nan must be a number of GB above 0"),
        ("--shard-size inf", "shard_size = inf must be a number of GB above 0"),
        (
            "--push owner/na--me",
            "'owner/na--me' is no name of a repository on the hub: Cannot have -- or .. in repo_id",
        ),
        ("--format onnx --check", "check = True compares what format = hub writes, not onnx"),
    ],
)
def test_options_of_other_formats_are_refused(tmp_path, options, message):
    """Before the model is read, of which there is none here."""
    with pytest.raises(UserError, match=message):
        export.main([str(tmp_path / "none"), str(tmp_path / "out"), *options.split()])


# ---- check ----


def test_check_finds_what_was_changed(tmp_path, exported, capsys, monkeypatch):
    model = exported[0]
    export.export(exported[2], tmp_path / "hub")
    check.check(tmp_path / "hub", model)
    assert capsys.readouterr().out.count("equal tokens") == 3
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    check.check(tmp_path / "hub", model)
    assert "transformers is not installed" in capsys.readouterr().out
    monkeypatch.undo()

    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    with pytest.raises(ValueError, match=r"logits that differ from transformers' by at most .* of the largest"):
        ours, processor = nanovlm.load(tmp_path / "hub")
        (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
        check.compare_with_transformers(tmp_path / "hub", ours, processor)
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    tensors["model.text_model.norm.weight"][3] += 1e-6
    save_file(tensors, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"differs from the model in decoder.norm.weight"):
        check.check(tmp_path / "hub", model)


def test_traps_are_named():
    def traps(config=OWN, tokenizer=TOKENIZER, template=CHAT_TEMPLATE):
        return " ".join(check.find_traps(Processor(tokenizer, template, config)))

    good = other(head_dim=32)
    assert traps(good).count("llama.cpp") == 1 and "by a hash" in traps(good)
    assert "head_dim = 16" in traps()
    assert "the decoder is a smollm3" in traps(other(layers_without_rope=(0,)))
    assert "every picture one tile, which it shows twice" in traps(
        dataclasses.replace(good, tiling=TilingConfig("idefics3", longest_edge=16))
    )
    assert "beside the marker that llama.cpp sets" in traps(good, template=SMOLVLM)
    two_breaks = json.loads(TOKENIZER.to_str())
    two_breaks["model"]["merges"].remove(["Ċ", "Ċ"])
    two_breaks["added_tokens"] = [t for t in two_breaks["added_tokens"] if t["content"] != "<row_2_col_1>"]
    from tokenizers import Tokenizer

    text = traps(good, Tokenizer.from_str(json.dumps(two_breaks)))
    assert 'the token "\\n\\n"' in text and "no tokens for <row_2_col_1>:" in text
    assert "by a hash" not in traps(TEXT_ONLY, train_other_tokenizer())


def train_other_tokenizer():
    """A tokenizer whose special tokens are not those of ours, but with the same ids for padding and end."""
    tokenizer = train_tokenizer(["a b"], 400).to_str()
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.replace(SPECIAL_TOKENS[3], "<|other|>"))
