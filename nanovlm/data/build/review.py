"""A sample of records -> a page on which a person judges them; and the records without those that were judged bad.

The page is one file that loads nothing: its pictures are in it, its one script is ours, and the policy in its head lets
nothing else run or load, whatever a record holds. All words of records are escaped. The verdicts are what the page
saves, a JSON file: {"verdicts": {ID: "good" or "bad"}, "shows": {ID: a digest of what was judged}}.

What is judged is a record or, of independent questions, each by itself. A record's name is its `id`, else its number in
the source; that of a question is the `id` of its turn, else the record's and the number of the turn.
"""

import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanovlm.config.fields import check
from nanovlm.data.build.carry import Carried, as_line, read_carried, walk
from nanovlm.data.build.hashes import digest_pixels
from nanovlm.data.build.items import text_of
from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.build.records import Unusable
from nanovlm.data.source import Ref, first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError, printable
from nanovlm.files import new_file, write_file

LARGEST_VERDICTS = 50_000_000  # bytes
PICTURE_SIDE = 512  # pixels of the longer side of a picture in the page
STYLE = """
body{font:16px/1.4 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:#222;background:#fff}
header{position:sticky;top:0;background:#fff;border-bottom:1px solid #ccc;padding:.5rem 0}
section{border-bottom:1px solid #ccc;padding:1rem 0;display:grid;grid-template-columns:minmax(8rem,20rem) 1fr;gap:1rem}
img{max-width:100%}dt{font-weight:600}dd{margin:0 0 .5rem;white-space:pre-wrap;overflow-wrap:anywhere}
button{font:inherit;margin-right:.5rem;padding:.2rem .8rem}button[aria-pressed=true]{background:#222;color:#fff}
.unit{border-left:4px solid #ccc;padding-left:.8rem;margin-bottom:1rem}.good{border-color:#2a2}.bad{border-color:#c22}
small{color:#666}
"""
SCRIPT = """
const verdicts = Object.create(null);  // so that __proto__ is a name as any other
const count = document.getElementById("count"), units = document.querySelectorAll(".unit");
const tell = () => { count.textContent = Object.keys(verdicts).length + " of " + units.length; };
for (const unit of units) for (const button of unit.querySelectorAll("button")) button.onclick = () => {
  const name = unit.dataset.name, verdict = button.value;
  if (verdicts[name] === verdict) delete verdicts[name]; else verdicts[name] = verdict;
  unit.className = "unit " + (verdicts[name] || "");
  for (const other of unit.querySelectorAll("button"))
    other.setAttribute("aria-pressed", String(verdicts[name] === other.value));
  tell();
};
document.getElementById("save").onclick = () => {
  const shows = Object.create(null);
  for (const {dataset} of units) if (verdicts[dataset.name]) shows[dataset.name] = dataset.shows;
  const data = JSON.stringify({verdicts, shows}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], {type: "application/json"}));
  link.download = "verdicts.json";
  link.click();
  URL.revokeObjectURL(link.href);
};
tell();
"""


