"""Pictures to batches, this checkout against another commit, by turns: CPU seconds of each stage.

    python benchmarks/pictures.py                       all shapes, against 2e1f7cf
    python benchmarks/pictures.py --against HEAD~1

JPEG files in memory become documents (decoded, cut into tiles, the text tokenised), rows and one batch, whose pixels
are normalised as the encoder wants them, by the loader or by the model. `ratio` is the median of the ratios of
neighbouring turns, for all stages together. The tiles of both must have the same mean, or nothing is written. Appends
lines to benchmarks/results/pictures.jsonl.
"""

import dataclasses
import io
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import turns  # beside this file; the code of a checkout is imported by its worker alone
import tyro
from PIL import Image
from tqdm import tqdm

RESULTS = turns.ROOT / "benchmarks" / "results" / "pictures.jsonl"


@dataclass(frozen=True)
class Shape:
    # Width and height of the pictures.
    sizes: tuple[tuple[int, int], ...]
    tile_size: int
    max_tiles: int
    policy: str = "fit"


STAGES = ("decode", "document", "batch", "normalize")
MIXED = ((640, 480), (800, 1200), (1024, 768), (1920, 1080))
SHAPES = {
    "tiles of 512": Shape(MIXED, 512, 9),
    "tiles of 512, idefics3": Shape(MIXED, 512, 9, "idefics3"),
    "one tile of 512": Shape(MIXED, 512, 1),
    "1080p": Shape(((1920, 1080),) * 2, 384, 9),
}


@dataclass(frozen=True)
class PicturesConfig:
    # Which shapes, keys of SHAPES.
    shapes: tuple[str, ...] = tuple(SHAPES)
    # The commit to compare with.
    against: str = "2e1f7cf"
    # Timed turns of each, after two that are not.
    repeats: int = 15
    # Set by the benchmark itself: measure the checkout in this folder, once for every line of standard input.
    worker: str = ""


def main(config: PicturesConfig):
    from benchmarks.speed import append_lines
    from nanovlm.config import pick
    from nanovlm.environment import describe_environment

    for name in config.shapes:
        pick(SHAPES, name, "--shapes")
    environment = describe_environment(torch.device("cpu"), threads=1)  # before a line changes the file of results
    with turns.checkout(config.against) as (other, commit):
        for name in tqdm(config.shapes, unit="shape"):
            found = turns.compare(__file__, ["--shapes", name], other, config.repeats)
            check_tiles(name, found[0])
            line = {"shape": name, **dataclasses.asdict(SHAPES[name]), **turns.summarize(found, "all")}
            for stage in STAGES:
                line |= {x: turns.summarize(found, stage)[x] for x in (stage, f"{stage}_before")}
            line |= {"unit": "CPU milliseconds a picture", "tiles": found[0][0]["tiles"], "before": commit}
            append_lines(RESULTS, [line], environment)


def check_tiles(shape: str, turn: tuple[dict, dict]):
    """Exit where the two checkouts cut other tiles, but for what another resizing filter rounds otherwise."""
    ours, theirs = turn
    if ours["tiles"] != theirs["tiles"] or abs(ours["mean"] - theirs["mean"]) > 1e-3:
        sys.exit(f"error: {shape}: the tiles are {ours} and {theirs}: not timed")


# --- one process for each checkout ----------------------------------------------------------------------------


def work(config: PicturesConfig):
    """Measure the CPU milliseconds of each stage, for the mean picture."""
    sys.path.insert(0, config.worker)
    import nanovlm.environment
    from nanovlm.config import TilingConfig, VisionConfig, VLMConfig
    from nanovlm.data import images, types
    from nanovlm.data.chat import Processor
    from nanovlm.data.loader import collate, make_row
    from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer

    getattr(nanovlm.environment, "keep_freed_memory", int)()
    torch.set_num_threads(1)
    shape = SHAPES[config.shapes[0]]
    model = VLMConfig(
        vision=VisionConfig(image_size=shape.tile_size),
        tiling=TilingConfig(policy=shape.policy, max_tiles=shape.max_tiles, longest_edge=4 * shape.tile_size),
    )
    text = {"user": "What is in the picture, and where?", "assistant": "A pattern of colors, everywhere."}
    processor = Processor(
        train_tokenizer(list(text.values()) * 9, 300, images.marker_tokens(model)), CHAT_TEMPLATE, model
    )
    files = [draw(width, height) for width, height in shape.sizes]

    def measure() -> dict:
        times = [time.process_time()]
        pictures = [images.decode_image(file) for file in files]
        times.append(time.process_time())
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text["user"]}]},
            {"role": "assistant", "content": text["assistant"]},
        ]
        documents = [processor.document(types.Sample([picture], messages)) for picture in pictures]
        times.append(time.process_time())
        length = max(map(len, documents))
        batch = collate([make_row([document], length, 0) for document in documents])
        times.append(time.process_time())
        pixels = batch.pixel_values
        if pixels.dtype == torch.uint8:  # the model's part, once batches have bytes
            from nanovlm.model.vision import normalize

            pixels = normalize(pixels)
        times.append(time.process_time())
        stages = np.diff(times) * 1e3 / len(files)
        found = dict(zip(STAGES, stages.tolist(), strict=True))
        return found | {"all": float(stages.sum()), "tiles": len(pixels), "mean": pixels.mean().item()}

    turns.work(measure)


def draw(width: int, height: int) -> bytes:
    """Draw smooth noise, as a JPEG file."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    given = tyro.cli(PicturesConfig, description=__doc__)
    if given.worker:
        work(given)
    else:
        sys.path.insert(0, str(turns.ROOT))
        from nanovlm import cli

        cli.run(lambda: main(given))
