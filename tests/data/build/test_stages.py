"""Each stage against a plain reading of what it promises."""

import copy
import hashlib
import io
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm.data.build import agreement, checks, comparing, hashes, leakage
from nanovlm.data.build.agreement import AgreementOptions, AlikeOptions
from nanovlm.data.build.items import Drop, Item, read_item
from nanovlm.data.build.ledger import is_whole, read_lines, write_lines
from nanovlm.data.build.shards import Written, to_written, write_shard
from nanovlm.data.build.stages import STAGES
from nanovlm.data.layouts import CHOICE_PROMPT
from nanovlm.data.members import encode
from nanovlm.data.pictures import Video
from nanovlm.data.records import RATINGS, check, content_parts, to_sample
from nanovlm.data.source import Ref
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.eval.questions import ask
from nanovlm.hub.dual import save_dual
from tests.data.build.test_funnel import jpeg, picture, png
from tests.data.build.test_hashes import to_bits
from tests.data.test_members import MP4
from tests.model.test_dual import make, tokenizer

assert tokenizer  # a fixture


def item(*images, answer="It is a picture.", number=0, options=None, **record):
    raw = {"images": list(images), "texts": [{"user": "What is it?", "assistant": answer}]} | record
    found = read_item(lambda key: key, Ref(0, number, 0, raw, "here", f"sample {number}", None), options or {})
    assert isinstance(found, Item), found
    return found


def reasons(judge, items):
    return [drop and drop.reason for drop in judge(items)]


# --- one record ------------------------------------------------------------------------------------------------


def test_ratings_leave_out_turns_and_records():
    turns = [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}]
    raw = {"texts": turns, "relevance_ratings": [1, 4]}
    read = {"min_ratings": dict(zip(RATINGS, (3, 0, 0, 0), strict=True))}
    found = item(options=read, **raw)
    assert found.answers == ["d"] and checks.open_ratings(checks.RatingsOptions())([found]) == [None]
    assert found.scores == {"turns_left_out": 1}
    lost = read_item(lambda key: key, Ref(0, 0, 0, raw | {"relevance_ratings": [1, 2]}, "here", "", None), read)
    assert isinstance(lost, Drop) and lost.stage == "ratings"


def test_listed_pictures_and_words(tmp_path):
    shown = [picture(i) for i in range(5)]
    files = [png(image) for image in shown]
    (tmp_path / "pictures").write_text(
        f"# not wanted\nsha256:{hashlib.sha256(files[0]).hexdigest()}   # the file\n"
        f"pixels:{hashes.digest_pixels(shown[1])}\nHASH:{hashes.hash_picture(shown[2]).upper()}\n"
    )
    (tmp_path / "words").write_text("bad  word\na.c\n")
    judge = STAGES["safety"].open(checks.SafetyOptions((str(tmp_path / "pictures"),), (str(tmp_path / "words"),)))
    shown[1].save(tmp_path / "1.webp", lossless=True)
    items = [
        item(files[0]),
        item(jpeg(shown[0], 95)),
        item((tmp_path / "1.webp").read_bytes()),
        item(jpeg(shown[2], 50)),
        item(files[3], files[1]),
        item(files[4], answer="a BAD\nword."),
        item(files[4], answer="a bad wording, and abc"),
        item(answer="a.c"),
    ]
    file, pixels, like, word = (
        "shows a listed picture (its file)", "shows a listed picture (its pixels)", "shows a picture like a listed one",
        "has a listed word",
    )  # fmt: skip
    assert reasons(judge, items) == [file, None, pixels, like, pixels, word, None, word]
    (tmp_path / "pictures").write_text("sha256:abc\n")
    with pytest.raises(UserError, match="has the line 'sha256:abc'; it must be sha256:, pixels: or hash:"):
        checks.open_safety(checks.SafetyOptions((str(tmp_path / "pictures"),)))
    with pytest.raises(UserError, match="there cannot be read"):
        checks.open_safety(checks.SafetyOptions(words=(str(tmp_path / "not there"),)))