def policy() -> str:
    """Return the Content-Security-Policy of a page: our script, our style, and the pictures in it."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (SCRIPT, STYLE)]
    script, style = (f"'sha256-{text}'" for text in hashes)
    pictures, nothing = "img-src data:", "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; {pictures}; script-src {script}; style-src {style}"


# --- the page --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PageConfig(ReadConfig):
    # The records, as data.sources of train.py takes them.
    source: str
    # The page to write, .html.
    out: Path
    # Which share of the records to show, and how many at least.
    share: float = 0.01
    least: int = 20
    # Seed of the choice.
    seed: int = 0

    def validate(self):
        """Raise UserError for the first contradiction."""
        check(self.out.suffix == ".html", f"{self.out} must end in .html")
        check(0 < self.share <= 1, f"--share {self.share} must be above 0 and at most 1")
        check(self.least >= 1, f"--least {self.least} must be at least 1")
        self.check_reading()


def write_page(config: PageConfig):
    """Write a page with a sample of records, for a person to judge."""
    config.validate()
    source = open_source(config.source, allow_urls=config.allow_urls)
    refs = list(first_pass(source))
    num = min(len(refs), max(config.least, math.ceil(config.share * len(refs))))
    chosen = sorted(sorted(refs, key=lambda ref: rank(config.seed, ref))[:num], key=lambda ref: ref.number)
    sections, lost = [], 0
    for ref in tqdm(chosen, unit="record"):
        try:
            carried = read_carried(source, ref, config.options)
            sections += [] if isinstance(carried, Unusable) else [show_record(carried)]
            lost += isinstance(carried, Unusable)
        except Exception:  # whatever its pictures do
            lost += 1
    check(sections, f"none of the {num} records that were drawn from {config.source} can be read")
    title = f"{len(sections)} of {len(refs)} records of {printable(config.source, 200)}"
    text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy())}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{html.escape(title)}</h1>
<p>Judge each question with its answer: is all of it right about the picture? <span id="count"></span> judged.
<button id="save">Save verdicts.json</button></p></header>
{"".join(sections)}<script>{SCRIPT}</script></body></html>
"""
    write_file(config.out, text)
    print(f"wrote {config.out}: {title}" + (f"; {lost} more cannot be read" if lost else ""))


def rank(seed: int, ref: Ref) -> bytes:
    """Return the place of a record in the order in which a sample is drawn."""
    return hashlib.sha256(f"{seed} {ref.number}".encode()).digest()


def show_record(carried: Carried) -> str:
    """Return the HTML of one record, all of whose words are escaped."""
    images, blocks = carried.decode(), []
    pictures = "".join(f'<img alt="" src="{to_data(image)}">' for image in images)
    for name, _kind, pairs in units_of(carried):
        shown = "".join(
            f"<dt>{html.escape(visible(asked))}</dt><dd>{html.escape(visible(answer))}</dd>" for asked, answer in pairs
        )
        buttons = "".join(f'<button value="{x}" aria-pressed="false">{x}</button>' for x in ("good", "bad"))
        label, shows = html.escape(name), f'data-shows="{digest_of(pairs, images)}"'
        block = f'<div class="unit" data-name="{label}" {shows}><dl>{shown}</dl>{buttons}<small>{label}</small></div>'
        blocks.append(block)
    return f"<section><div>{pictures}</div><div>{''.join(blocks)}</div></section>\n"


def visible(text: str) -> str:
    """Escape what a browser would not show: control characters, and such as turn the direction of writing."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def units_of(carried: Carried) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield what is judged of a record: its name in the page, its kind, and pairs of a question and its answer."""
    raw, texts = carried.raw, [text_of(m) for m in carried.messages if m["role"] != "system"]
    pairs = list(itertools.zip_longest(texts[::2], texts[1::2], fillvalue=""))
    name, kind = visible(word_of(raw, "id", str(carried.number))), word_of(raw, "kind", "record")
    if not carried.independent:
        yield name, kind, pairs
        return
    turns = raw["texts"] if isinstance(raw.get("texts"), list) else []
    turns = turns if len(turns) == len(pairs) and all(isinstance(x, dict) for x in turns) else [{}] * len(pairs)
    for i, (turn, pair) in enumerate(zip(turns, pairs, strict=True)):
        yield visible(word_of(turn, "id", f"{name}.{i}")), word_of(turn, "kind", kind), [pair]


def digest_of(pairs: list[tuple[str, str]], images: list[Image.Image]) -> str:
    """Return what tells whether the same is judged: the words and the pixels that are shown."""
    shown = json.dumps([pairs, [digest_pixels(image) for image in images]])
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def word_of(raw: dict, key: str, otherwise: str) -> str:
    return raw[key] if isinstance(raw.get(key), str) and raw[key] else otherwise


def to_data(image: Image.Image) -> str:
    """Return the pixels of a picture as the address of a PNG, whatever its file was."""
    image = image.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- the verdicts ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VerdictsConfig(ReadConfig):
    # The records that the page was made of.
    source: str
    # The file that the page saved.
    verdicts: Path
    # The file to write, .jsonl.
    out: Path
    # Leave out all of a kind of which a smaller share than this was judged good; 0 leaves out only what was judged bad.
    least_good: float = 0.0

    def validate(self):
        """Raise UserError for the first contradiction."""
        check(self.out.suffix == ".jsonl", f"{self.out} must end in .jsonl: a line is a record")
        check(not self.out.exists(), f"{self.out} is there already: name another file, or remove it")
        check(0 <= self.least_good <= 1, f"--least-good {self.least_good} must be between 0 and 1")
        self.check_reading()


