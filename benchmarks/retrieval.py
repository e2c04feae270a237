"""What retrieval gives: answers with and without it, and what a search over 100,000 pictures costs.

    python benchmarks/retrieval.py answers    SmolLM2-135M (docs/hub.md) answers 22 questions about our docs
    python benchmarks/retrieval.py search     100,000 drawn pictures are indexed and searched
    python benchmarks/retrieval.py vectors    100,000 vectors are searched, by faiss too where it is installed
    python benchmarks/retrieval.py table      the tables of docs/search.md, of the newest lines

Appends lines to benchmarks/results/retrieval.jsonl. Before a search is timed, what it finds is compared with a product
in fp64. Answers are scored as SQuAD's are (Rajpurkar et al. 2016, arXiv 1606.05250).
"""

import json
import re
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, pages
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.config import DualConfig, SamplingConfig, TextConfig
from nanovlm.data.dual import DualProcessor
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.environment import describe_environment
from nanovlm.errors import UserError
from nanovlm.hub.dual import save_dual
from nanovlm.hub.read import load
from nanovlm.infer.asking import answer_all
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.infer.text import after_thinking
from nanovlm.model.dual import Dual
from nanovlm.model.inference import prepare
from nanovlm.presets import scenes
from nanovlm.search.documents import Documents, DocumentsConfig, document_work, with_passages
from nanovlm.search.embed import embedder_of, open_embedder
from nanovlm.search.index import open_index
from nanovlm.search.pictures import find_pictures
from nanovlm.search.update import update
from nanovlm.search.vectors import open_vectors, search

RESULTS = cli.PROJECT / "benchmarks" / "results" / "retrieval.jsonl"
QUESTIONS = cli.PROJECT / "benchmarks" / "retrieval_questions.json"
DOCS, PAGE = cli.PROJECT / "docs", cli.PROJECT / "docs" / "search.md"
SIZE = 768  # of the vectors, as SigLIP-B has them
BRIEFLY = " Answer with a number, a name or a few words."


@dataclass(frozen=True)
class RetrievalConfig:
    # What to measure, or the tables of what was measured.
    subject: Annotated[Literal["answers", "search", "vectors", "table"], tyro.conf.Positional]
    # CPU threads.
    threads: int = 2
    # Pictures or vectors that are searched.
    num: int = 100_000
    # Searches that count, after three that do not.
    repeats: int = 50
    # The decoder of `answers`.
    model: str = "smollm2"


def main(config: RetrievalConfig):
    if config.subject == "table":
        write_tables()
        return
    torch.set_num_threads(config.threads)
    lines = SUBJECTS[config.subject](config)
    environment = describe_environment(torch.device("cpu"), config.threads, "fp32")
    append_lines(RESULTS, [{"subject": config.subject, **line} for line in lines], environment)


# --- answers ---------------------------------------------------------------------------------------------------


def measure_answers(config: RetrievalConfig) -> list[dict]:
    """Ask each question without passages, with three found by words, by vectors and by both, and with a short one."""
    questions = json.loads(QUESTIONS.read_text())
    model, processor = load(config.model)
    embedders = {"words": None}
    for pooling in ("last", "mean"):
        embedders[pooling] = open_embedder(config.model, pooling=pooling, loaded=(model, processor))
    indexes: dict[str, Documents] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, embedder in embedders.items():
            out = Path(folder) / name
            update(DOCS, out, document_work(DocumentsConfig(DOCS, out), embedder))
            indexes[name] = Documents(out, loaded=(model, processor))
        found = {"none": [[] for _ in questions]}
        for name, documents in indexes.items():
            found[name] = [documents.find(one["question"], 3) for one in questions]
        for pooling in ("last", "mean"):
            found[f"{pooling} alone"] = [by_vectors(indexes[pooling], one["question"]) for one in questions]
        short = DocumentsConfig(DOCS, Path(folder) / "short", chunk_tokens=60, overlap=10)
        update(DOCS, short.out, document_work(short, None))
        documents = Documents(short.out)
        found["short"] = [documents.find(one["question"], 1) for one in questions]
    prepare(model)
    return [
        score_way(way, questions, passages, ask(model, processor, questions, passages))
        for way, passages in found.items()
    ]


def by_vectors(documents: Documents, question: str) -> list:
    """Return the three passages whose vectors are nearest."""
    found = documents.find(question, len(documents.index))
    return sorted((one for one in found if one.cosine is not None), key=lambda one: -one.cosine)[:3]


