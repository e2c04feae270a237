"""Find weights of a mixture by short runs.

    python -m nanovlm.data.mix search PRESET FOLDER --sources a.jsonl b.jsonl c.jsonl       6 mixtures, ranked
    python -m nanovlm.data.mix presets                                                      mixtures of published models

Each mixture trains PRESET for some steps, a run in FOLDER for each seed. Their held-out losses on each source are
fitted as log loss = a + b . weights, a line for each source (RegMix, arXiv 2407.01492; the exponents of data mixing
laws, arXiv 2403.16952, without their constant), which ranks the mixtures that were tried and proposes another one
between them. How far to believe it says a rank correlation: each mixture predicted from the others. The best two or
three are for longer runs. A command that was killed goes on when it is given again.
"""

import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import changes, read_json, write_file

# Weights of published models, in per cent: of the last stage of SmolVLM with a decoder of 1.7 B parameters and with
# smaller ones (arXiv 2504.05299), and SmolDocling's (arXiv 2503.11576).
MIXTURES = {
    "smolvlm": (25, 18, 17, 13, 11, 8, 8, 1),
    "smolvlm_small": (41, 14, 13, 9, 10, 5, 8, 1),
    "smoldocling": (40, 25, 20, 15),
}
LEAST = 0.02  # share of a source in a mixture that is drawn
RIDGE = 1e-3  # keeps the fit of more sources than mixtures finite
NUM_CANDIDATES = 20_000
TRAIN = "from nanovlm.command_line import train; train()"


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    # A preset of train.py, which says the model and how it learns.
    preset: str
    # The folder of the runs, and of ranking.json.
    folder: Path
    # What is mixed, as data.sources of train.py.
    sources: tuple[str, ...] = ()
    # How many mixtures are tried: equal shares, the published ones that have as many sources, and drawn ones.
    num: int = 6
    # Seeds of each mixture; a difference that is not larger than that between seeds is none.
    seeds: tuple[int, ...] = (0, 1)
    # Steps of a run.
    steps: int = 300
    # Share of the records that is held out, on which the runs are compared.
    val_fraction: float = 0.05
    # How much the loss on each source counts; without, all count alike.
    goals: tuple[float, ...] = ()
    # Further options of train.py, as in --options="--optim.lr 1e-3 --device cpu".
    options: str = ""

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        num = len(self.sources)
        if num < 2:
            raise UserError(f"--sources has {num} entries: a mixture needs at least 2")
        if self.num < 3:
            raise UserError(f"--num {self.num} must be at least 3, as a ranking of fewer mixtures says nothing")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {self.seeds} must be one or several different numbers")
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} must be at least 1")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must be above 0 and below 1")
        if len(self.goals) not in (0, num) or not all(goal >= 0 for goal in self.goals) or sum(self.goals or (1,)) <= 0:
            raise UserError(f"--goals {self.goals} must be a number of at least 0 for each of the {num} sources")


def choose_mixtures(num_sources: int, num: int) -> dict[str, tuple[float, ...]]:
    """Return `num` mixtures by their names: equal, published, each source as two thirds if `num` allows, and drawn."""
    found = {"equal": (1.0,) * num_sources}
    found |= {name: weights for name, weights in MIXTURES.items() if len(weights) == num_sources}
    for k in range(num_sources) if len(found) + num_sources <= num else ():
        found[f"mostly_{k + 1}"] = tuple(1.0 if i == k else 0.5 / (num_sources - 1) for i in range(num_sources))
    rng = np.random.default_rng(0)
    for number in itertools.count(1):
        if len(found) >= num:
            break
        found[f"drawn_{number}"] = tuple(draw(rng, num_sources, 1)[0].round(4).tolist())
    return {name: normalise(weights) for name, weights in itertools.islice(found.items(), num)}


