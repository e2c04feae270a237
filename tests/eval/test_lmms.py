"""lmms-eval asks our models by its own commands, and gets the answers and the scores that eval.run gives.

make harness
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanovlm.config import SamplingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.eval.published import NO_LIMIT
from nanovlm.eval.run import AskConfig, main
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.answers import generate
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

ROOT = Path(__file__).parent.parent.parent
HARNESS = importlib.util.find_spec("lmms_eval")
pytestmark = [
    pytest.mark.harness,
    pytest.mark.skipif(HARNESS is None, reason="needs lmms-eval, which make harness installs"),
]

# A task of lmms-eval for each metric, on the records of one file, with its own functions.
TASK = """\
task: mine_METRIC
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.see
doc_to_text: "{{question}}"
doc_to_target: answers
generation_kwargs: {max_new_tokens: 48, until: []}
metric_list: [{metric: THEIRS, aggregation: mean, higher_is_better: true}]
"""
# Our metric -> the name of lmms-eval's, and the line of the task that computes it if it is not one of its own.
SCORES = {
    "exact_match": ("exact_match", ""),
    "anls_lenient": ("anls", ""),
    "relaxed_accuracy": ("relaxed", "process_results: !function functions.score_relaxed"),
    "vqa_soft": ("vqa", "process_results: !function functions.score_vqa"),
}
FUNCTIONS = """\
from pathlib import Path
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
def see(record):
    return [str(Path(__file__).parent / record["image"])]
def score_relaxed(record, results):
    return {"relaxed": max(float(relaxed_correctness(results[0], answer)) for answer in record["answers"])}
def score_vqa(record, results):
    record = {"answers": [*record["answers"]], "question_id": 0}
    return {"vqa": textvqa_process_results(record, results)["exact_match"]}
"""


def make_folder(folder, seed, words):
    """Write a model folder whose random model writes numbers, and words the more the larger their factor is."""
    torch.manual_seed(seed)
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=False))
    processor = Processor(train_tokenizer(sample_texts(Scenes("train"), 50), 512), CHAT_TEMPLATE, config)
    model = VLM(config).eval()
    factors = torch.zeros(512, 1)
    for token, i in processor.tokenizer.get_vocab().items():
        factors[i] = 30 if re.fullmatch("[0-9%.]", token) else words if re.fullmatch("Ġ[a-z]+", token) else 0
    factors[config.eos_token_id] = 25
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(factors)
        model.projector.proj.weight.mul_(8)  # so that answers depend on the image
    save_model(folder, model, processor)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "model", seed=3, words=12)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """What runs lmms-eval on tasks in a folder, with our plug-in as an installation would register it."""
    installed = tmp_path_factory.mktemp("installed")
    code = "import sys; from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(installed)], cwd=ROOT, check=True, capture_output=True)
    home = tmp_path_factory.mktemp("home")
    paths = [str(installed), str(ROOT), str(Path(HARNESS.origin).resolve().parent.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def call(tasks, *args):
        command = [sys.executable, "-m", "lmms_eval", "--model", "nanovlm", "--include_path", str(tasks), *args]
        return subprocess.run(list(map(str, command)), cwd=home, env=env, capture_output=True, text=True)

    return call


@pytest.fixture(scope="module")
def model(folder):
    """The class that lmms-eval finds, made as it makes it; it holds the model and its processor."""
    from nanovlm.eval.lmms import Model

    return Model(pretrained=str(folder), batch_size=4)


def see(*parts):
    """One turn of a user in lmms-eval's form, of texts, images and paths of images."""
    shown = [{"type": "image", "url": str(part) if isinstance(part, Path) else part} for part in parts]
    texts = [{"type": "text", "text": part} for part in parts]
    content = [texts[i] if isinstance(part, str) else shown[i] for i, part in enumerate(parts)]
    return [{"role": "user", "content": content}]


def request(model, messages, **options):
    """A request for the answer to these messages, as lmms-eval puts it to a chat model."""
    records = model.task_dict.setdefault("mine", {"test": []})["test"]
    records.append(messages)
    return SimpleNamespace(args=("", lambda record: record, options, len(records) - 1, "mine", "test"))


def say(model, text, images, num, **options):
    """Our own answer, without a batch, to a question or a whole conversation."""
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    batch = model.processor(messages, images)
    return model.processor.decode(generate(model.model, batch, max_new_tokens=num, **options)[0])


