"""A language model as judge of answers that match no reference: a server's, or one in a folder.

The server has the interface of OpenAI (POST ADDRESS/chat/completions). An answer that matches a reference word for word
is right without asking, so `judged` says how much of a score is the judge's opinion. Verdicts are kept in
`judge.jsonl` of the report's folder, and asked once.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.eval.metrics import exact_match, find_yes_no
from nanovlm.eval.questions import Question
from nanovlm.infer.asking import answer_all
from nanovlm.infer.chat_client import MAX_NEW_TOKENS, SEED, ask_server
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM

PROMPT = """A student answered a question about a picture. Decide whether the answer means the same as a correct answer.
Ignore wording, case and punctuation; do not ignore other numbers, names, colors or a different meaning.

Question: {question}
Correct: {references}
Answer: {answer}

Is the answer right? Reply with one word, yes or no."""


class Judge:
    """Asks for a verdict once for each different question, references and answer."""

    def __init__(
        self, name: str, reply: Callable[[Sequence[str]], Iterator[tuple[int, str]]], folder: Path | None = None
    ):
        """`reply` yields the index of each prompt with the judge's text, in any order.

        What an earlier run by `name` left in a folder is read.
        """
        self.name, self.reply = name, reply
        self.path = folder / "judge.jsonl" if folder else None
        self.replies: dict[str, str] = {}
        self.start = ""  # of the next line
        if self.path and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self.start = "" if text.endswith("\n") else "\n"
            for line in text.splitlines():
                try:
                    stored = json.loads(line)
                    self.replies[stored["key"]] = str(stored["reply"])
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut short: asked again

    def score(self, questions: Sequence[Question], answers: Sequence[str], title: str | None = None) -> list[dict]:
        """Return `judge` (1 or 0), `judged` (1 if it was asked) and `judge_unclear` (neither yes nor no: wrong)."""
        prompts = [
            None if exact_match(answer, question.references) else make_prompt(question, answer)
            for question, answer in zip(questions, answers, strict=True)
        ]
        replies = iter(self.ask([prompt for prompt in prompts if prompt is not None], title))
        scores = []
        for prompt in prompts:
            if prompt is None:
                scores.append({"judge": 1.0, "judged": 0.0, "judge_unclear": 0.0})
                continue
            verdict = find_yes_no(next(replies))
            scores.append({"judge": float(verdict == "yes"), "judged": 1.0, "judge_unclear": float(verdict is None)})
        return scores

    def ask(self, prompts: Sequence[str], title: str | None = None) -> list[str]:
        """Return the judge's replies, from the cache where they are there."""
        keys = [hashlib.sha256(json.dumps([self.name, SEED, prompt]).encode()).hexdigest() for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.replies}
        names = list(missing)
        given = self.reply(list(missing.values()))
        for i, text in tqdm(given, desc=title, total=len(names), disable=title is None, unit="verdict"):
            self.keep(names[i], text)
        return [self.replies[key] for key in keys]

    def keep(self, key: str, reply: str):
        """Keep a reply, also in the folder, at once."""
        self.replies[key] = reply
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{self.start}{json.dumps({'key': key, 'judge': self.name, 'reply': reply})}\n")
                self.start = ""


def make_prompt(question: Question, answer: str) -> str:
    """Return what the judge is asked about an answer."""
    return PROMPT.format(question=question.text, references=" or ".join(question.references), answer=answer.strip())


def open_judge(judge: str, model: str = "", folder: Path | None = None, device: torch.device | str = "cpu") -> Judge:
    """Return the judge at an address, or in a model folder. Raises UserError for neither."""
    if judge.startswith(("http://", "https://")):
        if not model:
            raise UserError("--judge with an address needs --judge-model, the name by which the server calls the model")

        def ask_all(prompts):
            return ((i, ask_server(judge, model, prompt)) for i, prompt in enumerate(prompts))

        return Judge(f"{judge} {model}", ask_all, folder)
    loaded, processor = load(judge, device)
    prepare(loaded)
    return Judge(judge, lambda prompts: ask_model(loaded, processor, prompts), folder)


def ask_model(model: VLM, processor: Processor, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield a model's greedy replies as they end. Raises UserError for a prompt that the model has no positions for."""
    documents = (processor.prompt([{"role": "user", "content": prompt}]) for prompt in prompts)
    sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
    for done in answer_all(Engine(model), (Request(document, sampling) for document in documents)):
        if done.end.reason == "error":
            raise UserError(f"the judge gives no verdict: {done.end.message}")
        yield done.request, processor.decode(done.ids)