def normalise(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def draw(rng: np.random.Generator, num_sources: int, num: int) -> np.ndarray:
    """float64[num, num_sources]: mixtures that are uniform among those with at least LEAST of every source."""
    least = min(LEAST, 0.5 / num_sources)
    return least + (1 - num_sources * least) * rng.dirichlet(np.ones(num_sources), num)


def search(config: SearchConfig):
    """Train with several mixtures for some steps each, rank them, and propose one."""
    config.validate()
    mixtures = choose_mixtures(len(config.sources), config.num)
    settings = take_up(config)
    losses = np.zeros((len(mixtures), len(config.seeds), len(config.sources)))
    runs = itertools.product(enumerate(mixtures.items()), enumerate(config.seeds))
    for number, ((m, (name, weights)), (s, seed)) in enumerate(runs, start=1):
        shares = " ".join(f"{weight:.3f}" for weight in weights)
        print(f"run {number} of {losses[..., 0].size}: {name}, seed {seed}, weights {shares}", flush=True)
        losses[m, s] = run(config, weights, seed, config.folder / f"{name}-{seed}")
    ranking = rank(mixtures, losses, config.goals)
    write_file(config.folder / "ranking.json", json.dumps(settings | {"seeds": config.seeds} | ranking, indent=1))
    print(format_ranking(ranking, config.sources))


def take_up(config: SearchConfig) -> dict:
    """Return all that decides a run beside its mixture and seed. Raises UserError where runs were made with another."""
    names = ("preset", "sources", "steps", "val_fraction", "options")
    settings = json.loads(json.dumps({name: getattr(config, name) for name in names}))
    path = config.folder / "search.json"
    config.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not any(file.is_dir() for file in config.folder.iterdir()):  # no run has begun
        write_file(path, json.dumps(settings, indent=1))
    if changed := changes(read_json(path), settings):
        raise UserError(f"the runs in {config.folder} are others ({changed}): name another folder")
    return settings


def run(config: SearchConfig, weights: Sequence[float], seed: int, run_dir: Path) -> list[float]:
    """Train a mixture, go on with it or find it done; return its held-out loss on each source."""
    options = {
        "data.sources": config.sources,
        "data.weights": [f"{weight:.6f}" for weight in weights],
        "data.val-fraction": [config.val_fraction],
        "optim.steps": [config.steps],
        "seed": [seed],
        "eval.show-every": [0],
        "run-dir": [run_dir],
    }
    args = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    if not (run_dir / "eval.json").exists():
        args = [config.preset, *args, *shlex.split(config.options)]
        if code := subprocess.run([sys.executable, "-c", TRAIN, *args]).returncode:
            raise UserError(f"the run in {run_dir} ended with status {code}: what it says is above")
    results = read_json(run_dir / "eval.json")
    # In the order of the sources.
    losses = {x.removeprefix("val_loss_"): loss for x, loss in results.items() if x.startswith("val_loss_")}
    if len(losses) != len(config.sources):
        raise UserError(
            f"{run_dir / 'eval.json'} has held-out losses of {len(losses)} of the {len(config.sources)} sources, "
            f"{', '.join(losses) or 'none'}: hold out more records, by --val-fraction, now {config.val_fraction}, or "
            "use another folder"
        )
    for name, loss in losses.items():
        if not isinstance(loss, float) or not 0 < loss < np.inf:
            raise UserError(f"the held-out loss on {name} is {loss} in {run_dir / 'eval.json'}: the run diverged, so "
                            "lower optim.lr by --options and use another folder")  # fmt: skip
    return list(losses.values())


def rank(mixtures: dict[str, tuple[float, ...]], losses: np.ndarray, goals: Sequence[float] = ()) -> dict:
    """Rank mixtures by `losses`, float64[mixtures, seeds, sources], the best first, and propose another one.

    A score is the mean of the log losses of the sources, weighted by `goals`: a source whose loss is large by itself
    does not count for more.
    """
    goal = np.array(normalise(goals or (1.0,) * losses.shape[2]))
    weights, logs = np.array(list(mixtures.values())), np.log(losses)
    measured = logs.mean(1) @ goal
    noise = float((logs @ goal).std(1, ddof=1).mean()) if losses.shape[1] > 1 else None
    fitted = predict(weights, logs.mean(1), weights) @ goal
    others = [np.arange(len(weights)) != i for i in range(len(weights))]
    left_out = [predict(weights[o], logs.mean(1)[o], weights[[i]])[0] @ goal for i, o in enumerate(others)]
    candidates = draw(np.random.default_rng(0), weights.shape[1], NUM_CANDIDATES)
    inside = ((candidates >= weights.min(0) - 1e-9) & (candidates <= weights.max(0) + 1e-9)).all(
        1
    )  # tells of no others
    candidates = np.concatenate([weights, candidates[inside]])
    scores = predict(weights, logs.mean(1), candidates) @ goal
    names = list(mixtures)
    return {
        "ranking": [
            {
                "name": names[i],
                "weights": [round(weight, 4) for weight in weights[i]],
                "losses": [round(loss, 5) for loss in np.exp(logs[i].mean(0)).tolist()],
                "score": round(float(measured[i]), 5),
                "fitted": round(float(fitted[i]), 5),
            }
            for i in np.argsort(measured, kind="stable").tolist()
        ],
        "between_seeds": None if noise is None else round(noise, 5),
        "rank_correlation": round(correlate_ranks(np.array(left_out), measured), 3),
        "proposed": [round(weight, 4) for weight in candidates[int(scores.argmin())].tolist()],
        "proposed_score": round(float(scores.min()), 5),
    }


def predict(weights: np.ndarray, logs: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Fit log losses, [mixtures, sources], as lines in the weights, by ridge regression; return those of `asked`."""
    mean, middle = weights.mean(0), logs.mean(0)
    x = weights - mean
    slopes = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (logs - middle))
    return middle + (asked - mean) @ slopes


def correlate_ranks(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of two lists without ties; 0 where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(float) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def format_ranking(ranking: dict, sources: Sequence[str]) -> str:
    """Return a ranking as a table, and what follows from it."""
    lines = [f"{'mixture':<16}{'score':>9}{'fitted':>9}  weights of {', '.join(sources)}"]
    for row in ranking["ranking"]:
        shares = " ".join(f"{weight:.3f}" for weight in row["weights"])
        lines.append(f"{row['name']:<16}{row['score']:>9.4f}{row['fitted']:>9.4f}  {shares}")
    noise, (best, *others) = ranking["between_seeds"], ranking["ranking"]
    varies = "" if noise is None else f"; between seeds it varies by {noise:.4f}"
    lines.append(f"the score is the mean log loss on the sources, and less is better{varies}")
    if alike := [row["name"] for row in others if row["score"] - best["score"] <= (noise or 0)]:
        lines.append(
            f"not told apart from {best['name']} by these seeds: {', '.join(alike)}; more --steps or --seeds may"
        )
    lines.append(
        f"rank correlation of each mixture with its prediction from the others: {ranking['rank_correlation']:.2f} "
        "(1 is the same order, 0 is chance)"
    )
    lines.append(
        f"proposed: --data.weights {' '.join(map(str, ranking['proposed']))}, predicted {ranking['proposed_score']:.4f}"
    )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class PresetsConfig:
    pass


def show_presets(_config: PresetsConfig):
    """Show the weights of published models' mixtures."""
    for name, weights in MIXTURES.items():
        print(f"{name:<16}--data.weights {' '.join(map(str, weights))}")


COMMANDS = {"search": (SearchConfig, search), "presets": (PresetsConfig, show_presets)}


def main(args: list[str]):
    """Run the command that the first argument names."""
    cli.run_command(args, COMMANDS, "python -m nanovlm.data.mix", __doc__)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