def test_all_planted_pictures_of_evaluation_are_found(tmp_path):
    """As they are, saved anew, resized, in grey, under other text and beside other pictures; and none of the others."""
    changes = (
        lambda image: png(image),
        lambda image: jpeg(image, 50),
        lambda image: png(image.resize((60, 50))),
        lambda image: jpeg(image.resize((180, 150)), 80),
        lambda image: png(image.convert("L")),
    )
    lines = []
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(png(picture(i)))
        lines.append({"image": f"{i}.png", "question": "What is it?", "answer": "a picture"})
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = leakage.open_leakage(leakage.LeakageOptions((str(tmp_path / "asked.jsonl"),)))
    planted = [item(change(picture(i)), answer=f"other {i}") for i in range(20) for change in changes]
    planted += [item(png(picture(100 + i)), png(picture(i))) for i in range(20)]
    assert all(reasons(judge, planted))
    assert not any(reasons(judge, [item(png(picture(i))) for i in range(100, 140)]))
    (tmp_path / "asked.jsonl").write_text(json.dumps(lines[0] | {"image": "none.png"}) + "\n")
    with pytest.raises(UserError, match=r"stages.leakage.sources: .*asked.jsonl, sample 0: .*none.png"):
        leakage.open_leakage(leakage.LeakageOptions((str(tmp_path / "asked.jsonl"),)))


def test_caps():
    options = comparing.CapsOptions("meta.kind", 2, ("b=1", "c=0"))
    kinds = ["a", "b", "a", "b", "a", "c", None, None, None]
    items = [item(meta={"kind": kind}, number=i) for i, kind in enumerate(kinds)]
    assert comparing.mark_caps(options)(items) == [None] * 9
    compare = comparing.compare_caps(options, None)
    drops = [drop is not None for drop in compare.judge(list(range(9)), [x.marks["caps"] for x in items])]
    assert drops == [False, False, False, True, True, True, False, False, True]


# --- records before ----------------------------------------------------------------------------------------------


def in_chunks(open_compare, marks, rng, resumed=False):
    """Compare marks in chunks of any size; with `resumed`, by a new comparison after each, which takes up the rest."""
    compare, drops, start = open_compare(), [], 0
    while start < len(marks):
        end = start + rng.randint(1, 9)
        numbers = list(range(start, min(end, len(marks))))
        if resumed:
            compare = open_compare()
            kept = [i for i in range(start) if drops[i] is None]
            compare.add(kept, [marks[i] for i in kept])
        drops += compare.judge(numbers, marks[start:end])
        start = end
    return [None if drop is None else drop.like for drop in drops]


def first_like(num, is_like):
    """The definition: a record is dropped if one before it, which was kept, is like it; and for the first such one."""
    kept, drops = [], []
    for i in range(num):
        like = next((j for j in kept if is_like(i, j)), None)
        drops.append(like)
        kept += [i] if like is None else []
    return drops


@given(seed=st.integers(0, 2**32 - 1), resumed=st.booleans())
@settings(max_examples=8, deadline=None)
def test_near_duplicates_are_those_of_the_definition(seed, resumed):
    """Some records have two pictures, some have a text to compare, and some nothing."""
    rng, most = random.Random(seed), 20
    centres = [rng.getrandbits(256) for _ in range(4)]

    def hash_text():
        return f"{rng.choice(centres) ^ sum(1 << i for i in rng.sample(range(256), rng.randint(0, 14))):064x}"

    marks = [[[hash_text() for _ in range(rng.choice((1, 1, 2)))], rng.choice(([], ["t"]))] for _ in range(60)]
    marks = [mark if rng.random() > 0.1 else [] for mark in marks]

    def is_like(i, j):
        a, b = marks[i], marks[j]
        if not a or not b or a[1] != b[1] or len(a[0]) != len(b[0]):
            return False
        return all((to_bits(x) != to_bits(y)).sum() <= most for x, y in zip(a[0], b[0], strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes, "TAIL", 8)
        options = comparing.NearOptions(most)
        found = in_chunks(lambda: comparing.compare_near(options, None), marks, rng, resumed)
    assert found == first_like(60, is_like)


@pytest.mark.parametrize("resumed", (False, True))
def test_exact_duplicates_are_those_of_the_definition(tmp_path, resumed):
    rng = random.Random(0)
    marks = [hashes.digest_text(str(rng.randrange(25))) for _ in range(60)]
    options = comparing.ExactOptions()
    found = in_chunks(lambda: comparing.compare_exact(options, tmp_path), marks, rng, resumed)
    assert found == first_like(60, lambda i, j: marks[i] == marks[j])


def test_what_an_exact_duplicate_is():
    a, b, text = png(picture(0)), jpeg(picture(1)), {"answer": "other"}
    items = [item(a), item(a, **text), item(b), item(a, b), item(b, a), item(), item(**text)]

    def groups(of):
        comparing.mark_exact(comparing.ExactOptions(of))(items)
        marks = [x.marks["exact"] for x in items]
        return [marks.index(mark) for mark in marks]

    assert groups("both") == [0, 1, 2, 3, 4, 5, 6]
    assert groups("pictures") == [0, 0, 2, 3, 4, 5, 6]
    assert groups("text") == [0, 1, 0, 0, 0, 0, 1]


PAIR = {"prompt": "Which?", "chosen": "red", "rejected": "blue"}
ASKED = {"question": "How many?", "answers": ["two", "2"]}
TURNS = {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}]}
CHOICE = {"question": "Which?", "options": ["red", "blue"], "answer": "A"}
TEACHER = {"tokens": [5], "ids": [[5, 6]], "logprobs": [[-0.1, -3.0]]}


