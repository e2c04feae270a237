"""Draw which experts serve which tokens: run held-out questions with their answers through a mixture of experts.

python -m nanovlm.eval.routing runs/scenes_moe/model routing.png
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from nanovlm import cli, load
from nanovlm.data.chat import Processor
from nanovlm.data.types import Sample
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.eval.questions import Question
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import write_file
from nanovlm.model.moe import expert_load
from nanovlm.model.vlm import VLM, Extras


@torch.no_grad()
def measure_routing(
    model: VLM, processor: Processor, questions: list[Question], batch_rows: int = 64
) -> dict[str, torch.Tensor]:
    """Count the tokens of every expert of L mixtures, fp32[L, E], for image tokens and for the text of each kind.

    Raises UserError for a model without a mixture of experts.
    """
    moe, device = model.config.decoder.moe, next(model.parameters()).device
    if moe is None:
        raise UserError("the model has no mixture of experts: its decoder.moe is None")
    loads: dict[str, torch.Tensor] = {}
    # Questions of one kind share batches.
    questions = sorted(questions, key=lambda question: question.kind)
    for kind in dict.fromkeys(question.kind for question in questions):
        chosen = [question for question in questions if question.kind == kind]
        for start in range(0, len(chosen), batch_rows):
            documents = []
            for question in chosen[start : start + batch_rows]:
                turns = [*question.messages, {"role": "assistant", "content": question.truth}]
                documents.append(processor.document(Sample(question.images, turns)))
            batch, extras = processor.batch(documents).to(device), Extras()
            model(batch, extras=extras)
            is_token = (batch.doc_ids >= 0).flatten()
            is_image = (batch.input_ids == model.config.image_token_id).flatten()
            for name, where in (("image tokens", is_image), (kind, is_token & ~is_image)):
                counts = torch.stack([expert_load(r.choice, where, moe.num_experts) for r in extras.routing]).cpu()
                loads[name] = loads.get(name, 0) + counts
    return loads


def draw_routing(loads: dict[str, torch.Tensor], layers: Sequence[int] = ()) -> bytes:
    """Draw the share of each expert as PNG: of all tokens by layer, and of each kind of text and of images by layer.

    `layers` are the numbers of the layers that are mixtures (`decoder.mixtures` of the config); empty for all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    total = torch.stack(list(loads.values())).sum(0)
    num_layers, num_experts = total.shape
    names = [f"layer {i}" for i in layers or range(num_layers)]
    panels = {"all tokens": (total, names)}
    for i, name in enumerate(names):
        panels[name] = (torch.stack([load[i] for load in loads.values()]), list(loads))
    heights = [len(names) for _, names in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(2.5 + 0.55 * num_experts, 1.2 + 0.45 * sum(heights)), height_ratios=heights
    )
    for axis, (title, (counts, names)) in zip(axes, panels.items(), strict=True):
        share = 100 * counts / counts.sum(-1, keepdim=True)
        axis.imshow(share.numpy(), vmin=0, vmax=min(100, 4 * 100 / num_experts), aspect="auto", cmap="viridis")
        axis.set_title(f"{title}: share of each expert in percent ({100 / num_experts:.1f} when even)", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(num_experts), range(num_experts), fontsize=8)
        for row in range(len(names)):
            for e in range(num_experts):
                axis.text(e, row, f"{share[row, e]:.0f}", ha="center", va="center", color="white", fontsize=7)
    axes[-1].set_xlabel("expert")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png.getvalue()


def main(model: Path, png: Path, task: str, limit: int, device: str):
    loaded, processor = load(model, find_device(device))
    loads = measure_routing(loaded, processor, read_questions(open_task(task, limit)))
    write_file(png, draw_routing(loads, loaded.config.decoder.mixtures))
    print(f"drawn in {png}")


if __name__ == "__main__":
    import tyro

    @dataclass(frozen=True)
    class RoutingConfig:
        # A model folder.
        model: Annotated[Path, tyro.conf.Positional]
        # Where the picture goes.
        png: Annotated[Path, tyro.conf.Positional] = Path("routing.png")
        # What to ask: the name of a task, or a source of records.
        task: str = "scenes"
        # How many of its records are asked.
        limit: int = 256
        # cpu, cuda, or auto (cuda when there is one).
        device: str = "auto"

    cli.run(lambda: main(**vars(tyro.cli(RoutingConfig, description=__doc__))))
