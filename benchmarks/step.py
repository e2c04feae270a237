"""Training steps of this checkout against those of another commit, by turns: CPU seconds and peak memory.

    python benchmarks/step.py                                    all shapes, against 2e1f7cf
    python benchmarks/step.py --shapes scenes --against HEAD~1

Two processes hold the same weights and the same documents, one in each commit's code, and take steps by turns; a step
collates the rows, moves the batch and updates the weights. Their first four losses must be equal to rounding, or
nothing is written. `ratio` is the median of the ratios of neighbouring steps. What has changed here and is not
committed is measured too, and marked by a + after the commit. Appends lines to benchmarks/results/step.jsonl.
"""

import dataclasses
import importlib.util
import json
import resource
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import turns  # beside this file; the code of a checkout is imported by its worker alone
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

RESULTS = turns.ROOT / "benchmarks" / "results" / "step.jsonl"


@dataclass(frozen=True)
class Shape:
    model: str
    rows: int
    row_length: int
    # Documents of equal length in a row, each with an image.
    documents: int
    precision: str
    # Precision of AdamW's moments, here alone.
    moments: str = "fp32"


SHAPES = {
    "small 4x1024": Shape("small", 4, 1024, 4, "bf16"),
    "small 1x4096": Shape("small", 1, 4096, 8, "bf16"),
    "small 4x1024 fp32": Shape("small", 4, 1024, 4, "fp32"),
    "small 1x4096 fp32": Shape("small", 1, 4096, 8, "fp32"),
    "222m 1x512": Shape("222m", 1, 512, 2, "bf16"),
    "222m 1x512, moments bf16": Shape("222m", 1, 512, 2, "bf16", moments="bf16"),
    "222m 1x1024": Shape("222m", 1, 1024, 4, "bf16"),
    "222m 1x512 fp32": Shape("222m", 1, 512, 2, "fp32"),
    "222m 1x512 fp32, moments bf16": Shape("222m", 1, 512, 2, "fp32", moments="bf16"),
    "222m 1x1024 fp32": Shape("222m", 1, 1024, 4, "fp32"),
    "460m 1x512 fp32": Shape("460m", 1, 512, 2, "fp32"),
    "scenes": Shape("scenes", 12, 192, 4, "bf16"),
    "scenes fp32": Shape("scenes", 12, 192, 4, "fp32"),
}


@dataclass(frozen=True)
class StepConfig:
    # Which shapes, keys of SHAPES.
    shapes: tuple[str, ...] = tuple(SHAPES)
    # The commit to compare with.
    against: str = "2e1f7cf"
    # CPU threads.
    threads: int = 1
    # Timed steps of each, after two that are not.
    repeats: int = 7
    # Set by the benchmark itself: take the steps of the checkout in this folder, one for every line of standard input.
    worker: str = ""
    # Set by the benchmark itself: a folder with the model to start from, written by the worker that finds it empty.
    start: str = ""


def main(config: StepConfig):
    from benchmarks.speed import append_lines
    from nanovlm.config import pick
    from nanovlm.environment import describe_environment

    for name in config.shapes:
        pick(SHAPES, name, "--shapes")
    environment = describe_environment(torch.device("cpu"), config.threads)  # before a line changes the file of results
    with turns.checkout(config.against) as (other, commit), tempfile.TemporaryDirectory() as folder:
        for name in tqdm(config.shapes, unit="shape"):
            options = ["--shapes", name, "--threads", str(config.threads), "--start", tempfile.mkdtemp(dir=folder)]
            steps = turns.compare(__file__, options, other, config.repeats)
            check_losses(name, steps)
            ours, theirs = steps[-1]
            line = {"shape": name, **dataclasses.asdict(SHAPES[name]), **turns.summarize(steps, "cpu_s")}
            line |= {"peak_memory_gb": ours["peak_memory_gb"], "peak_memory_gb_before": theirs["peak_memory_gb"]}
            line |= {"loss": ours["loss"], "before": commit}
            append_lines(RESULTS, [line], environment)


def check_losses(shape: str, steps: list[tuple[dict, dict]]):
    """Exit where the first losses of the two checkouts are not equal to rounding, which later steps make larger."""
    bound = 1e-5 if SHAPES[shape].precision == SHAPES[shape].moments == "fp32" else 1e-2
    for ours, theirs in steps[:4]:
        if abs(ours["loss"] - theirs["loss"]) > bound * abs(theirs["loss"]):
            sys.exit(f"error: {shape}: the losses are {ours['loss']} and {theirs['loss']}: not timed")


# --- one process for each checkout ----------------------------------------------------------------------------


