"""Train a vision-language model.

    python train.py                              the default preset, scenes
    python train.py scenes --optim.lr 2e-3       any field by its dotted name
    python train.py --run-dir runs/second        started again with the same folder, a run continues
    python train.py --help                       what is often set; every field: --help-all
    torchrun --nproc-per-node 8 train.py smolvlm_256m_stage3 --parallel.strategy fsdp      on 8 GPUs

The run directory receives config.json, metrics.jsonl (a line a step), checkpoints/, model-best/ where evaluations
choose one, and at the end model/ (all that generate.py needs), curves.png, and the results of the tasks: eval.json and
samples.png.
"""

import sys

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()

from nanovlm.command_line import parse_train

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = cli.run(lambda: parse_train(sys.argv[1:], __doc__).validate())

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Sized
from pathlib import Path

import torch
from PIL import Image

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.columns import parse_fields
from nanovlm.data.dual import DualProcessor
from nanovlm.data.features import open_features
from nanovlm.data.loader import Loader
from nanovlm.data.mixture import parts_of
from nanovlm.data.process import make_process
from nanovlm.data.records import options_of
from nanovlm.data.source import Source
from nanovlm.data.sources import open_data, sample_texts
from nanovlm.data.split import describe_split
from nanovlm.environment import (
    choose_precision,
    choose_threads,
    describe_environment,
    device_name,
    find_device,
    keep_freed_memory,
)
from nanovlm.errors import UserError
from nanovlm.eval.controls import TrainingScan
from nanovlm.eval.routing import draw_routing, measure_routing
from nanovlm.eval.run import MAX_NEW_TOKENS, answer, collect, evaluate, format_table, summarise
from nanovlm.eval.sheet import choose, describe, draw_sheet
from nanovlm.eval.tasks import Question, Records, Task, open_task, read_questions
from nanovlm.files import lock, read_json, write_file
from nanovlm.model import adapters
from nanovlm.objectives import find_objective
from nanovlm.train import adapt, best, checkpoint, frozen, init, parallel
from nanovlm.train.alerts import Alerts
from nanovlm.train.curves import draw_curves
from nanovlm.train.log import Log, import_wandb
from nanovlm.train.optim import assign_rules, make_optimizers
from nanovlm.train.passes import describe_counts, estimate_steps
from nanovlm.train.resume import (
    check_same_config,
    find_checkpoints,
    share_micro_batches,
    write_config,
)
from nanovlm.train.rollouts import Rollouts
from nanovlm.train.state import TrainState
from nanovlm.train.step import count, fill_up, train_step
from nanovlm.train.validate import HeldOut, evaluating, loss_names, read_held_out, validate

SHOWN = 4  # questions whose answers are shown while a run goes on
RESTART = 75  # exit status of a run that a signal ended: it is saved and can be started again


def main(config: TrainConfig) -> dict:
    """Train, resume or report a finished run; return the contents of its eval.json, an empty dict on other ranks."""
    config = adapt.take_adapter(config.validate()).validate()
    with distributed.ranks(find_device(config.device)) as device:
        if distributed.rank():
            with contextlib.redirect_stdout(None):
                distributed.wait()  # until the first rank has the folder
                return train(config, Path(config.run_dir), device)
        with lock(Path(config.run_dir)) as run_dir:
            distributed.wait()
            return train(config, run_dir, device)


