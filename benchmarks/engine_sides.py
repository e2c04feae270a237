"""The sides of benchmarks/engine.py: each answers the same requests, in a process of its own, when its turn comes.

    python benchmarks/engine_sides.py SIDE FOLDER TREE

FOLDER has job.json, which says how, prompts.json with token ids, texts and names of pictures, and the model in the
forms that the sides read. A line of standard input is `{"requests": [[prompt, tokens], ...]}`; the answer is a line
with `answers`, the tokens of each, `seconds` until all were there, and where a side tells, `firsts`, the seconds until
the first token of each. Only the standard library is imported here, as each side has packages of its own.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

# What a side does with the requests of a line, pairs (prompt, number of tokens).
Answer = Callable[..., dict]


def main(side: str, folder: str, tree: str):
    """Answer each line of standard input with a line of JSON."""
    sys.path.insert(0, tree)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer = SIDES[side](Path(folder), json.loads((Path(folder) / "job.json").read_text()))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)


# --- ours, and ours before ------------------------------------------------------------------------------------


def load(folder: Path, job: dict):
    """Load our model and the prompts as documents, with the code of the checkout of this process."""
    import torch

    import nanovlm
    from nanovlm.environment import keep_freed_memory

    keep_freed_memory()  # as train.py does
    torch.set_num_threads(job["threads"])
    model, processor = nanovlm.load(job["model"])
    return model.eval(), processor, read_prompts(folder)


def read_prompts(folder: Path) -> list:
    """Read the prompts as documents."""
    import torch

    from nanovlm.data.types import IGNORE, Document

    prompts = []
    for prompt in json.loads((folder / "prompts.json").read_text()):
        ids = torch.tensor(prompt["ids"])
        tiles = [torch.load(folder / f"{name}.pt") for name in prompt["pictures"]]
        prompts.append(
            Document(
                input_ids=ids,
                labels=torch.full_like(ids, IGNORE),
                branch_ids=torch.zeros(len(ids), dtype=torch.int32),
                tiles=torch.cat(tiles) if tiles else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
            )
        )
    return prompts


def engine(folder: Path, job: dict, make_draft: Callable | None = None, compiles: bool = False) -> Answer:
    """Ours: a new engine each turn, so that it keeps nothing of the last one."""
    from nanovlm.config import SamplingConfig
    from nanovlm.infer.engine import Engine
    from nanovlm.infer.request import Request, Token
    from nanovlm.model.inference import prepare

    model, processor, prompts = load(folder, job)
    prepare(model, compiles=compiles)
    draft = make_draft(job) if make_draft else None
    pictures = read_pictures(folder) if job.get("reads_pictures") else []

    def answer(requests, num_answers=1, one_by_one=False):
        start = time.perf_counter()
        engine = Engine(model, draft=draft, **job["engine"])
        if job.get("ignores_ends"):
            engine.stops = []
        queue, answers, usages, most_blocks = list(enumerate(requests)), {}, {}, 0
        owners = {}
        while queue or not engine.is_idle:
            while queue and (engine.is_idle or not one_by_one):
                owner, (i, num) = queue.pop(0)
                prompt = processor.prompt(*pictures[i]) if pictures else prompts[i]
                owners[engine.submit(Request(prompt, SamplingConfig(max_new_tokens=num), num_answers))] = owner
            for event in engine.step():
                key = owners[event.request], event.answer
                if isinstance(event, Token):
                    answers.setdefault(key, []).append(event.id)
                elif event.reason == "error":
                    sys.exit(f"error: {event.message}")
                else:
                    usages[key] = event.usage
            most_blocks = max(most_blocks, len(engine.blocks.all) - engine.blocks.num_free)
        return {
            "answers": [answers[key] for key in sorted(answers)],
            "seconds": time.perf_counter() - start,
            "firsts": [usages[key].first_token_s for key in sorted(usages)],
            "most_blocks": most_blocks,
            "drafted": sum(usage.drafted_tokens for usage in usages.values()),
            "accepted": sum(usage.accepted_tokens for usage in usages.values()),
        }

    return answer


def compiled(folder: Path, job: dict) -> Answer:
    """Ours with --compile."""
    return engine(folder, job, compiles=True)


def look_up(folder: Path, job: dict) -> Answer:
    """Ours with guesses from the prompt and the answer so far."""

    def make_draft(job):
        from nanovlm.infer.speculate import PromptLookup

        return PromptLookup()

    return engine(folder, job, make_draft)


def draft(folder: Path, job: dict) -> Answer:
    """Ours with guesses of another model."""

    def make_draft(job):
        import nanovlm
        from nanovlm.infer.draft_model import DraftModel
        from nanovlm.model.inference import prepare

        return DraftModel(prepare(nanovlm.load(job["draft"])[0].eval()))

    return engine(folder, job, make_draft)


def before(folder: Path, job: dict) -> Answer:
    """Ours before the engine: generate() in batches, each of which goes on until its longest answer is there."""
    from nanovlm.config import SamplingConfig
    from nanovlm.infer.sampling import stream

    model, processor, prompts = load(folder, job)

    def answer(requests):
        start, answers, firsts = time.perf_counter(), [], []
        for group in in_batches(requests, job["batch"]):
            batch = processor.batch([prompts[i] for i, _ in group])
            columns, begin, first_s = [], time.perf_counter(), 0.0
            for tokens in stream(model, batch, SamplingConfig(max_new_tokens=max(num for _, num in group))):
                columns.append(tokens.tolist())
                first_s = first_s or time.perf_counter() - begin
            firsts += [first_s] * len(group)
            rows = zip(*columns, strict=True)
            answers += [list(row)[:num] for row, (_, num) in zip(rows, group, strict=True)]
        return {"answers": answers, "seconds": time.perf_counter() - start, "firsts": firsts}

    return answer


# --- others ---------------------------------------------------------------------------------------------------


def transformers(folder: Path, job: dict) -> Answer:
    """transformers.generate in batches, padded on the left; pixels are normalised before the clock runs."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    _, processor, prompts = load(folder, job)
    model = AutoModelForImageTextToText.from_pretrained(folder / "hub", dtype=getattr(torch, job["dtype"])).eval()
    pixels = [(prompt.tiles.to(model.dtype) / 255 - 0.5) / 0.5 for prompt in prompts]
    pad = processor.config.pad_token_id

    @torch.inference_mode()
    def answer(requests):
        start, answers = time.perf_counter(), []
        for group in in_batches(requests, job["batch"]):
            length = max(len(prompts[i]) for i, _ in group)
            ids = torch.full((len(group), length), pad)
            for row, (i, _) in zip(ids, group, strict=True):
                row[length - len(prompts[i]) :] = prompts[i].input_ids
            mask = torch.stack([torch.arange(length) >= length - len(prompts[i]) for i, _ in group]).long()
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "pixel_values": torch.stack([pixels[i] for i, _ in group]),
            }
            rows = model.generate(**inputs, do_sample=False, max_new_tokens=max(num for _, num in group))
            answers += [row[:num] for row, (_, num) in zip(rows[:, length:].tolist(), group, strict=True)]
        return {"answers": answers, "seconds": time.perf_counter() - start}

    return answer


