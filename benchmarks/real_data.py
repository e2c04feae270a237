"""Packages of npm and Debian -> real pictures with questions: emoji in eight styles, and photographs of clothes.

    python benchmarks/real_data.py FOLDER      writes FOLDER/packages and the records that benchmarks/real.py uses

| package | pictures | licence |
|---|---|---|
| npm @iconify-json/noto, noto-v1 | Google's emoji, two generations | Apache 2.0 |
| npm @iconify-json/fluent-emoji, fluent-emoji-flat | Microsoft's emoji, with shades and flat | MIT |
| npm @iconify-json/emojione, emojione-v1 | EmojiOne's emoji, two generations | CC BY 4.0, CC BY-SA 4.0 |
| npm @iconify-json/openmoji | OpenMoji's emoji | CC BY-SA 4.0 |
| npm @iconify-json/twemoji | Twitter's emoji: the style that training never shows | CC BY 4.0 |
| Debian dataset-fashion-mnist | 70,000 grey photographs of clothes (arXiv 1708.07747) | MIT |

The things are those with a name of one word in every style. Emoji are drawn by resvg (pip install resvg-py). A record
has one picture and several independent questions; the records of `test` ask in words that training never uses, and
show the style, and the photographs, that training never shows. Nothing that is there is fetched or written again.
"""

import gzip
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import new_file, read_json, write_file

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "openmoji", "twemoji")
HELD_OUT = "twemoji"
SIDE = 48  # of a picture, in pixels

# --- packages ---------------------------------------------------------------------------------------------------------


def fetch(folder: Path):
    """Bring what is missing of the packages: folder/STYLE.json, folder/groups.json and folder/*-ubyte.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        if not (folder / f"{style}.json").exists():
            fetch_style(folder, style)
    if not (folder / "t10k-labels-idx1-ubyte.gz").exists():
        fetch_clothes(folder)


def fetch_style(folder: Path, style: str):
    """Download the emoji of a style by npm, and with those of noto the group of each name."""
    name = f"@iconify-json/{style}"
    with tempfile.TemporaryDirectory() as place:
        call(place, f"npm package {name}", "npm", "pack", "--silent", name)
        [file] = Path(place).glob("*.tgz")
        with tarfile.open(file) as package:
            members = {x: package.extractfile(f"package/{x}.json").read() for x in ("icons", "metadata")}  # pyright: ignore
    if style == "noto":
        write_file(folder / "groups.json", json.dumps(json.loads(members["metadata"])["categories"]))
    write_file(folder / f"{style}.json", members["icons"])


def fetch_clothes(folder: Path):
    """Download Fashion-MNIST by apt and unpack it, which needs no administrator."""
    with tempfile.TemporaryDirectory() as place:
        call(place, "Debian package dataset-fashion-mnist", "apt-get", "download", "dataset-fashion-mnist")
        [file] = Path(place).glob("*.deb")
        call(place, "Debian package dataset-fashion-mnist", "dpkg-deb", "-x", str(file), place)
        found = sorted(Path(place).rglob("*-ubyte.gz"), reverse=True)  # what `fetch` looks for comes last
        for path in sorted(found, key=lambda path: path.name == "t10k-labels-idx1-ubyte.gz"):
            write_file(folder / path.name, path.read_bytes())


def call(place: str, what: str, *command: str):
    """Run a package manager in a folder. Raises UserError that says what could not be had, and why."""
    if shutil.which(command[0]) is None:
        raise UserError(f"the {what} is fetched by {command[0]}, which is not installed")
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip() or "it says nothing").splitlines()[-1]
        raise UserError(f"the {what} could not be fetched: {' '.join(command)} failed: {last}")


# --- things -----------------------------------------------------------------------------------------------------------

GROUPS = {"Animals & Nature": "nature", "Food & Drink": "food", "Travel & Places": "travel", "Activities": "activity"}
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
KINDS = (*GROUPS.values(), "clothing")
PHOTOGRAPHS = 0.25  # their share of the records with questions


class Thing(NamedTuple):
    """A picture, RGBA for emoji and grey for a photograph, and what it shows."""

    image: Image.Image
    name: str
    kind: str


def read_emoji(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the SVG texts of each style by name, and the kind of each name."""
    styles = {style: read_json(folder / f"{style}.json") for style in STYLES}
    groups = read_json(folder / "groups.json")
    kinds = {
        name: kind
        for group, kind in GROUPS.items()
        for name in sorted(groups.get(group, ()))
        if name.isalpha() and all(name in style["icons"] for style in styles.values())
    }
    return {style: {name: svg_of(data, name) for name in kinds} for style, data in styles.items()}, kinds


