"""What is held out is decided by pictures: no training record shows a held-out one, whatever is asked about it."""

import hashlib
import itertools
import json
import math

import pytest
from PIL import Image

from nanovlm.config import DataConfig
from nanovlm.data.loader import Loader
from nanovlm.data.mixture import Concatenation
from nanovlm.data.records import to_sample
from nanovlm.data.source_lines import TextFiles
from nanovlm.data.split import describe_split, is_validation
from tests.data.test_loader import numbered

TURN = {"user": "which?", "assistant": "this"}


def is_held_out(picture: bytes, fraction: float) -> bool:
    """The rule as the docstring of split.py has it, written down again."""
    return int(hashlib.blake2b(picture, digest_size=8).hexdigest(), 16) / 2**64 < fraction


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return TextFiles(path)


def flat_questions(folder, num_pictures=40, each=5):
    """A question a line, as most published sets are: every picture comes several times."""
    for i in range(num_pictures):
        (folder / f"{i}.png").write_bytes(f"picture {i}".encode())
    turns = [{"user": f"question {k}?", "assistant": f"answer {k}"} for k in range(each)]
    return write(folder / "a.jsonl", [{"image": f"{i}.png", "texts": [t]} for i in range(num_pictures) for t in turns])


def read_sides(source, fraction, **options):
    """The numbers of the records that the loaders of the two splits turn into documents."""
    sides = {}
    for split in ("train", "val"):
        seen = sides[split] = []

        def process(raw, seen=seen):
            seen.append(raw)
            return numbered(len(seen))

        config = DataConfig(row_length=64, pack_buffer=20, val_fraction=fraction, max_bad_fraction=1.0)
        loader = Loader(source, process, config, 0, split=split, num_epochs=1, **options)
        list(loader)
        sides[f"counts of {split}"] = loader.counts
    return sides


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_no_picture_is_both_trained_on_and_held_out(tmp_path, fraction):
    sides = read_sides(flat_questions(tmp_path), fraction)
    trained, held_out = ({raw["images"][0] for raw in sides[split]} for split in ("train", "val"))
    assert held_out == {picture for i in range(40) if is_held_out(picture := f"picture {i}".encode(), fraction)}
    assert trained and held_out and not trained & held_out and len(trained | held_out) == 40
    assert [len(sides["train"]), len(sides["val"])] == [5 * len(trained), 5 * len(held_out)]


def test_a_record_is_held_out_if_one_of_its_pictures_is():
    """So that no training record shows one, in whatever place; n pictures hold out more records than one does."""
    pictures = [f"{i}".encode() for i in range(200)]
    records = [{"images": [a, b], "texts": [TURN]} for a, b in itertools.pairwise(pictures)]
    sides = [is_validation(record, 0.2) for record in records]
    kept_out = {picture for picture in pictures if is_held_out(picture, 0.2)}
    assert sides == [any(picture in kept_out for picture in record["images"]) for record in records]
    assert math.isclose(sum(sides) / len(sides), 1 - 0.8**2, abs_tol=0.1)


