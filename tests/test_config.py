"""A config is believed only as far as any model goes: what a damaged one says takes no memory and no time."""

import dataclasses
import json

import pytest

import nanovlm
from nanovlm.command_line import parse_train
from nanovlm.config import TilingConfig, TrainConfig, VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.objectives import METHODS, OBJECTIVES, find_objective
from tests.conftest import TINY, make_document


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decoder": {"num_hidden_layers": 10**9}}, "decoder.num_hidden_layers = 1000000000 must be at most 1024"),
        ({"decoder": {"hidden_size": 2**40}}, "decoder.hidden_size = 1099511627776 must be at most 16777216"),
        ({"decoder": {"moe": {"num_experts": 10**6}}}, "decoder.moe.num_experts = 1000000 must be at most 4096"),
        ({"vision": {"image_size": 10**6}}, "vision.image_size = 1000000 must be at most 16384"),
        ({"tiling": {"max_tiles": 10**8}}, "tiling.max_tiles = 100000000 must be at most 1024"),
        (
            {"tiling": {"policy": "idefics3", "longest_edge": 4096}, "vision": {"image_size": 16, "patch_size": 4}},
            "tiling.longest_edge = 4096 is more than 128 tiles of vision.image_size = 16",
        ),
        ({"decoder": {"rope_theta": float("nan")}}, "decoder.rope_theta = nan must be a finite number"),
        ({"decoder": {"rms_norm_eps": float("inf")}}, "decoder.rms_norm_eps = inf must be a finite number"),
        ({"decoder": {"rope_theta": -1.0}}, "decoder.rope_theta = -1.0 must be positive"),
        ({"vision": {"layer_norm_eps": 0}}, "vision.layer_norm_eps = 0.0 must be positive"),
        ({"projector": {"norm_eps": -1}}, "projector.norm_eps = -1.0 must be positive"),
        ({"decoder": {"rope_theta": 10**400}}, "decoder.rope_theta must be float, got 1000000"),
    ],
)
def test_numbers_beyond_any_model_are_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        from_dict(VLMConfig, json.loads(json.dumps(changes))).validate()
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"decoder": {"hidden_act": "gelu_tanh", "moe": {}}},
            "decoder.hidden_act = gelu_tanh must be silu for a mixture of experts, which is SwiGLU",
        ),
        (
            {"decoder": {"moe": {"swiglu_limit": 5}}},
            "decoder.moe.swiglu_limit = 5.0 is for decoder.moe.has_bias, which",
        ),
        (
            {"decoder": {"rope_interleaved": True}},
            "decoder.rope_interleaved = True is for decoder.rope_sections, which",
        ),
        ({"vision": {"norm": "none"}}, "vision.norm = none must be layer or rms: the blocks have norms"),
        (
            {"vision": {"full_attention_layers": [1, 1], "window_size": 16}},
            "vision.full_attention_layers = (1, 1) must be indices of the vision.num_hidden_layers = 4 blocks, each",
        ),
        ({"vision": {"full_attention_layers": [4], "window_size": 16}}, "vision.full_attention_layers = (4,) must be"),
        ({"vision": {"full_attention_layers": [0]}}, "vision.full_attention_layers = (0,) is for vision.window_size"),
        ({"vision": {"second": {"window_size": 16}}}, "vision.second.window_size = 16 must be 0: it is for native"),
        ({"vision": {"second": {"stretch": "corners"}}}, "vision.second.stretch = corners must be centres: it is for"),
        (
            {"vision": {"stretch": "corners"}},
            "vision.stretch = corners needs pictures that are read whole, but tiling.pol",
        ),
        (
            {"projector": {"type": "mlp", "bias": True}},
            "projector.bias = True must be False for projector.type = mlp: it is for linear",
        ),
        (
            {"projector": {"norm": "rms"}},
            "projector.norm = rms must be none for projector.type = linear: it is for mlp and merger",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        from_dict(VLMConfig, json.loads(json.dumps(changes))).validate()
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 10**23}, r"seed = 1\d* must be below 2\*\*63"),
        ({"run_dir": " "}, "run_dir is empty: name a folder"),
        ({"optim": {"lr": float("inf")}}, "optim.lr = inf must be a finite number"),
        ({"optim": {"betas": [0.9, float("nan")]}}, "optim.betas = nan must be a finite number"),
        ({"optim": {"moments": "bf16"}}, "optim.moments = bf16 needs optim.betas of at most 0.98, not 0.99"),
        (
            {"optim": {"rules": [{"pattern": "", "lr_scale": float("nan")}]}},
            "optim.rules.lr_scale = nan must be a finite",
        ),
        (
            {"objective": "reward", "model": {"has_score_head": True}, "preference": {"beta": 0.5}},
            "preference.beta is given, but objective = reward does not read it: it is one of objective = preference or "
            "online_preference",
        ),
        ({"group": {"num_generations": 2}}, "group.num_generations is given, but objective = next_token does not read"),
        ({"objective": "group", "ppo": {"lam": 0.5}}, "ppo.lam is given, but .* it is one of objective = ppo$"),
        (
            {"objective": "preference", "preference": {"reference": "records"}, "data": {"too_long": "shrink"}},
            "data.too_long = shrink must be skip: the log-probabilities of preference.reference = records",
        ),
        (
            {"objective": "distill", "group": {"num_questions": 2}},
            "the settings of group .* only with distill.on_policy",
        ),
        ({"objective": "ppo", "distill": {"beta": 0.2}}, "distill.beta is given, but objective = ppo does not read it"),
    ],
)
def test_mistakes_in_the_config_of_a_run(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_dict(TrainConfig, changes).validate()


def test_the_name_of_a_method_says_by_which_objective_it_is_chosen():
    """As the command line does, whose flags these are."""
    for name, chosen in METHODS.items():
        with pytest.raises(ValueError, match=f"objective = '{name}' is unknown; that method is --objective {chosen}$"):
            find_objective(name)
        preset = "scenes_siglip" if chosen.startswith("contrastive") else "scenes"
        more = {"reward": ["--model.has-score-head"], "clip": ["--dual.initial-bias", "None"]}
        argv = [preset, "--objective", *chosen.split(), *more.get(name if name in more else chosen, [])]
        assert parse_train(argv, "").validate().objective in OBJECTIVES
    with pytest.raises(ValueError, match=r"objective = 'gropu' is unknown; there are next_token, .*masked$"):
        find_objective("gropu")


@pytest.mark.parametrize(
    "objective", [name for name in OBJECTIVES if name != "contrastive"]
)  # a dual model has no adapters
def test_dropout_is_no_part_of_what_log_probabilities_are_compared_with(objective):
    """A sampling or a reference has none, so that the first step would begin with a difference."""
    config = {
        "objective": objective,
        "model": {"has_score_head": objective == "reward"},
        "init": {"model": "somewhere"},
        "adapter": {"rank": 2},
    }
    assert from_dict(TrainConfig, config).validate()
    config["adapter"]["dropout"] = 0.1
    if objective in ("next_token", "reward", "distill", "masked"):
        assert from_dict(TrainConfig, config).validate()
        return
    with pytest.raises(ValueError, match=f"adapter.dropout = 0.1 must be 0: objective = {objective} compares"):
        from_dict(TrainConfig, config).validate()


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size"])
def test_no_memory_is_taken_for_what_the_weights_do_not_hold(tmp_path, processor, monkeypatch, field):
    """A model of 2**24 by anything would not fit into this machine."""
    save_model(tmp_path / "model", VLM(TINY), processor)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["decoder"][field] = 2**24
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(VLM, "to_empty", lambda *args, **options: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the config: .*the config says .*16777216"):
        nanovlm.load(tmp_path / "model")


def test_every_token_id_of_a_tokenizer_has_an_embedding(processor):
    """Also the ids of a tokenizer that leaves some out, so that it has fewer tokens than its highest id says."""
    tokenizer = json.loads(processor.tokenizer.to_str())
    tokenizer["model"]["vocab"]["far"] = 10**6
    far = type(processor.tokenizer).from_str(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"the tokenizer has tokens up to id 1000000, and so needs 1000001"):
        Processor(far, processor.chat_template, TINY)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ range(10 ** 9) | list }}",
        "{{ lipsum(n=10000) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ ''.ljust(10 ** 9) }}",
        "{{ 'a' | indent(10 ** 9, true) }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ '0123456789' }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_takes_no_memory_and_ends(processor, monkeypatch, attack):
    monkeypatch.setattr("nanovlm.data.template.RENDER_SECONDS", 1)
    with pytest.raises(ValueError, match="the chat template refuses a conversation of user, assistant: "):
        make_document(Processor(processor.tokenizer, attack, TINY), 0, ("what?", "a thing"))


def test_what_templates_do_is_allowed(processor):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ ('in %s' % 2024)[:0] ~ m.content }}"
        "{{ '' if 0.5 * 2000 else 'a' | indent }}"
        "<end_of_utterance>{% endfor %}"
    )
    assert make_document(Processor(processor.tokenizer, template, TINY), 0, ("what?", "a thing"), images=0)


def test_a_grid_of_any_model_is_believed():
    for tiling in (TilingConfig("idefics3", longest_edge=2048), TilingConfig("nanovlm", longest_edge=64)):
        dataclasses.replace(TINY, tiling=tiling).validate()
