"""The funnel of nanovlm/data/build: what it finds of near duplicates, how fast its stages are, the memory it takes.

    python benchmarks/funnel.py near                        recall and precision on generated pairs
    python benchmarks/funnel.py near --model RUN/model      and by the vectors of a dual encoder
    python benchmarks/funnel.py stages                      samples a second and core of each stage, 10,000 pictures
    python benchmarks/funnel.py records                     a million records of metadata: seconds and highest memory
    python benchmarks/funnel.py draw                        a run over drawn documents, and pictures of it
    python benchmarks/funnel.py tables                      put the committed results into docs/data.md

Pictures are drawn: coloured noise with shapes on it, and pages of words. A pair is a picture and what a change made of
it; recall is the share of pairs that are found. Precision is the share of true pairs among all that are found in the
whole collection, of which a third differs in details only: shapes on the same noise, words on the same page. Appends
lines to benchmarks/results/funnel.jsonl; `draw` writes benchmarks/results/funnel_drawn.json.
"""

import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from benchmarks.funnel_drawn import DOCS, format_drawn, measure_drawn
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.data.build import funnel
from nanovlm.data.build.hashes import distances, hash_picture, parse_hashes
from nanovlm.data.build.recipe import Recipe, ShardOptions
from nanovlm.data.source import IN_ORDER, deal
from nanovlm.environment import describe_environment
from nanovlm.files import read_json, write_file

RESULTS = Path(__file__).resolve().parent / "results" / "funnel.jsonl"
DRAWN = RESULTS.with_name("funnel_drawn.json")
SIZE = (320, 240)
WORDS = "red green blue small large circle square house tree river total price invoice street open left right".split()
BITS = (8, 16, 24, 31, 40)
COSINES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class FunnelConfig:
    # near, stages, records, draw, or tables.
    what: Annotated[Literal["near", "stages", "records", "draw", "tables"], tyro.conf.Positional]
    # Pictures that are drawn: 1,000 originals for near, 10,000 for stages; 1,000,000 records of metadata.
    num: int = 0
    # A dual encoder: its vectors find pairs too, and judge how well text and pictures agree.
    model: str = ""
    # Print, and write nothing.
    dry: bool = False
    # Set by the benchmark itself: run so many records of metadata, and print what it took.
    worker: int = 0


# --- pictures -------------------------------------------------------------------------------------------------


def draw(number: int) -> Image.Image:
    """Draw a picture; every third has the background of the one before it, and other details."""
    base = number - (number % 3 == 2)
    rng, details = random.Random(f"base {base}"), random.Random(f"details {number}")
    return draw_page(rng, details) if base % 6 >= 3 else draw_photo(rng, details)


