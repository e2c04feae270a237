"""Run a recipe: records of a source -> questions and answers that a model writes, and a report of what was lost.

```
.OUT.part/settings.json  000000.jsonl ..   what was kept and dropped of each record, a file for CHUNK of them
OUT.report.json                            the counts: every drop by its kind, the stage that dropped it and why
OUT                                        records that data.sources reads; written last
```

A chunk is made of its records, the recipe and the replies alone, and its file is there whole or not at all. So a run
that was killed goes on and asks again only about the chunk that it was at, and changes no byte of what is written.
"""

import hashlib
import itertools
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Sized
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanovlm.data.build.questions.checks import Draft, agree
from nanovlm.data.build.questions.kinds import KINDS, Item
from nanovlm.data.build.questions.output import OUTPUTS, Letters, to_records
from nanovlm.data.build.questions.recipe import Recipe
from nanovlm.data.build.questions.reply import Broken, read_reply
from nanovlm.data.build.questions.rules import RULES, refuse_control, refuse_markup, refuse_orders, words_of
from nanovlm.data.build.questions.writers import Ask, Writer, open_writer
from nanovlm.data.build.records import Found, Unusable, read
from nanovlm.data.build.settings import keep_settings
from nanovlm.data.records import content_parts
from nanovlm.data.source import Ref, Source, first_pass
from nanovlm.data.sources import open_sources
from nanovlm.data.template import render
from nanovlm.errors import UserError, printable
from nanovlm.files import lock, new_file, write_file
from nanovlm.infer.chat_client import Unavailable

CHUNK = 16  # records that are written about at a time
JUDGED_AFTER = 100  # records before the share of those without any question is checked
LONGEST_WORDS = 4000  # characters of a record that a writer is shown
MOST_REASONS = 50  # reasons of records that cannot be read, which have the words of files in them
WORDS_RULES = (refuse_control, refuse_markup, refuse_orders)


def run(recipe: Recipe) -> dict:
    """Write what a recipe says, or go on with it, and return the report. Raises UserError for what is wrong."""
    recipe = recipe.validate()
    out = Path(recipe.out)
    source = open_sources(recipe.sources, split=recipe.split, shuffle=False, allow_urls=recipe.allow_urls)
    with lock(out.absolute().with_name(f".{out.name}.part")) as folder:
        if out.exists():
            raise UserError(f"{out} is there already: name another file, or remove it")
        take_up(folder, recipe, source)
        write_chunks(folder, recipe, source)
        report = write_out(folder, recipe, source, out)
        shutil.rmtree(folder)
    return report


def take_up(folder: Path, recipe: Recipe, source: Source):
    """Begin a run, or make sure that the one that is there was begun with the same recipe and as many records."""
    settings = recipe.settings() | {"records": len(source) if isinstance(source, Sized) else None}
    has_written = any(folder.glob("*.jsonl"))
    keep_settings(folder / "settings.json", settings, "another recipe or source", has_written)


def open_writers(folder: Path, recipe: Recipe) -> dict[str, Writer]:
    """Open who writes, and who has to agree; make sure that they are those that the run was begun with."""
    named = {"writer": recipe.writer, "second": recipe.second}
    opened = {name: open_writer(options) for name, options in named.items() if options.model}
    models, has_written = {name: writer.model for name, writer in opened.items()}, any(folder.glob("*.jsonl"))
    keep_settings(folder / "models.json", models, "another model", has_written)
    return opened


def chunks(recipe: Recipe, source: Source) -> Iterator[tuple[int, list[Ref]]]:
    """Yield the refs of each chunk, in the order of the source."""
    refs = itertools.islice(first_pass(source), recipe.num or None)
    return enumerate(iter(lambda: list(itertools.islice(refs, CHUNK)), []))


def write_chunks(folder: Path, recipe: Recipe, source: Source):
    """Ask about all records that no file in the folder is about."""
    total = min(len(source), recipe.num or len(source)) if isinstance(source, Sized) else recipe.num or None
    opened: dict[str, Writer] = {}
    num_read = num_bad = 0
    with tqdm(total=total, unit="record") as progress:
        for number, refs in chunks(recipe, source):
            path = folder / f"{number:06d}.jsonl"
            if not path.exists():
                opened = opened or open_writers(folder, recipe)
                lines = write_chunk(recipe, opened, [read(source, ref, recipe.options) for ref in refs], refs)
                write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
            lines = read_lines(path)
            num_read += len(lines)
            num_bad += sum(not line.get("kept") for line in lines)
            progress.update(len(refs))
            if num_read >= JUDGED_AFTER and num_bad > recipe.max_bad_fraction * num_read:
                break
    if num_bad > recipe.max_bad_fraction * num_read:
        reasons = Counter(reason for path in sorted(folder.glob("*.jsonl")) for reason in reasons_of(read_lines(path)))
        often = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise UserError(
            f"nothing is kept of {num_bad} of {num_read} records, more than max_bad_fraction = "
            f"{recipe.max_bad_fraction} allows; most often: {often}"
        )


