"""Scenes -> data of the recipes of post-training: the same contents in another style, in German, as pairs of captions.

    python benchmarks/recipe_data.py FOLDER german|pairs --split train --num 2000

writes N.png and records.jsonl, which train.py reads. Each record is made of the scene of the same number (scenes.py),
so that the splits stay apart: `train` shows no pair of HELD_OUT, `test` scenes are never trained on.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovlm import cli
from nanovlm.data.scenes import CELLS, COLORS, SEEN, SHAPES, draw

# --- another palette and style, and German ------------------------------------------------------------------------

GERMAN_COLORS = dict(zip(COLORS, ("rot", "grün", "blau", "gelb", "lila", "orange"), strict=True))
# Article, singular and plural of a shape.
GERMAN_SHAPES = {
    "circle": ("der", "Kreis", "Kreise"),
    "square": ("das", "Quadrat", "Quadrate"),
    "triangle": ("das", "Dreieck", "Dreiecke"),
    "star": ("der", "Stern", "Sterne"),
    "cross": ("das", "Kreuz", "Kreuze"),
}
PLACES = "oben links, oben, oben rechts, links, in der Mitte, rechts, unten links, unten, unten rechts"
GERMAN_CELLS = dict(zip(CELLS, PLACES.split(", "), strict=True))
GERMAN_SIDES = {"left": "links", "right": "rechts", "above": "darüber", "below": "darunter"}
ENDINGS = {"der": "er", "das": "es"}  # of an adjective behind an indefinite article


def restyle(image: Image.Image) -> Image.Image:
    """Draw a scene in another palette, darker and paler, with white outlines."""
    hue, saturation, value = image.convert("HSV").split()
    saturation = saturation.point(lambda s: s * 3 // 4)
    value = value.point(lambda v: v * 2 // 3)
    painted = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    edges = np.asarray(image.convert("L").filter(ImageFilter.FIND_EDGES), dtype=np.float32)[..., None] / 255
    pixels = np.asarray(painted, dtype=np.float32)
    return Image.fromarray((pixels * (1 - edges) + 255 * edges).clip(0, 255).astype(np.uint8))


def translate(kind: str, question: str, answer: str) -> tuple[str, str]:
    """Return a question of a scene and its answer in German."""
    return QUESTIONS[kind](question, answer)


def _thing(name: str, article: str = "definite") -> str:
    """`the red star`, `the star`, `the red object`, `a red star` in German."""
    *colors, shape = name.split()[1:]
    gender, noun = ("das", "Objekt") if shape == "object" else GERMAN_SHAPES[shape][:2]
    if not colors:
        return f"{gender} {noun}"
    if article == "definite":
        return f"{gender} {_color_of(colors[0], 'e')} {noun}"
    return f"ein {_color_of(colors[0], ENDINGS[gender])} {noun}"


def _color_of(name: str, ending: str) -> str:
    """Return a colour before a noun; two of them stay as they are."""
    return GERMAN_COLORS[name] + ("" if name in ("purple", "orange") else ending)


def _color(question, answer):
    shape = re.fullmatch(r"what color is the (\w+)\?", question)[1]
    return f"welche Farbe hat {_thing(f'the {shape}')}?", GERMAN_COLORS[answer]


def _shape(question, answer):
    color = re.fullmatch(r"what shape is the (\w+) object\?", question)[1]
    return f"welche Form hat {_thing(f'the {color} object')}?", GERMAN_SHAPES[answer][1]


def _count(question, answer):
    what = re.fullmatch(r"how many (.+) are there\?", question)[1]
    if what == "objects":
        return "wie viele Objekte gibt es?", answer
    if what.endswith(" objects"):
        return f"wie viele {_color_of(what.removesuffix(' objects'), 'e')} Objekte gibt es?", answer
    shape = next(shape for shape in SHAPES if what.startswith(shape))
    return f"wie viele {GERMAN_SHAPES[shape][2]} gibt es?", answer


def _position(question, answer):
    name = re.fullmatch(r"where is (.+)\?", question)[1]
    return f"wo ist {_thing(name)}?", GERMAN_CELLS[answer]


def _relation(question, answer):
    first, second = re.fullmatch(r"where is (.+) relative to (.+)\?", question).groups()
    return f"wo ist {_thing(first)}, gesehen von: {_thing(second)}?", GERMAN_SIDES[answer]


def _existence(question, answer):
    name = re.fullmatch(r"is there (.+)\?", question)[1]
    return f"gibt es: {_thing(name, 'indefinite')}?", {"yes": "ja", "no": "nein"}[answer]


def _digits(question, answer):
    return "welche Ziffer steht da?", answer


QUESTIONS = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "existence": _existence,
    "digits": _digits,
}


def make_german(split: str, index: int) -> dict:
    """Return a scene in the other style with its questions in German, but for captions, which are not translated."""
    scene = draw(split, index)
    texts = []
    for turn in scene["texts"]:
        if turn["kind"] not in QUESTIONS:
            continue
        question, answer = translate(turn["kind"], turn["user"], turn["assistant"])
        texts.append({"user": question, "assistant": answer, "kind": turn["kind"]})
    return {"image": restyle(scene["images"][0]), "texts": texts, "independent": True}


# --- pairs of captions ----------------------------------------------------------------------------------------------


def find_objects(caption: str) -> list[str]:
    """Return the objects that a caption names, as `red star`."""
    return re.findall(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", caption)


def make_pair(split: str, index: int) -> dict:
    """Return a scene, its true caption, and one that names an object that is not there.

    It stands in the place of another one, or is one more: an absent one, or one that is there named twice.
    """
    scene, rng = draw(split, index, ("caption",)), random.Random(f"pair {split} {index}")
    question, chosen = scene["texts"][0]["user"], scene["texts"][0]["assistant"]
    there = find_objects(chosen)
    absent = rng.choice([pair for pair in SEEN if pair not in there])
    article = "an" if absent[0] == "orange" else "a"
    if rng.random() < 0.5:
        rejected = re.sub(rf"an? {' '.join(rng.choice(there))}", f"{article} {' '.join(absent)}", chosen, count=1)
    else:
        parts = chosen.removesuffix(f" and{chosen.rpartition(' and')[2]}").split(", ")
        more = f"{article} {' '.join(absent)} at the {rng.choice(CELLS)}"
        place = rng.randrange(len(parts))
        parts.insert(place + 1, rng.choice((more, parts[place])))
        rejected = f"{', '.join(parts)} and{chosen.rpartition(' and')[2]}"
    return {"image": scene["images"][0], "prompt": question, "chosen": chosen, "rejected": rejected}


MAKERS = {"german": make_german, "pairs": make_pair}


@dataclass(frozen=True)
class RecipeDataConfig:
    # Folder to write N.png and records.jsonl to.
    folder: Annotated[Path, tyro.conf.Positional]
    # Scenes in another style with German questions; or a true and a false caption of each.
    kind: Annotated[Literal["german", "pairs"], tyro.conf.Positional]
    # Split of the scenes.
    split: Literal["train", "test", "compositional"] = "train"
    # Number of scenes.
    num: int = 2000


def write(folder: Path, kind: str, split: str, num: int) -> Path:
    """Write the records of a kind; return records.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num):
        record = MAKERS[kind](split, index)
        record["image"].save(folder / f"{index}.png")
        lines.append(json.dumps(record | {"image": f"{index}.png"}, ensure_ascii=False) + "\n")
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "records.jsonl"


def main(config: RecipeDataConfig):
    print(f"wrote {config.num} records to {write(config.folder, config.kind, config.split, config.num)}")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(RecipeDataConfig, description=__doc__)))
