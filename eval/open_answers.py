"""Published benchmarks whose answers are words, numbers or captions."""

from nanovlm.eval.metrics import METRICS
from nanovlm.eval.normalise import NUMBERS
from nanovlm.eval.published import NO_LIMIT, SHORT, Asked, Published, by, get, get_texts, picture
from nanovlm.eval.questions import Question

FORMULAS = "Handwritten Mathematical Expression Recognition"
CAPTION = "Provide a one-sentence caption for the provided image."
COUNT = "Look at the image carefully and count the objects. Answer with just a number, without any additional text. "
TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
NUMBER_WORDS = NUMBERS | {word: str(i) for i, word in enumerate(TEENS, start=11)}


def ask_docvqa(record: dict) -> Asked:
    kinds = record.get("question_types") or ["question"]
    return Asked(get(record, "question") + SHORT, get_texts(record, "answers"), [picture(record)], kinds[0])


def ask_infovqa(record: dict) -> Asked:
    kinds = record.get("answer_type") or ["question"]
    return Asked(get(record, "question") + SHORT, get_texts(record, "answers"), [picture(record)], kinds[0])


def ask_chartqa(record: dict) -> Asked:
    text = get(record, "question") + "\nAnswer the question with a single word."
    return Asked(text, get_texts(record, "answer"), [picture(record)], get(record, "type"))


def ask_textvqa(record: dict) -> Asked:
    return Asked(get(record, "question").capitalize() + SHORT, get_texts(record, "answers"), [picture(record)])


def ask_vqav2(record: dict) -> Asked:
    answers = tuple(get(answer, "answer") for answer in get(record, "answers", list))
    return Asked(get(record, "question") + SHORT, answers, [picture(record)], get(record, "answer_type"))


def ask_ocrbench(record: dict) -> Asked:
    references = get_texts(record, "answer")
    return Asked(get(record, "question").strip(), references, [picture(record)], get(record, "question_type"))


def score_ocrbench(metric: str):
    """Compare handwritten formulas in their own way, everything else by a metric."""

    def score(question: Question, answer: str) -> float:
        name = "ocrbench_formula" if question.kind == FORMULAS else metric
        return METRICS[name](answer, question.references)

    return score


def ask_pope(record: dict) -> Asked:
    references = (get(record, "answer").strip().lower(),)
    return Asked(get(record, "question").strip() + SHORT, references, [picture(record)], get(record, "category"))


def ask_coco(record: dict) -> Asked:
    return Asked(CAPTION, get_texts(record, "answer"), [picture(record)])


def ask_countbench(record: dict) -> Asked:
    text = COUNT + get(record, "question").strip()
    return Asked(text, (str(get(record, "number", (int, str))),), [picture(record)])


def score_countbench(question: Question, answer: str) -> float:
    """Compare numbers, which may be words up to twenty."""
    said, true = (NUMBER_WORDS.get(x.strip().lower(), x.strip().lower()) for x in (answer, question.truth))
    return float(said == true)


def _docvqa(config, ask, kinds):
    return Published("lmms-lab-encoder/DocVQA", config, "validation", ask, by("anls", "anls_lenient"), 32, kinds=kinds)


OPEN_ANSWERS = {
    "docvqa": _docvqa("DocVQA", ask_docvqa, "the first of `question_types`"),
    "infovqa": _docvqa("InfographicVQA", ask_infovqa, "the first of `answer_type`"),
    "chartqa": Published(
        "lmms-lab-encoder/ChartQA", "", "test", ask_chartqa, by("relaxed_accuracy", "exact_match"), 16, kinds="`type`"
    ),
    "textvqa": Published("lmms-lab-encoder/textvqa", "", "validation", ask_textvqa, by("vqa_soft"), NO_LIMIT),
    "vqav2": Published(
        "lmms-lab-encoder/VQAv2", "", "validation", ask_vqav2, by("vqa_soft_vqav2"), 16, kinds="`answer_type`"
    ),
    "ocrbench": Published(
        "echo840/OCRBench",
        "",
        "test",
        ask_ocrbench,
        {"ocrbench": score_ocrbench("ocrbench"), "ocrbench_lenient": score_ocrbench("ocrbench_lenient")},
        128,
        kinds="`question_type`",
        score="1000 times the mean over questions",
    ),
    "pope": Published(
        "lmms-lab-encoder/POPE",
        "",
        "test",
        ask_pope,
        {"accuracy": by("yes_no")["yes_no"], "accuracy_lenient": by("yes_no_lenient")["yes_no_lenient"]},
        128,
        corpus=("pope", "pope_lenient"),
        kinds="`category`",
    ),
    "coco": Published(
        "lmms-lab-encoder/COCO-Caption2017", "", "val", ask_coco, by("rouge_l"), 64, ("cider", "bleu"), score="CIDEr"
    ),
    "countbench": Published("vikhyatk/CountBenchQA", "", "test", ask_countbench, {"accuracy": score_countbench}, 16),
}