def llama_cpp(folder: Path, job: dict) -> Answer:
    """llama.cpp's server in this process, asked for one answer at a time; seconds are by its own clock."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["gguf"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 2048, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(params)
    prompts = json.loads((folder / "prompts.json").read_text())

    def answer(requests):
        total = {"answers": [], "seconds": 0.0, "firsts": []}
        for i, num in requests:
            body = {"prompt": prompts[i]["ids"], "n_predict": num, "temperature": 0, "ignore_eos": True}
            body |= {"cache_prompt": False, "return_tokens": True}
            request = urllib.request.Request(
                f"{server.listening_address}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            reply = json.loads(urllib.request.urlopen(request, timeout=600).read())
            timings = reply["timings"]
            if timings["prompt_n"] != len(prompts[i]["ids"]):
                sys.exit(f"error: llama.cpp read {timings['prompt_n']} tokens of a prompt of {len(prompts[i]['ids'])}")
            total["firsts"].append(timings["prompt_ms"] / 1e3)
            total["seconds"] += (timings["prompt_ms"] + timings["predicted_ms"]) / 1e3
            total["answers"].append(reply["tokens"])
        return total

    return answer


def vllm(folder: Path, job: dict) -> Answer:
    """vLLM's engine, which reads the pictures itself and keeps nothing of the last turn."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(job["threads"]), "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    model = LLM(str(folder / "hub"), dtype=job["dtype"], max_model_len=2048, max_num_seqs=job["engine"]["num_rows"])
    processor = AutoProcessor.from_pretrained(folder / "hub")
    given = []
    for (message,), pictures in read_pictures(folder):
        content = [{"type": "image"}, {"type": "text", "text": message["content"]}]
        text = processor.apply_chat_template([message | {"content": content}], add_generation_prompt=True)
        given.append({"prompt": text, "multi_modal_data": {"image": pictures}})

    def answer(requests):
        model.reset_prefix_cache()
        model.llm_engine.reset_mm_cache()
        start = time.perf_counter()
        sampling = [SamplingParams(temperature=0, max_tokens=num, ignore_eos=True) for _, num in requests]
        outputs = model.generate([given[i] for i, _ in requests], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"answers": [list(x.outputs[0].token_ids) for x in outputs], "seconds": seconds}

    return answer


def read_pictures(folder: Path) -> list[tuple]:
    """Return what Processor.prompt takes for each prompt, its pictures opened."""
    from PIL import Image

    return [
        ([{"role": "user", "content": p["question"]}], [Image.open(folder / f"{name}.png") for name in p["pictures"]])
        for p in json.loads((folder / "prompts.json").read_text())
    ]


def in_batches(requests: Sequence, size: int) -> list:
    return [requests[i : i + size] for i in range(0, len(requests), size)]


SIDES = {
    "engine": engine,
    "compiled": compiled,
    "look-up": look_up,
    "draft": draft,
    "before": before,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "vLLM": vllm,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