def train(config: TrainConfig, run_dir: Path, device: torch.device) -> dict:
    """Do what `main` says, in a run directory that this run has locked."""
    # --- setup -------------------------------------------------------------------------------------------
    begin = time.perf_counter()
    is_first = distributed.rank() == 0
    if (run_dir / "eval.json").exists():
        check_same_config(run_dir, config, checkpoint.list_checkpoints(run_dir))
        print(f"{run_dir} is a finished run; its results are in {run_dir / 'eval.json'}")
        return read_json(run_dir / "eval.json")
    checkpoints = distributed.from_first(lambda: find_checkpoints(run_dir))
    if checkpoints:
        config = check_same_config(run_dir, config, checkpoints)
    config = share_micro_batches(config)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    threads = config.threads or choose_threads(device)
    precision = choose_precision(device) if config.precision == "auto" else config.precision
    threads, precision = distributed.gather((threads, precision))[0]  # all ranks use those of the first
    if checkpoints:  # a run keeps its precision, on another processor too
        precision = read_json(checkpoints[-1] / "state.json")["precision"]
    wandb = import_wandb() if config.wandb and is_first else None

    # --- data --------------------------------------------------------------------------------------------
    data = config.data
    Image.MAX_IMAGE_PIXELS = data.max_pixels
    source = open_data(data, config.seed)
    if checkpoints:
        processor, fill = init.load_processor(run_dir, config), None
    else:
        processor, fill = init.prepare(config, sample_texts(source, 1000, options_of(config.data)))
    as_run = dataclasses.replace(config, precision=precision)
    objective = find_objective(config.objective)(as_run, processor, device)
    loader = make_loader(source, processor, config, learns_from=objective.learns_from)
    # Read before the first step, so that what cannot be asked is named now.
    how = {
        "layout": data.layout,
        "fields": parse_fields(data.fields),
        "allow_urls": data.allow_urls,
        "video": data.video,
    }
    tasks = [open_task(name, config.eval.limit, **how) for name in config.eval.tasks]
    asked = [(task, read_questions(task)) for task in tasks]
    held_out = {}
    if data.val_fraction:
        if is_first and not checkpoints:
            print("the split: " + "\nthe split: ".join(describe_split(source, data.val_fraction, options_of(data))))
        loaders = {
            part.name: make_loader(part, processor, config, "val", objective.learns_from) for part in parts_of(source)
        }
        held_out = read_held_out(loaders, config)
        asked += ask_held_out(loaders, processor, config) if config.eval.every and config.dual is None else []
    about, shown = asked[0] if asked else (None, [])
    if config.eval.show:
        about = open_task(config.eval.show, SHOWN, **how)
        shown = read_questions(about)
    shown = choose(shown, SHOWN) if config.eval.show_every else []
    scores = [f"accuracy_{task.name}" for task, _ in asked]
    metric = best.choose_metric(config.eval, loss_names(held_out), scores, objective.learns_from)

    # --- model, optimizers, state ------------------------------------------------------------------------
    model = adapt.build(config)  # without memory until it is sharded
    total, active = model.count_parameters()
    in_codes = adapters.count(model)[1] - total  # which are no parameters of torch's
    total, active = total + in_codes, active + in_codes
    parts = {name: num / 1e6 for name, part in model.named_children() if (num := adapters.count(part)[1])}
    assign_rules(model, config.optim, config.adapter)
    replica = parallel.parallelize(model, config.parallel, device, precision, fill)
    optimizers = make_optimizers(model, config.optim, precision, config.adapter, objective.state)
    adapt.part_ranks(config)
    state = TrainState(model, replica, optimizers, loader, threads, precision, objective, sources=loader.sources)
    feed = Rollouts(state, processor, config) if objective.learns_from == "own" else loader
    distributed.wait()  # until all have seen whether the run is new
    if checkpoints:
        state.load(checkpoints[-1])
        best.check_kept(state, run_dir)
        begin -= state.elapsed_s
        print(f"continuing {run_dir} at step {state.step}")
    if data.features:
        frozen.check_encoder(model, open_features(data.features, config.model))
    if is_first:
        write_config(run_dir / "config.json", config, is_new=not checkpoints)
        if not checkpoints:
            processor.save(run_dir)
    torch.set_num_threads(state.threads)
    most_steps = config.optim.steps
    num_updates = feed.objective.num_updates if isinstance(feed, Rollouts) else 1
    if (
        data.num_epochs
        and isinstance(source, Sized)
        and ((steps := estimate_steps(source, loader, config, num_updates)) < most_steps)
    ):
        print(f"data.num_epochs = {data.num_epochs} gives about {steps} steps, fewer than optim.steps = {most_steps}: "
              f"the rate falls as for {steps}")  # fmt: skip
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))
    log = Log(config, run_dir, state, device, begin, wandb)
    alerts = Alerts(run_dir / "metrics.jsonl", config.eval.alert if is_first else 0)
    if not checkpoints:
        state.save(run_dir, config.keep_checkpoints).finish()
    print(f"{total / 1e6:.2f} M parameters ({', '.join(f'{k} {v:.2f}' for k, v in parts.items())})", end="")
    print(f", {active / 1e6:.2f} M of them active for a token" if active < total else "")
    if config.adapter.rank:
        print(
            "{:,} of {:,} parameters learn ({:.2%})".format(*(counts := adapters.count(model)), counts[0] / counts[1])
        )
    where = f"{device_name(device)}, {parallel.describe(config.parallel)}"
    print(f"training on {where}, with {state.threads} threads in {state.precision}")

    # --- loop --------------------------------------------------------------------------------------------
    model.train()
    saving, saved_step = None, state.step
    with cli.watch_signals() as signals, profile(config, run_dir, state.step) as profile_step:
        while state.step < most_steps and not best.has_stalled(state, metric, config.eval):
            start = time.perf_counter()
            batches = next(feed, [])
            data_wait_s = time.perf_counter() - start - state.rollout_s
            totals = distributed.add_up(count(batches, state, config) | {"signals": len(signals)})
            if not totals["batches"]:
                read = f"{totals['samples read']} reads in {data.num_epochs} passes over the data"
                log.say(f"all was read after {state.step} steps: {read}")
                break
            if totals["batches"] < config.optim.micro_batches:  # some ranks have no more: all must still take this step
                batches = fill_up(batches, config)
            numbers = train_step(state, batches, totals["units"], config)
            if config.eval.every and state.step % config.eval.every == 0:
                with log.paused():
                    numbers |= (seen := look(state, processor, asked, held_out))
                    for sentence in (worse := alerts.find(state.step, seen)):
                        log.say(sentence)
                    if alerts.best or worse:
                        numbers["alerts"] = len(worse)
                    log.say(best.keep_best(state, seen, metric, config.eval, run_dir, processor))
            log.add(numbers, totals, data_wait_s)
            profile_step()
            if shown and state.step % config.eval.show_every == 0:
                with log.paused():
                    log.say(f"step {state.step}:\n  " + "\n  ".join(show(state, processor, about, shown)))
            if state.step % config.checkpoint_every == 0 or totals["signals"]:
                log.settle()
                if saving:
                    saving.finish()
                saving, saved_step = state.save(run_dir, config.keep_checkpoints), state.step
            if saving:
                saving.finish(wait=bool(totals["signals"]))
            if totals["signals"]:
                distributed.wait()  # for the first rank's rename: torchrun ends all ranks when one exits
                print(f"stopped by a signal at step {state.step}; start it again to go on")
                sys.exit(128 + signal.SIGINT if signal.SIGINT in signals else RESTART)
    if best.has_stalled(state, metric, config.eval):
        log.say(f"ended at step {state.step}: {best.describe_stall(state)}")
    if metric and state.step % config.eval.every:  # else the last model would have no chance to be the best
        with log.paused():
            seen = look(state, processor, asked, held_out)
            log.say(best.keep_best(state, seen, metric, config.eval, run_dir, processor))
    log.close()
    if saving:
        saving.finish()
    if state.step > saved_step:
        state.save(run_dir, config.keep_checkpoints).finish()
    results = {
        "train_seconds": round(state.elapsed_s, 1),
        "environment": describe_environment(device, state.threads, state.precision),
    } | validate(state, held_out)
    if state.best.get("step"):
        results["best"] = best.describe_best(state)
    training = None
    if asked and config.eval.controls:
        training = TrainingScan(source, (ref.key for ref in loader.refs_read()), **options_of(data), video=data.video)
        training.add_up()
    loader.close()
    print(describe_counts(distributed.add_up(dict(loader.counts)), source))

    # --- end ---------------------------------------------------------------------------------------------
    weights = parallel.whole_tensors(model)
    if not is_first:
        return {}
    adapt.save(run_dir, "", model, processor, weights)
    model, processor = adapt.load(run_dir, config, device)
    if state.step:
        write_file(run_dir / "curves.png", draw_curves(run_dir / "metrics.jsonl"))
    if asked:
        results["tasks"] = {
            task.name: evaluate(model, processor, task, questions, training, config.eval.controls, title=task.name)
            for task, questions in asked
        }
        print("\n" + format_table(results["tasks"]))
        first, questions = asked[0]
        if chosen := choose(training.leave_out(questions) if training else questions, num=12):
            answers = answer(model, processor, chosen)
            write_file(run_dir / "samples.png", draw_sheet(first, chosen, answers))
            print(f"Questions of {first.name}, drawn in {run_dir / 'samples.png'}:")
            print(*(f"  {describe(first, *each)}" for each in zip(chosen, answers, strict=True)), sep="\n")
        if config.model.decoder.moe is not None:
            loads = measure_routing(model, processor, questions)
            write_file(run_dir / "routing.png", draw_routing(loads, config.model.decoder.mixtures))
            print(f"Which expert serves what is drawn in {run_dir / 'routing.png'}")
    write_file(run_dir / "eval.json", json.dumps(results, indent=2))
    print(f"\ntrained in {state.elapsed_s:.0f} s; the model is in {run_dir / 'model'}", end="")
    if model.adapters:
        print(f", and needs the adapter in {run_dir / 'adapter'}: name that, and the model is read too", end="")
    elif config.adapter.init == "pissa":
        print(", merged: adapters of pissa fit no other model, so none is written", end="")
    print()
    if "best" in results:
        print(
            "that of step {step}, the best by {metric}, is in {folder}".format(
                **results["best"], folder=run_dir / best.FOLDER
            )
        )
    return results


