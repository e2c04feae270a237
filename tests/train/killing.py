"""Kill a rank at a moment of a run, another one at each start of torchrun's ranks, in one run of theirs."""

import os
import random
import signal
import time
from pathlib import Path

import train
from nanovlm.infer.engine import Engine
from nanovlm.train.checkpoint import Saving
from nanovlm.train.rollouts import Rollouts


def die_by_plan(plan, folder):
    """Let start n of the ranks end by plan[n] = (rank, moment, step), and those after the last go on to the end.

    `folder` receives what `read_deaths` returns. Checkpoints are waited for, so that it is known from which ones the
    next start goes on.
    """
    rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    finish, step, steps = Saving.finish, train.train_step, []

    def note_begin(state, *args):
        steps.append(state.step)
        if rank == 0 and len(steps) == 1:
            (Path(folder) / f"begun_{start}").write_text(str(state.step))
        return step(state, *args)

    Saving.finish = lambda self, wait=True: finish(self)
    train.train_step = note_begin
    if start < len(plan) and plan[start][0] == rank:
        _, moment, number = plan[start]

        def die():
            (Path(folder) / f"died_{start}").write_text(f"{moment} {number}")
            os.kill(os.getpid(), signal.SIGKILL)

        MOMENTS[moment](number, die)


def read_deaths(folder):
    """Return the step at which each start began, and the moments at which all but the last ended."""
    begun, died = (sorted(Path(folder).glob(f"{what}_*")) for what in ("begun", "died"))
    return [int(file.read_text()) for file in begun], [file.read_text() for file in died]


def die_in_step(number, die):
    """After its gradients and the optimizer, before it is told or saved."""
    step = train.train_step

    def train_step(state, *args):
        numbers = step(state, *args)
        if state.step == number:
            die()
        return numbers

    train.train_step = train_step


def die_in_rollout(number, die):
    """While the answers for the step after `number` are sampled."""
    sample, calls = Rollouts._sample, []

    def _sample(self, *args):
        if self.state.step == number:
            step = Engine.step

            def step_or_die(engine):
                calls.append(engine)
                if len(calls) == 3:
                    die()
                return step(engine)

            Engine.step = step_or_die
        return sample(self, *args)

    Rollouts._sample = _sample


def die_in_save(number, die):
    """While the shards of a checkpoint are written, flushed or hashed."""
    make = Saving.__init__

    def __init__(self, run_dir, model, optimizers, state, *args):
        make(self, run_dir, model, optimizers, state, *args)
        if state["step"] == number:
            time.sleep(random.uniform(0, 0.005))
            die()

    Saving.__init__ = __init__


MOMENTS = {"step": die_in_step, "rollout": die_in_rollout, "save": die_in_save}