def draw_photo(rng: random.Random, details: random.Random) -> Image.Image:
    noise, total = np.random.default_rng(rng.randrange(2**32)), np.zeros((SIZE[1], SIZE[0], 3))
    for cells in (3, 6, 12, 24, 48, 96):
        field = Image.fromarray(noise.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(field.resize(SIZE, Image.Resampling.BICUBIC)) / cells
    picture = Image.fromarray((total / total.max() * 255).astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for _ in range(details.randint(3, 6)):
        x, y, radius = details.randint(30, 290), details.randint(30, 210), details.randint(20, 60)
        color, sides = tuple(details.randrange(256) for _ in range(3)), details.choice((3, 4, 5, 60))
        canvas.regular_polygon((x, y, radius), sides, details.randrange(90), color)
    return picture


def draw_page(rng: random.Random, details: random.Random) -> Image.Image:
    picture = Image.new("RGB", SIZE, (rng.randint(225, 255),) * 3)
    canvas, y = ImageDraw.Draw(picture), 10
    while y < SIZE[1] - 20:
        size, left = rng.choice((9, 10, 12, 16)), rng.choice((10, 10, 30, 150))
        line = " ".join(details.choice(WORDS) for _ in range(rng.randint(1, 6)))
        canvas.text((left, y), line, fill=(rng.randint(0, 60),) * 3, font=ImageFont.load_default(size))
        y += size + rng.choice((4, 4, 12))
    return picture


def encode(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def jpeg(quality: int):
    return lambda picture: Image.open(io.BytesIO(encode(picture, quality=quality))).convert("RGB")


def resize(scale: float):
    return lambda picture: picture.resize([round(scale * x) for x in picture.size], Image.Resampling.BICUBIC)


def crop(share: float, is_centred: bool = True):
    """Cut off a share of the width and the height: half of it on each side, or all at the right and the bottom."""

    def cut(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        x, y = round(share * width), round(share * height)
        left, top = (x // 2, y // 2) if is_centred else (0, 0)
        return picture.crop((left, top, left + width - x, top + height - y))

    return cut


CHANGES = {
    "JPEG 80": jpeg(80),
    "JPEG 30": jpeg(30),
    "half the size": resize(0.5),
    "a quarter": resize(0.25),
    "twice the size": resize(2.0),
    "brightness + 20 %": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "contrast - 30 %": lambda picture: ImageEnhance.Contrast(picture).enhance(0.7),
    "no colour": lambda picture: picture.convert("L").convert("RGB"),
    "crop 2 %": crop(0.02),
    "crop 5 %": crop(0.05),
    "crop 10 %": crop(0.1),
    "crop 20 %": crop(0.2),
    "corner 5 %": crop(0.05, is_centred=False),
}


# --- near duplicates --------------------------------------------------------------------------------------------


def measure_near(config: FunnelConfig) -> list[dict]:
    num = config.num or 1000
    pictures = [draw(number) for number in range(num)]
    sets = {"": pictures} | {name: [change(picture) for picture in pictures] for name, change in CHANGES.items()}
    found = {name: parse_hashes([hash_picture(picture) for picture in some]) for name, some in sets.items()}
    lines = summarize_near(
        num, BITS, "bits", lambda a, b: distances(found[a][:, None], found[b][None]), lambda x, most: x <= most
    )
    if config.model:
        vectors = {name: embed(config.model, some) for name, some in sets.items()}
        lines += summarize_near(
            num, COSINES, "cosine", lambda a, b: vectors[a] @ vectors[b].T, lambda x, least: x >= least
        )
    return lines


def embed(model: str, pictures: list[Image.Image]) -> np.ndarray:
    from nanovlm.hub.dual import load_dual

    dual, processor = load_dual(model)
    with torch.inference_mode():
        parts = [dual.embed_images(processor.encode_images(pictures[i : i + 16])) for i in range(0, len(pictures), 16)]
    return torch.cat(parts).float().numpy()


def summarize_near(num: int, limits: tuple, unit: str, compare, is_near) -> list[dict]:
    """Compare the originals with what each change made of all, and among themselves."""
    own = ~np.eye(num, dtype=bool)
    among = compare("", "")
    wrong = {limit: int(is_near(among, limit)[own].sum()) // 2 for limit in limits}
    right, lines = dict.fromkeys(limits, 0), []
    for name in CHANGES:
        values = compare("", name)
        recall = {}
        for limit in limits:
            near = is_near(values, limit)
            right[limit] += int(near.diagonal().sum())
            wrong[limit] += int(near[own].sum())
            recall[str(limit)] = round(float(near.diagonal().mean()), 4)
        lines.append({"what": "near", "by": unit, "pictures": num, "change": name, "recall": recall})
    precision = {str(limit): round(right[limit] / max(1, right[limit] + wrong[limit]), 4) for limit in limits}
    return [*lines, {"what": "near", "by": unit, "pictures": num, "change": "precision", "recall": precision}]


# --- speed of the stages ----------------------------------------------------------------------------------------


def measure_stages(config: FunnelConfig) -> list[dict]:
    num = config.num or 10_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "source.tar", num)
        write_source(folder / "asked.tar", 1000, first=10**6)
        stages: dict = {
            "ratings": None,
            "text": {"languages": ["en"]},
            "corrupt": None,
            "size": None,
            "leakage": {"sources": [str(folder / "asked.tar")]},
            "exact": None,
            "near": None,
        }
        if config.model:
            stages |= {"agreement": {"model": config.model}, "alike": {"model": config.model}}
        stages |= {"caps": {"field": "source"}}
        recipe = Recipe(sources=(str(folder / "source.tar"),), out=str(folder / "out"), stages=stages)
        start = time.process_time()
        report = funnel.run(recipe)
        whole, left, lines = time.process_time() - start, num, []
        for stage in ("read", *stages):
            rate = round(left / max(report["seconds"][stage], 1e-9), 1)
            lines.append({"what": "stages", "pictures": num, "stage": stage, "samples_per_second_and_core": rate})
            left -= report["dropped"].get(stage, 0)
        rate = round(num / whole, 1)
        return [*lines, {"what": "stages", "pictures": num, "stage": "all", "samples_per_second_and_core": rate}]


def write_source(path: Path, num: int, first: int = 0):
    """Write a shard of pictures as JPEG files with captions; one in ten is the one before it, saved anew."""
    with tarfile.open(path, "w") as tar:
        for i in range(num):
            picture = draw(first + i - (i % 10 == 9))
            record = {"caption": f"A picture with the number {i} on it, and some of the shapes are large."}
            quality = 70 if i % 10 == 9 else 90
            for suffix, data in (("jpg", encode(picture, quality=quality)), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{i:07d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


# --- memory -----------------------------------------------------------------------------------------------------


class Metadata:
    """Records without pictures, made as they are read: one in four has the text of an earlier one."""

    name, damaged, order, blocks = "metadata", (), IN_ORDER, None

    def __init__(self, num: int):
        self.num = num

    def __len__(self):
        return self.num

    def refs(self, slots, num_slots, start=None):
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        number = key // 2 if key % 4 == 3 else key
        answer = f"The file with the number {number} is in the folder and has {number % 977} lines of text."
        return {"question": "What is it?", "answer": answer, "kind": f"kind {number % 1000}"}


def run_records(num: int) -> dict:
    """Run metadata through the stages; return seconds and the highest memory of this process."""
    source = Metadata(num)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name:
        stages = {"text": None, "exact": None, "near": None, "caps": {"field": "kind", "most": num // 2000}}
        recipe = Recipe(
            sources=("metadata",),
            out=f"{name}/out",
            stages=stages,
            chunk=1024,
            shards=ShardOptions(most_records=10_000),
        )
        start, funnel.open_sources = time.perf_counter(), lambda *_args, **_options: source
        report = funnel.run(recipe)
        seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "what": "records",
        "records": num,
        "kept": report["kept"],
        "dropped": report["dropped"],
        "seconds": round(seconds, 1),
        "memory_before_mb": round(before / 1024, 1),
        "highest_memory_mb": round(most / 1024, 1),
    }


def measure_records(config: FunnelConfig) -> list[dict]:
    num, lines = config.num or 1_000_000, []
    for some in (num // 100, num // 10, num):
        command = [sys.executable, __file__, "records", "--worker", str(some)]
        lines.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return lines


# --- tables -----------------------------------------------------------------------------------------------------


def tables(lines: list[dict]) -> dict[str, str]:
    """Write the newest results of each subject as Markdown."""
    newest: dict = {}
    for line in lines:
        key = line["what"], line.get("by"), line.get("change"), line.get("stage"), line.get("records")
        newest.pop(key, None)  # so that lines stand as they were measured last
        newest[key] = line
    found = {
        what: [line for line in newest.values() if line["what"] == what]
        for what in MEASURES  # in their order on the page
    }
    return {what: format_lines(what, some) if some else "not measured yet" for what, some in found.items()}


def format_lines(what: str, lines: list[dict]) -> str:
    places = dict.fromkeys(pages.where(line) for line in lines)
    return "\n".join([*FORMATS[what](lines), "", *(f"({place})" for place in places)])


def format_near(lines: list[dict]) -> list[str]:
    text = []
    for unit, sign in (("bits", "at most"), ("cosine", "at least")):
        rows = [line for line in lines if line["by"] == unit]
        if rows:
            limits = list(rows[0]["recall"])
            text += [f"| found by {unit} | " + " | ".join(f"{sign} {limit}" for limit in limits) + " |"]
            text += ["|---|" + "--:|" * len(limits)]
            text += [
                f"| {row['change']} | " + " | ".join(f"{100 * row['recall'][x]:.1f} %" for x in limits) + " |"
                for row in rows
            ]
            text += [""]
    return text[:-1]


def format_stages(lines: list[dict]) -> list[str]:
    rows = [f"| `{line['stage']}` | {line['samples_per_second_and_core']:,.0f} |" for line in lines]
    return ["| stage | samples a second and core |", "|---|--:|", *rows]


def format_records(lines: list[dict]) -> list[str]:
    return [
        "| records | seconds | memory before, MB | highest, MB |",
        "|--:|--:|--:|--:|",
        *(
            f"| {line['records']:,} | {line['seconds']:,.0f} | {line['memory_before_mb']:.0f} | "
            f"{line['highest_memory_mb']:.0f} |"
            for line in lines
        ),
    ]


def put_tables():
    """Put all committed results between their marks on the page."""
    found = tables(pages.read_lines(RESULTS))
    if DRAWN.exists():
        found["drawn"] = format_drawn(read_json(DRAWN))
    for name, table in found.items():
        pages.put(DOCS / "data.md", name, "funnel.py", table)


FORMATS = {"near": format_near, "stages": format_stages, "records": format_records}
MEASURES = {"near": measure_near, "stages": measure_stages, "records": measure_records}


def main(config: FunnelConfig):
    if config.what == "tables":
        put_tables()
        return
    if config.worker:
        print(json.dumps(run_records(config.worker)))
        return
    torch.set_num_threads(1)
    environment = describe_environment(torch.device("cpu"), threads=1)  # before a line changes the file of results
    if config.what == "draw":
        counts = measure_drawn()
        print(format_drawn(counts))
        write_file(DRAWN, json.dumps(environment | counts, indent=1) + "\n")
        put_tables()
        return
    lines = MEASURES[config.what](config)
    if config.dry:
        print(format_lines(config.what, [environment | line for line in lines]))
    else:
        append_lines(RESULTS, lines, environment)


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(FunnelConfig, description=__doc__)))