def make_loader(
    source: Source,
    processor: Processor | DualProcessor,
    config: TrainConfig,
    split: str = "train",
    learns_from: str = "answers",
) -> Loader:
    """Return a loader of this rank's micro-batches, r, r + R, ... of R ranks; it reads the held-out split once."""
    return Loader(
        source,
        make_process(processor, config.data, learns_from),
        config.data,
        config.built.pad_token_id,
        range(distributed.rank(), config.optim.micro_batches, distributed.num_ranks()),
        config.optim.micro_batches,
        split,
        num_epochs=1 if split == "val" else config.data.num_epochs or None,
    )


def ask_held_out(
    loaders: dict[str, Loader], processor: Processor, config: TrainConfig
) -> list[tuple[Task, list[Question]]]:
    """Return the held-out records as a task, with those questions that can be asked; nothing if there are none."""
    held_out = HeldOut([loader.reader for loader in loaders.values()])
    task = Records("held_out", held_out, config.eval.limit, **options_of(config.data), video=config.data.video)
    longest = config.model.decoder.max_position_embeddings - MAX_NEW_TOKENS

    def can_be_asked(question: Question) -> bool:
        try:
            return len(processor.prompt(question.messages, question.images)) <= longest
        except UserError:  # such as an empty question, which can be trained on
            return False

    questions = [question for question in task.questions() if can_be_asked(question)]
    num_records = len({question.record for question in questions})
    print(f"{len(questions)} questions about {num_records} held-out records are asked at every evaluation")
    return [(task, questions)] if questions else []


