"""Prompts of different lengths answered at once by transformers, from an export: as one by one, and as we answer.

With the version installed here, and with others, each in a folder of its own:

    make other-transformers
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanovlm
from nanovlm.config import MoEConfig
from nanovlm.hub import export
from tests.conftest import noise
from tests.hub.ask_transformers import NEW_TOKENS, ask
from tests.hub.test_export import OWN, TEXT_ONLY, write_own

OTHERS = Path(os.environ.get("OTHER_TRANSFORMERS", "/nowhere"))
MODELS = {
    "pictures": OWN,
    "pictures, a mixture": dataclasses.replace(
        OWN, decoder=dataclasses.replace(OWN.decoder, moe=MoEConfig(num_experts=4, intermediate_size=32))
    ),
    "text": TEXT_ONLY,
    "text, layers without positions": dataclasses.replace(
        TEXT_ONLY, decoder=dataclasses.replace(TEXT_ONLY.decoder, layers_without_rope=(1,))
    ),
}
# Widths and heights of the pictures of each prompt: of one tile, of several, two pictures.
SIZES = [[(16, 16)], [(100, 64)], [(40, 130)], [(300, 7)], [(64, 64), (9, 30)], [(2, 5)], [(200, 180)], [(33, 64)]]
QUESTIONS = [
    "what color?",
    "what color is the circle next to the green triangle in the second row?",
    "how many objects are there?",
    "where?",
    "is there a red square above the blue one?",
    "what is in the image, and where is it?",
    "count the circles.",
    "describe the image.",
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def asked(request, tmp_path_factory):
    """An export, a file with prompts, and our answers to them, one by one."""
    config, folder = MODELS[request.param], tmp_path_factory.mktemp("batches")
    model = write_own(folder / "model", config)
    processor = nanovlm.load(folder / "model")[1]
    export.export(folder / "model", folder / "hub")
    prompts, ours = [], []
    for i, (sizes, question) in enumerate(zip(SIZES, QUESTIONS, strict=True)):
        images = [noise(i, 300).resize(size) for size in sizes] if config.vision else []
        paths = [str(folder / f"{i}_{j}.png") for j in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        prompts.append({"text": question, "images": paths})
        document = processor.prompt([{"role": "user", "content": question}], images)
        ours.append((document, nanovlm.generate(model, processor.batch([document]), max_new_tokens=NEW_TOKENS)[0]))
    (folder / "prompts.json").write_text(json.dumps(prompts))
    documents, answers = zip(*ours, strict=True)
    assert len({len(document) for document in documents}) > 5 and len(set(map(tuple, answers))) > 5
    assert nanovlm.generate(model, processor.batch(list(documents)), max_new_tokens=NEW_TOKENS) == list(answers)
    return folder / "hub", folder / "prompts.json", list(answers)


def assert_same(told, ours):
    assert told["alone"] == ours
    assert told["together"] == ours
    assert "token_type_ids" not in told["inputs"]  # with which transformers 4 refuses to generate


def test_answers_of_a_batch_are_those_of_its_prompts(asked):
    folder, prompts, ours = asked
    assert_same(ask(folder, json.loads(prompts.read_text())), ours)


def other_transformers(test):
    """Mark a test that runs with each of the other versions."""
    for mark in (
        pytest.mark.parametrize("version", ["4.54.1", "4.57.6", "5.20.0"]),
        pytest.mark.skipif(not OTHERS.is_dir(), reason="needs other versions of transformers: make other-transformers"),
        pytest.mark.other_transformers,
    ):
        test = mark(test)
    return test


def run_other(version, *arguments):
    """Run ask_transformers.py with another version; return what it says."""
    command = [sys.executable, str(Path(__file__).with_name("ask_transformers.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str((OTHERS / version).resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"] == version
    return told


@other_transformers
def test_other_versions_of_transformers_answer_the_same(asked, version):
    """4.57.6 sees other pictures in fp32, as every patch gets the position of its neighbour; else it is right too."""
    folder, prompts, ours = asked
    told = run_other(version, folder, prompts)
    if version == "4.57.6" and "repaired" in told:
        assert told["as it is"]["together"] == told["as it is"]["alone"] != ours
        assert_same(told["repaired"], ours)
    else:
        assert_same(told["as it is"], ours)
