"""What it saves to read stored features of a frozen encoder in place of pictures, and what they take.

    python benchmarks/features.py                  append to results/features.jsonl, write the table of docs/data.md
    python benchmarks/features.py --shapes tiny    the same in small, for a look

JPEG files of drawn noise are encoded once (python -m nanovlm.features), in both dtypes. Then steps of stage 1, of which
the projector alone learns, are timed from the pictures and from the features: reading, packing, forward and backward
pass. Weights are random. Losses from features in 32 bits must be those from pictures to 1e-4, in 16 bits to 1 %, or
nothing is written.
"""

import base64
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from benchmarks.pictures import draw
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.command_line import parse_train
from nanovlm.config import DecoderConfig, ProjectorConfig, TrainConfig, VisionConfig, VLMConfig, pick
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.loader import Loader
from nanovlm.data.process import make_process
from nanovlm.data.sources import open_source
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.environment import choose_precision, describe_environment, find_device, keep_freed_memory
from nanovlm.features import FeaturesConfig, store
from nanovlm.files import read_json
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.objectives.next_token import NextToken
from nanovlm.train.optim import assign_rules

RESULTS = cli.PROJECT / "benchmarks" / "results" / "features.jsonl"
# An encoder as SigLIP-B/16 and a decoder as SmolLM2-135M; and both in small.
SHAPES = {
    "SigLIP-B/16 of 224 pixels, SmolLM2-135M": VLMConfig(
        vision=VisionConfig(224, 16, 768, 3072, 12, 12),
        projector=ProjectorConfig(scale_factor=2),
        decoder=DecoderConfig(
            vocab_size=8192,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
        ),
    ),
    "tiny": VLMConfig(
        vision=VisionConfig(64, 16, 64, 256, 2, 4),
        decoder=DecoderConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
    ),
}
TEXT = {"user": "What is in the picture, and where?", "assistant": "A pattern of colors, everywhere."}


@dataclass(frozen=True)
class Config:
    # Which shapes, keys of SHAPES.
    shapes: tuple[str, ...] = tuple(SHAPES)[:1]
    # Pictures of 640 x 480 pixels.
    num: int = 64
    # Timed steps, after one that is not.
    repeats: int = 5
    # cpu, cuda, or auto.
    device: str = "auto"
    # Precision of matrix products, as that of a run.
    precision: str = "auto"


def main(config: Config):
    keep_freed_memory()
    device = find_device(config.device)
    precision = choose_precision(device) if config.precision == "auto" else config.precision
    environment = describe_environment(device, torch.get_num_threads(), precision)
    for shape in config.shapes:
        model = pick(SHAPES, shape, "--shapes")
        with tempfile.TemporaryDirectory() as folder:
            of_run = prepare(Path(folder), model, config, precision)
            lines = measure(Path(folder), of_run, config.repeats, device, precision)
            append_lines(RESULTS, [{"shape": shape, "pictures": config.num, **line} for line in lines], environment)
    pages.put(cli.PROJECT / "docs" / "data.md", "features", "features.py", format_table(pages.read_lines(RESULTS)))


def format_table(lines: list[dict]) -> str:
    """Lay out the last line of each dtype of the shape that a plain run measures."""
    [shape] = Config().shapes
    newest = {line["dtype"]: line for line in lines if line["shape"] == shape}
    if not newest:
        return "not measured yet"
    rows = [
        (
            f"`{dtype}`",
            f"{line['bytes_a_tile']:,}",
            f"{line['seconds_to_store_a_tile']:.3f}",
            f"{line['seconds_a_step_pictures']:.2f}",
            f"{line['seconds_a_step_features']:.2f}",
            f"{line['speedup']:.2f}",
            f"{line['largest_difference_of_losses']:.1e}",
        )
        for dtype, line in newest.items()
    ]
    header = ["stored as", "bytes a tile", "seconds to store a tile", "seconds a step from pictures", "from features"]
    table = pages.lay_out([*header, "times as fast", "largest difference of losses"], rows)
    last = newest[next(reversed(newest))]
    asked = f"{shape}; {last['tiles_a_step']:.1f} tiles a step; {last['pixel_bytes_a_tile']:,} bytes of pixels a tile"
    return f"{table}\n\n({asked}; {pages.where(last)})"


def prepare(folder: Path, model: VLMConfig, config: Config, precision: str) -> TrainConfig:
    """Write a model and records, and return the config of a run of stage 1 on them."""
    tokenizer = train_tokenizer(list(TEXT.values()) * 9, 400, marker_tokens(model))
    save_model(folder / "model", VLM(model), Processor(tokenizer, CHAT_TEMPLATE, model))
    with open(folder / "records.jsonl", "w") as lines:
        for number in range(config.num):  # bytes behind the end of a JPEG file make it another picture
            picture = base64.b64encode(draw(640, 480) + number.to_bytes(4)).decode()
            lines.write(json.dumps({"images": [picture], "texts": [TEXT]}) + "\n")
    options = {
        "init.model": folder / "model",
        "data.sources": folder / "records.jsonl",
        "data.row-length": 4 * (model.num_image_tokens + 60),
        "data.batch-rows": 4,
        "data.pack-buffer": 32,
        "data.too-long": "skip",
        "device": config.device,
        "precision": precision,
    }
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return parse_train(["small", *given, "--optim.freeze", "^vision", "^decoder"]).validate()


def measure(folder: Path, config: TrainConfig, repeats: int, device: torch.device, precision: str) -> list[dict]:
    """Time steps from pictures and from features; return a line for each dtype."""
    from nanovlm.hub.read import load

    model, processor = load(str(folder / "model"), device)
    model.float().train()
    assign_rules(model, config.optim)
    lines, pictures = [], time_steps(model, processor, config, repeats, device, precision)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 1e-2)):
        store(FeaturesConfig(folder / dtype, dtype), config)
        data = dataclasses.replace(config.data, features=str(folder / dtype))
        stored = time_steps(model, processor, dataclasses.replace(config, data=data), repeats, device, precision)
        for ours, theirs in zip(stored["losses"], pictures["losses"], strict=True):
            assert abs(ours - theirs) <= tolerance * theirs, f"loss {ours} from features, {theirs} from pictures"
        about = read_json(folder / dtype / "index.json")
        lines.append(
            {
                "dtype": dtype,
                "tiles": about["tiles"],
                "bytes_a_tile": about["bytes"] // about["tiles"],
                "pixel_bytes_a_tile": 3 * config.model.tile_size**2,
                "seconds_to_store_a_tile": round(about["seconds"] / about["tiles"], 4),
                "seconds_a_step_pictures": pictures["seconds"],
                "seconds_a_step_features": stored["seconds"],
                "tiles_a_step": stored["tiles"],
                "speedup": round(pictures["seconds"] / stored["seconds"], 2),
                "largest_difference_of_losses": max(
                    abs(a - b) / b for a, b in zip(stored["losses"], pictures["losses"], strict=True)
                ),
            }
        )
    return lines


def time_steps(
    model: VLM, processor: Processor, config: TrainConfig, repeats: int, device: torch.device, precision: str
) -> dict:
    """Return the median seconds of a step, the mean number of its tiles, and the losses."""
    data, objective = config.data, NextToken()
    source = open_source(data.sources[0])
    loader = Loader(source, make_process(processor, data), data, processor.config.pad_token_id)
    seconds, losses, tiles = [], [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        [batch] = next(loader)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective.loss(model, batch) / objective.count(batch)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        tiles.append(len(batch.pixel_values))
    return {"seconds": round(statistics.median(seconds[1:]), 4), "losses": losses, "tiles": statistics.mean(tiles)}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
