"""Held-out losses and accuracies of several sources -> a sentence for each source that gets worse.

A mixture may improve as a whole while one of its sources is forgotten. A source gets worse when its loss is above its
own best by a share, or its accuracy below by as much of it. A loss that is no finite number is named whatever was
before, also that of a run with one source.
"""

import math
from pathlib import Path

from nanovlm.train.log import read_metrics

MEAN, LOSS, ACCURACY = "val_loss", "val_loss_", "accuracy_held_out_"


class Alerts:
    """The best number of each source so far, also before a run was resumed, by its metrics.jsonl."""

    def __init__(self, metrics: Path, share: float):
        self.share, self.best = share, {}
        for line in read_metrics(metrics) if share and metrics.exists() else []:
            self.find(line["step"], line)

    def find(self, step: int, numbers: dict) -> list[str]:
        """Note an evaluation; return a sentence for each source that is worse than its best by more than the share."""
        sentences = []
        for name, value in numbers.items() if self.share else ():
            is_loss = name.startswith(LOSS)
            if not isinstance(value, float) or not (is_loss or name == MEAN or name.startswith(ACCURACY)):
                continue
            if not math.isfinite(value) and (is_loss or (name == MEAN and not sentences)):
                before = "" if name not in self.best else ", {:.4g} at its best at step {}".format(*self.best[name])
                sentences.append(f"alert at step {step}: {name} is {value}{before}: the model's numbers overflow, so "
                                 "go back to a checkpoint before it and lower optim.lr (eval.alert)")  # fmt: skip
            if not math.isfinite(value) or name == MEAN:
                continue
            best, when = self.best.get(name, (value, step))
            if value < best if is_loss else value > best:
                best, when = value, step
            self.best[name] = best, when
            if value > best * (1 + self.share) if is_loss else value < best * (1 - self.share):
                by = f", {abs(value / best - 1):.0%} {'above' if is_loss else 'below'} its best" if best else ""
                sentences.append(f"alert at step {step}: {name} is {value:.4g}{by}, {best:.4g} at step {when}: this "
                                 "source gets worse (eval.alert)")  # fmt: skip
        return sentences
