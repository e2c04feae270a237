"""Keep the model of the best evaluation in run_dir/model-best, and tell when evaluations no longer improve.

`state.best` is what a resumed run needs: the best evaluation so far, how many came after it, and what was measured.
"""

import math
from pathlib import Path

from nanovlm import distributed
from nanovlm.config import EvalConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.files import restore
from nanovlm.train import adapt, parallel
from nanovlm.train.state import TrainState

FOLDER = "model-best"


def choose_metric(config: EvalConfig, losses: list[str], scores: list[str], learns_from: str = "answers") -> str:
    """Return the name of an evaluation's number that decides; empty if none does.

    By default it is the first of the losses, or else of the scores; rewards of own answers need not lower the losses on
    those of records, so there it is the first score. Raises UserError if eval.best is none of them, or if there is none
    for eval.patience.
    """
    names = losses + scores
    if not config.every or config.best == "none":
        return ""
    if config.best and config.best not in names:
        raise UserError(f"eval.best = {config.best!r} is not measured; there are {', '.join(names) or 'no numbers'}")
    if config.best:
        return config.best
    usual = scores if learns_from == "own" else names
    if config.patience and not usual:
        why = f"{losses[0]} need not fall with rewards, so name it by eval.best" if losses else "no record is held out"
        raise UserError(f"eval.patience = {config.patience} has nothing to go by: {why}")
    return usual[0] if usual else ""


def judge(state: TrainState, metric: str, value: float | None, config: EvalConfig) -> bool:
    """Note an evaluation in `state.best`; return whether it is the best so far. Of losses the lower is better."""
    best: dict = state.best if state.best.get("of") == measured(metric, config) else {"of": measured(metric, config)}
    before, sign = best.get("value"), -1 if metric.startswith("val_loss") else 1
    is_best = value is not None and math.isfinite(value) and (before is None or sign * value > sign * before)
    if is_best:
        state.best = best | {"step": state.step, "value": value, "misses": 0}
    else:
        state.best = best | {"misses": best.get("misses", 0) + 1}
    return is_best


def measured(metric: str, config: EvalConfig) -> list:
    """Return what must be equal for two evaluations to compare."""
    return [metric, config.every, config.limit, config.val_batches, list(config.tasks)]


def has_stalled(state: TrainState, metric: str, config: EvalConfig) -> bool:
    """Tell whether `eval.patience` evaluations in a row were no better."""
    if not config.patience or state.best.get("of") != measured(metric, config):
        return False
    return state.best["misses"] >= config.patience


def keep_best(
    state: TrainState, numbers: dict, metric: str, config: EvalConfig, run_dir: Path, processor: Processor
) -> str:
    """Judge an evaluation and write the model if it is the best; return a sentence that has its numbers."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, float))
    shown = f"step {state.step}: {shown}"
    if not metric:
        return shown
    value = distributed.gather(numbers.get(metric))[0]  # on GPUs, answers of ranks may differ
    if not judge(state, metric, value, config):
        step = state.best.get("step")
        return f"{shown} (the best {metric} was that of step {step})" if step else shown
    weights = parallel.whole_tensors(state.model)
    if distributed.rank() == 0:
        adapt.save(run_dir, "-best", state.model, processor, weights)
    return f"{shown} (the best {metric} so far: {run_dir / FOLDER})"


def check_kept(state: TrainState, run_dir: Path):
    """Bring a resumed run's model-best back to its name; begin anew if it is gone."""

    def is_there() -> bool:
        restore(run_dir / FOLDER)
        return (run_dir / FOLDER).is_dir()

    if state.best.get("step") and not distributed.from_first(is_there):
        print(f"note: {run_dir / FOLDER} is gone: the best model is chosen among the evaluations from now on")
        state.best = {}


def describe_stall(state: TrainState) -> str:
    step, metric = state.best.get("step"), state.best["of"][0]
    than = f"no better than that of step {step}" if step else f"without a finite {metric}"
    return f"{state.best['misses']} evaluations in a row were {than} (eval.patience)"


def describe_best(state: TrainState) -> dict:
    """Return step, metric and value of the best evaluation, for eval.json."""
    return {"step": state.best["step"], "metric": state.best["of"][0], "value": state.best["value"]}
