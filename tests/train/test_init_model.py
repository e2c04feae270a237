"""Runs that start from a whole model by --init.model: its config is the run's, and what else is given changes it."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer

import nanovlm
import train
from nanovlm.command_line import parse_train
from nanovlm.config import InitConfig, MoEConfig, QuantizationConfig, TilingConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.records import options_of, to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import gguf
from nanovlm.hub.model_folder import load_folder, save_model
from nanovlm.hub.read import find_model
from nanovlm.hub.stored import fill_decoder
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from nanovlm.presets import PRESETS
from nanovlm.train import init
from nanovlm.train.resume import read_config
from tests.conftest import TINY, noise
from tests.hub.test_layouts import LONGEST, SIDE, make_vlm_folder
from tests.test_train import comparable, metrics

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "red green blue round square near far up down left right".split()


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """A tiny model as SmolVLM is published: pictures of 17 tiles with 4 tokens each, 3 rows that no token uses."""
    folder = tmp_path_factory.mktemp("hub") / "smolvlm"
    make_vlm_folder(folder, family="smolvlm")
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for number in range(24):
        noise(number, 40).save(folder / f"{number}.png")
    pairs = [{"user": "what is it?", "assistant": " ".join(WORDS[i % 11] for i in (n, n + 3))} for n in range(24)]
    lines = [json.dumps({"images": [f"{n}.png"], "texts": [pair]}) for n, pair in enumerate(pairs)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder / "mine.jsonl"


def command(start, run_dir, records, *options, preset="small"):
    settings = "--threads 1 --device cpu --precision fp32 --optim.steps 4 --data.pack-buffer 4 --eval.every 0"
    places = ["--init.model", str(start), "--run-dir", str(run_dir), "--data.sources", str(records)]
    return [preset, *places, *settings.split(), *options]


def test_a_published_model_is_tuned_by_its_name_alone(smolvlm, records, tmp_path):
    """The run's model is that of the folder, with what is set besides; data and optimizer are those of the preset."""
    options = ["--model.decoder.max-position-embeddings", "1024", "--model.tiling.longest-edge", "64"]
    config = parse_train(command(smolvlm, tmp_path / "run", records, *options)).validate()
    theirs = find_model(smolvlm).config
    assert theirs.tiling.longest_edge == LONGEST and theirs.decoder.max_position_embeddings == 2048
    tiling = dataclasses.replace(theirs.tiling, longest_edge=64)
    decoder = dataclasses.replace(theirs.decoder, max_position_embeddings=1024)
    assert config.model == dataclasses.replace(theirs, tiling=tiling, decoder=decoder)
    small = PRESETS["small"]()
    assert config.data.row_length == small.data.row_length and config.optim.rules == small.optim.rules
    torch.manual_seed(config.seed)
    before = init.start(config, ())[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in nanovlm.load(smolvlm)[0].state_dict().items())
    train.main(config)
    assert read_config(tmp_path / "run").model == config.model
    model, processor = load_folder(tmp_path / "run" / "model")
    assert model.config == config.model and processor.chat_template == find_model(smolvlm).processor.chat_template
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "proj" in name)
    # No gradient and no decay of weights reaches the embeddings of rows that no token uses.
    name, used = "decoder.embed_tokens.weight", processor.token_ids()
    unused = sorted({*range(theirs.decoder.vocab_size)}.difference(used))
    assert len(unused) == 3 and torch.equal(model.state_dict()[name][unused], before[name][unused])


def test_the_same_command_goes_on_where_the_model_is_gone(smolvlm, records, tmp_path, monkeypatch):
    """Bit for bit as without a stop; the run keeps the model of its own config.json."""
    options = ["--checkpoint-every", "1", "--model.decoder.attention", "flex"]
    train.main(parse_train(command(smolvlm, tmp_path / "unbroken", records, *options[:2])))
    start = shutil.copytree(smolvlm, tmp_path / "start")
    step = train.train_step

    def fail(state, *args):
        if state.step == 2:
            raise ZeroDivisionError
        return step(state, *args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "train_step", fail)
        train.main(parse_train(command(start, tmp_path / "run", records, *options[:2])))
    shutil.rmtree(start)
    again = command(start, tmp_path / "run", records, *options[:2])
    with pytest.raises(ValueError, match=r"another config \(model.decoder.attention: 'sdpa' against 'flex'"):
        train.main(parse_train([*again, *options[2:]]))
    with pytest.raises(ValueError, match=r"config \(model.decoder.moe: None against MoEConfig\(num_experts=4"):
        train.main(parse_train([*again, "--model.decoder.moe.num-experts", "4"]))
    assert parse_train(again).model == parse_train(["--run-dir", str(tmp_path / "run")]).model
    train.main(parse_train(again))
    assert comparable(metrics(tmp_path / "run")) == comparable(metrics(tmp_path / "unbroken"))
    with pytest.raises(ValueError, match=r"there is no model folder .*start"):
        parse_train(command(start, tmp_path / "new", records))


