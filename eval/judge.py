"""A language model as judge of answers that match no reference: a server's, or one in a folder.

The server has the interface of OpenAI (POST ADDRESS/chat/completions). An answer that matches a reference word for word
is right without asking, so `judged` says how much of a score is the judge's opinion. Verdicts are kept in
`judge.jsonl` of the report's folder, and asked once.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.eval.metrics import exact_match, find_yes_no
from nanovlm.eval.questions import Question
from nanovlm.infer.answers import generate

SEED, MAX_NEW_TOKENS = 0, 16
TIMEOUT, TRIES, WAIT = 120, 4, 2.0  # seconds for a reply, attempts, seconds before the second, doubled each time
LARGEST_REPLY = 2**20  # bytes
PROMPT = """A student answered a question about a picture. Decide whether the answer means the same as a correct answer.
Ignore wording, case and punctuation; do not ignore other numbers, names, colors or a different meaning.

Question: {question}
Correct: {references}
Answer: {answer}

Is the answer right? Reply with one word, yes or no."""


class Judge:
    """Asks for a verdict once for each different question, references and answer."""

    def __init__(self, name: str, reply: Callable[[str], str], folder: Path | None = None):
        """`reply` returns the judge's text for a prompt; verdicts of an earlier run by `name` in a folder are read."""
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
        scores = []
        pairs = zip(questions, answers, strict=True)
        for question, answer in tqdm(pairs, desc=title, total=len(answers), disable=title is None, unit="answer"):
            if exact_match(answer, question.references):
                scores.append({"judge": 1.0, "judged": 0.0, "judge_unclear": 0.0})
                continue
            verdict = find_yes_no(self.ask(question, answer))
            scores.append({"judge": float(verdict == "yes"), "judged": 1.0, "judge_unclear": float(verdict is None)})
        return scores

    def ask(self, question: Question, answer: str) -> str:
        """Return the judge's reply about an answer, from the cache if it is there."""
        prompt = PROMPT.format(
            question=question.text, references=" or ".join(question.references), answer=answer.strip()
        )
        key = hashlib.sha256(json.dumps([self.name, SEED, prompt]).encode()).hexdigest()
        if key not in self.replies:
            self.replies[key] = self.reply(prompt)
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    line = json.dumps({"key": key, "judge": self.name, "reply": self.replies[key]})
                    file.write(f"{self.start}{line}\n")
                    self.start = ""
        return self.replies[key]


def open_judge(judge: str, model: str = "", folder: Path | None = None, device: torch.device | str = "cpu") -> Judge:
    """Return the judge at an address, or in a model folder. Raises UserError for neither."""
    if judge.startswith(("http://", "https://")):
        if not model:
            raise UserError("--judge with an address needs --judge-model, the name by which the server calls the model")
        return Judge(f"{judge} {model}", lambda prompt: ask_server(judge, model, prompt), folder)
    loaded, processor = load(judge, device)

    def reply(prompt):
        batch = processor([{"role": "user", "content": prompt}]).to(device)
        (ids,) = generate(loaded, batch, SamplingConfig(max_new_tokens=MAX_NEW_TOKENS))
        return processor.decode(ids)

    return Judge(judge, reply, folder)


def ask_server(address: str, model: str, prompt: str) -> str:
    """Ask a server for a greedy, seeded reply; OPENAI_API_KEY, where set, goes with it.

    What a busy server refuses is asked again, up to four times. Raises UserError that has the server's own words.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": SEED,
        "max_tokens": MAX_NEW_TOKENS,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{address.rstrip('/')}/chat/completions"
    for attempt in range(TRIES):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content = json.loads(response.read(LARGEST_REPLY))["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
        except urllib.error.HTTPError as error:
            refusal = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (urllib.error.URLError, OSError) as error:
            refusal = str(error)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            refusal = f"its reply is not that of chat completions ({type(error).__name__}: {error})"
            break
        if attempt + 1 < TRIES:
            time.sleep(WAIT * 2**attempt)
    raise UserError(f"the judge at {url} gives no verdict: {refusal}")
