"""A request of lmms-eval -> the answer of one of our models: what makes a model folder a model of lmms-eval.

    python -m lmms_eval --model nanovlm --model_args pretrained=runs/demo/model --tasks chartqa --batch_size 32

lmms-eval finds `manifest` by the entry point lmms_eval.models in pyproject.toml, and asks by its protocol of chat
models: `request.args` are (text, doc_to_messages, options of generation, number of the record, task, split). Answers
are greedy, so that they depend on the model and the question alone: a task that wants them drawn is refused.
"""

import itertools
import os
from typing import NamedTuple

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig
from nanovlm.data.images import open_image
from nanovlm.data.types import Document
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.eval.published import NO_LIMIT
from nanovlm.infer.answers import generate

READ = {"max_new_tokens", "until", "repetition_penalty", "do_sample", "temperature", "num_beams"}
IDLE = {"top_p", "top_k", "seed", "use_cache"}  # say nothing to a greedy answer
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def manifest() -> list[ModelManifest]:
    """Take the name nanovlm; lmms-eval's own model of this name, another project, becomes nanovlm_lmms_engine."""
    theirs = "lmms_eval.models.chat.nanovlm.NanoVLM"
    return [
        ModelManifest("nanovlm", chat_class_path=f"{__name__}.Model"),
        ModelManifest("nanovlm_lmms_engine", chat_class_path=theirs),
    ]


class Prompt(NamedTuple):
    """A request that the model can read."""

    number: int
    document: Document
    # Largest number of new tokens, and the repetition penalty: the same for all prompts of a batch.
    limits: tuple[int, float]
    stops: list[str]


class Model(lmms):
    """Anything that `nanovlm.load` reads, behind the protocol of lmms-eval."""

    is_simple = False

    def __init__(self, pretrained=None, dtype="auto", batch_size=1, device=None, max_batch_size=None, **unknown):
        """Take `--model_args pretrained=MODEL,dtype=auto|bf16|fp32`, `--batch_size` and `--device`.

        Raises UserError for any other argument or value.
        """
        super().__init__()
        if pretrained is None or unknown:
            what = f"do not take {', '.join(unknown)}" if unknown else "need pretrained=MODEL"
            raise UserError(f"the --model_args of nanovlm {what}; there are pretrained and dtype")
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype} in --model_args must be one of {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size} must be a number of questions, at least 1")
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.batch_size, self.device = int(batch_size), find_device(device or "auto")
        self.model, self.processor = load(str(pretrained), self.device, DTYPES[dtype])
        self.noted = set()

    def generate_until(self, requests: list) -> list[str]:
        """Answer requests in batches; an answer is the same in any batch. Raises UserError that names a record."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="nanovlm", unit="answer", disable=self.rank > 0) as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = enumerate(requests[start : start + self.batch_size], start)
                prompts = sorted((self.read(request, number) for number, request in batch), key=_limits)
                for limits, group in itertools.groupby(prompts, key=_limits):
                    for prompt, text in self.answer(list(group), *limits):
                        answers[prompt.number] = cut(text, prompt.stops)
                progress.update(len(prompts))
        return [answers[number] for number in range(len(requests))]

    def read(self, request, number: int) -> Prompt:
        """Turn a request into a prompt. Raises UserError that names its task and record."""
        _text, doc_to_messages, options, doc_id, task, split = request.args
        try:
            messages, images = to_messages(doc_to_messages(self.task_dict[task][split][doc_id]))
            document = self.processor.prompt(messages, images)
            stops, limits = self.read_options(options, len(document), task)
        except UserError as error:
            raise UserError(f"the task {task}, record {doc_id} of {split}: {error}") from error
        return Prompt(number, document, limits, stops)

    def read_options(self, options: dict, length: int, task: str) -> tuple[list[str], tuple[int, float]]:
        """Return the texts that end an answer, and its limits, for a prompt of `length` tokens."""
        temperature = float(options.get("temperature") or 0)
        if options.get("do_sample", temperature > 0) and temperature > 0:
            raise UserError(
                f"it asks for answers drawn at temperature {temperature:g}, but nanovlm answers greedily: "
                "--gen_kwargs do_sample=False,temperature=0 asks for that"
            )
        if (beams := int(options.get("num_beams") or 1)) != 1:
            raise UserError(f"it asks for {beams} beams, but nanovlm answers greedily: --gen_kwargs num_beams=1")
        if unread := sorted(options.keys() - READ - IDLE):
            self.note(f"the options {', '.join(unread)} of the task {task} are not read")
        stops = options.get("until") or []
        most, positions = int(options.get("max_new_tokens") or NO_LIMIT), self.processor.config.decoder
        if (room := positions.max_position_embeddings - length) < 1:
            raise UserError(f"its prompt of {length} tokens fills the {room + length} positions of the model")
        if room < most:
            self.note(f"answers in the task {task} end before {most} tokens where the {room + length} positions end")
        penalty = float(options.get("repetition_penalty") or 1)
        return [stops] if isinstance(stops, str) else [*stops], (min(most, room), penalty)

    @torch.inference_mode()
    def answer(self, prompts: list[Prompt], most: int, penalty: float) -> list[tuple[Prompt, str]]:
        """Return prompts with their greedy answers."""
        batch = self.processor.batch([prompt.document for prompt in prompts]).to(self.device)
        rows = generate(self.model, batch, SamplingConfig(max_new_tokens=most, repetition_penalty=penalty))
        return [(prompt, self.processor.decode(row)) for prompt, row in zip(prompts, rows, strict=True)]

    def note(self, text: str):
        """Print a line once."""
        if text not in self.noted and self.rank == 0:
            print(f"note: {text}")
        self.noted.add(text)

    def loglikelihood(self, requests):
        raise UserError("lmms-eval asks chat models, as nanovlm is one, for answers alone, not for likelihoods")

    def generate_until_multi_round(self, requests):
        raise UserError("nanovlm takes no tasks of several rounds, in which an answer leads to the next question")


def to_messages(messages: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """Return messages of lmms-eval as ours, and their images in order. Raises UserError for sound and video."""
    ours, images = [], []
    for message in ChatMessages(messages=messages).messages:
        parts = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
                continue
            if part.type != "image":
                raise UserError(f"it shows {part.type}, but nanovlm sees images alone")
            images.append(part.url if isinstance(part.url, Image.Image) else open_image(part.url))
            parts.append({"type": "image"})
        ours.append({"role": message.role, "content": parts})
    return ours, images


def cut(text: str, stops: list[str]) -> str:
    """Return a text up to the first of the stops."""
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=None)]


def _limits(prompt: Prompt) -> tuple[int, float]:
    return prompt.limits