@pytest.mark.parametrize("preset", [name for name, make in PRESETS.items() if make().dual is None])
def test_every_preset_takes_another_model(smolvlm, records, tmp_path, preset):
    """Those that name other models too; a mixture of the preset stays, made of the dense layers."""
    config = command(smolvlm, tmp_path / "run", records, "--data.row-length", "2048", preset=preset)
    config = parse_train(config).validate()
    assert (config.init.vision, config.init.decoder) == ("", "")
    theirs = find_model(smolvlm).config
    if (moe := PRESETS[preset]().model.decoder.moe) is not None:
        moe = dataclasses.replace(moe, intermediate_size=theirs.decoder.intermediate_size)
        theirs = dataclasses.replace(theirs, decoder=dataclasses.replace(theirs.decoder, moe=moe))
    assert config.model == theirs


# The columns of the data sets of the presets, as their pages on the hub list them.
PUBLISHED = {
    "smolvlm_sft": {
        "questionId": 337,
        "question": "what is the date?",
        "question_types": ["handwritten"],
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93", "January 8"],
    },
    "captions_qlora": {"image_id": "ROCOv2_2023_train_054311", "caption": "a chest", "cui": ["C1306645"]},
}


@pytest.mark.parametrize(("preset", "answer"), [("smolvlm_sft", "1/8/93"), ("captions_qlora", "a chest")])
def test_the_recipes_that_tune_a_published_model(smolvlm, records, tmp_path, preset, answer):
    """Their data sets are read, the first of several answers as what is trained; they run on other data and models."""
    config = PRESETS[preset]().validate()
    assert config.adapter.rank and config.data.sources[0].startswith("hub:")
    picture = {"bytes": (records.parent / "0.png").read_bytes(), "path": None}
    sample = to_sample(PUBLISHED[preset] | {"image": picture}, **options_of(config.data))
    assert len(sample.images) == 1 and sample.messages[-1]["content"] == answer
    options = ["--optim.steps", "2", "--optim.warmup-steps", "0", "--optim.micro-batches", "1", "--eval.every", "1"]
    options += ["--data.num-epochs", "0", "--adapter.base", "int8"]  # as 48 weights a row are no group of nf4
    result = train.main(parse_train(command(smolvlm, tmp_path / "run", records, *options, preset=preset)))
    assert result["best"]["step"] in (1, 2) and len(metrics(tmp_path / "run")) == 2


def test_a_language_model_is_tuned_on_texts(tmp_path, monkeypatch):
    """`smollm2` is the file of a package; here it is a tiny one."""
    pytest.importorskip("gguf")
    from tests.hub.test_gguf import DECODER, make_model, write

    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS[n:])}) for n in range(9)))
    theirs = make_model()
    write(tmp_path / "tiny.gguf", theirs, train_tokenizer(sample_texts(Scenes("train"), 50), DECODER.vocab_size))
    monkeypatch.setattr(gguf, "find_smollm2", lambda: tmp_path / "tiny.gguf")
    for name in ("smollm2", str(tmp_path / "tiny.gguf")):
        config = parse_train(command(name, tmp_path / "run", tmp_path / "texts.jsonl", "--data.row-length", "128"))
        assert config.validate().model == dataclasses.replace(theirs.config, decoder=DECODER)
        for key, tensor in init.start(config, ())[0].state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[key]), key
    train.main(config)
    with pytest.raises(ValueError, match=r"'smollm2' is a language model, without an image encoder for --model.vi"):
        parse_train(["small", "--init.model", "smollm2", "--model.vision.hidden_size", "64"])
    with pytest.raises(ValueError, match=r"row_length = 1024 is above model.decoder.max_position_embeddings = 128"):
        parse_train(command("smollm2", tmp_path / "run", "texts.jsonl")).validate()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of ours, dense, and a mixture that was made of it."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), TINY.decoder.vocab_size)
    processor = Processor(tokenizer, "{{ messages[0].content }}", TINY)
    torch.manual_seed(0)
    save_model(folder / "dense", VLM(TINY), processor)
    moe = MoEConfig(num_experts=4, intermediate_size=TINY.decoder.intermediate_size)
    mixture = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))
    save_model(folder / "mixture", VLM(mixture), processor)
    return folder


