"""The settings of post-training: adapters, preferences, groups of the model's own answers, distillation."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from nanovlm.config.fields import check, read_weights
from nanovlm.errors import UserError


@dataclass(frozen=True)
class AdapterConfig:
    # Rank of the two matrices that learn in place of each weight matrix; 0 for no adapters: all weights learn.
    rank: int = 0
    # The change of a weight is alpha / rank times the product of the two matrices.
    alpha: float = 16.0
    # alpha / sqrt(rank) in place of alpha / rank (rsLoRA), for high ranks.
    use_rslora: bool = False
    # Also learn how long each row of a changed weight is (DoRA).
    use_dora: bool = False
    # Share of an adapter's inputs that are dropped in training.
    dropout: float = 0.0
    # First values: kaiming and gaussian begin with no change at all, orthogonal with a small one; pissa takes the
    # largest singular values out of the weight.
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = "kaiming"
    # Linear layers and stacked experts in whose names this regular expression is found.
    target: str = r"^decoder\..*\.(q|k|v|o|gate|up|down)_proj$"
    # Patterns of other parameters that learn beside the adapters, such as ^projector\.
    train: tuple[str, ...] = ()
    # Round the decoder's linear layers to this format when the run starts (QLoRA); if empty, they stay as stored.
    base: Literal["", "int8", "int4", "nf4"] = ""
    # Round the experts of its mixtures, too.
    base_experts: bool = False

    @property
    def scale(self) -> float:
        """Factor of B A: rsLoRA's is that of Kalajdzievski 2023, arXiv 2312.03732."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def validate(self) -> "AdapterConfig":
        """Return self, or raise UserError with the value of the first contradiction."""
        check(not self.base_experts or self.base != "", "adapter.base_experts = True needs an adapter.base")
        check(self.rank >= 0, f"adapter.rank = {self.rank} must be at least 0")
        check(self.alpha > 0, f"adapter.alpha = {self.alpha} must be positive")
        check(0 <= self.dropout < 1, f"adapter.dropout = {self.dropout} must be at least 0 and below 1")
        check(
            self.init != "orthogonal" or self.rank % 2 == 0,
            f"adapter.init = orthogonal needs an even adapter.rank, not {self.rank}",
        )
        for name, patterns in (("target", (self.target,)), ("train", self.train)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"adapter.{name}: {pattern!r} is no regular expression: {error}") from error
        return self


