"""Ask a run and its export, loaded by transformers, the same held-out questions.

    make demo test && .venv/bin/python benchmarks/export.py runs/demo

Writes benchmarks/results/export.json: how many answers are the same to the letter, and how many are right.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
from nanovlm import cli
from nanovlm.environment import describe_environment
from nanovlm.eval.run import MAX_NEW_TOKENS, answer
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import read_json, write_file
from nanovlm.hub import export

RESULT = Path(__file__).resolve().parent / "results" / "export.json"


@dataclass(frozen=True)
class ExportBenchmarkConfig:
    # Folder of a finished run of the scenes.
    run_dir: Annotated[Path, tyro.conf.Positional]
    # Held-out scenes, each with a question of every kind.
    scenes: int = 64
    # CPU threads.
    threads: int = 1


def main(config: ExportBenchmarkConfig):
    torch.set_num_threads(config.threads)
    model, processor = nanovlm.load(config.run_dir / "model")
    questions = read_questions(open_task("scenes", config.scenes))
    ours = answer(model, processor, questions)
    with tempfile.TemporaryDirectory() as folder:
        export.export(config.run_dir, Path(folder) / "out")
        theirs = ask_transformers(Path(folder) / "out", [q.images[0] for q in questions], [q.text for q in questions])
    truths = [q.truth for q in questions]
    result = {
        "questions": len(questions),
        "same answer": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "right": sum(a == b for a, b in zip(ours, truths, strict=True)),
        "right through transformers": sum(a == b for a, b in zip(theirs, truths, strict=True)),
        "trained at commit": read_json(config.run_dir / "config.json")["commit"],
        "environment": describe_environment(torch.device("cpu"), config.threads, "fp32"),
    }
    write_file(RESULT, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def ask_transformers(folder: Path, images: list, questions: list[str]) -> list[str]:
    """Answer each question about its image greedily, with the classes that transformers chooses for a folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answers = []
    for image, question in zip(tqdm(images, unit="question"), questions, strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        answers.append(processor.decode(tokens, skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(ExportBenchmarkConfig, description=__doc__)))
