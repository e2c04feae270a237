"""The engine against what answered before it and against others, by turns: one command a subject.

    python benchmarks/engine.py questions               64 questions about 16 pictures, answers of 1 to 64 tokens
    python benchmarks/engine.py chat                    first token of the second turn over that of the first
    python benchmarks/engine.py answers                 8 answers to a prompt over one: time and cache
    python benchmarks/engine.py decode                  tokens a second of one answer, all formats, compiled too
    python benchmarks/engine.py llama.cpp               the same of SmolLM2-135M, whose weights are real
    python benchmarks/engine.py speculate               the same with guesses, by look-up and by a draft
    python benchmarks/engine.py vllm --python VENV/bin/python       32 requests at once
    python benchmarks/engine.py memory                  bytes of weights, of a cached token, of a picture's features

Every side has a process of its own (engine_sides.py), and they answer the same requests by turns. What they answer is
compared first: greedy answers are equal, or differ first where two tokens are equally likely as far as the precision
goes; otherwise nothing is written. `ratio` is the median of the ratios of a turn. Models have random weights unless a
subject says otherwise. Appends lines to benchmarks/results/engine.jsonl and writes the tables of docs/inference.md;
`--shapes tiny` writes nothing.
"""

import gc
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
from benchmarks import arguments, engine_report, turns
from benchmarks.engine_bench import BATCH, Bench, compare, decoding_rate, is_alike, make_format, median, spread
from benchmarks.engine_jobs import QUESTIONS, find_config, make_document, make_model, write_gguf
from nanovlm import cli
from nanovlm.environment import choose_threads, describe_environment
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare

RESULTS = engine_report.RESULTS
BEFORE = "86f2e25"  # the last commit without an engine
FORMATS = ("fp32", "bf16", "int8", "int4", "nf4")
SPECULATED = {
    "repeat": "Repeat this text word by word: A lens bends light so that all that comes from one point of a thing "
    "meets in one point of a picture. A mirror does the same by throwing it back. The picture is sharp there.",
    "answer": "How do a lens and a mirror make a picture?",
}


@dataclass(frozen=True)
class EngineConfig:
    what: Annotated[
        Literal["questions", "chat", "answers", "decode", "llama.cpp", "speculate", "vllm", "memory"],
        tyro.conf.Positional,
    ]
    # Which models: scenes, 222m, 256m, 460m, tiny; none for those of the subject.
    shapes: tuple[str, ...] = ()
    # Weights: fp32, bf16, int8, int4, nf4; none for those of the subject.
    formats: tuple[str, ...] = ()
    # Answers at a time of our engine.
    rows: int = 64
    # Turns that count.
    repeats: int = 3
    # CPU threads; 0 as in a run.
    threads: int = 0
    # The interpreter of an environment that has vLLM.
    python: str = ""


def main(config: EngineConfig):
    torch.set_num_threads(config.threads or choose_threads(torch.device("cpu")))
    environment = describe_environment(torch.device("cpu"), torch.get_num_threads())
    measure, shapes, formats = SUBJECTS[config.what]
    with turns.checkout(BEFORE) as (before, _):
        for shape, format in itertools.product(config.shapes or shapes, config.formats or formats):
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(Path(folder), before, shape, format, config.rows, config.repeats, config.python)
                for line in measure(bench):
                    line = {"what": config.what, "shape": shape, "weights": format, "rows": config.rows} | line
                    print(json.dumps(environment | line), flush=True)
                    if shape != "tiny":
                        with open(RESULTS, "a") as file:
                            file.write(json.dumps(environment | line) + "\n")
                if shape != "tiny":
                    engine_report.main()


# --- subjects -------------------------------------------------------------------------------------------------


def ask_questions(bench: Bench) -> list[dict]:
    """4 questions about each of 16 pictures, all at once; the others take them in batches, in the same order."""
    requests = bench.prepare_questions(16, exports=True)
    sides, few = ("engine", "before", "transformers"), [[i, min(num, 8)] for i, num in requests[:4]]
    timed = bench.time(sides, [few] * 2, [requests] * bench.repeats)
    about = {"pictures": 16, "batch": BATCH}
    return [about | compare(timed, side, "answers", lambda x: len(requests) / x["seconds"]) for side in sides[1:]]


