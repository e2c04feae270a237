"""Everything that a run needs to resume; every rank saves and restores its own part."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from nanovlm import distributed
from nanovlm.data.loader import Loader
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.files import flush
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import NextToken, Objective
from nanovlm.train import checkpoint


@dataclass
class TrainState:
    """Everything that a resumed run needs; `replica` is what training calls: the model, or its DDP wrapper."""

    model: VLM
    replica: VLM
    optimizers: dict[str, torch.optim.Optimizer]
    loader: Loader
    threads: int
    precision: str
    objective: Objective = field(default_factory=NextToken)
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    elapsed_s: float = 0.0
    # The best evaluation so far, as best.py keeps it.
    best: dict = field(default_factory=dict)
    # Of an objective that learns from the model's own answers (rollouts.py): this rank's batches that more steps learn
    # from; and of the last step the metrics of its answers, and how many seconds they took.
    pending: list[Batch] = field(default_factory=list)
    sampled: Extras = field(default_factory=Extras)
    rollout_s: float = 0.0
    # The names of the sources that are mixed, of which a step tells the losses; none of a single one.
    sources: Sequence[str] = ()

    def save(self, run_dir: Path, keep: int) -> checkpoint.Saving:
        """Start writing a checkpoint; once it is finished, only the newest `keep` stay."""
        if distributed.rank() == 0:
            flush(run_dir / "metrics.jsonl")
        names = ("step", "tokens", "skipped_steps", "elapsed_s", "threads", "precision", "best")
        numbers = {name: getattr(self, name) for name in names}
        states = distributed.gather(self.loader.state_dict())
        numbers["slots"] = {number: state for of_rank in states for number, state in of_rank.items()}
        rng = distributed.gather(checkpoint.rng_state())
        rng = {f"{rank}.{kind}": value for rank, state in enumerate(rng) for kind, value in state.items()}
        rng |= {f"objective.{name}": tensor.detach().cpu() for name, tensor in self.objective.state.items()}
        for of_rank in distributed.gather(name_batches(self.pending)):
            rng |= of_rank
        return checkpoint.Saving(run_dir, self.model, self.optimizers, numbers, rng, keep)

    def load(self, folder: Path):
        """Resume from a checkpoint, which any number of ranks may have written."""
        numbers, rng = checkpoint.load_checkpoint(folder, self.model, self.optimizers)
        self.loader.load_state_dict(numbers.pop("slots"))
        mine = f"{distributed.rank()}."
        checkpoint.set_rng_state({name.removeprefix(mine): x for name, x in rng.items() if name.startswith(mine)})
        of_objective = {name: x for name, x in rng.items() if name.startswith("objective.")}
        for name, tensor in self.objective.state.items():
            key, is_mark = f"objective.{name}", name.startswith("frozen.")  # of which older runs have none
            if not is_mark:
                tensor.detach().copy_(of_objective[key])
            elif not torch.equal(of_objective.get(key, tensor), tensor):
                raise UserError(
                    f"the {name.removeprefix('frozen.')} of this run has other weights than when {folder} was saved: "
                    "bring them back, or begin another run with another --run-dir"
                )
        self.pending = find_batches(rng)
        for name, value in numbers.items():
            setattr(self, name, value)


def name_batches(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Return the tensors of this rank's batches, named pending.MICRO_BATCH.FIELD, or .values.NAME at the end."""
    tensors = {}
    for place, batch in enumerate(batches):
        prefix = f"pending.{distributed.rank() + place * distributed.num_ranks()}."
        named = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        named |= {"grids": torch.tensor(batch.grids)} if batch.grids else {}
        named |= {f"values.{name}": x for name, x in batch.values.items()}
        tensors |= {prefix + name: x.contiguous().clone() for name, x in named.items()}
    return tensors


def find_batches(tensors: dict[str, torch.Tensor]) -> list[Batch]:
    """Return those of the batches that `name_batches` named on all ranks which are this rank's."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("pending.")})
    batches = []
    for number in numbers:
        if number % distributed.num_ranks() != distributed.rank():
            continue
        prefix = f"pending.{number}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        grids = [tuple(grid) for grid in own.pop("grids", torch.empty(0, 2)).tolist()]
        named = {f.name: own[f.name] for f in fields(Batch) if f.name in own}
        values = {name.removeprefix("values."): x for name, x in own.items() if name.startswith("values.")}
        batches.append(Batch(**named, values=values, grids=grids))
    return batches