def ask(model, processor, questions: list[dict], passages: list[list]) -> list[str]:
    sampling, requests = SamplingConfig(max_new_tokens=48), []
    for one, found in zip(questions, passages, strict=True):
        question = one["question"] + BRIEFLY
        content = with_passages(question, found) if found else question
        requests.append(Request(processor.prompt([{"role": "user", "content": content}]), sampling))
    answers = sorted(answer_all(Engine(model, 4), requests))
    return [after_thinking(done.ids, processor) for done in answers]


def score_way(way: str, questions: list[dict], passages: list[list], answers: list[str]) -> dict:
    """Return mean scores, and the share of questions that a passage of the right file holds the answer to."""
    figures = {"exact": [], "f1": [], "contains": [], "found": []}
    for one, found, said in zip(questions, passages, answers, strict=True):
        figures["exact"].append(max(normalise(said) == normalise(truth) for truth in one["answers"]))
        figures["f1"].append(max(token_f1(said, truth) for truth in one["answers"]))
        figures["contains"].append(any(contains(said, truth) for truth in one["answers"]))
        figures["found"].append(
            any(p.file == one["file"] and contains(p.text, t) for p in found for t in one["answers"])
        )
    means = {name: round(statistics.mean(map(float, values)), 3) for name, values in figures.items()}
    return {"way": way, "questions": len(questions), **means, "answers": answers}


