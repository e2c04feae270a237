"""Each published benchmark on a tiny copy of its columns, as `datasets` stores them, and its scores.

The copies are parquet files with a README that names configs and splits, as on the hub; `root` stands for the hub.
"""

import io
import random

import datasets
import pytest
from PIL import Image

from nanovlm.data.chat import Processor
from nanovlm.eval.benchmarks import BENCHMARKS, table
from nanovlm.eval.multiple_choice import SEED, read_mmmu_values
from nanovlm.eval.run import evaluate
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def image(seed=0):
    file = io.BytesIO()
    noise(seed, size=20 + seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def vqa_answers(*answers):
    return [{"answer": x, "answer_confidence": "yes", "answer_id": i} for i, x in enumerate(answers, start=1)]


# name -> records
RECORDS = {
    "docvqa": [
        {"questionId": "1", "question": "What is the date?", "question_types": ["form", "layout"], "image": image(),
         "docId": 3, "answers": ["May 5", "5 May"]},
        {"questionId": "2", "question": "Who?", "question_types": ["layout"], "image": image(1), "docId": 4,
         "answers": ["ab"]},
    ],
    "infovqa": [
        {"questionId": "1", "question": "How many?", "answers": ["12"], "answer_type": ["single span"],
         "image": image()}
    ],
    "chartqa": [
        {"type": "human_test", "question": "How high?", "answer": "100", "image": image()},
        {"type": "augmented_test", "question": "Which?", "answer": "Yes", "image": image(1)},
    ],
    "textvqa": [
        {"image_id": "a", "question_id": 1, "question": "what is the brand of THIS?", "image": image(),
         "answers": ["nokia"] * 2 + [f"x{i}" for i in range(8)], "ocr_tokens": ["nokia"]}
    ],
    "vqav2": [
        {"question_type": "what", "multiple_choice_answer": "red", "answer_type": "other", "question": "What color?",
         "answers": vqa_answers(*["red"] * 3, *["dark red"] * 7), "image": image(), "question_id": 7}
    ],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition",
         "answer": ["CENTRE"], "image": image()},
        {"dataset": "HME100k", "question": "Write it.", "answer": ["x ^ 2"], "image": image(1),
         "question_type": "Handwritten Mathematical Expression Recognition"},
    ],
    "pope": [
        {"id": "0", "question_id": "1", "question": "Is there a cat?", "answer": "yes", "image": image(),
         "category": "random"},
        {"id": "1", "question_id": "2", "question": "Is there a dog?", "answer": "no", "image": image(1),
         "category": "popular"},
    ],
    "coco": [
        {"question_id": "1.jpg", "image": image(i), "question": "?", "id": i, "answer": [caption, caption + " today"]}
        for i, caption in enumerate(("a red dog runs here", "two cats sleep on a bed"))
    ],
    "countbench": [{"image": image(), "text": "ten cats", "question": "How many cats are there?", "number": 10}],
    "mmstar": [
        {"index": i, "question": f"Which? Options: A: x, B: y, C: z, D: w{more}", "image": image(i), "answer": "B",
         "category": category, "l2_category": l2, "meta_info": {"source": "s"}}
        for i, (category, l2, more) in enumerate(
            [("math", "geometry", " Please answer yes or no."), ("math", "geometry", ""), ("math", "statistics", "")]
        )
    ],
    "mmmu": [
        {"id": "validation_Accounting_1", "question": "Look at <image 2>, then <image 1>. Which?", "answer": "C",
         "options": "['cat', 'dog', '<image 1>', \"it's\"]", "question_type": "multiple-choice",
         "image_1": image(), "image_2": image(1)},
        {"id": "validation_Art_Theory_2", "question": "<image 1> How much?", "options": "[]",
         "answer": "['0.5', '1/2']", "question_type": "open", "image_1": image(2), "image_2": None},
    ],
    "mathvista": [
        {"pid": "1", "question": "Which?", "image": "images/1.jpg", "decoded_image": image(),
         "choices": ["3/11", "8/11"],
         "unit": None, "precision": None, "answer": "8/11", "question_type": "multi_choice", "answer_type": "text",
         "query": "?", "metadata": {"task": "figure question answering"}},
        {"pid": "2", "question": "How long?", "image": "images/2.jpg", "decoded_image": image(1), "choices": None,
         "unit": "cm", "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
         "query": "?", "metadata": {"task": "geometry problem solving"}},
        {"pid": "3", "question": "How many?", "image": "images/3.jpg", "decoded_image": image(2), "choices": None,
         "unit": None, "precision": None, "answer": "14", "question_type": "free_form", "answer_type": "integer",
         "query": "?", "metadata": {"task": "geometry problem solving"}},
    ],
    "ai2d": [{"question": "What is A?", "options": ["leaf", "root", "stem"], "answer": "1", "image": image()}],
    "scienceqa": [
        {"image": image(), "question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "It is hot.",
         "task": "closed choice", "subject": "natural science", "topic": "t"},
        {"image": image(1), "question": "Who?", "choices": ["x", "y", "z"], "answer": 0, "hint": "",
         "task": "closed choice", "subject": "social science", "topic": "t"},
    ],
    "realworldqa": [
        {"image": image(), "image_path": "a", "answer": "B", "question": "Where?\nA. left\nB. right\nPlease answer."},
        {"image": image(1), "image_path": "b", "answer": "2", "question": "How many?"},
    ],
}  # fmt: skip
# name -> prompts, references, kinds
EXPECTED = {
    "docvqa": (["What is the date?" + SHORT, "Who?" + SHORT], [("May 5", "5 May"), ("ab",)], ["form", "layout"]),
    "infovqa": (["How many?" + SHORT], [("12",)], ["single span"]),
    "chartqa": ([x + "\nAnswer the question with a single word." for x in ("How high?", "Which?")],
                [("100",), ("Yes",)], ["human_test", "augmented_test"]),
    "textvqa": (["What is the brand of this?" + SHORT], [("nokia", "nokia", *(f"x{i}" for i in range(8)))],
                ["question"]),
    "vqav2": (["What color?" + SHORT], [("red",) * 3 + ("dark red",) * 7], ["other"]),
    "ocrbench": (["what is written?", "Write it."], [("CENTRE",), ("x ^ 2",)],
                 ["Regular Text Recognition", "Handwritten Mathematical Expression Recognition"]),
    "pope": (["Is there a cat?" + SHORT, "Is there a dog?" + SHORT], [("yes",), ("no",)], ["random", "popular"]),
    "coco": (["Provide a one-sentence caption for the provided image."] * 2,
             [(x, x + " today") for x in ("a red dog runs here", "two cats sleep on a bed")], ["question"] * 2),
    "countbench": (["Look at the image carefully and count the objects. Answer with just a number, without any "
                    "additional text. How many cats are there?"], [("10",)], ["question"]),
    "mmstar": (["Which? Options: A: x, B: y, C: z, D: w" + LETTER.rstrip(".")] * 3, [("B",)] * 3,
               ["math: geometry", "math: geometry", "math: statistics"]),
    "mmmu": (["Look at, then. Which?\nA. cat\nB. dog\nC.D. it's\n" + LETTER, "How much?\n" + SHORT],
             [("C",), ("0.5", "1/2")], ["Accounting", "Art_Theory"]),
    "mathvista": (["Which?\nA. 3/11\nB. 8/11" + LETTER,
                   "How long? (Unit: cm)\nAnswer the question using a single floating-point number with one decimal "
                   "place.",
                   "How many?\nAnswer the question using a single integer number."], [("8/11",), ("1.2",), ("14",)],
                  ["figure question answering: choice", "geometry problem solving: float1",
                   "geometry problem solving: integer"]),
    "ai2d": (["What is A?\nA. leaf\nB. root\nC. stem" + LETTER], [("B",)], ["question"]),
    "scienceqa": (["Context: It is hot.\nWhich?\nA. x\nB. y" + LETTER, "Who?\nA. x\nB. y\nC. z" + LETTER],
                  [("B",), ("A",)], ["natural science", "social science"]),
    "realworldqa": (["Where?\nA. left\nB. right\nPlease answer.", "How many?"], [("B",), ("2",)], ["choice", "open"]),
}  # fmt: skip
COCO_CIDER = 4.7047579583240875  # by pycocoevalcap 1.2
# name -> (answers, main figure, its mean over questions, other figures)
SCORES = {
    "docvqa": (["may  5", "ax"], "anls", 0.5, {"anls_lenient": 0.75}),
    "infovqa": (["12"], "anls", 1, {"anls_lenient": 1}),
    "chartqa": (["105", "yes"], "relaxed_accuracy", 1, {"exact_match": 0}),
    "textvqa": (["The Nokia."], "vqa_soft", 0.6, {}),
    "vqav2": (["Red"], "vqa_soft_vqav2", 0.9, {}),
    "ocrbench": (["It says centre", "y = x^2"], "ocrbench", 1, {"ocrbench_lenient": 1}),
    "pope": (["Yes", "No, there is none"], "accuracy", 0.5,
             {"accuracy_lenient": 1, "f1": 1, "yes_ratio": 0.5, "neither_yes_nor_no": 0.5, "f1_lenient": 1}),
    "coco": (["a red dog runs here", "nothing"], "cider", COCO_CIDER, {"rouge_l": 0.5}),
    "countbench": (["Ten"], "accuracy", 1, {}),
    "mmstar": (["B", "The answer is B", "A"], "letter_mmstar", 2 / 3, {"letter_strict": 1 / 3}),
    "mmmu": (["(C)", "so the result is 0.50"], "accuracy", 1, {"drawn_at_random": 0}),
    "mathvista": (["(B)", "1.23", "there are 14 of them"], "accuracy", 2 / 3, {"accuracy_lenient": 1}),
    "ai2d": (["B. root"], "letter_ai2d", 1, {"letter": 1}),
    "scienceqa": (["(B)", "A"], "letter_strict", 0.5, {"letter": 1}),
    "realworldqa": (["The answer is B", "2."], "accuracy", 1, {}),
}  # fmt: skip


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Write every benchmark as parquet files under owner/name, with a README that names its configs."""
    root = tmp_path_factory.mktemp("hub")
    configs = {}
    for name, records in RECORDS.items():
        published = BENCHMARKS[name]
        folder = root / published.data / (published.config or "data")
        folder.mkdir(parents=True, exist_ok=True)
        dataset = datasets.Dataset.from_list(records)
        for column, value in records[0].items():
            if isinstance(value, dict) and "bytes" in value:
                dataset = dataset.cast_column(column, datasets.Image())
        dataset.to_parquet(folder / f"{published.split}-00000-of-00001.parquet")
        configs.setdefault(root / published.data, []).append(
            f"- config_name: {published.config or 'default'}\n  data_files:\n  - split: {published.split}\n"
            f"    path: {folder.name}/{published.split}-*\n"
        )
    for folder, entries in configs.items():
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    return root


def test_every_benchmark_is_tested():
    assert RECORDS.keys() == EXPECTED.keys() == SCORES.keys() == BENCHMARKS.keys() and len(BENCHMARKS) == 15


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_asks_what_is_published(root, name):
    task = open_task(name, 10, root=str(root))
    questions = read_questions(task)
    assert ([q.text for q in questions], [q.references for q in questions], [q.kind for q in questions]) == EXPECTED[
        name
    ]
    assert [q.max_new_tokens for q in questions] == [BENCHMARKS[name].max_new_tokens] * len(questions)
    for question, record in zip(questions, RECORDS[name], strict=True):
        shown = [part for part in question.messages[0]["content"] if part["type"] == "image"]
        assert len(shown) == len(question.images) == (3 if record.get("image_2") else 1)
        assert all(isinstance(x, Image.Image) and x.mode == "RGB" for x in question.images)
    assert len(read_questions(open_task(name, 1, root=str(root)))) == 1


def test_images_stand_where_mmmu_shows_them(root):
    first, second = read_questions(open_task("mmmu", 10, root=str(root)))
    kinds = [part.get("text", "image") for part in first.messages[0]["content"]]
    assert kinds == ["Look at", "image", ", then", "image", ". Which?\nA. cat\nB. dog\nC.", "image",
                     "D. it's\n" + LETTER]  # fmt: skip
    assert [x.width for x in first.images] == [21, 20, 20] and [x.width for x in second.images] == [22]
    assert first.choices == ("cat", "dog", "<image 1>", "it's") and second.choices == ()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_scored_as_published(root, monkeypatch, name):
    answers, main, overall, others = SCORES[name]
    task = open_task(name, 10, root=str(root))
    monkeypatch.setattr("nanovlm.eval.run.answer", lambda *_, **__: [f" {answer}\n" for answer in answers])
    result = evaluate(None, None, task, read_questions(task))
    assert result.get("figure", "accuracy") == main
    assert result["overall"] == pytest.approx(overall)
    assert {figure: result[figure] for figure in others} == pytest.approx(others)
    assert result["intervals"].keys() >= {"mean", "overall", *others}
    if name == "mmstar":
        assert result["mean"] == pytest.approx(0.5)  # of two sub-categories, one with both right


def test_a_model_answers_a_benchmark_with_controls(root, processor: Processor):
    model = VLM(TINY).eval()
    task = open_task("chartqa", 10, root=str(root))
    result = evaluate(model, processor, task, read_questions(task), controls=True)
    assert result["n"] == 2 and {"blank_mean", "shuffled_mean", "alone_mean"} <= result.keys()


def test_answers_without_a_letter_are_drawn_and_counted(root):
    task = open_task("mmmu", 10, root=str(root))
    question = read_questions(task)[0]
    drawn = random.Random(f"{SEED} 0").choice("ABCD")
    assert task.score(question, "I do not know") == {"accuracy": float(drawn == "C"), "drawn_at_random": 1.0}
    draws = {random.Random(f"{SEED} {record}").choice("ABCD") for record in range(20)}
    assert draws == set("ABCD")


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        ("0.5", {0.5}),
        ("The result is 1,000.", {1000.0, 0.0}),
        ("It could be x\nso y = 3", {" x", "x ", 3.0}),
        ("nothing", {"nothing"}),
        ("is :", {"is :"}),
        ("the answer is about 1e3 cm", {"about 1e3 cm", 1000.0, 3.0}),
    ],
)
def test_open_answers_of_mmmu_are_read_by_its_rules(answer, values):
    assert read_mmmu_values(answer) == values


def test_mathvista_reads_strictly_and_leniently(root):
    choice, length, count = read_questions(task := open_task("mathvista", 10, root=str(root)))
    for question, answer, strict, lenient in [
        (choice, "8/11", 1, 1), (choice, "B", 1, 1), (choice, "A", 0, 0), (choice, "The answer is (B)", 0, 1),
        (choice, "8/1", 0, 1), (choice, "", 0, 0), (length, "1.20", 1, 1), (length, "1.25", 1, 1),
        (length, "1.3", 0, 0), (length, "about 1.2 cm", 0, 1), (count, "14.0", 1, 1),
        (count, "14.5", 1, 1), (count, "fourteen", 0, 0),
        (count, "inf", 0, 0), (count, "nan", 0, 0),
    ]:  # fmt: skip
        assert task.score(question, answer) == {"accuracy": strict, "accuracy_lenient": lenient}, answer


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("docvqa", {"answers": []}, r"record 1 of pass 0: the column answers must hold a text or a list of texts"),
        ("docvqa", {"question": None}, r"record 1 of pass 0: the column question must hold a str, not a NoneType"),
        (
            "ai2d",
            {"answer": "7"},
            r"record 1 of pass 0: the column answer must be the index of one of 3 options, not '7'",
        ),
        ("docvqa", {"image": {"bytes": b"x", "path": None}}, "the column image cannot be read as an image"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, name, change, message):
    published = BENCHMARKS[name]
    folder = tmp_path / published.data / (published.config or "data")
    folder.mkdir(parents=True)
    first = RECORDS[name][0]
    dataset = datasets.Dataset.from_list([first, first | change]).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "x.parquet")
    (tmp_path / published.data / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {published.config or 'default'}\n  data_files:\n  - split: {published.split}\n"
        f"    path: {folder.name}/x.parquet\n---\n"
    )
    with pytest.raises(ValueError, match=f"the task {name} cannot be asked: .*{message}"):
        read_questions(open_task(name, 10, root=str(tmp_path)))


def test_a_benchmark_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the task docvqa cannot be asked: hub:.*DocVQA:DocVQA, split 'validation'"):
        read_questions(open_task("docvqa", 10, root=str(tmp_path)))


def test_the_table_names_every_benchmark():
    lines = table()
    assert len(lines) == 17 and all(line.count("|") == 8 for line in lines)
    assert (
        "| `pope` | `lmms-lab-encoder/POPE` | test | `accuracy`, `accuracy_lenient`, `pope`, `pope_lenient` |"
        in lines[8]
    )