def reasons_of(lines: Sequence[dict]) -> Iterator[str]:
    for line in lines:
        if "unusable" in line:
            yield line["unusable"]
        yield from (": ".join(drop) for drop in line.get("dropped", []))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_chunk(
    recipe: Recipe, opened: dict[str, Writer], results: Sequence[Found | Unusable], refs: Sequence[Ref]
) -> list[dict]:
    """Return what was kept and dropped of each record of a chunk."""
    lines: list[dict] = []
    for ref, found in zip(refs, results, strict=True):
        if isinstance(found, Found) and not found.images:
            found = Unusable("the record has no picture")
        if isinstance(found, Unusable):
            lines.append({"number": ref.number, "unusable": printable(str(found), 300)})
        else:
            lines.append({"number": ref.number, "content": digest(found), "kept": [], "dropped": []})
    usable = [
        (line, found) for line, found in zip(lines, results, strict=True) if isinstance(found, Found) and "kept" in line
    ]
    drafts = draft(recipe, opened["writer"], usable)
    for asker, name, times, least in (
        (opened["writer"], "again", recipe.again, recipe.least_agreement),
        *((second, "second", 1, 1.0) for second in [opened.get("second")] if second),
    ):
        votes, failed = [0] * len(drafts), {}
        for time in range(times):
            seeds = [seed_of(recipe, line, kind, index, name, time) for line, index, (kind, *_rest) in drafts]
            for i, agrees in enumerate(agree(asker, [draft for _line, _index, draft in drafts], seeds)):
                if isinstance(agrees, Unusable):
                    failed[i] = agrees
                else:
                    votes[i] += agrees
        passed = []
        for i, (line, index, made) in enumerate(drafts):
            if votes[i] >= least * times:
                passed.append((line, index, made))
            elif i in failed:
                drop_reply(line, made.kind, name, failed[i])
            else:
                line["dropped"].append([made.kind, name, "another answer is given"])
        drafts = passed
    for line, _index, (kind, item, _images) in drafts:
        line["kept"].append([kind, asdict(item)])
    return lines


def draft(recipe: Recipe, writer: Writer, usable: list[tuple[dict, Found]]) -> list[tuple[dict, int, Draft]]:
    """Let a model write about each record; return what passes the rules, each with its line and its place there."""
    templates, asked, about = recipe.templates(), [], []
    for line, found in usable:
        shown = show_words(found, line) if recipe.shows_texts else []
        for kind in recipe.kinds:
            text = render(templates[kind], num=recipe.num_items, texts=shown)
            seed = seed_of(recipe, line, kind, 0, "write", 0)
            asked.append(Ask(text, found.sample.images, seed, KINDS[kind].schema(recipe.num_items)))
            about.append((line, found, kind, shown))
    drafts, seen = [], defaultdict(set)
    replies = writer.ask(asked) if asked else []
    for (line, found, kind, shown), ask, reply in zip(about, asked, replies, strict=True):
        if isinstance(reply, Unusable):
            drop_reply(line, kind, "reply", reply)
            continue
        try:
            assert ask.schema is not None
            data = read_reply(reply, ask.schema)
            if any(json.dumps(data) in text or reply.strip() in text for text in shown):
                raise Broken("it is copied from the words of the record")
        except Broken as error:
            line["dropped"].append([kind, "reply", str(error)])
            continue
        items = KINDS[kind].items(data, recipe.instructions, random.Random(ask.seed))
        for index, item in enumerate(items):
            made = Draft(kind, item, found.sample.images)
            if broken := find_broken(recipe, made, seen[line["number"]]):
                line["dropped"].append([kind, *broken])
            else:
                drafts.append((line, index, made))
    return drafts


def drop_reply(line: dict, kind: str, stage: str, reply: Unusable):
    """Note in a record's line that a prompt got no reply; what a server says of that is shown."""
    if reply.__cause__ is not None:
        tqdm.write(printable(str(reply.__cause__)))
    line["dropped"].append([kind, "server" if isinstance(reply.__cause__, Unavailable) else stage, str(reply)])