def normalise(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def contains(text: str, truth: str) -> bool:
    return f" {' '.join(normalise(truth))} " in f" {' '.join(normalise(text))} "


def token_f1(said: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall over words, each as often as it occurs."""
    said_words, true_words = Counter(normalise(said)), Counter(normalise(truth))
    shared = (said_words & true_words).total()
    return 2 * shared / (said_words.total() + true_words.total()) if shared else 0.0


# --- search ----------------------------------------------------------------------------------------------------


def measure_search(config: RetrievalConfig) -> list[dict]:
    """Index drawn pictures with a model of the shapes of `scenes_siglip` and random weights, and search them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        draw_pictures(folder / "pictures", config.num)
        command = [sys.executable, "-m", "nanovlm.search", "index", "pictures", "out", "--model", "model"]
        seconds, peaks = [], []
        for _ in range(2):  # the second time nothing is new
            start = time.perf_counter()
            peaks.append(peak_of([*command, "--device", "cpu"], folder))
            seconds.append(time.perf_counter() - start)
        index = open_index(folder / "out")
        embedder = embedder_of(index.about, "cpu", str(folder / "model"))
        assert embedder is not None and index.vectors is not None
        check(index.vectors, embedder.query("a red circle"))
        times = timed(lambda: find_pictures(index, embedder, "a red circle", 5), config.repeats)
        size = sum(path.stat().st_size for path in (folder / "out" / "index").iterdir())
    return [
        {
            "num": config.num,
            "vector_size": index.about["vector_size"],
            "seconds_per_thousand": round(1000 * seconds[0] / config.num, 3),
            "seconds_unchanged": round(seconds[1], 2),
            "index_peak_mb": round(max(peaks)),
            "index_mb": round(size / 2**20, 1),
            "query_ms": times,
        }
    ]


def peak_of(command: list[str], folder: Path) -> float:
    """Run a command and return its peak memory in MB; what the system counts of children has this process in it."""
    peak, process = 0, subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        peak = int(found[1]) if found else peak
        time.sleep(0.05)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed")
    return peak / 1024


def save_model(folder: Path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 200), 640)
    vision = scenes().model.vision
    assert vision is not None
    size = vision.hidden_size
    config = DualConfig(vision=vision, text=TextConfig(vocab_size=640, hidden_size=size), projection_size=size)
    save_dual(folder, Dual(config), DualProcessor(tokenizer, config))


def draw_pictures(folder: Path, num: int):
    source = Scenes("train")
    for i, ref in zip(range(num), source.refs((0,), 1), strict=False):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.read(ref.key)["images"][0].save(path)


# --- vectors ---------------------------------------------------------------------------------------------------


def measure_vectors(config: RetrievalConfig) -> list[dict]:
    """Search mapped vectors of each dtype; and those that faiss holds in memory, where it is installed."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((config.num, SIZE), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = torch.from_numpy(vectors[:1] + 0.01 * generator.standard_normal((1, SIZE), dtype=np.float32))
    sides: dict[str, Callable] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "float32"):
            np.save(path := Path(folder) / f"{dtype}.npy", vectors.astype(dtype))
            mapped = open_vectors(path)
            check(mapped, query)
            sides[f"ours, {dtype}, mapped"] = lambda mapped=mapped: search(mapped, query, 10)
        try:
            import faiss
        except ModuleNotFoundError:
            print("faiss-cpu is not installed, and not measured")
        else:
            faiss.omp_set_num_threads(config.threads)
            flat = faiss.IndexFlatIP(SIZE)
            half = faiss.IndexScalarQuantizer(SIZE, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
            half.train(vectors[:1000])
            for name, index in (("faiss, float16, in memory", half), ("faiss, float32, in memory", flat)):
                index.add(vectors)
                sides[name] = lambda index=index: index.search(query.numpy(), 10)
        turns = [{name: timed(side, 1)[0] for name, side in sides.items()} for _ in range(config.repeats)]
    return [
        {"side": name, "num": config.num, "vector_size": SIZE, "query_ms": percentiles([turn[name] for turn in turns])}
        for name in sides
    ]


def check(vectors: torch.Tensor, query: torch.Tensor):
    """Raise UserError where a search does not find what a product in fp64 finds."""
    scores, rows = search(vectors, query, 10)
    truth = (vectors.double() @ query.double().T)[:, 0].sort(descending=True)
    if not torch.allclose(scores[0].double(), truth.values[:10], atol=1e-5) or rows[0, 0] != truth.indices[0]:
        raise UserError("the search does not find the largest products, so no time counts")


def timed(function: Callable, repeats: int) -> list[float]:
    """Return the median, the 10th and the 90th percentile of so many calls, in ms, after three that do not count."""
    times = []
    for _ in range(3 + repeats if repeats > 1 else 1):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return percentiles(times[3:]) if repeats > 1 else times


def percentiles(times: list[float]) -> list[float]:
    return [round(float(np.percentile(times, q)), 2) for q in (50, 10, 90)]


# --- tables ----------------------------------------------------------------------------------------------------

WAYS = {
    "none": "no passages",
    "short": "one passage of 60 tokens by its words (BM25)",
    "words": "three passages of 300 tokens by their words",
    "last alone": "by vectors, last token",
    "mean alone": "by vectors, mean of tokens",
    "last": "words and vectors, last token, fused",
    "mean": "words and vectors, mean of tokens, fused",
}


def write_tables():
    """Put the newest lines between the marks of docs/search.md."""
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []
    newest = {(line["subject"], line.get("way") or line.get("side")): line for line in lines}
    rows = [
        "| SmolLM2-135M answers from | passage found | exact | token F1 | contains it |",
        "|---|---|---|---|---|",
    ]
    for way, what in WAYS.items():
        line = newest.get(("answers", way))
        cells = (
            [f"{line[name]:.2f}" for name in ("found", "exact", "f1", "contains")] if line else ["not measured yet"] * 4
        )
        rows.append(f"| {what} | {' | '.join(['', *cells[1:]] if way == 'none' else cells)} |")
    tables = {"answers": rows}
    rows = ["| search of vectors | of them | a query, ms | 10 % to 90 % |", "|---|---|---|---|"]
    for (subject, side), line in newest.items():
        if subject in ("vectors", "search"):
            name = side or "pictures, through the index"
            middle, low, high = line["query_ms"]
            rows.append(f"| {name}, {line['vector_size']} numbers | {line['num']:,} | {middle} | {low} to {high} |")
    if line := newest.get(("search", None)):
        rows += [
            "",
            f"Index of {line['num']:,} drawn pictures: {line['seconds_per_thousand']} s a thousand, "
            f"{line['seconds_unchanged']} s where nothing has changed, at most {line['index_peak_mb']} MB of memory, "
            f"{line['index_mb']} MB on disk.",
        ]
    tables["search"] = rows
    for name, rows in tables.items():
        of = [line for (subject, _), line in newest.items() if (subject == "answers") == (name == "answers")]
        for device, threads, commit, date in dict.fromkeys(
            (line["device"], line["threads"], line["commit"][:7], line["date"]) for line in of
        ):
            rows += ["", f"({device}, {threads} threads, commit {commit}, {date})"]
        pages.put(PAGE, name, "retrieval.py", "\n".join(rows))


SUBJECTS = {"answers": measure_answers, "search": measure_search, "vectors": measure_vectors}

if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(RetrievalConfig, __doc__)))