def ask_vllm(bench: Bench) -> list[dict]:
    """4 questions about each of 8 pictures, 32 tokens each; both read the pictures, and vLLM compiles its model."""
    if not bench.python:
        raise UserError("--python names the interpreter of an environment that has vLLM")
    requests = [[i, 32] for i, _ in bench.prepare_questions(8, exports=True, reads_pictures=True)]
    timed = bench.time(("engine", "vLLM"), [requests], [requests] * bench.repeats)
    return [{"pictures": 8} | compare(timed, "vLLM", "answers", lambda x: len(requests) / x["seconds"])]


def decode(bench: Bench) -> list[dict]:
    """One answer, tokens a second after the first: the engine's, also compiled, those of before it, and bf16's."""
    requests, sides = [[0, 33]], ("engine", "compiled", "before")
    own, bf16 = (Bench(bench.folder / name, bench.before, bench.shape, name, rows=1) for name in (bench.format, "bf16"))
    commands = {}
    for one, prefix, shown in ((own, "", sides), (bf16, "bf16 ", sides[:2])):
        if commands and own.format == "bf16":
            break
        one.folder.mkdir()
        one.prepare_questions(1)
        commands |= {prefix + side: one.command(side) for side in shown}
    measured = turns.alternate(commands, [json.dumps({"requests": requests})] * (1 + bench.repeats))
    results = [{side: turn[side] for side in sides} for turn in measured]
    for turn in results[:2]:
        own.check(requests, turn)
    lines = []
    for side, about in (("engine", {}), ("compiled", {"compiled": True})):
        pairs = [(turn[side], turn.get(f"bf16 {side}", turn[side])) for turn in measured[1:]]
        times = spread([decoding_rate(mine) / decoding_rate(other) for mine, other in pairs])
        line = {"rows": 1} | about | compare(results[1:], "before", "tokens", decoding_rate, side)
        lines.append(line | {"times_bf16": [times["ratio"], times["least"], times["most"]]})
    return lines


def decode_smollm2(bench: Bench) -> list[dict]:
    """The same of SmolLM2-135M-Instruct; what both answer must be about as likely under the weights in fp32."""
    exact, processor = nanovlm.load("smollm2", dtype=torch.float32)
    prompt = processor.prompt([{"role": "user", "content": SPECULATED["answer"]}])
    gguf = write_gguf(bench.folder, {"int8": "Q8_0", "int4": "Q4_0"}[bench.format])
    bench.prepare(
        exact, processor, [{"ids": prompt.input_ids.tolist(), "pictures": []}], gguf=str(gguf), ignores_ends=True
    )
    requests = [[0, 129]]
    timed = bench.time(("engine", "compiled", "llama.cpp"), [requests], [requests] * bench.repeats, is_alike)
    return [
        {"peer_weights": gguf.stem} | about | compare(timed, "llama.cpp", "tokens", decoding_rate, side)
        for side, about in (("engine", {}), ("compiled", {"compiled": True}))
    ]


def speculate(bench: Bench) -> list[dict]:
    """SmolLM2-135M-Instruct repeats a text and answers a question, with guesses; the draft is its copy in int4."""
    exact, processor = nanovlm.load("smollm2", dtype=torch.float32)
    prompts = [processor.prompt([{"role": "user", "content": text}]) for text in SPECULATED.values()]
    save_model(bench.folder / "draft", make_format(exact, "int4")[1], processor)
    given = [{"ids": prompt.input_ids.tolist(), "pictures": []} for prompt in prompts]
    bench.prepare(exact, processor, given, draft=str(bench.folder / "draft"))
    lines = []
    for i, name in enumerate(SPECULATED):
        requests = [[i, 65]]
        timed = bench.time(("engine", "look-up", "draft"), [requests], [requests] * bench.repeats)
        for side in ("look-up", "draft"):
            result = timed[0][side]
            about = {"prompt": name, "drafted": result["drafted"], "accepted": result["accepted"]}
            guessed = [{"engine": turn[side], "no guesses": turn["engine"]} for turn in timed]
            lines.append(about | {"guesses": side} | compare(guessed, "no guesses", "tokens", decoding_rate))
    return lines