@pytest.mark.parametrize(
    ("preset", "options", "num_experts"), [("scenes_moe", [], 8), ("scenes", ["--model.decoder.moe.num-experts=3"], 3)]
)
def test_a_dense_model_becomes_a_mixture(own, tmp_path, preset, options, num_experts):
    """By the preset's own mixture or by an option: its experts are copies, of the width of the dense layer."""
    config = parse_train([preset, "--init.model", str(own / "dense"), *options]).validate()
    moe = config.model.decoder.moe
    assert moe is not None and (moe.num_experts, moe.intermediate_size) == (num_experts, 64)
    layer = init.start(config, ())[0].decoder.layers[1].mlp
    matrix = load_folder(own / "dense")[0].decoder.layers[1].mlp.up_proj.weight
    assert len(layer.up_proj) == num_experts and all(torch.equal(expert, matrix) for expert in layer.up_proj)
    wide = [preset, "--init.model", str(own / "dense"), *options, "--model.decoder.moe.intermediate_size", "32"]
    with pytest.raises(ValueError, match=r"a mixture where decoder.moe.intermediate_size = 64, not 32"):
        init.start(parse_train(wide).validate(), ())


def test_a_mixture_keeps_what_it_is(own):
    """Whatever the preset's is; how it is trained may change."""
    start = ["--init.model", str(own / "mixture"), "--model.decoder.moe.balance-weight", "0.5"]
    for preset in ("scenes", "scenes_moe"):
        config = parse_train([preset, *start, "--model.decoder.moe.experts", "loop"]).validate()
        moe = config.model.decoder.moe
        assert moe == MoEConfig(num_experts=4, intermediate_size=64, balance_weight=0.5, experts="loop")
        init.start(config, ())
    with pytest.raises(ValueError, match=r"model.decoder.moe.num_experts_per_tok: 2 against 1"):
        init.start(parse_train(["scenes", *start, "--model.decoder.moe.num-experts-per-tok", "1"]), ())


def test_how_a_video_is_written_may_differ(own):
    config = parse_train(["scenes", "--init.model", str(own / "dense"), "--model.video-prompt", "times"]).validate()
    _model, processor = init.start(config, ())
    assert processor.config.video_prompt == "times"


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--model.decoder.rope-theta 5e5", "model.decoder.rope_theta: 10000.0 against 500000.0"),
        ("--model.vision.patch-size 16", "model.vision.patch_size: 8 against 16"),
        ("--model.tiling.policy square", "model.tiling.policy: 'idefics3' against 'square'"),
        ("--model.projector.scale-factor 1", "model.projector.scale_factor: 2 against 1"),
        ("--model.vision None", r"model.vision: VisionConfig\(.*\) against None; model.image_token_id: 3 against None"),
    ],
)
def test_a_contradiction_is_named_with_both_values(smolvlm, records, tmp_path, option, values):
    config = parse_train(command(smolvlm, tmp_path / "run", records, *option.split())).validate()
    with pytest.raises(
        ValueError, match=f"^the run cannot start from {smolvlm}, which differs from the config: {values}$"
    ):
        train.main(config)


def test_other_mistakes_are_named(smolvlm, own, records, tmp_path):
    with pytest.raises(ValueError, match=r"there is no model folder nowhere"):
        parse_train(["small", "--init.model", "nowhere"])
    with pytest.raises(ValueError, match=r"there is no model folder runs/smolvlm_256m_stage1/model"):
        parse_train(["smolvlm_256m_stage2"])
    model, processor = load_folder(own / "dense")
    quantize(model, QuantizationConfig(format="int8"))
    save_model(tmp_path / "int8", model, processor)
    with pytest.raises(ValueError, match=r"model.quantization = .*format='int8', .* must be None"):
        parse_train(command(tmp_path / "int8", tmp_path / "run", records)).validate()
    with pytest.raises(ValueError, match=r"brings all parts: init.vision = 'b'"):
        parse_train(command(smolvlm, tmp_path / "run", records, "--init.vision", "b")).validate()


