"""Batch -> how far a student is from its teacher: in its next tokens, its image features, or the teacher's answers.

```
batch --+--> student --> features, image tokens, hidden states --+
        |                                                        +--> losses of distill.losses, by their weights
        +--> teacher --> features, image tokens, hidden states --+
             frozen
```

The teacher reads the same batch, so it must have the student's tokens and tiles. It is a whole model on every rank, and
no part of a checkpoint: a resumed run reads it again. Legend: I tiles, P patches or image tokens a tile, D hidden.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from nanovlm import distributed
from nanovlm.config import SamplingConfig, TrainConfig, VLMConfig, pick
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.divergences import DIVERGENCES, Teach, divergences, teach_by_model, teach_by_top_k
from nanovlm.objectives.losses import next_token_loss
from nanovlm.objectives.next_token import balance
from nanovlm.objectives.own import OwnAnswer, Question, make_document
from nanovlm.objectives.reference import fingerprint

# Losses that compare what parts of the models return.
PARTS = {"features": "vision", "projector": "projector"}
LOSSES = (*DIVERGENCES, "next_token", *PARTS)


class Distill:
    """Learn from a teacher: its distributions of the next token, its image features, and labels beside them.

    A loss is the mean over the trained tokens. Where the widths of student and teacher differ, features of the student
    go through a linear map, which learns with the student.
    """

    def __init__(self, config: TrainConfig, processor: Processor, device: torch.device):
        """Read the teacher. Raises UserError for one whose tokens or tiles are not those of the student."""
        settings, model = config.distill, config.model
        self.settings, self.weights = settings, settings.weights
        for name in self.weights:
            pick(dict.fromkeys(LOSSES), name, "distill.losses")
        self.compared = [name for name in self.weights if name in DIVERGENCES]
        self.parts = {name: PARTS[name] for name in self.weights if name in PARTS}
        self.unreached = find_unreached(self.weights.keys())
        self.num_tokens, self.teacher, self.state = model.decoder.vocab_size, None, {}
        if settings.teacher:
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            self.teacher, theirs = load(settings.teacher, device, dtype)
            self.teacher.requires_grad_(False)
            self.check_teacher(config, processor, theirs)
            self.num_tokens = min(self.num_tokens, self.teacher.config.decoder.vocab_size)
            self.state = make_maps(self.parts, model, self.teacher.config, config.seed, device)
            self.state["frozen.teacher"] = fingerprint(self.teacher.state_dict())
        elif settings.on_policy:
            raise UserError("distill.on_policy needs a teacher of the student's own answers: name distill.teacher")
        elif self.parts or settings.temperature != 1:
            what = ", ".join(self.parts) or f"distill.temperature = {settings.temperature}"
            raise UserError(f"{what} needs the teacher itself, not what records say of it: name distill.teacher")

        if settings.on_policy and "next_token" in self.weights:
            raise UserError("distill.on_policy: next_token would teach the student its own answers, so leave it out")
        # How train/rollouts.py samples the answers of the student itself.
        self.num_updates, self.num_answers = 1, 1
        self.sampling = SamplingConfig(config.group.max_completion_length, config.group.temperature)

    def documents(self, groups: list[tuple[Question, list[OwnAnswer]]], extras: Extras) -> list[Document | None]:
        """Return the answers of the student to each question, all of whose tokens the teacher judges."""
        return [make_document(question, answers) for question, answers in groups]

    def prepare(self, model: VLM, batches: list[Batch], extras: Extras):
        """Ask the model nothing."""

    @property
    def learns_from(self) -> Literal["answers", "teacher", "own"]:
        if self.settings.on_policy:
            return "own"
        return "answers" if self.settings.teacher else "teacher"

    def count(self, batch: Batch) -> int:
        return len(batch.trained)

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        with watch(model, self.parts) as ours:
            x_BTD = model(batch, extras=extras)
        x_ND, labels = x_BTD.flatten(0, 1)[batch.trained], batch.labels.flatten()[batch.trained]
        with torch.no_grad(), watch(self.teacher, self.parts) as theirs:
            teach = self.ask_teacher(batch)
        losses = {}
        if teach is not None:
            beta, temperature = self.settings.beta, self.settings.temperature
            values, agreed = divergences(x_ND, self.head_weight(model), teach, self.compared, beta, temperature)
            losses |= dict(zip(self.compared, values, strict=True))
            extras.add("agreement", agreed, len(labels))
        if "next_token" in self.weights:
            backend = model.config.decoder.cross_entropy
            losses["next_token"] = next_token_loss(x_ND, labels, model.decoder.head_weight, backend=backend)
        for name, loss in losses.items():
            extras.add(name, loss, len(labels))
        shares_I = tile_shares(batch)
        for name in self.parts:
            losses[name] = feature_loss(ours, theirs, name, shares_I, self.state.get(name))
            extras.add(name, losses[name], shares_I.sum())
        total = torch.zeros((), device=x_BTD.device) + balance(model, batch, extras, len(batch.trained))
        for name, loss in losses.items():
            total = total + self.weights[name] * loss
        # Ranks that exchange gradients must use every parameter, and a batch without images needs a gradient too.
        if distributed.num_ranks() > 1 or not total.requires_grad:
            total = total + 0 * x_BTD.sum()
            if self.unreached:
                total = total + 0 * model.decoder.head_weight.sum()
        if model.config.decoder.moe is None:  # the routers of which learn to keep the load even
            extras.unreached = self.unreached
        return total

    def ask_teacher(self, batch: Batch) -> Teach | None:
        """Run as much of the teacher as is compared; return its say on the next tokens, None if nobody asks."""
        if self.teacher is None:
            if self.compared and len(batch.trained) and "top_ids" not in batch.values:
                raise UserError(
                    "the records do not have the likeliest tokens of a teacher: name distill.teacher, or write them "
                    "with python -m nanovlm.data.build top-k"
                )
            return teach_by_top_k(batch.value("top_ids").long(), batch.value("top_logprobs")) if self.compared else None
        if self.compared:
            hidden = self.teacher(batch).flatten(0, 1)[batch.trained]
            return teach_by_model(hidden, self.head_weight(self.teacher), self.settings.temperature)
        if self.parts and len(batch.pixel_values):
            self.teacher.encode(batch.pixel_values, batch.grids)
        return None

    def head_weight(self, model: VLM) -> Tensor:
        """[V, D] of the tokens that both models have; a larger one has others only to fill up its table."""
        weight = model.decoder.head_weight
        return weight if len(weight) == self.num_tokens else weight[: self.num_tokens]

    def check_teacher(self, config: TrainConfig, processor: Processor, theirs: Processor):
        """Raise UserError for the first thing in which the teacher cannot read what the student reads."""
        name, model, teacher = f"distill.teacher = {config.distill.teacher}", config.model, theirs.config
        if not self.compared and not self.parts:
            raise UserError(f"{name} teaches nothing: distill.losses = {config.distill.losses} compare nothing with it")
        if self.compared and theirs.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
            raise UserError(
                f"{name} has other tokens than the student, so that their probabilities cannot be compared: train on "
                "its answers (python -m nanovlm.data.build answer), learn its features alone, or start from a model "
                "with its tokenizer"
            )
        ours, seen = model.vision, teacher.vision
        if self.parts and ours is None:
            raise UserError(f"the student is a language model, which has no {', '.join(self.parts)} to compare")
        same: dict[str, tuple] = {}
        if self.compared:
            same["decoder.prefix_attention"] = teacher.decoder.prefix_attention, model.decoder.prefix_attention
        if ours is not None:
            if seen is None:
                raise UserError(f"{name} is a language model, and the student reads pictures")
            same["whether tiling.policy is native"] = teacher.is_native, model.is_native
            same["the side of a tile"] = teacher.tile_size, model.tile_size
            is_anyres = teacher.tiling.policy == "anyres", model.tiling.policy == "anyres"
            same["whether tiling.policy is anyres"] = is_anyres
            if "projector" in self.parts or (self.compared and is_anyres[1]):
                same["the image features of a tile"] = teacher.num_image_features, model.num_image_features
            if self.compared:
                same["the image tokens of a tile"] = teacher.num_image_tokens, model.num_image_tokens
                if is_anyres[1]:
                    same["tiling.max_tiles"] = teacher.tiling.max_tiles, model.tiling.max_tiles
                same["image_token_id"] = teacher.image_token_id, model.image_token_id
            if "features" in self.parts:
                same["the patches of a tile"] = teacher.num_tile_patches, model.num_tile_patches
        for what, (their, our) in same.items():
            if their != our:
                raise UserError(f"{what}: {their} of {name}, {our} of the student; both must read the same batches")
        longest, what = config.data.row_length, "data.row_length"
        if config.distill.on_policy:  # an answer follows a prompt of up to a row
            longest = min(longest + config.group.max_completion_length, model.decoder.max_position_embeddings)
            what += " + group.max_completion_length, as far as the student reads,"
        if self.compared and teacher.decoder.max_position_embeddings < longest:
            raise UserError(
                f"{name} reads {teacher.decoder.max_position_embeddings} tokens at most, fewer than {what} = {longest}"
            )


def find_unreached(losses: Collection[str]) -> tuple[str, ...]:
    """Return the parts of the model that no loss reaches: all that comes after the last that is compared."""
    if set(losses) - PARTS.keys():
        return ()
    return ("fusion", "decoder") if "projector" in losses else ("projector", "fusion", "decoder")


@contextlib.contextmanager
def watch(model: VLM | None, parts: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that will hold what the parts of a model return, by the names of the losses."""
    seen, handles = {}, []
    for name, part in parts.items():
        hook = functools.partial(lambda name, _part, _inputs, output: seen.update({name: output}), name)
        handles.append(getattr(model, part).register_forward_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def make_maps(
    parts: dict[str, str], student: VLMConfig, teacher: VLMConfig, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Return a map [D of the teacher, D of the student] for each part in which their widths differ."""
    maps, random = {}, torch.Generator().manual_seed(seed)
    for name, part in parts.items():

        def width(config: VLMConfig, part: str = part) -> int:
            own = config.decoder.hidden_size
            if part == "vision" and config.vision is not None:
                own = config.vision.feature_size
            return own * (1 + len(config.projector.deepstack_layers))  # what more there is stands beside it

        ours, theirs = width(student), width(teacher)
        if ours != theirs:
            values = torch.randn(theirs, ours, generator=random) * ours**-0.5
            maps[name] = nn.Parameter(values.to(device))
    return maps


def tile_shares(batch: Batch) -> Tensor:
    """fp32[I]: the trained tokens of each tile's document, divided among its tiles.

    So a sum over tiles with these weights counts a document by its trained tokens, however it is packed.
    """
    documents, of_tiles = batch.doc_ids.flatten()[batch.trained].long(), batch.tile_doc_ids.long()
    nothing = torch.zeros(batch.doc_ids.numel(), device=batch.trained.device)
    num_tokens, num_tiles = (nothing.index_add(0, i, torch.ones_like(i).float()) for i in (documents, of_tiles))
    return (num_tokens / num_tiles.clamp(min=1))[of_tiles]


def feature_loss(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], name: str, shares: Tensor, matrix: Tensor | None
) -> Tensor:
    """Return the mean square of differences between features [I, P, D], summed over tiles with weights fp32[I].

    `matrix` maps the student's features to the teacher's. Without tiles the sum is 0.
    """
    if not len(shares):  # the model may have seen a grey tile, so that every rank runs its encoder
        return shares.sum() if matrix is None else 0 * matrix.sum()
    x_IPD = ours[name] if matrix is None else ours[name] @ matrix.T
    x_IPD = x_IPD.to(torch.promote_types(x_IPD.dtype, torch.float32))
    return (x_IPD - theirs[name]).square().flatten(1).mean(1) @ shares.to(x_IPD.dtype)