def chat(bench: Bench) -> list[dict]:
    """Two turns about a picture of 1,024 pixels; the second prompt goes on where the first and its answer end."""
    bench.prepare_chat()
    requests = [[0, 8], [1, 8]]
    line = {"requests": requests, "one_by_one": True}
    bench.check_before(requests)
    firsts = [turn["engine"]["firsts"] for turn in bench.take_turns(("engine",), [line] * bench.repeats)]
    ratios = spread([second / first for first, second in firsts])
    times = {"first_s": median(x for x, _ in firsts), "second_s": median(x for _, x in firsts)}
    return [{"picture": 1024, "prompt_tokens": [len(prompt) for prompt in bench.prompts]} | times | ratios]


def answers(bench: Bench) -> list[dict]:
    """8 answers of 32 tokens to a prompt with a picture against one: seconds until all have begun, and cache."""
    bench.prepare_chat()
    lines = [{"requests": [[0, 32]], "num_answers": num} for num in (8, 1)]
    measured = [turn["engine"] for turn in bench.take_turns(("engine",), lines * bench.repeats)]
    eight, one = measured[::2], measured[1::2]
    if any(answer != one[0]["answers"][0] for turn in measured for answer in turn["answers"]):
        sys.exit("error: answers to one prompt differ: not timed")
    bench.check_before([[0, 32]])
    pairs = [(max(x["firsts"]), max(y["firsts"])) for x, y in zip(eight, one, strict=True)]
    line = {"picture": 1024, "prompt_tokens": len(bench.prompts[0]), "num_answers": 8}
    line |= {"first_s": median(x for x, _ in pairs), "first_s_of_one": median(x for _, x in pairs)}
    line |= spread([x / y for x, y in pairs])
    return [line | {"cache_ratio": round(eight[0]["most_blocks"] / one[0]["most_blocks"], 3)}]


def measure_memory(bench: Bench) -> list[dict]:
    """Bytes of weights as they are prepared for a CPU, of a token in the cache, and of the features of a tile."""
    before = find_storages()
    model, processor = make_model(find_config(bench.shape), torch.float32)
    model = prepare(make_format(model, bench.format)[1])
    weights = sum(x.nbytes() for address, x in find_storages().items() if address not in before)
    engine = Engine(model, num_rows=1, cache_tokens=1024)
    engine.submit(Request(make_document(processor, 0, model.config.tile_size, QUESTIONS[0])))
    engine.step()
    line = {"weight_bytes": weights, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    line |= {"cache_bytes_a_token": engine.cache.bytes_per_token, "feature_bytes_a_tile": engine.features.num_bytes}
    return [line | {"tokens_a_tile": model.config.num_image_tokens}]


def find_storages() -> dict[int, torch.UntypedStorage]:
    """Find the memory of all tensors of this process by address. What is held cannot be freed and used again."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, Parameter) and not found.is_meta]
    return {x.data_ptr(): x for x in (tensor.untyped_storage() for tensor in tensors)}


# What measures a subject, and its shapes and formats.
SUBJECTS = {
    "questions": (ask_questions, ("scenes", "256m"), ("fp32",)),
    "chat": (chat, ("256m",), ("bf16",)),
    "answers": (answers, ("256m",), ("bf16",)),
    "decode": (decode, ("222m",), FORMATS),
    "llama.cpp": (decode_smollm2, ("smollm2",), ("int8", "int4")),
    "speculate": (speculate, ("smollm2",), ("fp32", "bf16")),
    "vllm": (ask_vllm, ("222m",), ("fp32",)),
    "memory": (measure_memory, ("scenes", "222m", "256m", "460m"), ("fp32", "bf16", "int4")),
}

if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(EngineConfig, __doc__)))
