"""A page for a person: all of a record is words on it, nothing runs but its own script, and verdicts come back."""

import html.parser
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from nanovlm.data.build import review
from nanovlm.data.build.__main__ import main as command
from nanovlm.data.build.balance import BalanceConfig
from nanovlm.data.build.review import PageConfig, VerdictsConfig, apply_verdicts, digest_of, wilson, write_page
from nanovlm.data.records import check
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError

EVIL = "</dd></script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onclick=alert(3) javascript:alert(4)"


@pytest.fixture
def source(tmp_path):
    """A caption that is a program, three independent questions, a multiple choice, and a record that cannot be read."""
    Image.new("RGB", (900, 30), "red").save(tmp_path / "red.png")
    picture = {"images": ["red.png"]}
    turns = [
        {"user": f"question {i}?", "assistant": f"answer {i}", "id": f"1-q-{i}", "kind": "questions"} for i in range(3)
    ]
    records = [
        {**picture, "id": f'x"{EVIL}', "texts": [{"user": EVIL, "assistant": f"\u202e\x1b{EVIL}"}]},
        {**picture, "id": "1", "kind": "single", "texts": turns, "independent": True, "category": "a/b"},
        {**picture, "id": "2", "kind": "choices", "question": "which?", "options": ["a", "b"], "answer": "B"},
        {"images": ["none.png"], "caption": "x"},
        {"images": ["red.png", "red.png"], "messages": [{"role": "user", "content": "<image> or <image>?"},
                                                       {"role": "assistant", "content": "both"}]},
    ]  # fmt: skip
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "records.jsonl"


