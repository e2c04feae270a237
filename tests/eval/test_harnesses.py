"""Our metrics give what lmms-eval's and VLMEvalKit's own functions give, on 200 answers with near misses of all kinds.

    make harness

Where the two harnesses differ from each other or from us by design, a test says how. What VLMEvalKit asks of a server,
as docs/harnesses.md has it, is read from a request of its own.
"""

import base64
import http.server
import importlib
import importlib.util
import io
import json
import random
import re
import sys
import threading
import types
from pathlib import Path

import pytest
from PIL import Image

from nanovlm.eval.metrics import METRICS

LMMS, KIT = importlib.util.find_spec("lmms_eval"), importlib.util.find_spec("vlmeval")
pytestmark = [
    pytest.mark.harness,
    pytest.mark.skipif(not (LMMS and KIT), reason="needs lmms-eval and VLMEvalKit, which make harness installs"),
]

WORDS = [
    "red", "yes", "no", "Stop sign", "the cat", "a dog on a mat", "an apple", "none", "two", "don't", "dont", "it's",
    "he'd've", "O'Neil", "U.S.A.", "e.g. this", "New York, NY", "t-shirt", "a/b", "(left)", "what?", "naïve café",
    "Straße", "İstanbul", "日本語", "ﬁsh", "x² + y²", "5½", "٣", "A", "an", "the", ";", "...", "the  two   cats",
    "1,000 (km)/h",
]  # fmt: skip
NUMBERS = [
    "10", "100", "20", "3.5", "0", "0.0", "-4", "1e3", "1,000", "12,345.67", "50%", "0.5", "100%", "2005", "$5.40",
    "5 km/h", "nan", "inf", "1_000", "42.", ".5",
]  # fmt: skip


def edit(text, rng):
    """Replace, insert or delete one character, some letters for others outside ASCII."""
    if not text:
        return "x"
    i, letter = rng.randrange(len(text)), rng.choice("aeiost 0.5,é日'")
    return rng.choice([text[:i] + letter + text[i + 1 :], text[:i] + letter + text[i:], text[:i] + text[i + 1 :]])


def scale(text, rng):
    """A number near 5 percent off, on either side of what is allowed, or just there; other texts as they are."""
    try:
        value = float(text.rstrip("%").replace(",", ""))
    except ValueError:
        return text
    value *= rng.choice([0.949, 0.95, 0.951, 1, 1.049, 1.05, 1.051])
    return rng.choice([f"{value:g}", f"{value}", f"{100 * value:g}%", f"{value / 100:g}", f"{value:,.2f}"])