def test_without_pictures_the_text_decides_in_either_of_its_forms():
    turns = [{"user": f"what is {i}?", "assistant": f"it is {i}"} for i in range(60)]
    for turn in turns:
        said = [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
        parts = [{**said[0], "content": [{"type": "text", "text": turn["user"]}]}, said[1]]
        forms = [{"texts": [turn]}, {"messages": said}, {"messages": parts}, {"id": 3, "texts": [turn | {"kind": "x"}]}]
        assert len({is_validation(form, 0.5) for form in forms}) == 1
    assert 15 < sum(is_validation({"texts": [turn]}, 0.5) for turn in turns) < 45


def test_pairs_of_one_prompt_are_on_one_side():
    def pairs_of(i):
        return [{"prompt": f"what is {i}?", "chosen": f"it is {k}", "rejected": f"it was {k}"} for k in range(4)]

    sides = [{is_validation(pair, 0.5) for pair in pairs_of(i)} for i in range(60)]
    assert all(len(of_prompt) == 1 for of_prompt in sides) and 15 < sum(True in of_prompt for of_prompt in sides) < 45


def test_a_picture_is_the_same_beside_a_conversation_and_in_it_and_whatever_is_asked():
    answer = {"role": "assistant", "content": "this"}
    for i in range(40):
        picture = f"{i}".encode()
        carried = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]}]
        placed = [{"role": "user", "content": [{"type": "text", "text": "here:"}, {"type": "image"}]}, answer]
        forms = [{"image": picture, "texts": [TURN]}, {"images": [picture], "texts": [TURN, TURN]}]
        forms += [{"messages": [*carried, answer]}, {"images": [picture], "messages": placed}]
        assert {is_validation(form, 0.5) for form in forms} == {is_held_out(picture, 0.5)}


def test_decoded_pictures_are_told_apart_by_their_pixels():
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(40)]
    sides = [is_validation({"images": [picture], "texts": [TURN]}, 0.5) for picture in pictures]
    assert sides == [is_held_out(picture.tobytes(), 0.5) for picture in pictures] and 8 < sum(sides) < 32


GARBAGE = [
    *({key: odd} for key in ("messages", "texts", "images", "image") for odd in (3, 1.5, True, "x", {}, [3], [None])),
    {"texts": [TURN], "images": 3},
    {"texts": [TURN], "images": [3]},
    {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": {"a": 1}}]},
    {"messages": 3, "images": [[1]], "texts": {"x": {"y": 2}}},
    3,
    [1],
    "text",
    None,
]


def test_garbage_is_a_counted_loss_of_the_training_split_alone(tmp_path, capsys):
    good = [{"texts": [TURN | {"user": f"{i}"}]} for i in range(30)]
    source = write(tmp_path / "a.jsonl", [*good, *GARBAGE])

    def process(raw):
        to_sample(raw)
        return numbered(1)

    config = DataConfig(row_length=64, pack_buffer=20, val_fraction=0.3, max_bad_fraction=1.0)
    counts = {}
    for split in ("train", "val"):
        loader = Loader(source, process, config, 0, split=split, num_epochs=1)
        list(loader)
        counts[split] = loader.counts
    num = len(good) + len(GARBAGE)
    assert counts["train"]["read"] == counts["val"]["read"] == num
    assert [counts[split]["corrupt"] for split in ("train", "val")] == [len(GARBAGE), 0]
    assert counts["train"]["documents"] + counts["val"]["documents"] == len(good) and counts["val"]["documents"] > 3
    shown = capsys.readouterr().out
    assert "skipped as corrupt" in shown and "Error" not in shown  # each in a sentence, none by a bug


def test_the_numbers_of_both_sides_are_said(tmp_path):
    source = flat_questions(tmp_path)
    kept_out = sum(is_held_out(f"picture {i}".encode(), 0.2) for i in range(40))
    expected = (
        f"{source.name}, 200 records: {5 * kept_out} with {kept_out} pictures are held out, "
        f"{5 * (40 - kept_out)} with {40 - kept_out} pictures are trained on"
    )
    assert describe_split(source, 0.2) == [expected]
    texts = write(tmp_path / "b.jsonl", [{"texts": [TURN | {"user": f"{i}"}]} for i in range(1001)])
    first, second = describe_split(Concatenation([source, texts]), 0.2)
    assert first == expected and second.startswith(f"{texts.name}, 501 of 1001 records: ") and "picture" not in second
    pairs = [{"images": ["0.png", f"{i}.png"], "texts": [TURN]} for i in range(1, 40)]
    [line] = describe_split(write(tmp_path / "c.jsonl", pairs), 0.2)
    assert "on both sides" in line or is_held_out(b"picture 0", 0.2)
