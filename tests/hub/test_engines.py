"""What is known of other programs: every fault is found where it is, and not in a model that all of them take."""

import dataclasses
import re

import pytest
import torch

from nanovlm.config import MoEConfig, ProjectorConfig, RopeScalingConfig, TilingConfig, VLMConfig
from nanovlm.hub import check, engines, export
from tests.conftest import TINY
from tests.hub.ask_transformers import grids_without_positions
from tests.hub.test_batches import other_transformers, run_other
from tests.hub.test_export import write_own

# One that every program takes: 4 x 32 is the width, a head of its own, pictures of several tiles, a grid of 4.
GOOD = dataclasses.replace(
    TINY,
    tiling=TilingConfig("idefics3", longest_edge=64),
    projector=ProjectorConfig(scale_factor=2),
    decoder=dataclasses.replace(TINY.decoder, hidden_size=128, head_dim=32, tie_word_embeddings=False),
)


def decoder(**changes):
    return dataclasses.replace(GOOD, decoder=dataclasses.replace(GOOD.decoder, **changes))


def grid(n):
    vision = dataclasses.replace(GOOD.vision, image_size=4 * n)
    return dataclasses.replace(GOOD, vision=vision, tiling=TilingConfig("idefics3", longest_edge=16 * n))


OTHER_DECODER = {"vLLM", "SGLang", "mlx-vlm"}
# Config, dtype -> the programs that have something against it, beside transformers 4.55 to 4.57, and a word of the why.
FAULTY = {
    "one token a patch": (
        dataclasses.replace(GOOD, projector=ProjectorConfig(scale_factor=1)),
        {"llama.cpp"},
        "projector.scale_factor = 1 aborts it at the first picture",
    ),
    "one tile": (
        dataclasses.replace(GOOD, tiling=TilingConfig("idefics3", longest_edge=16)),
        {"llama.cpp"},
        "tiling.longest_edge = 16 makes every picture one tile, which it shows twice",
    ),
    "wide heads": (decoder(head_dim=64), {"mlx-vlm"}, "num_attention_heads x head_dim = 4 x 64 must be decoder.hidden"),
    "tied": (decoder(tie_word_embeddings=True), {"mlx-vlm"}, "decoder.tie_word_embeddings = True"),
    "biases": (decoder(qkv_bias=True, o_bias=True), {"mlx-vlm"}, "it has no biases in attention"),
    "scaled positions": (
        decoder(rope_scaling=RopeScalingConfig(type="linear", factor=2.0)),
        {"mlx-vlm"},
        "decoder.rope_scaling.type = linear is ignored",
    ),
    "head size": (
        decoder(hidden_size=160, head_dim=40),
        {"vLLM"},
        "no attention for decoder.head_dim = 40; it has 32, ",
    ),
    "qwen3": (decoder(qk_norm="head"), OTHER_DECODER, "the decoder is a qwen3: "),
    "mixtral": (decoder(moe=MoEConfig(num_experts=4)), OTHER_DECODER, "the decoder is a mixtral: "),
    "grid before 4.55": (grid(52), {"transformers"}, "4.54 and older give some of 52 patches a side"),
}


def known(config, dtype=torch.float32):
    """Faults but that of transformers 4.55 to 4.57, which every model that sees has."""
    always = [fault for fault in engines.find_faults(config, dtype) if "#41190" in fault[1]]
    assert len(always) == (config.vision is not None)
    return [fault for fault in engines.find_faults(config, dtype) if fault not in always]


def test_nothing_is_known_against_a_model_that_all_take():
    assert known(GOOD) == known(GOOD, torch.bfloat16) == []
    assert known(dataclasses.replace(GOOD, vision=None, image_token_id=None)) == []


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_found(name):
    config, programs, words = FAULTY[name]
    config.validate()
    faults = known(config)
    assert {engine for engine, _ in faults} == programs
    assert all(words in why for _, why in faults)


def test_half_precision_is_named_where_positions_are_lost():
    assert known(grid(6)) == []
    assert [engine for engine, _ in known(grid(6), torch.bfloat16)] == ["transformers"]
    assert "5.0 to 5.20 give some of 6 patches a side" in known(grid(6), torch.bfloat16)[0][1]
    for n, exceptions in ((4, ", but for 4.56 and 4.57 in bfloat16 and float16:"), (5, "in bfloat16:"), (6, "41190):")):
        (why,) = [why for _, why in engines.find_faults(grid(n), torch.float32) if "#41190" in why]
        assert exceptions in why


def test_the_grids_of_this_transformers_are_those_that_are_refused_anyway():
    refused = [n for n in export.families.IDEFICS3_BAD_GRIDS if n <= 64]
    for dtype in ("float32", "bfloat16", "float16"):
        assert grids_without_positions(dtype, largest=64) == refused


@other_transformers
def test_the_grids_of_other_versions_are_those_that_are_named(version):
    grids = run_other(version)["grids"]
    refused = set(export.families.IDEFICS3_BAD_GRIDS)
    all_grids = set(range(2, 129))
    half = {str(dtype)[6:]: all_grids - set(good) for dtype, good in engines.HALF_PRECISION_GRIDS.items()}
    if version == "4.54.1":
        for dtype in grids:
            assert set(grids[dtype]) - refused == set(engines.TRANSFORMERS_4_54_BAD_GRIDS)
    elif version == "4.57.6":
        assert {dtype: set(bad) for dtype, bad in grids.items()} == {"float32": all_grids} | half
    else:
        assert {dtype: set(bad) for dtype, bad in grids.items()} == {"float32": refused} | half


def test_the_card_and_the_check_name_them(tmp_path, capsys):
    model = write_own(tmp_path / "model", decoder(tie_word_embeddings=True))
    export.export(tmp_path / "model", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.*) \|$", card, flags=re.M))
    assert rows["mlx-vlm"].startswith("0.7.10 on a CPU, in nanovlm's tests | decoder.tie_word_embeddings = True")
    assert rows["llama.cpp"] == "xllamacpp 2026.10.11549, in nanovlm's tests | -"
    assert "#41190" in rows["transformers"] and rows.keys() >= {"transformers", "llama.cpp", "vLLM", "mlx-vlm"}
    check.check(tmp_path / "hub", model)
    said = capsys.readouterr().out
    assert "note: mlx-vlm: decoder.tie_word_embeddings = True" in said
    assert "seen with this layout: transformers 4.54.1, 5.20.0, 5.23.0, in nanovlm's tests; llama.cpp xllamacpp" in said


def test_the_card_of_a_language_model_names_what_was_seen_with_one(tmp_path):
    config = VLMConfig(vision=None, image_token_id=None, decoder=GOOD.decoder)
    write_own(tmp_path / "model", config)
    export.export(tmp_path / "model", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| transformers | 4.54.1, 4.57.6, 5.20.0, 5.23.0, in nanovlm's tests | - |" in card
    assert "llama.cpp" not in card


def test_versions_that_are_named_are_those_of_the_tests():
    """The version that the tests run with, and those of make other-transformers."""
    installed = re.findall(r"^transformers==(\S+)$", export.cli.PROJECT.joinpath("constraints.txt").read_text(), re.M)
    others = re.findall(r"transformers==([\d.]+)", export.cli.PROJECT.joinpath("Makefile").read_text())
    assert engines.SEEN_WITHOUT_PICTURES["transformers"].split(", in ")[0].split(", ") == [*others, *installed]
    seen = engines.SEEN["transformers"].split(", in ")[0].split(", ")
    assert seen == [version for version in (*others, *installed) if not version.startswith("4.57")]