def work(config: StepConfig):
    """Take a step whenever a line arrives, and print its loss, CPU seconds and the peak of memory so far."""
    sys.path.insert(0, config.worker)
    spec = importlib.util.spec_from_file_location("bench", Path(config.worker) / "benchmarks" / "train.py")
    bench = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = bench
    spec.loader.exec_module(bench)
    shape = SHAPES[config.shapes[0]]
    import nanovlm.environment

    getattr(nanovlm.environment, "keep_freed_memory", int)()
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    weights, config_json = Path(config.start) / "model.safetensors", Path(config.start) / "config.json"
    if weights.exists():
        model = bench.VLM(read_config(bench.VLMConfig, json.loads(config_json.read_text())))
        model.load_state_dict(load_file(weights), strict=False)  # a tied head is stored once
    else:
        model = bench.VLM(small_model(bench) if shape.model == "small" else bench.SHAPES[shape.model])
        config_json.write_text(json.dumps(dataclasses.asdict(model.config)))
        save_file(dict(model.named_parameters()), weights)
    rows = make_rows(bench, model.config, shape)
    state = start(bench, model, shape, config.threads)
    recipe = bench.TrainConfig(model=model.config)

    def take_step() -> dict:
        start_s = time.process_time()
        batch = bench.collate(rows)
        loss = bench.train.train_step(state, [batch], len(batch.trained), recipe)["loss"].item()
        seconds = time.process_time() - start_s
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"loss": loss, "cpu_s": seconds, "peak_memory_gb": round(peak, 3)}

    turns.work(take_step)


def read_config(cls, data: dict):
    """Build a config from what the other checkout wrote, without the fields that this one does not know."""
    hints = typing.get_type_hints(cls)
    values = {}
    for name in hints.keys() & data.keys():
        classes = [kind for kind in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(kind)]
        nested = classes and data[name] is not None
        values[name] = read_config(classes[0], data[name]) if nested else data[name]
    return cls(**values)


def start(bench, model, shape: Shape, threads: int):
    """Make the state of a run; the optimizers took no precision at 2e1f7cf."""
    kind = "muon" if shape.model == "scenes" else "adamw"  # as their presets
    rules = bench.ParamRule("norm|bias|embed|lm_head"), bench.ParamRule("", weight_decay=0.01, optimizer=kind)
    optim = bench.OptimConfig(rules=rules, betas=(0.9, 0.95))
    if hasattr(optim, "moments"):
        optim = dataclasses.replace(optim, moments=shape.moments)
    replica = bench.parallelize(model, bench.ParallelConfig(), torch.device("cpu"), shape.precision)
    try:
        optimizers = bench.make_optimizers(model, optim, shape.precision)
    except TypeError:
        optimizers = bench.make_optimizers(model, optim)
    state = bench.train.TrainState(model, replica, optimizers, [], threads, shape.precision)
    if hasattr(bench, "NextToken"):
        state.objective = bench.NextToken()
    return state


def small_model(bench):
    """Return a config of 4.4 million parameters with rows long enough that attention weighs."""
    vision = bench.VisionConfig(image_size=64, patch_size=8, hidden_size=128, intermediate_size=512)
    decoder = bench.DecoderConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=608, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    return bench.VLMConfig(vision=vision, decoder=decoder)


def make_rows(bench, config, shape: Shape) -> list:
    """Make rows of equal documents: an image, text, and a second half of the text that is trained."""
    generator = torch.Generator().manual_seed(0)
    length, size, image = shape.row_length // shape.documents, config.vision.image_size, config.num_image_tokens
    first_trained = image + (length - image) // 2
    rows = []
    for _ in range(shape.rows):
        ids, labels = [], []
        for _ in range(shape.documents):
            text = torch.randint(8, 500, (length - image,), generator=generator).tolist()
            document = [config.image_token_id] * image + text
            ids += document
            labels += [bench.IGNORE] * first_trained + document[first_trained + 1 :] + [bench.IGNORE]
        fields = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "doc_ids": torch.arange(shape.documents, dtype=torch.int32).repeat_interleave(length),
            "branch_ids": torch.zeros(len(ids), dtype=torch.int32),
            "position_ids": torch.arange(length).repeat(shape.documents),
            "tiles": torch.randint(0, 256, (shape.documents, 3, size, size), generator=generator, dtype=torch.uint8),
            "tile_doc_ids": torch.arange(shape.documents, dtype=torch.int32),
        }
        known = {field.name for field in dataclasses.fields(bench.Row)}
        rows.append(bench.Row(**{name: value for name, value in fields.items() if name in known}))
    return rows


if __name__ == "__main__":
    given = tyro.cli(StepConfig, description=__doc__)
    if given.worker:
        work(given)
    else:
        sys.path.insert(0, str(turns.ROOT))
        from nanovlm import cli

        cli.run(lambda: main(given))
