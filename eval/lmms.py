"""A request of lmms-eval -> the answer of one of our models: what makes a model folder a model of lmms-eval.

    python -m lmms_eval --model nanovlm --model_args pretrained=runs/demo/model --tasks chartqa --batch_size 32

lmms-eval finds `manifest` by the entry point lmms_eval.models in pyproject.toml, and asks by its protocol of chat
models: `request.args` are (text, doc_to_messages, options of generation, number of the record, task, split). Answers
are greedy, so that they depend on the model and the question alone: a task that wants them drawn is refused.
"""

import os
from collections.abc import Iterator

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig
from nanovlm.data.images import open_image
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.eval.published import NO_LIMIT
from nanovlm.eval.run import open_engine
from nanovlm.infer.asking import answer_all
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare

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
        prepare(self.model)
        self.engine = open_engine(self.model, self.batch_size)
        self.noted = set()

    def generate_until(self, requests: list) -> list[str]:
        """Answer requests, --batch_size at a time, each by its own options. Raises UserError that names a record."""
        answers, stops = [""] * len(requests), []

        def prompts() -> Iterator[Request]:
            for request in requests:
                prompt, ends = self.read(request)
                stops.append(ends)
                yield prompt

        with tqdm(total=len(requests), desc="nanovlm", unit="answer", disable=self.rank > 0) as progress:
            for done in answer_all(self.engine, prompts()):
                if done.end.reason == "error":
                    raise UserError(f"{name(requests[done.request])}: {done.end.message}")
                answers[done.request] = cut(self.processor.decode(done.ids), stops[done.request])
                progress.update()
        return answers

    def read(self, request) -> tuple[Request, list[str]]:
        """Return what the engine is asked, and the texts that end an answer. Raises UserError that names the record."""
        _text, doc_to_messages, options, doc_id, task, split = request.args
        try:
            messages, images = to_messages(doc_to_messages(self.task_dict[task][split][doc_id]))
            prompt = self.processor.prompt(messages, images)
            stops, sampling = self.read_options(options, len(prompt), task)
        except UserError as error:
            raise UserError(f"{name(request)}: {error}") from error
        return Request(prompt, sampling), stops

    def read_options(self, options: dict, length: int, task: str) -> tuple[list[str], SamplingConfig]:
        """Return the texts that end an answer, and how it is chosen, for a prompt of `length` tokens."""
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
        most = int(options.get("max_new_tokens") or NO_LIMIT)
        if (room := self.engine.longest - length) < 1:
            raise UserError(f"its prompt of {length} tokens fills the {room + length} positions of the model")
        if room < most:
            self.note(f"answers in the task {task} end before {most} tokens where the {room + length} positions end")
        penalty = float(options.get("repetition_penalty") or 1)
        sampling = SamplingConfig(max_new_tokens=min(most, room), repetition_penalty=penalty).validate()
        return [stops] if isinstance(stops, str) else [*stops], sampling

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


def name(request) -> str:
    """Return which record a request is about."""
    _text, _messages, _options, doc_id, task, split = request.args
    return f"the task {task}, record {doc_id} of {split}"