@pytest.mark.parametrize(
    ("raw", "other"),
    [
        (PAIR, {"rejected": "green"}),
        (PAIR, {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}),
        (PAIR, {"prompt": None, "rejected": None, "chosen": None, "question": "Which?", "answer": "red"}),
        (ASKED, {"answers": ["two", "a pair"]}),
        (ASKED, {"kind": "count"}),
        (ASKED, {"question": "How", "answers": ["many? two", "2"]}),
        (TURNS, {"independent": True}),
        ({"texts": TURNS["texts"][:1]}, {"texts": None, "text": "a? b"}),
        (TURNS, {"teacher": TEACHER}),
        (TURNS | {"teacher": TEACHER}, {"teacher": TEACHER | {"ids": [[5, 7]]}}),
        (TURNS, {"texts": [TURNS["texts"][0], TURNS["texts"][1] | {"references": ["e"]}]}),
        (TURNS, {"texts": [TURNS["texts"][0] | {"kind": "k"}, TURNS["texts"][1]]}),
        (CHOICE, {"options": ["red", "green"]}),
        (CHOICE, {"options": None, "question": f"Which?\nA. red\nB. blue\n{CHOICE_PROMPT}"}),
        ({"text": "a <image> b"}, {"text": "a b <image>"}),
    ],
)
def test_all_that_training_and_scoring_read_tells_records_apart(raw, other):
    """And a column that neither reads, case and white space do not."""
    raws = [raw, raw | other, raw | {"taken": "in May"}, json.loads(json.dumps(raw).replace("? ", "?  "))]
    raws = [{"image": png(picture(0))} | {key: value for key, value in x.items() if value is not None} for x in raws]
    items = [read_item(lambda key: key, Ref(0, 0, 0, x, "here", "", None), {}) for x in raws]
    for of in ("both", "text"):
        assert comparing.mark_exact(comparing.ExactOptions(of))(items) == [None] * 4
        first, second, *same = [x.marks["exact"] for x in items]
        assert (first != second or (of == "text" and "<image>" in str(raw))) and same == [first] * 2
    assert len({x.content for x in items[:3]}) == 3
    comparing.mark_exact(comparing.ExactOptions("pictures"))(items)
    assert len({x.marks["exact"] for x in items}) == 1


def test_the_same_record_in_two_layouts_is_a_duplicate():
    raws = [{"caption": "a Red dog"}, {"texts": [{"user": "describe the image.", "assistant": "a red\ndog"}]}]
    raws += [{"messages": [{"role": "user", "content": "<image>\nDescribe the image."},
                           {"role": "assistant", "content": [{"type": "text", "text": "A red dog"}]}]}]  # fmt: skip
    items = [
        read_item(lambda key: key, Ref(0, 0, 0, raw | {"image": png(picture(0))}, "here", "", None), {}) for raw in raws
    ]
    comparing.mark_exact(comparing.ExactOptions())(items)
    assert len({x.marks["exact"] for x in items}) == 1


# --- a dual encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dual(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("dual") / "model"
    model, processor = make(tokenizer)
    save_dual(folder, model, processor)
    return str(folder), model.eval(), processor


@torch.inference_mode()
def test_agreement_is_the_cosine_of_text_and_pictures(dual):
    folder, model, processor = dual
    items = [item(png(picture(0)), answer="a red circle"), item(png(picture(1)), png(picture(2)), answer="x"), item()]
    judge = agreement.open_agreement(AgreementOptions(folder))
    assert judge(items) == [None] * 3 and "agreement" not in items[2].scores
    for one in items[:2]:
        texts = model.embed_texts(processor.encode_texts(["\n".join(one.answers)]))
        images = torch.stack([model.embed_images(processor.encode_images([x]))[0] for x in one.pictures])
        wanted = torch.nn.functional.cosine_similarity(texts, images).mean()
        assert abs(one.scores["agreement"] - float(wanted)) < 2e-4
    low, high = sorted(one.scores["agreement"] for one in items[:2])
    drops = agreement.open_agreement(AgreementOptions(folder, min_score=(low + high) / 2))(items)
    assert [bool(drop) for drop in drops] == [x.scores.get("agreement") == low for x in items]