def evaluate(folder, records, out):
    """Score answers as eval.run does; return them, the scores of each by metric, and the means."""
    config = AskConfig(str(folder), data=(str(records),), metric=(*SCORES, "anls"), controls=False, out=out)
    main(config)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    (means,) = json.loads((out / "scores.json").read_text())["tasks"].values()
    assert means["figure"] == "exact_match"
    scores = {name: [line["scores"][name] for line in lines] for name in config.metric}
    return [line["answer"] for line in lines], scores, means | {"exact_match": means["overall"]}


def write_records(folder, file):
    """Write questions to which the answers of a model are right, nearly right or wrong; return these answers."""
    from nanovlm.eval.lmms import Model

    model, answers, lines = Model(str(folder)), [], []
    for i in range(24):
        noise(i).save(file.parent / f"{i}.png")
        answers.append(say(model, f"what is {i}?", [noise(i)], 48))
        said = answers[-1].strip()
        right = [
            [said] * 10,
            [f"{said}x"] * 10,
            [f"The {said}."] * 10,
            [f"no {said}", said.upper()] * 5,
            ["nothing"] * 8 + [said] * 2,
            ["nothing of the kind"] * 10,
            [said[: len(said) // 2] + "xy" * len(said)] * 10,
            [said[: len(said) // 2] + "_" * (len(said) - len(said) // 2)] * 10,
        ][i % 8]
        if re.fullmatch("[0-9]+", said):
            right = [f"{1.06 * float(said)}", f"{1.04 * float(said)}"] * 2 if i % 3 else ["0", said, said, "7%"]
        lines.append({"image": f"{i}.png", "question": f"what is {i}?", "answers": right})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return answers


def test_lmms_eval_gets_our_answers_and_scores(ask, tmp_path):
    folder = make_folder(tmp_path / "model", seed=37, words=14)
    answers = write_records(folder, tmp_path / "mine.jsonl")
    assert len(set(answers)) > 5 and any(said != said.strip() for said in answers)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    for name, (theirs, line) in SCORES.items():
        task = TASK.replace("METRIC", name).replace("THEIRS", theirs).replace("FILE", str(tmp_path / "mine.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(task + line)
    tasks = ",".join(f"mine_{name}" for name in SCORES)
    done = ask(tmp_path, "--tasks", tasks, "--model_args", f"pretrained={folder}", "--batch_size", 5, "--log_samples",
               "--output_path", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(results.read_text())
    assert results["config"]["model_backend"] == "nanovlm.eval.lmms.Model (chat)"
    said, scores, means = evaluate(folder, tmp_path / "mine.jsonl", tmp_path / "ours")
    assert said == answers
    for name, (metric, _) in SCORES.items():
        (samples,) = (tmp_path / "out").rglob(f"*_samples_mine_{name}.jsonl")
        samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"] for sample in samples] == [text.strip() for text in said]
        assert [sample[metric] for sample in samples] == pytest.approx(scores[name], abs=1e-12)
        assert 0 < means[name] < 1
        mean = results["results"][f"mine_{name}"][f"{metric},none"]
        assert mean == pytest.approx(means[name], abs=1e-12)
    assert means["anls"] < means["anls_lenient"]  # where half of an answer is right
    assert means["relaxed_accuracy"] > means["exact_match"]


def test_answers_are_the_same_in_any_batch_and_within_their_own_limits(model):
    limits = [(48, 1), (2, 1), (48, 1.5), (1, 1), (3, 1), (48, 1), (48, 1.5), (2, 1), (48, 1)]
    asked, alone = [], []
    for i, (num, penalty) in enumerate(limits):
        options = {"max_new_tokens": num, "repetition_penalty": penalty}
        question = f"what is {i + 1}{'0' * i}?"
        asked.append(request(model, see(noise(i), question), **options))
        alone.append(say(model, question, [noise(i)], num, repetition_penalty=penalty))
    assert len(set(alone)) > 5
    assert model.generate_until(asked) == alone
    assert model.generate_until(asked[::-1]) == alone[::-1]


def test_images_are_where_the_messages_have_them(model, tmp_path):
    noise(5).save(tmp_path / "5.png")
    asked = [request(model, see("first", noise(4), "then", tmp_path / "5.png", "what changed?"), max_new_tokens=48)]
    image, texts = {"type": "image"}, [{"type": "text", "text": text} for text in ("first", "then", "what changed?")]
    messages = [{"role": "user", "content": [texts[0], image, texts[1], image, texts[2]]}]
    expected, swapped = (say(model, messages, [noise(i), noise(9 - i)], 48) for i in (4, 5))
    assert model.generate_until(asked) == [expected] != [swapped]
    dialogue = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        *see("what?"),
        {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
        *see("where?"),
    ]
    plain = [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in dialogue]
    asked = request(model, dialogue, max_new_tokens=48)
    assert model.read(asked)[0].prompt.input_ids.equal(model.processor.prompt(plain).input_ids)
    assert model.generate_until([asked]) == [say(model, plain, [], 48)]


def test_answers_end_before_the_first_stop(model):
    whole = say(model, "what is 0?", [noise(0)], 48)
    stop = whole[4:6]
    assert len(stop) == 2 and whole.index(stop) == 4 and whole.index(stop[1]) < 4
    for until, expected in [
        ([], whole),
        (None, whole),
        (["\n\n", ""], whole),
        (stop, whole[:4]),
        ([stop, whole[1:3], "?"], whole[: whole.index(whole[1:3])]),
        ([whole[0]], ""),
    ]:
        assert model.generate_until([request(model, see(noise(0), "what is 0?"), max_new_tokens=48, until=until)]) == [
            expected
        ]


def test_answers_end_with_the_positions(model, capsys, monkeypatch):
    length = len(model.processor.prompt(see(noise(0), "what is 0?"), [noise(0)]))
    asked = [request(model, see(noise(0), "what is 0?"), max_new_tokens=n) for n in (4, 1000)]
    monkeypatch.setattr(model.engine, "longest", length + 2)
    cut = say(model, "what is 0?", [noise(0)], 2)
    assert model.generate_until(asked) == [cut, cut]
    noted = capsys.readouterr().out.splitlines()
    assert noted[0] == f"note: answers in the task mine end before 4 tokens where the {length + 2} positions end"
    assert len(noted) == 2
    monkeypatch.setattr(model.engine, "longest", length)
    with pytest.raises(UserError, match=rf"the task mine, record \d+ of test: its prompt of {length} tokens fills the"):
        model.generate_until(asked)


REFUSED = {
    "drawn": (see("what?"), dict(do_sample=True, temperature=0.7), "drawn at temperature 0.7, .*do_sample=False,"),
    "warm": (see("what?"), dict(temperature=1), "drawn at temperature 1, "),
    "beams": (see("what?"), dict(num_beams=3), "asks for 3 beams, .*num_beams=1"),
    "video": ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], {}, "it shows video, but"),
    "no file": (see(Path("none.png"), "what?"), {}, "there is no image file none.png"),
    "no question": (see(noise(0)), {}, "the prompt is empty"),
}


@pytest.mark.parametrize(("messages", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_task_and_record(model, messages, options, message):
    with pytest.raises(UserError, match=rf"the task mine, record \d+ of test: .*{message}"):
        model.generate_until([request(model, messages, **options)])


def test_options_that_are_not_read_are_named_once(model, capsys):
    asked = [request(model, see("what?"), max_new_tokens=1, do_sample=False, temperature=0.2, top_p=0, look=1)] * 3
    assert len(set(model.generate_until(asked))) == 1
    assert model.read(request(model, see("what?")))[0].sampling == SamplingConfig(max_new_tokens=NO_LIMIT)
    assert capsys.readouterr().out == "note: the options look of the task mine are not read\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "need pretrained=MODEL"),
        ({"pretrained": "x", "dtypes": "bf16"}, "do not take dtypes; there are pretrained and dtype"),
        ({"pretrained": "x", "dtype": "fp8"}, "dtype=fp8 in --model_args must be one of auto, bf16, fp32"),
        ({"pretrained": "x", "batch_size": "auto"}, "--batch_size auto must be a number"),
        ({"pretrained": "x", "batch_size": 0}, "--batch_size 0 must be a number"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    from nanovlm.eval.lmms import Model

    with pytest.raises(UserError, match=message):
        Model(**arguments)


def test_weights_can_be_read_in_another_precision(folder):
    from nanovlm.eval.lmms import Model

    assert Model(str(folder), dtype="bf16").model.decoder.embed_tokens.weight.dtype == torch.bfloat16


def test_what_lmms_eval_asks_other_kinds_of_models(model):
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="nanovlm"):
            method([])


def test_the_model_that_lmms_eval_has_by_this_name_is_called_another():
    from nanovlm.eval.lmms import manifest

    models = importlib.import_module("lmms_eval.models")
    own = f"lmms_eval.models.chat.nanovlm.{models.AVAILABLE_CHAT_TEMPLATE_MODELS['nanovlm']}"
    paths = {model.model_id: model.chat_class_path for model in manifest()}
    assert paths == {"nanovlm": "nanovlm.eval.lmms.Model", "nanovlm_lmms_engine": own}
