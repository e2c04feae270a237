"""The settings of post-training: adapters, preferences, groups of the model's own answers, distillation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreferenceConfig:
    # How much a change of log-probability counts against the reference.
    beta: float = 0.1

    def validate(self):
        pass


@dataclass(frozen=True)
class GroupConfig:
    # Answers to each question.
    num_answers: int = 8

    def validate(self):
        pass


@dataclass(frozen=True)
class DistillConfig:
    # The model to learn from: a folder, a repository of the hub, a .gguf file or smollm2.
    teacher: str = ""

    def validate(self):
        pass
