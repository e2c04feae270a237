"""What is too long takes as many tiles as fit, whichever way a policy cuts images."""

import dataclasses
import itertools
import json

import pytest
import torch
from PIL import Image

import train
from nanovlm.config import DataConfig, EvalConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.loader import Loader
from nanovlm.data.packing import make_row
from nanovlm.data.process import make_process, smaller
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tilings import TILING
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import Shrunk
from tests.conftest import TINY, noise
from tests.data.test_loader import Records
from tests.test_train import SMALL

TILINGS = {
    "fit": TilingConfig("fit", max_tiles=9),
    "idefics3": TilingConfig("idefics3", longest_edge=64),
    "nanovlm": TilingConfig("nanovlm", longest_edge=64),
    "square": TilingConfig("square"),
    "gemma": TilingConfig("gemma"),
    "paligemma": TilingConfig("paligemma"),
    "crop": TilingConfig("crop"),
    "native": TilingConfig("native", max_patches=20),
    "internvl": TilingConfig("internvl", max_tiles=12),
    "anyres": TilingConfig("anyres", max_tiles=16, longest_edge=64),
    "qwen": TilingConfig("qwen", min_pixels=64, max_pixels=20 * 64),
}
ONE_TILE = {"square", "gemma", "paligemma", "crop"}


def make_processor(tiling):
    config = dataclasses.replace(TINY, tiling=tiling)
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(config))
    return Processor(tokenizer, CHAT_TEMPLATE, config)


def raw(num_images=1, answer="yes", size=(60, 50)):
    turns = [{"user": "what is it?", "assistant": answer}]
    return {"images": [noise(i, 8).resize(size) for i in range(num_images)], "texts": turns}


def test_every_policy_is_known():
    assert TILINGS.keys() == TILING.keys()


@pytest.mark.parametrize("policy", sorted({*TILING} - ONE_TILE))
@pytest.mark.parametrize("num_images", [1, 2])
def test_the_largest_tiling_that_fits_is_taken(policy, num_images):
    """By the documents of processors that were made for each of the smaller tilings."""
    processor, record = make_processor(TILINGS[policy]), raw(num_images)
    whole = processor.document(to_sample(record))
    tilings = smaller(TILINGS[policy], processor.config.tile_size)
    ladder = [make_processor(tiling).document(to_sample(record)) for tiling in tilings]
    least = 2 if policy == "anyres" else 1  # the whole picture, and a grid of one tile
    sizes = sorted({(len(d), len(d.tiles)) for d in [whole, *ladder]}, reverse=True)
    assert len(sizes) > 2 and sizes[0] == (len(whole), len(whole.tiles)) and sizes[-1][1] == least * num_images
    for (length, num_tiles), (next_length, next_tiles) in itertools.pairwise(sizes):
        for options in ({"row_length": length - 1}, {"row_length": 9999, "max_tiles": num_tiles - 1}):
            config = DataConfig(too_long="shrink", **options)
            document = make_process(processor, config)(record)
            assert type(document) is Shrunk and (len(document), len(document.tiles)) == (next_length, next_tiles)
            texts = (processor.decode(d.input_ids.tolist()).replace("\n", "") for d in (document, whole))
            assert len(set(texts)) == 1
            trained = document.labels[document.labels >= 0]
            assert torch.equal(trained, whole.labels[whole.labels >= 0])
    assert not isinstance(make_process(processor, DataConfig(row_length=len(whole), too_long="shrink"))(record), Shrunk)


@pytest.mark.parametrize("policy", TILING)
def test_what_no_tiling_shortens_is_too_long(policy):
    processor, config = make_processor(TILINGS[policy]), DataConfig(row_length=60, too_long="shrink")
    for record in (raw(answer="yes " * 99), raw(num_images=60), {"texts": raw(answer="yes " * 99)["texts"]}):
        document = make_process(processor, config)(record)
        assert not isinstance(document, Shrunk) and len(document) > 60
        assert len(document) == len(processor.document(to_sample(record)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_took_fewer_tiles_is_trained_and_counted(num_workers):
    processor = make_processor(TILINGS["fit"])

    class Pictures(Records):
        def read(self, key):
            return raw(size=(16, 16) if key % 2 else (60, 50), answer="yes " * (99 if key % 10 == 0 else 1))

    counts = {}
    for too_long in ("skip", "shrink"):
        config = DataConfig(
            row_length=50, too_long=too_long, num_workers=num_workers, max_bad_fraction=1.0, pack_buffer=4
        )
        loader = Loader(Pictures(40), make_process(processor, config), config, 0, num_epochs=1)
        assert all(batch.input_ids.shape[1] == 50 for step in loader for batch in step)
        counts[too_long] = [loader.counts[name] for name in ("packed", "shrunk", "too long")]
        loader.close()
    assert counts == {"skip": [20, 0, 20], "shrink": [36, 16, 4]}


def test_a_run_says_what_took_fewer_tiles(tmp_path, capsys):
    lines = []
    for i in range(20):
        size = (200, 200) if i % 2 else (40, 40)
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "texts": [{"user": "what?", "assistant": "black"}]}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    model = dataclasses.replace(SMALL.model, tiling=TilingConfig("fit", max_tiles=16))
    data = dataclasses.replace(
        SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=(), row_length=100, num_epochs=1, batch_rows=4
    )
    changes = {"model": model, "eval": EvalConfig(), "optim": dataclasses.replace(SMALL.optim, steps=9)}

    def run(name, **of_data):
        config = dataclasses.replace(SMALL, run_dir=str(tmp_path / name), **changes)
        train.main(dataclasses.replace(config, data=dataclasses.replace(data, **of_data)))
        return capsys.readouterr().out

    said = "20 reads of 20 records: 20 trained, 0 too long, 0 corrupt; 10 took fewer tiles (data.too_long)"
    assert said in run("shrunk", too_long="shrink")
    with pytest.raises(ValueError, match=r"^10 of 20 .* allows \(10 too long\): .*; and others\. For what is too"):
        run("skipped")


@pytest.mark.parametrize(
    ("settings", "learns_from", "message"),
    [
        ({"train_on": "all"}, "pairs", r"data\.train_on = all must be answers: the objective compares answers"),
        (
            {"too_long": "shrink"},
            "teacher",
            r"data\.too_long = shrink must be skip: the records' teacher saw",
        ),
    ],
)
def test_what_an_objective_cannot_learn_from_is_told_before_a_record_is_read(settings, learns_from, message):
    processor = make_processor(TilingConfig())
    assert make_process(processor, DataConfig(), learns_from)
    with pytest.raises(ValueError, match=message):
        make_process(processor, DataConfig(**settings), learns_from)


def test_text_asks_the_model_nothing():
    processor = make_processor(TilingConfig())
    assert len(make_process(processor, DataConfig())({"text": "once upon a time"}))
    with pytest.raises(ValueError, match="the record is text, which asks no question"):
        make_process(processor, DataConfig(), "own")({"text": "once upon a time"})


def test_rows_have_values_of_one_width():
    process = make_process(make_processor(TilingConfig()), DataConfig())
    documents = [process({"question": "a", "answer": "b"}) for _ in range(2)]
    for width, document in enumerate(documents, start=4):
        document.values["top_ids"] = torch.zeros(len(document), width)
    with pytest.raises(ValueError, match="records bring top_ids of 4 and 5 numbers a token"):
        make_row(documents, 256, 0)
