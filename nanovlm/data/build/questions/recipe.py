"""A recipe: about which records a model writes what, and how it is checked. As a YAML file, or the same in Python.

```yaml
sources: [photos.jsonl]
out: questions.jsonl                    # or .parquet
kinds: [captions, questions, choices]   # and dialogues, boxes
writer: {model: runs/demo/model}        # or {address: "http://localhost:8000/v1", model: name}
second: {address: "http://localhost:8001/v1", model: other}
again: 1
prompts:
  captions: |
    Describe the picture in the words of a child. Reply with JSON: {"caption": "..."}
```

    Recipe(sources=("photos.jsonl",), out="questions.jsonl", writer=WriterOptions("runs/demo/model"))
"""

import dataclasses
import json
from pathlib import Path

import jinja2

from nanovlm.config import pick
from nanovlm.config.fields import check, check_finite
from nanovlm.data.build.questions import kinds
from nanovlm.data.build.questions.kinds import KINDS, MOST_ITEMS
from nanovlm.data.build.questions.rules import RULES
from nanovlm.data.build.questions.writers import WriterOptions
from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.build.yaml_file import read_yaml, to_config
from nanovlm.data.layouts import CAPTION_QUESTION
from nanovlm.data.template import compile_template
from nanovlm.errors import UserError

VARIABLES = ("num", "texts")
NOBODY = WriterOptions()


@dataclasses.dataclass(frozen=True)
class Prompts:
    # The template of each kind, of jinja2, with `num` items to write and `texts`, the words of the record, a list.
    captions: str = kinds.CAPTIONS
    questions: str = kinds.QUESTIONS
    dialogues: str = kinds.DIALOGUES
    boxes: str = kinds.BOXES
    choices: str = kinds.CHOICES


@dataclasses.dataclass(frozen=True)
class Recipe(ReadConfig):
    # What data.sources of train.py takes; several are read one after the other.
    sources: tuple[str, ...] = ()
    # The file to write, .jsonl or .parquet; the report is beside it.
    out: str = ""
    # What is written: captions, questions, dialogues, boxes, choices.
    kinds: tuple[str, ...] = ("captions", "questions")
    # How many questions, turns or things of a picture are asked for.
    num_items: int = 3
    # Who writes.
    writer: WriterOptions = NOBODY
    # Another model that is asked each question once, and has to agree; none where it has no model.
    second: WriterOptions = NOBODY
    # How often the writer is asked each question again, and which share of its answers must agree.
    again: int = 1
    least_agreement: float = 1.0
    # Which rules what was written has to pass; empty for none.
    rules: tuple[str, ...] = tuple(RULES)
    prompts: Prompts = Prompts()
    # Show the writer what the record says already.
    shows_texts: bool = True
    # What captions answer, one of these at random.
    instructions: tuple[str, ...] = (
        CAPTION_QUESTION,
        "What is in the picture?",
        "Write a caption.",
        "What do you see?",
    )
    # Of drawn scenes, hub and saved data sets.
    split: str = "train"
    # How many records to read, from the first on; 0 for all.
    num: int = 0
    # Largest share of the records of which nothing may be kept.
    max_bad_fraction: float = 0.9
    # Of replies, of the letters of multiple choices and of instructions.
    seed: int = 0

    def validate(self) -> "Recipe":
        """Return self, or raise UserError for the first contradiction."""
        check(self.sources, "sources is empty: name your records, as in sources: [photos.jsonl]")
        check(Path(self.out).suffix in (".jsonl", ".parquet"), f"out = {self.out!r} must end in .jsonl or .parquet")
        check(self.kinds, f"kinds is empty; there are {', '.join(KINDS)}")
        for names, known, field in ((self.kinds, KINDS, "kinds"), (self.rules, RULES, "rules")):
            for name in names:
                pick(known, name, field)
            check(len({*names}) == len(names), f"{field} names one twice: {', '.join(names)}")
        check(1 <= self.num_items <= MOST_ITEMS, f"num_items = {self.num_items} must be from 1 to {MOST_ITEMS}")
        check(0 <= self.again <= 16, f"again = {self.again} must be from 0 to 16")
        check(
            self.again < 2 or self.writer.temperature > 0,
            f"again = {self.again} asks the same thing {self.again} times: set writer.temperature above 0, or again: 1",
        )
        for field in ("least_agreement", "max_bad_fraction"):
            value = getattr(self, field)
            check(0 <= value <= 1, f"{field} = {value} must be between 0 and 1")
        check(self.num >= 0, f"num = {self.num} must be at least 0")
        check(self.instructions and all(map(str.strip, self.instructions)), "instructions has an empty one, or none")
        self.writer.validate("writer")
        if self.second != NOBODY:
            self.second.validate("second")
        self.check_reading()
        self.templates()
        check_finite(self)
        return self

    def templates(self) -> dict[str, jinja2.Template]:
        """Return the compiled prompt of each kind. Raises UserError that names the one that is wrong."""
        found = {}
        for kind in self.kinds:
            template, variables = compile_template(getattr(self.prompts, kind), f"prompts.{kind}")
            if unknown := sorted(variables - {*VARIABLES, *template.environment.globals}):
                raise UserError(f"prompts.{kind} reads {unknown[0]}; there are {' and '.join(VARIABLES)}")
            found[kind] = template
        return found

    def settings(self) -> dict:
        """Return all that decides what is written, as JSON."""
        found = dataclasses.asdict(self)
        del found["out"], found["max_bad_fraction"]
        del found["writer"]["timeout"], found["second"]["timeout"]
        return json.loads(json.dumps(found))


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file. Raises UserError that names the file, and the field or the place that is wrong."""
    return to_config(path, Recipe, read_yaml(path, "the fields of a recipe, as in sources: [photos.jsonl]"))
