"""Files of published layouts (tests/data/layouts, one a layout), read to exactly these samples or refused by name."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from nanovlm.config import DataConfig
from nanovlm.data import layouts
from nanovlm.data.columns import parse_fields, rename
from nanovlm.data.images import open_image
from nanovlm.data.loader import Loader
from nanovlm.data.pictures import PICTURE_KEYS
from nanovlm.data.records import check, choices, content_parts, options_of, references, to_sample
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError

FOLDER = Path(__file__).parent / "layouts"
CHOICE = "Answer with the letter of the right option."
# Each file and its conversation: who speaks, and {a} and {b} for the pictures a.png and b.png where they stand.
READ = {
    "texts_finevision": "user {a}what is it? | assistant red | user sure? | assistant yes",
    "texts_cauldron": "user {a}{b}what is it? | assistant red",
    "texts_image": "user {a}what is it? | assistant red",
    "texts_file_name": "user {a}what is it? | assistant red",
    "texts_file_names": "user {b}{a}what is it? | assistant red",
    "texts_marker": "user left: {a} right: {b} same? | assistant no",
    "texts_independent": "user {a}what is it? | assistant red | user {a}sure? | assistant yes",
    "texts_independent_markers": "user {a}what is it? | assistant red | user sure?{a} | assistant yes",
    "texts_only": "user 1 + 1? | assistant 2",
    "messages_openai": "user what is it?{a} | assistant red",
    "messages_openai_data": "user {a}what is it? | assistant red",
    "messages_openai_plain": "user {a}what is it? | assistant red",
    "messages_url": "user {a}what is it? | assistant red",
    "messages_path": "user {a}what is it? | assistant red",
    "messages_image": "user {a}or{b}? | assistant red",
    "messages_carried_beside_id": "user {a}what is it? | assistant red",
    "messages_qwen": "user {a}what is it? | assistant red",
    "messages_placed": "user first{a}then{b} | assistant red",
    "messages_indexed": "user {b}{a}what is it? | assistant red",
    "messages_system": "system be brief | user {a}what is it? | assistant red",
    "messages_llama_factory": "user {a}what is it? | assistant red | user {b}and this? | assistant blue",
    "messages_swift": "system be brief | user {a}{b}differences? | assistant the color",
    "llava_pretrain": "user describe it{a} | assistant red",
    "llava_instruct": "user {a}what is it? | assistant red | user sure? | assistant yes",
    "llava_text": "user 1 + 1? | assistant 2",
    "llava_images": "user {a}{b}same? | assistant no",
    "llava_no_marker": "user {a}what is it? | assistant red",
    "sharegpt_system": "system be brief | user {a}what is it? | assistant red",
    "sharegpt_in_list": "system be brief | user {a}what is it? | assistant red",
    "sharegpt_roles": "user {a}what is it? | assistant red",
    "sharegpt_messages": "user {a}what is it? | assistant red",
    "conversation": "user {a}what is it? | assistant red",
    "alpaca": "user add\n1 and 1 | assistant 2",
    "alpaca_images": "system be brief | user hello | assistant good day | user {a}what is it? | assistant red",
    "swift_query": "user {a}what is it? | assistant red",
    "swift_history": "user {a}what is it? | assistant red | user {b}and this? | assistant blue",
    "question_answer": "user {a}what is it? | assistant red",
    "question_answers": "user {a}what is it? | assistant red",
    "question_vqav2": "user {a}what is it? | assistant red",
    "question_answer_list": "user {a}what is it? | assistant red",
    "question_cell": "user {a}what is it? | assistant red",
    "question_system": "system be brief | user {a}what is it? | assistant red",
    "question_number": "user {a}how many? | assistant 3",
    "question_box": "user {a}where? | assistant [1, 2, 3, 4]",
    "question_context": "user It is red.\nwhat is it? | assistant red",
    "fields": "user {a}what is it? | assistant red",
    "fields_several": "user is {b} left of {a}? | assistant no",
    "fields_chosen": "user {a}what is it? | assistant red",
    "preference": "user {a}what is it? | assistant red",
    "preference_messages": "user {a}what is it? | assistant red",
    "preference_trl": "user {a}what is it? | assistant red",
    "preference_rlaif_v": "user {a}what is it? | assistant red",
    "preference_llama_factory": "user {a}what is it? | assistant red",
    "caption": "user {a}describe the image. | assistant a red square",
    "captions": "user {a}describe the image. | assistant a red square",
    "caption_text": "user {a}describe the image. | assistant a red square",
    "caption_base64": "user {a}describe the image. | assistant a red square",
    "completion": "user {a}what is it? | assistant red",
    "completion_messages": "system be brief | user {a}what is it? | assistant red",
    "text": "text Once upon a time",
    "text_no_images": "text Once upon a time",
    "text_interleaved": "text see {a} above,\nnot {b}.",
    "choices_scienceqa": f"user {{a}}Look.\nwhich color?\nA. red\nB. blue\n{CHOICE} | assistant A",
    "choices_dict": f"user {{a}}which color?\nA. blue\nB. red\n{CHOICE} | assistant B",
    "choices_letters": f"user {{a}}which color?\nA. blue\nB. red\n{CHOICE} | assistant B",
    "choices_words": f"user {{a}}which color?\nA. blue\nB. red\n{CHOICE} | assistant B",
    "choices_ai2d": f"user {{a}}which color?\nA. green\nB. blue\nC. red\n{CHOICE} | assistant C",
    "choices_mmbench": f"user {{a}}which color?\nA. red\nB. blue\nC. green\n{CHOICE} | assistant A",
}
REFUSED = {
    "refused_swift_rejected": r"good or bad, .* --data.fields prompt=query chosen=response rejected=rejected_response",
    "refused_kto": "good or bad, and it is no pair",
    "refused_label": "has the label of a class: write the class's name, and train it by --data.fields caption=label",
    "refused_image_text_label": "has the label of a class: .* --data.fields caption=label",
    "refused_text_label": "has the label of a class: .* question=text answer=label",
    "refused_text_empty": "the text of the record is empty",
    "refused_detection": r"no layout has the keys of this record: \w+, \w+; name its columns, as in --data.fields",
    "refused_audio": "audio is not empty, and sound is not read: leave it out",
    "refused_audio_part": "each part of message 0 must be .*, not a part of type audio",
    "refused_tools": "messages have calls of tools, which are not trained",
    "refused_untrained": "messages leave answers out of training by loss or weight or train; here all are trained",
    "refused_two_layouts": "can be read as messages and as question: decide by --data.layout messages",
    "refused_two_systems": "two system prompts, in system and in its first message",
    "refused_imgs": "the field 'imgs' seems to hold a picture, .* --data.fields image=imgs",
    "refused_img": "the field 'img' seems to hold a picture, .* --data.fields image=img",
    "refused_picture": "the field 'picture' seems to hold a picture, .* --data.fields image=picture",
    "refused_photo_bytes": "the field 'scan' seems to hold a picture, .* --data.fields image=scan",
    "refused_image_id": "the field 'image_id' seems to hold a picture",
    "refused_second_image": "the field 'image_2' seems to hold a picture, .* --data.fields images=image_1,image_2",
    "refused_more_markers": "the messages show 2 images, the record has 1",
    "refused_fewer_markers": "the messages show 1 images, the record has 2",
    "refused_marker_alone": "the text shows <image> 1 times, and the record has no picture",
    "refused_marker_in_answer": "an answer has the marker <image>, and answers show no pictures",
    "refused_marker_and_part": "the text has the marker <image>, and image parts are beside it",
    "refused_marker_number": r"the text shows the pictures \[3\] \(0 is none\), the record has 2",
    "refused_choice_outside": "the answer 'C' is none of the 2 options",
    "refused_choice_doubtful": "the answer '1' can be more than one of the 3 options",
    "refused_choice_several": "answer must be a letter, an index or the text of an option, not list",
    "refused_numpy_cell": "answers looks like a list and is none in the notation of JSON or Python",
    "refused_image_in_turn": "the field 'images' of a turn seems to hold a picture: put it into the images of the",
    "refused_image_in_text_part": "each part of message 0 must be .*, not one with text and a picture",
    "refused_deep_picture": "the field 'media' seems to hold a picture, .* --data.fields image=media",
    "refused_no_answer": "answers is an empty list: there is nothing to train",
    "refused_caption_alone": "a caption needs a picture",
}
FIELDS = {
    "fields": ("image=img", "question=q", "answer=a"),
    "fields_several": ("images=image_1,image_2,image_3",),
    "fields_chosen": ("completion=chosen",),
}
REFERENCES = {
    "texts_finevision": [("red",), ("yes",)],
    "messages_openai_data": [("red",)],
    "question_answers": [("red", "crimson")],
    "question_answer_list": [("red", "crimson")],
    "question_vqav2": [("red", "pink", "red")],
    "question_cell": [("red", "crim'son")],
    "captions": [("a red square", "all red")],
    "choices_letters": [("B",)],
}


def options(name, layout=""):
    return options_of(DataConfig(fields=FIELDS.get(name, ()), layout=layout))


def read(name):
    return open_source(str(FOLDER / f"{name}.jsonl")).read(0)


def tell(sample):
    """Write a sample as in READ."""
    names = {open_image(FOLDER / f"{name}.png").tobytes(): f"{{{name}}}" for name in "ab"}
    unseen = iter([] if sample.independent else sample.images)
    told = []
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        assert all(part.keys() == ({"type"} if part["type"] == "image" else {"type", "text"}) for part in parts)
        if sample.independent:
            unseen = iter(sample.images)
        text = "".join(p["text"] if p["type"] == "text" else names[next(unseen).tobytes()] for p in parts)
        told.append(f"{message['role']} {text}")
    assert not list(unseen) or sample.independent
    return " | ".join(told)


def test_every_file_is_in_a_table():
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == READ.keys() | REFUSED.keys()
    assert len(READ) >= 30 and REFERENCES.keys() < READ.keys() and FIELDS.keys() < READ.keys()


@pytest.mark.parametrize("name", READ)
def test_a_layout_is_read_to_exactly_its_sample(name):
    sample = to_sample(read(name), **options(name))
    assert tell(sample) == READ[name]
    assert sample.independent == ("independent" in name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name):
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        to_sample(read(name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name", READ)
def test_what_is_right_is_kept_for_tasks(name):
    raw = read(name)
    trained = [text.removeprefix("assistant ") for text in READ[name].split(" | ") if text.startswith("assistant ")]
    right = references(raw, **options(name))
    assert right == REFERENCES.get(name, [(answer,) for answer in trained])
    assert [answers[0] for answers in right] == trained
    expected = {"choices_ai2d": ("green", "blue", "red"), "choices_mmbench": ("red", "blue", "green")}
    expected |= {
        "choices_scienceqa": ("red", "blue"),
        "choices_words": ("blue", "red"),
        "choices_letters": ("blue", "red"),
        "choices_dict": ("blue", "red"),
    }
    assert choices(raw, **options(name)) == expected.get(name, ())


def test_each_layout_has_a_file_and_can_be_named():
    told = {}
    for name in (*READ, *REFUSED):
        raw = read(name)
        try:
            told.setdefault(layouts.recognise(rename(raw, parse_fields(FIELDS.get(name, ())))), name)
        except UserError:
            continue
    assert told.keys() == layouts.LAYOUTS.keys()
    for layout, name in told.items():
        if name in READ:
            assert tell(to_sample(read(name), **options(name, layout))) == READ[name]
        else:
            with pytest.raises(UserError, match=REFUSED[name]):
                to_sample(read(name), **options(name, layout))


def test_a_named_layout_decides():
    raw = read("refused_two_layouts")
    assert tell(to_sample(raw, layout="question")) == "user {a}what is it? | assistant red"
    assert tell(to_sample(raw, layout="messages")) == "user {a}what is it? | assistant blue"
    with pytest.raises(UserError, match="the layout query needs query, response; this record has the keys: "):
        to_sample(raw, layout="query")
    with pytest.raises(UserError, match=r"data.layout = 'vqa' is unknown; there are texts, messages, "):
        options_of(DataConfig(layout="vqa"))


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("image", "data.fields = 'image' must be name=column, as in image=img"),
        ("image=", "must be name=column"),
        ("=img", "must be name=column"),
        ("images=a,,b", "must be name=column"),
        ("imag=img", r"no layout reads 'imag' \(in 'imag=img', name=column\); the nearest is 'image'"),
        ("image=gone", "the record has no 'gone', which data.fields names for image; its keys are: img, q, a"),
    ],
)
def test_fields_that_cannot_be_read_are_explained(field, sentence):
    with pytest.raises(UserError, match=sentence):
        check(read("fields"), fields=parse_fields((field, "question=q", "answer=a")))


def test_an_empty_column_is_a_record_without_picture_and_another_name_wins():
    fields = parse_fields(("image=img", "question=q", "answer=a"))
    raw = {"img": None, "q": "1 + 1?", "a": "2"}
    assert tell(to_sample(raw, fields=fields)) == "user 1 + 1? | assistant 2"
    image = {name: open_image(FOLDER / f"{name}.png") for name in "ab"}
    assert tell(to_sample({**raw, "img": image["a"], "images": [image["b"]]}, fields=fields)).startswith("user {a}1")
    assert tell(to_sample({"image": image["b"], "q": "?", "a": "2"}, fields=fields)).startswith("user {b}?")


@pytest.mark.parametrize(
    "key", ["image" + "1" * 27 + "x", "image" + "_ids" * 40 + "x", "img" + "url" * 1000, "_" * 10**5]
)
def test_no_key_takes_long_to_judge(key):
    """A pattern that tries all ways to cut such a key would not end."""
    started = time.process_time()
    try:
        check({"texts": [{"user": "a", "assistant": "b"}], key: "x" * 10**6 + ".png" * 10**5})
    except UserError as error:
        assert "seems to hold a picture" in str(error)
    assert time.process_time() - started < 5


def test_pictures_of_damaged_base64_and_long_names_are_told_shortly(tmp_path, capsys, processor):
    """25 records with 300 kB each where a picture should be: neither output nor checkpoint quotes them."""
    url = "data:image/png;base64," + "iVBORw0KGgo" + "A" * 300_000
    bad = [url, url[:-3] + "!!!", "data:image/png," + url, "x" * 300_000 + ".png", url[22:]]
    lines = [json.dumps({"images": [bad[i % 5]], "texts": [{"user": f"{i}?", "assistant": "a"}]}) for i in range(20)]
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    lines += [json.dumps({"messages": turns}), json.dumps({"question": "q" * 300_000, "answers": {}})]
    lines += [json.dumps({url: 1}), json.dumps({"image": 1, "texts": [], url: url}), json.dumps({"role": url})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loader = Loader(
        open_source(str(tmp_path / "a.jsonl")),
        lambda raw: processor.document(to_sample(raw)),
        DataConfig(row_length=256),
        processor.config.pad_token_id,
        num_epochs=1,
    )
    with pytest.raises(UserError, match=r"no sample of .* could be used: 25 corrupt, 25 read") as error:
        next(loader)
    assert len(capsys.readouterr().out) < 25_000 and len(str(error.value)) < 5000
    assert len(json.dumps(loader.state_dict())) < 25_000


# --- any record ------------------------------------------------------------------------------------------------

VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3.5,
        float("nan"),
        float("inf"),
        10**400,
        "",
        " ",
        "a",
        "<image>",
        "[1, 2",
        "['a' 'b']",
    ),
    *([], {}, [[]], [None], [{}], [1, 2], ["a", "b"], {"bytes": None, "path": None}, {"url": {"url": "a.png"}}),
    *("a.png", ["a.png"], "gone.png", "../a.png", "data:image/png;base64,AAAA", "[" * 5000 + "]", "\ud800"),
    *(
        [{"role": "user", "content": "a"}],
        [{"from": "human", "value": 3}],
        [{"user": "a", "assistant": "b"}],
        "<image 9>",
    ),
]


def mutate(rng, value, depth=0):
    """Change a value of JSON in one place: drop, rename, replace, repeat or nest it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        choice = rng.randrange(6)
        if choice == 0:
            del value[key]
        elif choice == 1:
            value[rng.choice(KEYS)] = value.pop(key)
        elif choice == 2:
            value[rng.choice(KEYS)] = rng.choice(VALUES)
        else:
            value[key] = mutate(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        value, i = list(value), rng.randrange(len(value))
        if rng.random() < 0.2:
            return value * rng.randint(0, 3)
        value[i] = mutate(rng, value[i], depth + 1)
        return value
    if isinstance(value, str) and rng.random() < 0.3:
        place = rng.randint(0, len(value))
        return value[:place] + rng.choice(["<image>", "\n", "<image 1>", "\x1b[2J", "日"]) + value[place:]
    return rng.choice(VALUES)


KEYS = sorted({key for name in (*READ, *REFUSED) for key in json.loads((FOLDER / f"{name}.jsonl").read_text())})


@pytest.mark.parametrize("seed", [time.time_ns() % 10**9], ids=lambda _seed: "seed")
def test_mutated_records_are_samples_or_counted(tmp_path, processor, seed, capsys):
    """Records in = documents + counted losses; of each loss a sentence; nothing else is raised, in bounded memory."""
    rng = random.Random(seed)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes((FOLDER / f"{name}.png").read_bytes())
    raws = [json.loads((FOLDER / f"{name}.jsonl").read_text()) for name in (*READ, *REFUSED) if name not in FIELDS]
    lines = []
    for _ in range(1500):
        raw = rng.choice(raws)
        for _ in range(rng.randint(1, 3)):
            raw = mutate(rng, raw)
        lines.append(json.dumps(raw))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "a.jsonl"))
    raised, read = [], []

    def process(raw):
        try:
            sample, right = to_sample(raw), references(raw)
            contents = [content_parts(message["content"]) for message in sample.messages]
            assert len(right) == sum(message["role"] == "assistant" for message in sample.messages)
            assert not any("<image>" in part["text"] for parts in contents for part in parts if part["type"] == "text")
            document = processor.document(sample)
        except UserError:
            raise
        except Exception as error:  # which the loader would count
            raised.append((error, raw))
            raise
        read.append(document)
        return document

    tracemalloc.start()
    loader = Loader(source, process, DataConfig(row_length=512, max_bad_fraction=1.0), 0, num_epochs=1)
    started = time.process_time()
    num_batches = sum(1 for _ in loader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counts = loader.counts
    assert not raised, f"seed {seed}: {raised[0]}"
    assert counts["read"] == 1500 == counts["documents"] + counts["corrupt"] + counts["too long"], f"seed {seed}"
    assert num_batches and counts["packed"] == counts["documents"] == len(read) - counts["too long"] > 100
    assert counts["corrupt"] > 300 and len(capsys.readouterr().out) < 30_000
    # A file that a record names is read into a buffer of the largest size allowed, 2**29 bytes.
    assert time.process_time() - started < 60 and peak < 2**29 + 2**28, f"seed {seed}"


def test_a_cell_that_is_an_interval_is_one_answer():
    assert references({"question": "where?", "answers": "[1, 2]"}) == [("[1, 2]",)]
    assert references({"question": "where?", "answers": "['a', 'b']"}) == [("a", "b")]


def test_a_text_beside_a_question_is_not_passed_over():
    record = {"text": "Bob is 7.", "question": "how old is Bob?", "answer": "7"}
    with pytest.raises(UserError, match="a text stands beside the question and would not be shown"):
        check(record)
    messages = check(record, fields=parse_fields(["context=text"]))[1]
    assert messages[0]["content"] == "Bob is 7.\nhow old is Bob?"


@pytest.mark.parametrize("nothing", [{key: x} for key in PICTURE_KEYS for x in (None, "", [], {})], ids=str)
def test_a_text_beside_no_picture_is_a_text(nothing):
    assert check({"text": "Once"} | nothing) == ([], [{"role": "text", "content": "Once"}], False)
    assert check({"text": "1 + 1?", "answer": "2"} | nothing, fields=parse_fields(["question=text"]))[0] == []
    with pytest.raises(UserError, match="no layout has the keys of this record"):
        check({"label": 3} | nothing)