@dataclass(frozen=True)
class PreferenceConfig:
    # What is learned of a pair, keys of nanovlm.objectives.preference.LOSSES (dpo, ipo, simpo, bco, sft), each with its
    # weight if that is not 1: dpo=0.8 bco=0.2 sft=1.0. mpo stands for these three.
    losses: tuple[str, ...] = ("dpo",)
    # How much a change of log-probability counts. simpo wants about 2, as it counts that of a token.
    beta: float = 0.1
    # dpo and simpo: share of the pairs of which the worse answer is taken to be the better one.
    label_smoothing: float = 0.0
    # simpo: by how much beta times the mean log-probability of the chosen answer should be above that of the other.
    gamma: float = 0.5
    # The model whose log-probabilities changes count from: a folder or a repository, or records for what records bring
    # (python -m nanovlm.data.build reference writes them). If empty, the model without its
    # adapters, where these are all that learns, or else a frozen copy of what the run begins with.
    reference: str = ""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss. Raises UserError for an entry that is no name or name=weight, or is there twice."""
        entries = (part for name in self.losses for part in MIXTURES.get(name, (name,)))
        return read_weights(entries, "preference.losses", "dpo=0.8")

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        check(self.weights, "preference.losses is empty: name what is learned, such as dpo")
        for name, weight in self.weights.items():
            check(weight > 0, f"the weight {weight} of {name} in preference.losses must be positive")
        check(self.beta > 0, f"preference.beta = {self.beta} must be positive")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 0.5, f"preference.label_smoothing = {smoothing} must be at least 0 and below 0.5")
        check(self.gamma >= 0, f"preference.gamma = {self.gamma} must be at least 0")


# Mixtures of losses by their names: MPO is that of Wang et al. 2024, arXiv 2411.10442.
MIXTURES = {"mpo": ("dpo=0.8", "bco=0.2", "sft=1.0")}


@dataclass(frozen=True)
class GroupConfig:
    # Answers to each question; objective ppo can do with one.
    num_generations: int = 8
    # At most this many questions of each micro-batch are asked, chosen at random; 0 for all of them.
    num_questions: int = 0
    # Largest number of tokens of an answer.
    max_completion_length: int = 64
    # Temperature of the sampling; the log-probabilities that are trained are those at this temperature.
    temperature: float = 1.0
    # At most this many answers are made at a time.
    num_rows: int = 64
    # Optimizer steps on one set of answers.
    num_iterations: int = 1
    # Reward functions, each with its weight if that is not 1: exact_match length=0.1; the names are those of
    # nanovlm.objectives.rewards.REWARDS, and format, judge and reward_model, which have fields of their own.
    rewards: tuple[str, ...] = ("exact_match=1.0",)
    # Reward format: the regular expression that all of an answer must match.
    format: str = ""
    # Reward judge: the address of a server of the OpenAI API, http://host:port/v1, and the name of its model.
    judge: str = ""
    judge_model: str = ""
    # Reward reward_model: a model with a score head, as objective reward trains it: a folder or a repository.
    reward_model: str = ""
    # What an answer's reward is compared with, a key of nanovlm.objectives.group.ADVANTAGES: group (the group's mean,
    # divided by its standard deviation), batch (divided by that of all answers of the step), mean (not divided), or
    # leave_one_out (the mean of the others).
    advantages: str = "group"
    # How the losses of tokens are averaged, a key of nanovlm.objectives.group.LOSS_TYPES: dapo (over all tokens of the
    # step), grpo (over the tokens of each answer, then over answers) or dr_grpo (their sum over max_completion_length).
    loss_type: str = "dapo"
    # Whose probabilities are compared with those of the sampling, a key of nanovlm.objectives.group.LEVELS: token,
    # sequence (GSPO: the geometric mean of an answer's tokens) or product (that of the whole answer).
    importance_sampling_level: str = "token"
    # The ratio of these probabilities counts from 1 - epsilon up to 1 + epsilon_high (clip-higher where it is larger).
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    # Weight of the divergence from the reference model, in the loss, or for objective ppo in the rewards; 0 for no
    # reference.
    beta: float = 0.0
    # The reference: a folder or a repository. If empty, the model without its adapters, where these are all that
    # learns, or else a frozen copy of what the run begins with.
    reference: str = ""
    # Leave out answers that max_completion_length cut short.
    mask_truncated_completions: bool = False

    def validate(self):
        for name, least in (
            *(("num_generations", 1), ("num_questions", 0), ("max_completion_length", 1)),
            *(("num_rows", 1), ("num_iterations", 1), ("epsilon", 0), ("epsilon_high", 0), ("beta", 0)),
        ):
            value = getattr(self, name)
            check(value >= least, f"group.{name} = {value} must be at least {least}")
        check(
            self.temperature > 0,
            f"group.temperature = {self.temperature} must be positive: equal answers teach nothing",
        )
        check(
            not self.beta or self.temperature == 1,
            f"group.beta = {self.beta} compares with a reference at temperature 1: group.temperature = "
            f"{self.temperature} must be 1",
        )
        check(self.epsilon < 1, f"group.epsilon = {self.epsilon} must be below 1")


@dataclass(frozen=True)
class PPOConfig:
    # Factor of a reward for each token that it comes later.
    gamma: float = 1.0
    # How far advantages look ahead (GAE): 0 trusts the values of the next token, 1 the rewards of the whole answer.
    lam: float = 0.95
    # Weight of the loss of the values, beside that of the policy.
    vf_coef: float = 0.1
    # The loss of a value does not lead it further than this from that when the answers were sampled.
    cliprange_value: float = 0.2

    def validate(self):
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"ppo.{name} = {value} must be between 0 and 1")
        check(self.vf_coef >= 0, f"ppo.vf_coef = {self.vf_coef} must be at least 0")
        check(self.cliprange_value > 0, f"ppo.cliprange_value = {self.cliprange_value} must be positive")


@dataclass(frozen=True)
class DistillConfig:
    # The model to learn from: a folder, a repository of the hub, a .gguf file or smollm2. Empty where records bring the
    # likeliest tokens of a teacher (python -m nanovlm.data.build top-k).
    teacher: str = ""
    # What is learned, each with its weight if that is not 1, as name=weight: forward_kl, reverse_kl, jensen_shannon (of
    # the next token's distributions), next_token (the labels), features (mean square between the encoders' outputs),
    # projector (between the image tokens). In stages, a run with --distill.losses features projector --optim.freeze
    # ^decoder comes before one that starts from its model and learns all.
    losses: tuple[str, ...] = ("forward_kl",)
    # Both sides' logits are divided by it, and divergences multiplied by its square.
    temperature: float = 1.0
    # jensen_shannon: the teacher's share in the mixture, between 0, which is like forward_kl, and 1, like reverse_kl.
    beta: float = 0.5
    # Learn from answers of the student's own to the questions of records (on-policy), in place of the records' answers;
    # group.max_completion_length, group.temperature and group.num_questions say how they are sampled.
    on_policy: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss. Raises UserError for an entry that is no name or name=weight, or is there twice."""
        return read_weights(self.losses, "distill.losses", "forward_kl=0.5")

    @property
    def compares_tokens(self) -> bool:
        """Whether a teacher is asked what the next token is, which takes its tokenizer."""
        return bool(self.teacher) and not self.weights.keys() <= {"next_token", "features", "projector"}

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        for name, weight in self.weights.items():
            check(weight >= 0, f"the weight {weight} of {name} in distill.losses must be at least 0")
        check(any(self.weights.values()), f"distill.losses = {self.losses} learn nothing: give one a weight")
        check(self.temperature > 0, f"distill.temperature = {self.temperature} must be positive")
        check(0 < self.beta < 1, f"distill.beta = {self.beta} must be between 0 and 1")
