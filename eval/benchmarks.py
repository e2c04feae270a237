"""Published benchmarks as tasks: their records on the hub, or in a folder that stands for it."""

from collections.abc import Iterator
from itertools import islice

from nanovlm.data.reader import explain
from nanovlm.data.source import first_pass
from nanovlm.data.source_hub import Hub
from nanovlm.errors import UserError, printable
from nanovlm.eval.multiple_choice import MULTIPLE_CHOICE
from nanovlm.eval.open_answers import OPEN_ANSWERS
from nanovlm.eval.questions import Question

BENCHMARKS = OPEN_ANSWERS | MULTIPLE_CHOICE


class Benchmark:
    """The first questions of a published benchmark; answers are scored without white space around them."""

    def __init__(self, name: str, limit: int, root: str = ""):
        """Take the records from the hub, or from the folder `root`/owner/name as `datasets` reads it."""
        self.name, self.limit, self.root = name, limit, root
        self.published = BENCHMARKS[name]
        self.corpus = self.published.corpus

    def questions(self) -> Iterator[Question]:
        published = self.published
        where = f"{self.root.rstrip('/')}/{published.data}" if self.root else published.data
        source = Hub(f"hub:{where}{published.config and ':'}{published.config}", published.split)
        for number, ref in enumerate(islice(first_pass(source), self.limit)):
            try:
                asked = published.ask(ref.key)
            except Exception as error:  # whatever a record does, it is named
                raise UserError(f"{ref.source}, {ref.where}: {explain(error)}") from error
            content = asked.content
            if isinstance(content, str):
                content = [{"type": "image"} for _ in asked.images] + [{"type": "text", "text": content}]
            yield Question(
                number,
                printable(asked.kind),
                asked.images,
                [{"role": "user", "content": content}],
                asked.references,
                asked.choices,
                published.max_new_tokens,
            )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {name: score(question, answer.strip()) for name, score in self.published.figures.items()}


def table() -> list[str]:
    """Return the lines of the table of benchmarks in docs/evaluation.md."""
    lines = [
        "| task | data set | split | figures, the main one first | kinds | published score | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, x in BENCHMARKS.items():
        data = f"`{x.data}`" + (f", `{x.config}`" if x.config else "")
        main_first = (*x.corpus, *x.figures) if "accuracy" not in x.figures else (*x.figures, *x.corpus)
        figures = ", ".join(f"`{figure}`" for figure in main_first)
        lines.append(f"| `{name}` | {data} | {x.split} | {figures} | {x.kinds} | {x.score} | {x.max_new_tokens} |")
    return lines