def test_rows_without_room_for_a_picture_are_named(smolvlm, records, tmp_path):
    """SmolVLM makes every picture large: its 17 tiles are named, and each of the three ways out is one."""
    skip = ["--data.too-long", "skip"]

    def begin(*options):
        return init.start(parse_train(command(smolvlm, tmp_path / "run", records, *skip, *options)).validate(), ())

    with pytest.raises(ValueError, match=r"data.row_length = 99 has no room for a square picture, which .* cuts") as e:
        begin("--data.row-length", "99")
    tokens, least = re.search(
        r"into 17 tiles, (\d+) tokens in all: set it to at least (\d+), model.ti", str(e.value)
    ).groups()
    processor = find_model(smolvlm).processor
    assert processor.num_image_tokens(SIDE, SIDE) == int(tokens) == int(least) - 1 > 99
    with pytest.raises(ValueError, match=r"data.max_tiles = 16 has no room .* tokens in all: set it to at least 17"):
        begin("--data.max-tiles", "16")
    begin("--data.max-tiles", "17", "--data.row-length", least)
    begin("--data.row-length", "99", "--model.tiling.longest-edge", "64")
    begin("--data.row-length", "99", "--data.too-long", "shrink")


def test_help_tells_where_the_model_is_from(capsys):
    with pytest.raises(SystemExit):
        parse_train(["smolvlm_256m_stage2", "--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "--model.tiling.max-tiles" in line)
    assert line.split()[:3] == ["--model.tiling.max-tiles", "(as", "init.model)"]


# --- rows of a table that no token uses -------------------------------------------------------------------------


def test_a_new_token_in_a_row_that_no_token_used_begins_near_the_mean_of_the_used(smolvlm):
    """As in Qwen's files, whose tables have more rows than their tokenizers have tokens."""
    stored = find_model(smolvlm)
    used, size = stored.processor.token_ids(), stored.config.decoder.vocab_size
    assert used == list(range(size - 3))
    decoder = dataclasses.replace(stored.config.decoder, vocab_size=size + 2)
    model = VLM(dataclasses.replace(stored.config, decoder=decoder))
    theirs = nanovlm.load(smolvlm)[0].state_dict()
    fill_decoder(model.state_dict(), stored, [*used, size - 3, size - 1, size])
    for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
        rows, old = model.state_dict()[name], theirs[name]
        kept, new = [*used, size - 2], [size - 3, size - 1, size, size + 1]
        assert torch.equal(rows[kept], old[kept])
        mean, deviation = old[used].mean(0), old[used].std(0)
        assert ((rows[new] - mean).abs() < 0.05 * deviation).all() and len(rows[new].unique(dim=0)) == 4
        assert 0.005 < ((rows[new] - mean) / deviation).std() < 0.015


def test_markers_of_images_take_rows_that_no_token_used(tmp_path):
    """Of a language model with more rows than tokens; those that stay unused stay as they are."""
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 450).to_str().replace('"<image>"', '"<|unused|>"')
    blind = dataclasses.replace(TINY, vision=None, image_token_id=None)
    model, processor = VLM(blind), Processor(Tokenizer.from_str(tokenizer), CHAT_TEMPLATE, blind)
    num = len(processor.token_ids())
    with torch.no_grad():
        model.decoder.embed_tokens.weight[num:] = 100
    save_model(tmp_path / "lm", model, processor)
    seeing = dataclasses.replace(TINY, tiling=TilingConfig(policy="idefics3", longest_edge=32), image_token_id=num)
    config = TrainConfig(model=seeing, init=InitConfig(decoder=str(tmp_path / "lm")))
    started, processor = init.start(config, ())
    end = num + len(["<image>", *marker_tokens(seeing)])
    assert processor.token_ids() == [*range(end)] and num + 6 < end < 512
    rows, old = (each.decoder.embed_tokens.weight for each in (started, model))
    assert torch.equal(rows[:num], old[:num]) and torch.equal(rows[end:], old[end:])
    assert ((rows[num:end] - old[:num].mean(0)).abs() < 0.05 * old[:num].std(0)).all()
