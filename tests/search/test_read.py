"""Text of Markdown, HTML and PDF files with the sections that a reader sees; damaged files are named."""

import io

import pytest

from nanovlm.errors import UserError
from nanovlm.search import read as reading
from nanovlm.search.read import READERS, read


def sections(data: str | bytes, name: str) -> dict[str, str]:
    """Each section's title and text."""
    text = read(data.encode() if isinstance(data, str) else data, name)
    ends = [*(section.start for section in text.sections[1:]), len(text.text)]
    assert text.sections[0].start == 0 and ends == sorted(ends)
    return {s.title: text.text[s.start : end].strip() for s, end in zip(text.sections, ends, strict=True)}


def test_markdown_is_cut_at_its_headings():
    page = (
        "before\n\n# Title #\ntext\n## Part *one*\n```sh\n# a comment\n```\n~~~~\n```\n# code\n~~~~\n"
        "Under\n=====\nmore\nLine\n---\n- item\n---\n| a |\n---\n### Deep\nx\n## `B`\n#nothing\n"
    )
    assert sections(page, "a.md") == {
        "": "before",
        "Title": "# Title #\ntext",
        "Title > Part *one*": "## Part *one*\n```sh\n# a comment\n```\n~~~~\n```\n# code\n~~~~",
        "Under": "Under\n=====\nmore",
        "Under > Line": "Line\n---\n- item\n---\n| a |\n---",
        "Under > Line > Deep": "### Deep\nx",
        "Under > `B`": "## `B`\n#nothing",
    }
    assert list(sections("# A\nb", "a.MD")) == ["A"]


def test_html_gives_what_a_reader_sees():
    page = """<!doctype html><html><head><title>T</title><style>p { x }</style><script>if (a < b) "<p>no"</script>
    <body><p>Hello &amp; <b>wel</b>come<br>here</p><h1>One
      &lt;two&gt;</h1>text <!-- hidden --> <svg><text>no</text></svg>on<ul><li>a<li>b</ul>
    <pre>x
      y</pre><h2>Sub</h2><table><tr><td>1</td><td>2</td></tr></table><p>unclosed <h1>Two</h1>end"""
    assert sections(page, "a.html") == {
        "": "Hello & welcome\nhere",
        "One <two>": "One <two>\ntext on\na\nb\nx\n      y",
        "One <two> > Sub": "Sub\n1\n2\nunclosed",
        "Two": "Two\nend",
    }
    assert sections('<meta charset="iso-8859-1"><p>caf\u00e9'.encode("latin-1"), "a.htm") == {"": "caf\u00e9"}


def test_a_text_is_one_section():
    assert sections("\ufeffa\n# b", "a.txt") == {"": "a\n# b"}


def make_pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page, as its specification has it."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    kids = []
    for page in pages:
        content = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        resources = b"<< /Font << /F1 3 0 R >> >>"
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources %s /Contents %d 0 R >>"
            % (resources, len(objects))
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    data, places = io.BytesIO(b""), []
    data.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, start=1):
        places.append(data.tell())
        data.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = data.tell()
    data.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    data.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    data.write(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
    return data.getvalue()


def test_pdf_has_a_section_a_page():
    assert sections(make_pdf("first words", "second"), "a.pdf") == {"page 1": "first words", "page 2": "second"}


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"\xff\xfea", "a.txt", "a.txt is no text in UTF-8"),
        (b"<meta charset=nonsense><p>a", "a.html", "a.html is no text in UTF-8"),
        (b"  \n", "a.md", "a.md has no text"),
        (b"%PDF-1.4 nothing", "a.pdf", "a.pdf cannot be read as PDF"),
        (make_pdf("x")[:200], "a.pdf", "a.pdf cannot be read as PDF"),
        (make_pdf(""), "a.pdf", "a.pdf has no text: its pages may be pictures"),
    ],
)
def test_what_cannot_be_read_is_named(data, name, words):
    with pytest.raises(UserError, match=words):
        read(data, name)


def test_a_file_without_end_is_given_up(monkeypatch):
    def forever(data, name):
        while True:
            pass

    monkeypatch.setattr(reading, "SECONDS", 0.05)
    monkeypatch.setitem(READERS, ".md", forever)
    with pytest.raises(UserError, match=r"reading a\.md took more than"):
        read(b"a", "a.md")
    monkeypatch.undo()
    monkeypatch.setattr(reading, "LONGEST", 3)
    with pytest.raises(UserError, match=r"a\.md has 4 characters, more than 3"):
        read(b"abcd", "a.md")
