"""Evaluate a model on held-out scenes.

    python -m eval.run runs/scenes/model               the table of a trained model
    python -m eval.run runs/scenes/model --scenes 64   faster

Beside the accuracy stand three controls: the answers to the same questions with a grey image (`blank`) and
with another scene's image (`shuffled`), and the commonest training answer to the very same question, or to its kind
where training never asks it (`majority`). All answers are generated greedily and count only when they are exact.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from eval.metrics import accuracy_by_kind, exact_match
from eval.tasks import Question, SceneTask, TrainingScan
from nanovlm import cli, load
from nanovlm.data.chat import Processor
from nanovlm.data.scenes import Scenes
from nanovlm.infer.sampling import SamplingConfig, generate
from nanovlm.model.vlm import VLM

BATCH_ROWS = 128
MAX_NEW_TOKENS = 48


def answer(
    model: VLM, processor: Processor, images: list[Image.Image], texts: list[str], title: str | None = None
) -> list[str]:
    """Generate the greedy answer to each text about the image at the same place; a title shows progress."""
    device = next(model.parameters()).device
    answers = []
    for start in tqdm(range(0, len(texts), BATCH_ROWS), desc=title, disable=title is None, unit="batch"):
        prompts = [
            processor.prompt([{"role": "user", "content": text}], [image])
            for image, text in zip(images[start : start + BATCH_ROWS], texts[start : start + BATCH_ROWS], strict=True)
        ]
        batch = processor.batch(prompts).to(device)
        rows = generate(model, batch, SamplingConfig(max_new_tokens=MAX_NEW_TOKENS))
        answers += [processor.decode(row) for row in rows]
    return answers


def evaluate(model: VLM, processor: Processor, tasks: dict[str, SceneTask], training: TrainingScan) -> dict:
    """Return `{split: {"mean", "blank_mean", "caption_exact", "dropped", "kinds": {kind: {...}}}}`.

    Shares between 0 and 1; the mean is over the kinds other than captions. Scenes whose pixels occur in
    training are dropped first, and counted.
    """
    results = {}
    for name, task in tasks.items():
        dropped = task.without_scenes_of(training)
        # Captions last, so that short answers never wait for them in a batch.
        questions = sorted(task.questions, key=lambda question: question.kind == "caption")
        texts = [question.text for question in questions]
        shown = [task.images[question.scene] for question in questions]
        blank = [Image.new("RGB", image.size, (128, 128, 128)) for image in shown]
        other = [task.images[(question.scene + 1) % len(task.images)] for question in questions]
        predictions = {
            "accuracy": answer(model, processor, shown, texts, name),
            "blank": answer(model, processor, blank, texts, f"{name}, blank images"),
            "shuffled": answer(model, processor, other, texts, f"{name}, shuffled images"),
            "majority": [training.guess(question) for question in questions],
        }
        scores = {column: accuracy_by_kind(questions, answers) for column, answers in predictions.items()}
        counts = Counter(question.kind for question in questions)
        kinds = {kind: {column: scores[column][kind] for column in scores} | {"n": n} for kind, n in counts.items()}
        caption = kinds.pop("caption")

        def mean(column, kinds=kinds):
            return sum(kind[column] for kind in kinds.values()) / len(kinds)

        results[name] = {
            "mean": mean("accuracy"),
            "blank_mean": mean("blank"),
            "shuffled_mean": mean("shuffled"),
            "majority_mean": mean("majority"),
            "caption_exact": caption["accuracy"],
            "dropped": dropped,
            "kinds": kinds,
        }
    return results


def format_table(results: dict) -> str:
    """Lay out what `evaluate` returned, in percent."""
    lines = []
    for split, result in results.items():
        lines += [f"{split:<14}  exact %   blank  shuffled  majority      n"]
        for kind, row in result["kinds"].items():
            shares = [100 * row[column] for column in ("accuracy", "blank", "shuffled", "majority")]
            lines.append(
                f"  {kind:<12} {shares[0]:8.1f} {shares[1]:7.1f} {shares[2]:9.1f} {shares[3]:9.1f} {row['n']:6}"
            )
        means = [100 * result[column] for column in ("mean", "blank_mean", "shuffled_mean", "majority_mean")]
        lines.append(f"  {'MEAN':<12} {means[0]:8.1f} {means[1]:7.1f} {means[2]:9.1f} {means[3]:9.1f}")
        lines.append(f"  whole caption exact {100 * result['caption_exact']:.1f}")
        lines.append(f"  {result['dropped']} scenes left out because their pixels occur in training\n")
    return "\n".join(lines)


def draw_contact_sheet(model: VLM, processor: Processor, task: SceneTask, num: int = 12) -> tuple[bytes, list[str]]:
    """Show held-out images with a question, the model's answer and the truth, as a PNG file and as lines of text."""
    chosen: list[Question] = []
    kinds = list(dict.fromkeys(question.kind for question in task.questions))
    for scene in range(min(num, len(task.images))):
        asked = [question for question in task.questions if question.scene == scene]
        wanted = [question for question in asked if question.kind == kinds[scene % len(kinds)]] or asked
        chosen += wanted[:1]
    images = [task.images[question.scene] for question in chosen]
    answers = answer(model, processor, images, [question.text for question in chosen])
    columns, side, gap, font = 4, 256, 12, ImageFont.load_default(15)
    cells = []
    for question, said in zip(chosen, answers, strict=True):
        color = (0, 110, 40) if exact_match(said, question.truth) else (180, 0, 0)
        lines = [(line, (0, 0, 0)) for line in _wrap(font, question.text, side)]
        lines += [(line, color) for line in _wrap(font, f"answer: {said}", side)]
        lines += [(line, (110, 110, 110)) for line in _wrap(font, f"truth: {question.truth}", side)]
        cells.append(lines)
    height = side + gap + 18 * max(len(lines) for lines in cells)
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (height + gap) + gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, cells, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (height + gap)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, (line, color) in enumerate(lines):
            canvas.text((x, y + side + 2 + 18 * number), line, fill=color, font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    texts = [
        f"{'right' if exact_match(said, q.truth) else 'WRONG'}  {q.text} {said} (truth: {q.truth})"
        for q, said in zip(chosen, answers, strict=True)
    ]
    return png.getvalue(), texts


def _wrap(font, text, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


@dataclass(frozen=True)
class EvalConfig:
    # A model folder.
    model: Annotated[Path, tyro.conf.Positional]
    # Held-out scenes a split.
    scenes: int = 512
    # So many training scenes give the commonest answers and are searched for the held-out ones. (At the end of a run
    # train.py takes those that the run has seen.)
    training_scenes: int = 50_000
    # Print one JSON object in place of the table.
    json: bool = False


def main(config: EvalConfig):
    """Print the scores of a model folder."""
    for name, value in (("--scenes", config.scenes), ("--training-scenes", config.training_scenes)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    model, processor = load(config.model, cli.find_device("auto"))
    tasks = {split: SceneTask(split, config.scenes) for split in ("test", "compositional")}
    results = evaluate(model, processor, tasks, TrainingScan(Scenes("train"), range(config.training_scenes)))
    print(json.dumps(results) if config.json else format_table(results))


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(EvalConfig, description=__doc__)))
