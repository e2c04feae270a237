"""How fast samples become packed rows, on one core.

    python benchmarks/loading.py             print, and append to benchmarks/results/loading.jsonl

Rows: text that is already tokenised goes through the loader (buffer, pack, rows of 2048 tokens, batches). Text: the
chat template and the tokenizer of drawn scenes' questions. Images: JPEG files are decoded and cut into tiles. Every
line has the median of `repeats` runs.
"""

import io
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.packing import Tokenised, documents, make_document
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.config import DataConfig, TilingConfig, VisionConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import decode_image, make_tiles, marker_tokens
from nanovlm.data.loader import Loader
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.environment import describe_environment
from nanovlm.presets import scenes

RESULTS = Path(__file__).resolve().parent / "results" / "loading.jsonl"


@dataclass(frozen=True)
class LoadingConfig:
    # Timed runs.
    repeats: int = 5


def time_rows(repeats: int) -> dict:
    """Time whole batches, reading and packing included; check the last one."""
    config = DataConfig(row_length=2048, batch_rows=8, pack_buffer=256)
    lengths, _num_tiles = documents(10_000)
    source = Tokenised(lengths, [0] * len(lengths))
    loader = Loader(source, make_document, config, pad_token_id=0)
    speeds, padding = [], []
    for _ in range(repeats):
        begin, tokens = time.perf_counter(), 0
        for _ in range(50):
            [batch] = next(loader)
            tokens += int((batch.doc_ids >= 0).sum())
        speeds.append(tokens / (time.perf_counter() - begin))
        padding.append(1 - tokens / (50 * batch.doc_ids.numel()))
    for doc in range(int(batch.doc_ids.max()) + 1):
        ids = batch.input_ids[batch.doc_ids == doc]
        assert len(ids.unique()) == 1 and len(ids) == source.lengths[int(ids[0])], "a document is torn"
    return {
        "what": "packed rows",
        "tokens_per_second": round(statistics.median(speeds)),
        "padding_percent": round(100 * statistics.median(padding), 2),
    }


def time_text(repeats: int) -> dict:
    """Time template and tokenizer, as training meets them: questions that repeat are looked up."""
    source, model = Scenes("train"), scenes().model
    tokenizer = train_tokenizer(sample_texts(source, 1000), 512, marker_tokens(model))
    processor = Processor(tokenizer, CHAT_TEMPLATE, model)
    speeds = []
    for repeat in range(repeats):
        samples = [to_sample(source.read(30_000 + 200 * repeat + i)) for i in range(200)]
        processor._encode_short.cache_clear()
        begin = time.perf_counter()
        found = [processor.document(sample).input_ids for sample in samples]
        tokens = sum(int((ids != model.image_token_id).sum()) for ids in found)
        speeds.append(tokens / (time.perf_counter() - begin))
    return {"what": "text of drawn scenes to documents", "tokens_per_second": round(statistics.median(speeds))}


def time_images(repeats: int, width: int, height: int) -> dict:
    """Time decoding a JPEG file and cutting it into tiles of 384 pixels, at most 9 and the whole."""
    config = VLMConfig(vision=VisionConfig(image_size=384), tiling=TilingConfig(max_tiles=9))
    rng, file = np.random.default_rng(0), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    decoding, cutting = [], []
    for _ in range(3 * repeats):
        begin = time.perf_counter()
        image = decode_image(file.getvalue())
        middle = time.perf_counter()
        tiles = make_tiles(image, config)
        decoding.append(middle - begin)
        cutting.append(time.perf_counter() - middle)
    return {
        "what": "JPEG to tiles",
        "size": [width, height],
        "tiles": len(tiles),
        "decode_ms": round(1e3 * statistics.median(decoding), 2),
        "cut_ms": round(1e3 * statistics.median(cutting), 2),
    }


def main(config: LoadingConfig):
    torch.set_num_threads(1)
    lines = [time_rows(config.repeats), time_text(config.repeats)]
    lines += [time_images(config.repeats, *size) for size in ((640, 480), (1920, 1080))]
    append_lines(RESULTS, lines, describe_environment(torch.device("cpu"), threads=1))


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(LoadingConfig, description=__doc__)))