def read_verdicts(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read what a page saved: of what is judged the verdict and the digest. Raises UserError that names the file."""
    try:
        if path.stat().st_size > LARGEST_VERDICTS:
            raise UserError(f"{path} has more than {LARGEST_VERDICTS} bytes, which no page saves")
        data = json.loads(path.read_text(encoding="utf-8"))
        verdicts, shows = data["verdicts"], data["shows"]
        is_right = all(isinstance(x, dict) for x in (verdicts, shows)) and {*verdicts.values()} <= {"good", "bad"}
        is_right = is_right and verdicts.keys() == shows.keys()
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        is_right, verdicts, shows = False, {}, {}
    what = '{"verdicts": {ID: "good" or "bad"}, "shows": {ID: ..}}'
    check(is_right, f"{path} must hold what a page saves: {what}")
    return verdicts, shows


def apply_verdicts(config: VerdictsConfig):
    """Write the records without those, or those of their questions, that a person judged bad."""
    config.validate()
    source = open_source(config.source, allow_urls=config.allow_urls)
    verdicts, shows = read_verdicts(config.verdicts)
    judged, found = defaultdict(Counter), set()
    for carried in walk(source, config.options):
        for name, kind, pairs in units_of(carried):
            if name in verdicts:
                check(name not in found, f"two records of {config.source} are called {name!r}: give each an id")
                check(
                    is_shown(carried, pairs, shows[name]),
                    f"{config.verdicts} judges {name!r}, which is not what the page showed: judge a page of "
                    f"{config.source} as it is now",
                )
                found.add(name)
                judged[kind][verdicts[name]] += 1
    if unknown := sorted(verdicts.keys() - found):
        raise UserError(f"{config.verdicts} judges {unknown[0]!r}, which {config.source} does not have")
    low = {kind for kind, counts in judged.items() if counts["good"] < config.least_good * counts.total()}
    counts: Counter[str] = Counter()
    with new_file(config.out) as file:
        for carried in walk(source, config.options, is_told=False):
            units = list(units_of(carried))
            kept = [i for i, (name, kind, _) in enumerate(units) if kind not in low and verdicts.get(name) != "bad"]
            counts.update(questions=len(units), kept=len(kept), records=bool(kept))
            if kept:
                file.write(json.dumps(as_line(carried, kept if carried.independent else None)).encode() + b"\n")
    report = {"judged": {kind: dict(sorted(c.items())) for kind, c in sorted(judged.items())}, "left_out": sorted(low)}
    write_file(config.out.with_suffix(".report.json"), json.dumps(report | dict(counts), indent=2) + "\n")
    for kind, of_kind in sorted(judged.items()):
        least, most = wilson(of_kind["good"], of_kind.total())
        share = f"{of_kind['good']} of {of_kind.total()} good, so {100 * least:.0f} to {100 * most:.0f} % of all"
        print(f"{printable(kind, 40):>12}  {share}{', left out' if kind in low else ''}")
    print(f"wrote {config.out}: {counts['kept']} of {counts['questions']} questions in {counts['records']} records")


def is_shown(carried: Carried, pairs: list[tuple[str, str]], digest: str) -> bool:
    """Tell whether a page with this digest shows the same of a record."""
    try:
        return digest_of(pairs, carried.decode()) == digest
    except Exception:  # whatever its pictures do, no page shows it
        return False


def wilson(good: int, num: int) -> tuple[float, float]:
    """Return the interval of a share at 95 % (Wilson 1927), of which `good` of `num` is a sample."""
    z = 1.959964
    middle, wide = (good + z * z / 2) / (num + z * z), z / (num + z * z)
    half = wide * math.sqrt(good * (num - good) / num + z * z / 4)
    return middle - half, middle + half