def look(
    state: TrainState, processor: Processor, asked: list[tuple[Task, list[Question]]], held_out: dict
) -> dict[str, float | dict[str, float]]:
    """Return the validation losses, and the accuracy of each task: the mean, that of each kind of question, and of
    held-out records that of each source.
    """
    losses, scores, of_sources = validate(state, held_out), {}, {}
    with evaluating(state):
        for task, questions in asked:
            columns = collect(state.model, processor, questions)
            scores[task.name] = summarise(task, questions, columns)[0]
            of_sources |= score_sources(task, questions, columns["accuracy"])
    means = {f"accuracy_{name}": score.get("mean") for name, score in scores.items()}
    kinds = {
        f"accuracies_{name}": {kind: figures["accuracy"] for kind, figures in score["kinds"].items()}
        for name, score in scores.items()
    }
    return losses | means | of_sources | kinds


def score_sources(task: Task, questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Return the accuracy on the held-out records of each of several sources; nothing for another task."""
    source = task.source if isinstance(task, Records) else None
    if not isinstance(source, HeldOut) or len(source.readers) < 2:
        return {}
    names, found = [source.shown[question.record] for question in questions], {}
    for name in dict.fromkeys(names):
        own = [i for i, of in enumerate(names) if of == name]
        figures = summarise(task, [questions[i] for i in own], {"accuracy": [answers[i] for i in own]})[0]
        found[f"accuracy_{task.name}_{name}"] = figures["mean"]
    return found


def show(state: TrainState, processor: Processor, task: Task, questions: list[Question]) -> list[str]:
    """Return what the model answers to a few questions."""
    with evaluating(state):
        answers = answer(state.model, processor, questions)
        return [describe(task, *each) for each in zip(questions, answers, strict=True)]


@contextlib.contextmanager
def profile(config: TrainConfig, run_dir: Path, steps_done: int):
    """Record the steps that the config names with torch's profiler; yield a function to call after every step."""
    first, last = (max(0, step - steps_done) for step in config.profile)
    if not last or distributed.rank():
        yield lambda: None
        return

    def write(profiler):
        profiler.export_chrome_trace(str(run_dir / ".trace.json.tmp"))
        (run_dir / ".trace.json.tmp").rename(run_dir / "trace.json")

    first = max(1, first)
    schedule = torch.profiler.schedule(wait=first - 1, warmup=0, active=last - first + 1, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step


if __name__ == "__main__":
    cli.run(lambda: main(CONFIG))
    cli.end(0)