def test_another_model_of_the_same_name_is_told_and_another_list_too(dual, tmp_path):
    folder, model, processor = dual
    before = agreement.digest_model(AgreementOptions(folder))
    other = copy.deepcopy(model)
    with torch.no_grad():
        max(other.parameters(), key=torch.numel).view(-1)[3] += 1e-3
    save_dual(tmp_path / "model", other, processor)
    assert STAGES["alike"].digest(AlikeOptions(folder)) == before
    assert agreement.digest_model(AgreementOptions(str(tmp_path / "model"))) != before
    options = checks.SafetyOptions(words=(str(tmp_path / "words"),))
    found = []
    for words in ("bad\n", "bad # a comment\n", "worse\n"):
        (tmp_path / "words").write_text(words)
        found.append(STAGES["safety"].digest(options))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("resumed", (False, True))
def test_alike_pictures_are_those_of_the_definition(dual, tmp_path, resumed, monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK", 4)
    folder, model, processor = dual
    items = [item(png(picture(i % 7, (40 + i, 40))), number=i) for i in range(20)] + [item(number=20)]
    options = AlikeOptions(folder, min_cosine=0.999)
    assert agreement.mark_alike(options)(items) == [None] * 21
    marks = [x.marks["alike"] for x in items]
    with torch.inference_mode():
        vectors = torch.cat([model.embed_images(processor.encode_images(x.pictures)) for x in items[:20]])
    cosines = (vectors.half().float() @ vectors.half().float().T).numpy()
    limit = float(np.median(cosines))
    options = AlikeOptions(folder, min_cosine=limit)
    found = in_chunks(lambda: agreement.compare_alike(options, tmp_path), marks, random.Random(0), resumed)
    assert found == first_like(21, lambda i, j: max(i, j) < 20 and cosines[i, j] >= limit)
    assert 3 < sum(x is not None for x in found) < 20


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ("tar", "parquet"))
def test_pairs_independent_questions_and_all_formats_are_written(tmp_path, suffix):
    frames = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tiff"}
    files = []
    for kind in frames:
        file = io.BytesIO()
        picture(1).save(file, kind)
        files.append(file.getvalue())
    assert [encode(data) for data in files] == list(zip(frames.values(), files, strict=True))
    assert encode(picture(1)) == ("png", png(picture(1)))
    pair = {"prompt": [{"role": "user", "content": "What?"}], "chosen": "good", "rejected": "bad"}
    two = {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}], "independent": True}
    raws = [{"image": files[0], **pair, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}]
    raws += [{"images": files, "texts": [{"user": "a?", "assistant": "b"}]}]
    raws += [{"images": files[:2], **two}, {"text": "no conversation <b>"}, {"image": picture(2), "caption": "a.png"}]
    written = []
    for number, raw in enumerate(raws):
        found = read_item(lambda key: key, Ref(0, number, 0, raw, "here", "a.png?#.png", None), {})
        written.append(to_written(found, {"where": "a.png?#.png"}, suffix))
    for some, name in ((written, f"a.{suffix}"), (written, f"b.{suffix}")):
        write_shard(tmp_path / name, some)
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    source = open_source(str(tmp_path / f"a.{suffix}"))
    for place, raw in enumerate(raws):
        was, now = to_sample(raw), to_sample(source.read(place))
        assert [x.tobytes() for x in now.images] == [x.tobytes() for x in was.images]
        assert now.ref_logprobs == was.ref_logprobs
        assert now.independent == was.independent and (now.rejected is None) == (was.rejected is None)
        assert texts_of(now) == texts_of(was)