def find_broken(recipe: Recipe, made: Draft, seen: set[str]) -> tuple[str, str] | None:
    """Return the rule that an item breaks and how, or None; `seen`, the questions of the picture, gets its own."""
    for name in recipe.rules:
        if reason := RULES[name](made.item, made.images):
            return name, reason
    if KINDS[made.kind].is_asked_again:
        asked = " ".join(words_of(made.item.turns[0][0]))
        if asked in seen:
            return "repeats", "the question is asked already"
        seen.add(asked)
    return None


def show_words(found: Found, line: dict) -> list[str]:
    """Return the words of a record for its writer to read; none, with the reason in its line, if they are suspect."""
    parts = [part for message in found.sample.messages for part in content_parts(message["content"])]
    texts = [part["text"] for part in parts if part["type"] == "text" and part["text"].strip()]
    words = Item([[text, ""] for text in texts])
    reasons = (reason for rule in WORDS_RULES if (reason := rule(words, [])))
    # The length comes first: searching a text of megabytes could take hours.
    reason = "it is too long" if sum(map(len, texts)) > LONGEST_WORDS else next(reasons, "")
    if reason:
        line["words"] = reason
        return []
    return texts


def seed_of(recipe: Recipe, line: dict, kind: str, index: int, stage: str, time: int) -> int:
    """Return a seed that depends on the recipe's and on what is asked, not on what else is."""
    name = f"{recipe.seed} {line['number']} {kind} {index} {stage} {time}"
    return int(np.frombuffer(hashlib.sha256(name.encode()).digest()[:4], "<u4")[0]) >> 1


def digest(found: Found) -> str:
    """Return what tells whether a record is still the same."""
    known = hashlib.sha256(json.dumps(found.sample.messages, sort_keys=True).encode())
    for image in found.sample.images:
        known.update(f"{image.size}".encode() + image.tobytes())
    return known.hexdigest()[:16]


def write_out(folder: Path, recipe: Recipe, source: Source, out: Path) -> dict:
    """Write the records of all chunks, and the report before them; return the report."""
    letters, report = Letters(recipe.seed), Report(recipe)

    def records() -> Iterator[dict]:
        for number, refs in chunks(recipe, source):
            for ref, line in zip(refs, read_lines(folder / f"{number:06d}.jsonl"), strict=True):
                report.count(line)
                if not line.get("kept"):
                    continue
                found = read(source, ref, recipe.options)
                if isinstance(found, Unusable) or digest(found) != line["content"]:
                    raise UserError(
                        f"{ref.source}, {ref.where}, is not what it was when the run began: remove {folder} and begin "
                        "again"
                    )
                kept = [(kind, Item(**item)) for kind, item in line["kept"]]
                for record in to_records(ref.number, found, kept, letters):
                    report.written += 1
                    yield record

    with new_file(out) as file:
        OUTPUTS[out.suffix](file, records())
        found = report.found(letters)
        write_file(out.with_suffix(".report.json"), json.dumps(found, indent=2) + "\n")
    return found


class Report:
    """Counts of what was kept, and of what was dropped and why."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.read, self.written, self.empty = recipe, 0, 0, 0
        self.unusable, self.words, self.kept = Counter(), Counter(), Counter()
        self.dropped: dict[str, Counter] = defaultdict(Counter)

    def count(self, line: dict):
        self.read += 1
        if "unusable" in line:
            reason = line["unusable"]
            is_new = reason not in self.unusable and len(self.unusable) >= MOST_REASONS
            self.unusable["other reasons" if is_new else reason] += 1
            return
        self.empty += not line["kept"]
        if "words" in line:
            self.words[line["words"]] += 1
        for kind, _item in line["kept"]:
            self.kept[kind] += 1
        for kind, stage, reason in line["dropped"]:
            self.dropped[kind][f"{stage}: {reason}"] += 1

    def found(self, letters: Letters) -> dict:
        kinds = {}
        for kind in self.recipe.kinds:
            kinds[kind] = {"kept": self.kept[kind], "dropped": dict(sorted(self.dropped[kind].items()))}
        return {
            "recipe": self.recipe.settings(),
            "records": {
                "read": self.read,
                "unusable": dict(sorted(self.unusable.items())),
                "without_any": self.empty,
                "words_left_out": dict(sorted(self.words.items())),
                "written": self.written,
            },
            "kinds": kinds,
            "letters": {f"of {num}": counts for num, counts in sorted(letters.counts().items())},
        }