def svg_of(style: dict, name: str) -> str:
    """Return an icon of Iconify's JSON as an SVG file."""
    icon = style["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(x) or style.get(x, 16) for x in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def draw_svg(svg: str) -> Image.Image:
    """Draw an SVG file twice as large as pictures are, so that it can be turned without loss."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("emoji are drawn by a package of its own: pip install resvg-py") from error
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def read_clothes(folder: Path, split: str) -> list[Thing]:
    """Return the photographs of a split, train or t10k."""
    images = np.frombuffer(gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    labels = np.frombuffer(gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    pixels = images.reshape(len(labels), 28, 28)
    return [Thing(Image.fromarray(x), CLOTHES[y], "clothing") for x, y in zip(pixels, labels, strict=True)]


# --- pictures ---------------------------------------------------------------------------------------------------------


def show(thing: Thing) -> Image.Image:
    """Return a thing as it is: emoji on white, photographs on their black."""
    return place(thing.image, (255, 255, 255) if thing.image.mode == "RGBA" else (0, 0, 0), SIDE)


def vary(thing: Thing, rng: random.Random) -> Image.Image:
    """Return a thing mirrored, larger or smaller, moved, turned, on another ground and in other light."""
    image, is_photograph = thing.image, thing.image.mode == "L"
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.gauss(0, 6), Image.Resampling.BICUBIC)
    ground = (255, 255, 255) if rng.random() < 0.5 else tuple(rng.randrange(256) for _ in range(3))
    side = rng.randint(SIDE * 2 // 3, SIDE)
    shift = (rng.random(), rng.random())
    shown = place(image, (0, 0, 0) if is_photograph else ground, side, shift)
    scale, offset = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    return shown.point(lambda x: max(0, min(255, int((x - 128) * scale + 128 + offset))))


def place(image: Image.Image, ground: tuple, side: int, shift: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Put a picture, resized to a square, on a ground; `shift` is where, as shares of the room that is left."""
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    left, top = (round(x * (SIDE - side)) for x in shift)
    canvas.paste(image.convert("RGB"), (left, top), image.getchannel("A") if image.mode == "RGBA" else None)
    return canvas


# --- questions --------------------------------------------------------------------------------------------------------

# For each kind of question its wordings in training, and after them one of the tests.
NAME = (
    "what is this?", "what does the picture show?", "name it.", "which thing do you see?", "what is in the image?",
    "what is shown here?", "tell me what this is.", "say in a word what you see.", "what do you see in the picture?",
)  # fmt: skip
KIND = (
    "is it {options}?", "which of {options} is it?", "choose what fits: {options}.", "sort this into {options}.",
    "what kind of thing is it, {options}?",
)  # fmt: skip
CHECK = (
    'is this "{name}"?', "does the picture show {name}?", "{name}, yes or no?", 'can you see "{name}" here?',
    "would you call this {name}?",
)  # fmt: skip
CHOICE = (
    "is this {options}?", "which one is it, {options}?", "{options}: what do you see?", "decide: {options}?",
    "do you see {options}?",
)  # fmt: skip


def listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def ask(thing: Thing, kinds: dict[str, str], rng: random.Random, is_test: bool) -> list[dict]:
    """Return a question of each kind with its answer; half of the wrong names are of the thing's own kind.

    The others are drawn as things are, so that a name is asked for as often wrongly as rightly, and no name is likelier
    than another without the picture.
    """

    def word(wordings: tuple[str, ...], **names) -> str:
        return (wordings[-1] if is_test else rng.choice(wordings[:-1])).format(**names)

    own_kind = [name for name, kind in kinds.items() if kind == thing.kind and name != thing.name]
    is_photograph = rng.random() < PHOTOGRAPHS
    others = [name for name, kind in kinds.items() if (kind == "clothing") == is_photograph and name != thing.name]
    wrong = rng.choice(own_kind if own_kind and rng.random() < 0.5 else others)
    is_there, options = rng.random() < 0.5, rng.sample(KINDS, len(KINDS))
    pair = rng.sample([thing.name, wrong], 2)
    return [
        {"kind": "name", "user": word(NAME), "assistant": thing.name},
        {"kind": "kind", "user": word(KIND, options=listed(options)), "assistant": thing.kind},
        {
            "kind": "check",
            "user": word(CHECK, name=thing.name if is_there else wrong),
            "assistant": "yes" if is_there else "no",
        },
        {"kind": "choice", "user": word(CHOICE, options=listed(pair)), "assistant": thing.name},
    ]


def caption(thing: Thing, rng: random.Random) -> str:
    return rng.choice(("{0}", "a picture of {0}", "{0}, {1}", "this is {0}")).format(thing.name, thing.kind)


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealDataConfig:
    # Folder to write packages/ and the records to.
    folder: Annotated[Path, tyro.conf.Positional]
    # Only the first names of each kind of emoji; 0 for all.
    num_names: int = 0
    # Pictures of each emoji in each style, in records for contrast.
    num_variants: int = 8
    # Photographs in records for contrast.
    num_photographs: int = 6000
    # Records that ask for the name alone, three of four of them of emoji, and as many records with all questions.
    num_questions: int = 6000
    # Records of each test.
    num_tests: int = 120


def write(config: RealDataConfig) -> dict[str, Path]:
    """Write what is missing of the five files of records; return them by name."""
    paths = {x: config.folder / f"{x}.tar" for x in ("contrast", "naming", "answers", "emoji_test", "clothes_test")}
    if all(path.exists() for path in paths.values()):
        return paths
    packages = config.folder / "packages"
    fetch(packages)
    styles, kinds = read_emoji(packages)
    if config.num_names:
        kept = [[x for x in kinds if kinds[x] == kind][: config.num_names] for kind in GROUPS.values()]
        kinds = {name: kinds[name] for names in kept for name in names}
    if not kinds:
        raise UserError(f"no name is in all styles of {packages}: delete it, so that the packages are fetched again")
    emoji = [
        (style, Thing(draw_svg(styles[style][name]), name, kind))
        for style in tqdm(STYLES, "drawing emoji", unit="style")
        for name, kind in kinds.items()
    ]
    seen = [thing for style, thing in emoji if style != HELD_OUT]
    unseen = [thing for style, thing in emoji if style == HELD_OUT]
    clothes, clothes_test = read_clothes(packages, "train"), read_clothes(packages, "t10k")
    kinds = kinds | dict.fromkeys(CLOTHES, "clothing")
    write_file(config.folder / "names.json", json.dumps(kinds))
    random.Random("tests").shuffle(unseen)
    random.Random("tests").shuffle(clothes_test)

    def contrast(rng: random.Random) -> Iterator[tuple[Image.Image, list[dict]]]:
        for thing in seen * config.num_variants + clothes[: config.num_photographs]:
            yield vary(thing, rng), [{"user": "describe it.", "assistant": caption(thing, rng)}]

    def answers(rng: random.Random) -> Iterator[tuple[Image.Image, list[dict]]]:
        for _ in range(config.num_questions):
            thing = rng.choice(clothes if rng.random() < PHOTOGRAPHS else seen)
            yield vary(thing, rng), ask(thing, kinds, rng, is_test=False)

    def naming(rng: random.Random) -> Iterator[tuple[Image.Image, list[dict]]]:
        return ((image, [x for x in asked if x["kind"] == "name"]) for image, asked in answers(rng))

    def test(things: list[Thing]) -> Callable[[random.Random], Iterator[tuple[Image.Image, list[dict]]]]:
        return lambda rng: ((show(x), ask(x, kinds, rng, is_test=True)) for x in things[: config.num_tests])

    makers = {
        "contrast": contrast,
        "naming": naming,
        "answers": answers,
        "emoji_test": test(unseen),
        "clothes_test": test(clothes_test),
    }
    for name, path in paths.items():
        if not path.exists():
            write_tar(path, makers[name](random.Random(name)))
    return paths


def write_tar(path: Path, records: Iterator[tuple[Image.Image, list[dict]]]):
    """Write records as a shard in WebDataset's layout."""
    with new_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, (image, texts) in enumerate(records):
            png = io.BytesIO()
            image.save(png, "PNG")
            record = json.dumps({"texts": texts, "independent": True}).encode()
            for suffix, data in (("png", png.getvalue()), ("json", record)):
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def names_of(folder: Path) -> dict[str, str]:
    """Return the names that training shows, with the kind of each."""
    return read_json(folder / "names.json")


def main(config: RealDataConfig):
    for name, path in write(config).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(RealDataConfig, description=__doc__)))