class Tags(html.parser.HTMLParser):
    """Notes tags with their attributes, and the text of each element."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def records(path):
    opened = open_source(str(path))
    return [opened.read(i) for i in range(len(opened))]


def test_the_page_shows_all_words_and_runs_none(source, tmp_path, capsys):
    write_page(PageConfig(str(source), tmp_path / "page.html", share=1.0))
    assert "4 of 5 records" in (shown := capsys.readouterr().out) and "1 more cannot be read" in shown
    page = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    names = [attributes["data-name"] for tag, attributes in page.tags if attributes.get("class") == "unit"]
    assert names == [f'x"{EVIL}', "1-q-0", "1-q-1", "1-q-2", "2", "4"]
    # a parser of its own sees one script, no event handler, and no address but those of pictures in the page
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("script") == kinds.count("style") == 1 and {*kinds} <= set(
        "html head meta title style body header h1 p span button section div img dl dt dd small script".split()
    )
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes), tag
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    assert kinds.count("img") == 5
    script = [text for tag, text in page.texts if tag == "script"]
    assert script[0] == review.SCRIPT
    assert ("dt", EVIL) in page.texts and ("dd", "\\u202e\\x1b" + EVIL) in page.texts
    (rule,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert rule == review.policy() and "default-src 'none'" in rule and "unsafe" not in rule and "http" not in rule


def test_a_sample_is_drawn_by_its_seed(tmp_path):
    lines = [{"id": f"r{i}", "text": f"text {i}"} for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def draw(name, **options):
        write_page(PageConfig(str(tmp_path / "a.jsonl"), tmp_path / name, **options))
        return re.findall(r'data-name="(r\d+)"', (tmp_path / name).read_text())

    first = draw("a.html")
    assert len(first) == 30 and draw("b.html") == first and draw("c.html", seed=1) != first
    assert first == sorted(first, key=lambda name: int(name[1:]))
    assert len(draw("d.html", share=0.001)) == 20


def judge(source, folder, verdicts, **options):
    """Write what a page of all records saves when these verdicts are given."""
    write_page(PageConfig(str(source), folder / "judged.html", share=1.0, **options))
    page = Tags((folder / "judged.html").read_text(encoding="utf-8"))
    shows = {a["data-name"]: a["data-shows"] for _tag, a in page.tags if "data-name" in a}
    (folder / "v.json").write_text(
        json.dumps({"verdicts": verdicts, "shows": {name: shows[name] for name in verdicts}})
    )


def test_verdicts_are_applied(source, tmp_path, capsys):
    judge(source, tmp_path, {"1-q-0": "good", "1-q-1": "bad", "2": "bad", "4": "good"})
    command(["verdicts", str(source), str(tmp_path / "v.json"), str(tmp_path / "out.jsonl")])
    shown = capsys.readouterr().out
    assert "questions  1 of 2 good, so 9 to 91 % of all" in shown and "4 of 6 questions in 3 records" in shown
    lines = source.read_text().splitlines()
    (tmp_path / "readable.jsonl").write_text("\n".join(line for line in lines if "none.png" not in line) + "\n")
    before, found = records(tmp_path / "readable.jsonl"), records(tmp_path / "out.jsonl")
    asked = {**before[1], "texts": [before[1]["texts"][i] for i in (0, 2)]}
    assert found[0]["texts"] == before[0]["texts"] and found[0]["id"] == before[0]["id"]
    assert [turn["id"] for turn in found[1]["texts"]] == ["1-q-0", "1-q-2"] and found[1]["category"] == "a/b"
    assert [check(record)[1] for record in found] == [check(record)[1] for record in (before[0], asked, before[3])]
    assert [len(check(record)[0]) for record in found] == [1, 1, 2] and found[0]["images"] == before[0]["images"]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["judged"] == {"choices": {"bad": 1}, "questions": {"bad": 1, "good": 1}, "record": {"good": 1}}
    apply_verdicts(VerdictsConfig(str(source), tmp_path / "v.json", tmp_path / "strict.jsonl", least_good=0.6))
    assert [record.get("id") for record in records(tmp_path / "strict.jsonl")] == [before[0]["id"], None]


def test_a_damaged_picture_is_counted_and_odd_names_come_back(tmp_path, capsys):
    names = ["a\u200bb", "c\rd", "e\nf", "__proto__", "\x1b[2J"]
    lines = [{"id": name, "text": f"text {i}"} for i, name in enumerate(names)]
    Image.new("RGB", (99, 99)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines += [{"images": ["a.png"], "caption": "x"}, {"messages": messages, "independent": True, "texts": ["odd", "x"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(PageConfig(str(tmp_path / "a.jsonl"), tmp_path / "page.html"))
    page = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = [attributes["data-name"] for _tag, attributes in page.tags if "data-name" in attributes]
    assert shown[:5] == ["a\\u200bb", "c\\rd", "e\nf", "__proto__", "\\x1b[2J"]
    assert f"{len(shown)} of 7 records" in (told := capsys.readouterr().out) and "more cannot be read" in told
    judge(tmp_path / "a.jsonl", tmp_path, dict.fromkeys(shown[:4], "bad"))
    apply_verdicts(VerdictsConfig(str(tmp_path / "a.jsonl"), tmp_path / "v.json", tmp_path / "out.jsonl"))
    assert records(tmp_path / "out.jsonl")[0]["id"] == names[4]


@pytest.mark.parametrize("changes", ["words", "picture", "source"])
def test_verdicts_of_what_has_changed_since_are_refused(source, tmp_path, changes):
    """And those of a page of another source, whose records have the same names."""
    verdicts = {"2": "bad", "4": "good"}
    judge(source, tmp_path, verdicts)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    if changes == "words":
        lines[2]["answer"] = "A"
    elif changes == "picture":
        Image.new("RGB", (900, 30), "blue").save(tmp_path / "red.png")
    else:
        lines = [{"id": "2", "text": "other"}, {"id": "4", "text": "another"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        UserError, match=r"v.json judges '2', which is not what the page showed: judge a page of .* as it"
    ):
        apply_verdicts(VerdictsConfig(str(source), tmp_path / "v.json", tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_of_other_names_are_read(tmp_path):
    """By page, verdicts and balance, as by the commands before them."""
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    lines = [{"img": "red.png", "q": f"which, {i}?", "a": f"red {i}", "category": f"c{i % 2}"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"fields": ("image=img", "question=q", "answer=a"), "layout": "question"}
    judge(tmp_path / "a.jsonl", tmp_path, {"1": "bad"}, **options)
    page = Tags((tmp_path / "judged.html").read_text())
    assert ("dt", "which, 3?") in page.texts and ("dd", "red 3") in page.texts
    apply_verdicts(VerdictsConfig(str(tmp_path / "a.jsonl"), tmp_path / "v.json", tmp_path / "out.jsonl", **options))
    command(["balance", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--layout", "question", "--num", "2",
             "--fields", *options["fields"]])  # fmt: skip
    for name, numbers in (("out.jsonl", [[0, 2, 3]]), ("b.jsonl", [[a, b] for a in (0, 2) for b in (1, 3)])):
        asked = [check(record)[1][0]["content"][-1]["text"] for record in records(tmp_path / name)]
        assert sorted(asked) in [[f"which, {i}?" for i in sorted(some)] for some in numbers]
    for kind, out in ((PageConfig, "x.html"), (BalanceConfig, "x.jsonl")):
        with pytest.raises(UserError, match="layout = 'quiz' is unknown; there are texts"):
            kind(str(tmp_path / "a.jsonl"), tmp_path / out, layout="quiz").validate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must hold what a page saves"),
        ("[]", "must hold what a page saves"),
        ('{"verdicts": {"1": "delete"}, "shows": {"1": ""}}', "must hold what a page saves"),
        ('{"verdicts": {"1": ["good"]}, "shows": {"1": ""}}', "must hold what a page saves"),
        ('{"verdicts": {"1": "good"}, "shows": {}}', "must hold what a page saves"),
        ('{"verdicts": {"1": "good"}}', "must hold what a page saves"),
        (
            '{"verdicts": {"2": "good"}, "shows": {"2": "0"}}',
            "judges '2', which is not what the page showed: judge a page",
        ),
        ("[" * 100_000, "must hold what a page saves"),
        ('{"verdicts": {"nobody": "good"}, "shows": {"nobody": ""}}', "judges 'nobody', which .* does not have"),
    ],
)
def test_verdicts_that_are_none_are_refused(source, tmp_path, text, message):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=message):
        apply_verdicts(VerdictsConfig(str(source), tmp_path / "v.json", tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_options_that_mean_nothing_are_named(source, tmp_path):
    for options, message in (
        (dict(out=Path("x.htm")), "x.htm must end in .html"),
        (dict(share=0.0), "--share 0.0 must be above 0"),
        (dict(least=0), "--least 0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            write_page(PageConfig(**{"source": str(source), "out": tmp_path / "a.html"} | options))
    with pytest.raises(UserError, match=r"there is no .*none.json"):
        apply_verdicts(VerdictsConfig(str(source), tmp_path / "none.json", tmp_path / "out.jsonl"))
    source.write_text((json.dumps({"id": "a", "text": "t"}) + "\n") * 2)
    (tmp_path / "v.json").write_text(json.dumps({"verdicts": {"a": "bad"}, "shows": {"a": digest_of([("t", "")], [])}}))
    with pytest.raises(UserError, match=r"two records of .* are called 'a'"):
        apply_verdicts(VerdictsConfig(str(source), tmp_path / "v.json", tmp_path / "out.jsonl"))


def test_the_interval_is_wilsons():
    """Of Newcombe 1998 (Statistics in Medicine 17, 857-872), table I: 81 of 263, and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
