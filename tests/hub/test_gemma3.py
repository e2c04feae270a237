"""Gemma-3 as transformers writes it and as it was published: tokens, pixels, logits and greedy answers are equal."""

import json
import re

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import nanovlm
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.hub.export import check_exportable
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.hub.test_layouts import edit
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

TOWER = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8, intermediate_size=40
)
# One block of four sees all.
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=24,
    max_position_embeddings=512,
    sliding_window=20,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    },
)
IMAGE, BEGIN, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", BEGIN, END, IMAGE]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["what is it? a cat", "user\nmodel\n\n"] * 9, 280)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make(folder, tokenizer, **text):
    """Write a random model, its tokenizer and its image settings as transformers does; return the model."""
    pad, eos, bos, _, end, begin, finish, image = (tokenizer.token_to_id(token) for token in SPECIAL)
    ids = {"pad_token_id": pad, "eos_token_id": [eos, end], "bos_token_id": bos}
    torch.manual_seed(0)
    config = hub.Gemma3Config(
        vision_config=hub.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hub.Gemma3TextConfig(**TEXT | ids | text, vocab_size=tokenizer.get_vocab_size() + 5),
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=finish,
        **ids,
    )
    model = hub.Gemma3ForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.generation_config.eos_token_id = [eos, end]
    model.save_pretrained(folder)
    extra = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
    theirs = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", extra_special_tokens=extra
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hub.Gemma3Processor(images, theirs, chat_template=TEMPLATE, image_seq_length=4)
    processor.save_pretrained(folder)
    return model, processor


def ask(num_images):
    parts = [{"type": "image"} for _ in range(num_images)]
    parts.insert(num_images // 2, {"type": "text", "text": "what is\nthe cat?"})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "a cat, a cat, a cat"}]}]


@pytest.mark.parametrize("window", [20, 3], ids=["wider than a picture", "narrower"])
@torch.inference_mode()
def test_pictures_and_text_are_answered_as_by_transformers(window, tmp_path, tokenizer):
    theirs, processor = make(tmp_path, tokenizer, sliding_window=window)
    ours, own = nanovlm.load(tmp_path)
    decoder = ours.config.decoder
    assert decoder.windows == (window, window, 0, window) and ours.config.num_image_tokens == 4
    documents, told = [], []
    for shown in (0, 1, 3):
        images = [noise(i, 64).resize((40 + 9 * i, 60)) for i in range(shown)]
        text = processor.apply_chat_template(ask(shown), add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt")
        documents.append(document := own.prompt(ask(shown), images))
        batch = own.batch([document])
        assert batch.input_ids.tolist() == inputs["input_ids"].tolist()
        if shown:
            assert (normalize(batch.pixel_values) - inputs["pixel_values"]).abs().max() <= 1e-6
        logits = theirs(**inputs).logits
        assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert logits.std() > 0.1
        never = [ours.config.pad_token_id, ours.config.image_token_id]
        found = theirs.generate(**inputs, do_sample=False, max_new_tokens=32, suppress_tokens=never)
        found = found[0, inputs["input_ids"].shape[1] :].tolist()
        ends = [i for i, token in enumerate(found) if token in (ours.config.eos_token_id, *ours.config.stop_token_ids)]
        told.append(found[: ends[0]] if ends else found)
    assert nanovlm.generate(ours, own.batch(documents), max_new_tokens=32) == told


NAMES = (
    (r"(model\.)?language_model\.(model\.)?(?!lm_head)", "language_model.model."),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
)
KEPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@torch.inference_mode()
def test_published_names_and_older_configs_are_read(tmp_path, tokenizer):
    kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    make(tmp_path, tokenizer, num_hidden_layers=7, layer_types=kinds, query_pre_attn_scalar=256)
    first = nanovlm.load(tmp_path)[0]
    tensors = load_file(tmp_path / "model.safetensors")
    for pattern, published in NAMES:
        tensors = {re.sub(f"^{pattern}", published, name): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def change(data):
        text, kept = data["text_config"], ("vocab_size", "head_dim", "sliding_window", "max_position_embeddings")
        data["text_config"] = {name: text[name] for name in (*KEPT, *kept)} | {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_local_base_freq": 5000,
        }

    edit(tmp_path / "config.json", change)
    second = nanovlm.load(tmp_path)[0]
    assert second.config == first.config and second.config.decoder.full_attention_layers == (5,)
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_each_rank_reads_its_rows(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    assert_ranks_fill_their_rows(find_model(tmp_path))


def test_what_we_do_not_compute_is_refused(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    original = json.loads((tmp_path / "config.json").read_text())
    near = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    for part, changes, message in (
        (None, {"mm_tokens_per_image": 5}, "mm_tokens_per_image = 5 must be the square"),
        (None, {"text_config": "x"}, "text_config and vision_config must be JSON objects"),
        ("vision_config", {"model_type": "clip_vision_model"}, "model_type = 'clip_vision_model' is not supported"),
        ("text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ("text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("text_config", {"rope_parameters": near}, "must have rope_type 'default'"),
        ("text_config", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 must be a number above 0"),
        ("text_config", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern = 0 must be"),
        ("text_config", {"layer_types": ["chunked_attention"] * 4}, "must say full_attention or sliding_attention"),
        ("text_config", {"sliding_window": -1}, "sliding_window = -1 must be null or a number from 1 on"),
    ):
        data = json.loads(json.dumps(original))
        (data[part] if part else data).update(changes)
        (tmp_path / "config.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(ValueError, match="cannot be exported"):
        check_exportable(nanovlm.load(tmp_path)[1])
    edit(tmp_path / "processor_config.json", lambda data: data["image_processor"].update(do_pan_and_scan=True))
    with pytest.raises(ValueError, match="do_pan_and_scan = True is not supported"):
        find_model(tmp_path)