CHANGES = [
    lambda text, rng: text,
    lambda text, rng: text.upper(),
    lambda text, rng: f"{rng.choice(['The', 'an', 'a'])} {text}.",
    lambda text, rng: f"{text}, {text}?",
    lambda text, rng: text.replace(" ", "  "),
    lambda text, rng: re.sub(r"[^\w\s.,]", "", text),
    lambda text, rng: text.replace(",", ""),
    lambda text, rng: {"none": "0", "two": "2", "0": "None", "10": "ten"}.get(text, text),
    lambda text, rng: text[: (len(text) + 1) // 2],  # so that a similarity of exactly a half occurs
    lambda text, rng: text + "x" * len(text),
    lambda text, rng: text + "." * 40,
    lambda text, rng: "",
    lambda text, rng: rng.choice(WORDS + NUMBERS),
    edit,
    edit,
    lambda text, rng: edit(edit(edit(text, rng), rng), rng),
]


def make_pairs(number=200, seed=0):
    """Return answers, stripped as lmms-eval strips them, and their references: one, a few, or the ten of VQA."""
    rng = random.Random(seed)
    pairs = []
    for i in range(number):
        group = NUMBERS if i % 2 else WORDS
        truth = group[i // 2 % len(group)]
        changes = [*CHANGES, *[scale] * 15 * (i % 2)]
        count = rng.choice([1, 3, 10, 10])
        references = [rng.choice(changes)(truth, rng) if rng.random() < 0.4 else truth for _ in range(count)]
        pairs.append((rng.choice(changes)(truth, rng).strip(), references))
    return pairs


PAIRS = [*make_pairs(), ("none", ["0"] * 10), ("Ten", ["10"] * 10), ("it isnt", ["It isn't"] * 10)]


def of_lmms_eval(name):
    """Return lmms-eval's function of a metric: (answer, references) -> float."""
    if name == "exact_match":
        match = importlib.import_module("lmms_eval.api.metrics").exact_match_hf_evaluate
        # As its tasks with several targets use it (`multiple_target` of lmms_eval/api/task.py).
        return lambda answer, refs: max(match(predictions=[answer], references=[r])["exact_match"] for r in refs)
    if name == "anls_lenient":
        anls = importlib.import_module("lmms_eval.api.metrics").anls
        return lambda answer, refs: anls(references=refs, predictions=[answer])["anls"]
    if name == "relaxed_accuracy":
        relaxed = importlib.import_module("lmms_eval.tasks.chartqa.utils").relaxed_correctness
        return lambda answer, refs: max(relaxed(answer, r) for r in refs)
    if name == "vqa_soft":
        textvqa = importlib.import_module("lmms_eval.tasks.textvqa.utils").textvqa_process_results
        return lambda answer, refs: textvqa({"answers": [*refs], "question_id": 0}, [answer])["exact_match"]
    vqav2 = importlib.import_module("lmms_eval.tasks.vqav2.utils").vqav2_process_results_val

    def score(answer, refs):
        answers = [{"answer": r, "answer_id": i} for i, r in enumerate(refs)]
        return vqav2({"answers": answers, "question_id": 0}, [answer])["exact_match"]

    return score


def of_vlmevalkit(name):
    """Return VLMEvalKit's function of a metric: (answer, references) -> float."""
    kit = load_kit("vlmeval.dataset.utils.vqa_eval")
    method = {"anls_lenient": "anls", "relaxed_accuracy": "relaxed_accuracy", "vqa_soft_vqav2": "vqa_score"}[name]
    dataset = {"anls": "DocVQA_VAL", "relaxed_accuracy": "ChartQA_TEST", "vqa_score": "TextVQA_VAL"}[method]

    def score(answer, references):
        line = kit.process_line({"answer": str(references), "prediction": answer}, method)
        return float(kit.hit_calculate([line], dataset)[0])

    return score


def load_kit(module):
    """Import a module of VLMEvalKit past its packages' __init__, which import all of its models and data sets."""
    root = Path(KIT.origin).parent
    for name in ("vlmeval", "vlmeval.dataset", "vlmeval.dataset.utils", "vlmeval.api"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    sys.modules["vlmeval.dataset"].DATASET_TYPE = None  # what adapters for other models import
    sys.modules["vlmeval.dataset"].DATASET_MODALITY = None
    return importlib.import_module(module)


def differences(name, theirs):
    """Return the pairs that we and they score differently, once it is seen that scores of both kinds occur."""
    ours = [float(METRICS[name](answer, references)) for answer, references in PAIRS]
    assert 30 < sum(score > 0 for score in ours) < 170
    others = [float(theirs(answer, references)) for answer, references in PAIRS]
    pairs = zip(PAIRS, ours, others, strict=True)
    return [(pair, own, other) for pair, own, other in pairs if abs(own - other) > 1e-12]


@pytest.mark.parametrize("name", ["exact_match", "anls_lenient", "relaxed_accuracy", "vqa_soft", "vqa_soft_vqav2"])
def test_lmms_eval_scores_the_same(name):
    assert differences(name, of_lmms_eval(name)) == []


@pytest.mark.parametrize("name", ["anls_lenient", "relaxed_accuracy"])
def test_vlmevalkit_scores_the_same(name):
    assert differences(name, of_vlmevalkit(name)) == []


def test_vlmevalkit_scores_vqa_the_same_but_for_a_full_stop_after_a_digit():
    """It leaves that full stop, which the scorer of the challenge, lmms-eval and we take out."""
    different = differences("vqa_soft_vqav2", of_vlmevalkit("vqa_soft_vqav2"))
    assert all(re.search(r"\d\.(?!\d)", " ".join([answer, *references])) for (answer, references), _, _ in different)
    assert len(different) <= 5


# (metric of ours, answer, references), our score, and those of lmms-eval and VLMEvalKit in tasks of this kind.
BY_DESIGN = [
    (("anls", "ax", ["ab"]), 0, 1 / 2, 1 / 2),  # just half of it is right
    (("anls", "a  x", ["a b"]), 2 / 3, 3 / 4, 3 / 4),  # white space counts in the length that they divide by
    (("vqa_soft", "red,blue", ["redblue"] * 10), 1, 1, 0),  # TextVQA's form, VQAv2's form
    (("vqa_soft", "It is 10.", ["it is 10"] * 10), 1, 1, 0),  # a full stop after a digit
]


@pytest.mark.parametrize(("asked", "ours", "lmms", "kit"), BY_DESIGN)
def test_what_differs_by_design(asked, ours, lmms, kit):
    name, answer, references = asked
    assert METRICS[name](answer, references) == pytest.approx(ours)
    assert of_lmms_eval({"anls": "anls_lenient"}.get(name, name))(answer, references) == pytest.approx(lmms)
    kit_name = {"anls": "anls_lenient", "vqa_soft": "vqa_soft_vqav2"}[name]
    assert of_vlmevalkit(kit_name)(answer, references) == pytest.approx(kit)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers a request for a chat completion with "red" and keeps it."""

    kept = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.kept.append((self.path, self.headers["Authorization"], json.loads(body)))
        reply = json.dumps({"choices": [{"message": {"content": " red\n"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


def test_what_vlmevalkit_asks_of_a_server(tmp_path):
    """It sends every image as JPEG, and enlarges small ones, so that a server sees other pixels than the file has."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Image.new("RGBA", (40, 30), "red").save(tmp_path / "a.png")
    # As its run.py makes it from --base-url, --model, --key, --max-tokens and --temperature.
    model = load_kit("vlmeval.api.lmdeploy").LMDeployAPI(
        model="mine",
        api_base=f"http://127.0.0.1:{server.server_port}/v1/chat/completions",
        key="sk-admin",
        max_tokens=16,
        temperature=0,
        retry=1,
        verbose=False,
    )
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": "what?"}]
    assert model.generate(message) == "red"
    server.shutdown()
    ((path, key, body),) = Recorder.kept
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-admin")
    image, text = body["messages"][0].pop("content")
    assert body == {"model": "mine", "messages": [{"role": "user"}], "n": 1, "max_tokens": 16, "temperature": 0}
    assert text == {"type": "text", "text": "what?"}
    start, _, data = image["image_url"]["url"].partition(",")
    assert (image["type"], start) == ("image_url", "data:image/jpeg;base64")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.mode, sent.size) == ("JPEG", "RGB", (133, 100))