@pytest.mark.parametrize("suffix", ("tar", "parquet"))
def test_what_a_task_asks_is_asked_of_shards_too(tmp_path, suffix):
    """References, options, kinds and ratings; of turns that are rated too low nothing is left."""
    turns = [{"user": f"q{i}?", "assistant": f"a{i}", "kind": f"k{i}", "references": [f"b{i}"]} for i in range(3)]
    del turns[2]["kind"], turns[2]["references"]
    raws = [
        {"texts": turns, "relevance_ratings": [5, 1, 3], "kind": "of the record", "taken": "in May"},
        {"question": "How many?", "answers": ["two", "2"], "kind": "count"},
        {"question": "Which?", "options": ["red", "blue"], "answer": "blue"},
        {"caption": ["a dog", "a brown dog"]},
        {"q": "Who?", "a": "me", "prompt": "unread", "messages": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "kind": "x"},
    ]
    least = {"min_ratings": dict(zip(RATINGS, (2, 0, 0, 0), strict=True))}
    written, asked = [], []
    for number, raw in enumerate(raws):
        options = least | ({"fields": {"question": ["q"], "answer": ["a"]}} if "q" in raw else {})
        raw["image"] = png(picture(number))
        found = read_item(lambda key, raw=raw: raw, Ref(0, number, 0, raw, "here", "", None), options)
        written.append(to_written(found, {}, suffix))
        asked.append([simplify(question) for question in ask(raw, number, **options)])
    write_shard(tmp_path / f"a.{suffix}", written)
    source = open_source(str(tmp_path / f"a.{suffix}"))
    back = [source.read(number) for number in range(len(raws))]
    assert [list(map(simplify, ask(raw, number, **least))) for number, raw in enumerate(back)] == asked
    assert [len(questions) for questions in asked] == [2, 1, 1, 1, 1, 1]
    assert asked[0][0][:2] == ("k0", ("a0", "b0")) and asked[2][0][2] == ("red", "blue")
    assert asked[0][1][0] == "of the record"
    assert back[0]["relevance_ratings"] == [5, 3] and back[0]["taken"] == "in May"


@pytest.mark.parametrize("suffix", ("tar", "parquet"))
def test_videos_are_written_too(tmp_path, suffix):
    turns = [{"user": "a?", "assistant": "b"}]
    found = read_item(lambda _key: {"video": MP4, "texts": turns}, Ref(0, 0, 0, 0, "here", "", None), {})
    assert found.num_bytes > len(MP4) and found.content
    plain = Written(1, {}, {"messages": [{"role": "text", "content": "b"}]}, {})
    write_shard(tmp_path / f"a.{suffix}", [to_written(found, {}, suffix), plain])
    source = open_source(str(tmp_path / f"a.{suffix}"))
    assert [check(source.read(number))[0] for number in range(2)] == [[Video(MP4)], []]
    lost = read_item(lambda _key: {"video": b"GIF89a", "texts": turns}, Ref(0, 0, 0, 0, "here", "", None), {})
    assert lost.stage == "corrupt" and "a video that is no mp4 or webm file" in lost.reason


def simplify(question):
    texts = [[(part["type"], part.get("text")) for part in content_parts(m["content"])] for m in question.messages]
    return question.kind, question.references, question.choices, texts, [x.tobytes() for x in question.images]


def test_a_column_of_two_types_is_named(tmp_path):
    rows = [Written(i, {}, {"question": "a?", "answer": "b", "size": size}, {}) for i, size in enumerate((1, "large"))]
    write_shard(tmp_path / "a.tar", rows)
    with pytest.raises(UserError, match=r"a.parquet cannot be written.*shards.format be tar.*\(size: "):
        write_shard(tmp_path / "a.parquet", rows)
    assert [path.name for path in tmp_path.glob("*.parquet*")] == []


def texts_of(sample):
    messages = [*sample.messages, *([sample.rejected] if sample.rejected else [])]
    return [(m["role"], [(part["type"], part.get("text")) for part in content_parts(m["content"])]) for m in messages]


def test_a_ledger_without_its_end_does_not_count(tmp_path):
    path = tmp_path / "1.jsonl"
    assert not is_whole(path)
    for lines in ([{"number": 1, "reason": "end\n"}, {"number": 2}], []):
        write_lines(path, lines)
        assert is_whole(path) and read_lines(path) == lines
        for size in range(len(path.read_bytes())):
            (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
            assert not is_whole(tmp_path / "cut")


def test_what_is_written_needs_no_picture(tmp_path):
    write_shard(tmp_path / "a.tar", [Written(3, {}, {"messages": [{"role": "text", "content": "x"}]}, {})])
    assert to_sample(open_source(str(tmp_path / "a.tar")).read(0)).messages == [{"role": "text", "content": "x"}]


def test_a_picture_that_is_all_of_one_grey_is_near_to_none():
    white, black = (item(png(Image.new("RGB", (50, 50), color))) for color in ("white", "black"))
    comparing.mark_near(comparing.NearOptions())([white, black])
    assert white.marks == black.marks == {"near": []}
