"""The settings of a run: all of them together, and those of its start, its ranks and its evaluations."""

from dataclasses import dataclass, field
from typing import Literal

from nanovlm.config.data import DataConfig
from nanovlm.config.dual import ContrastiveConfig, DualConfig
from nanovlm.config.fields import check, check_finite, differences, integers
from nanovlm.config.masked import MaskedConfig
from nanovlm.config.model import VLMConfig
from nanovlm.config.optim import OptimConfig
from nanovlm.config.post import AdapterConfig, DistillConfig, GroupConfig, PPOConfig, PreferenceConfig
from nanovlm.errors import UserError


@dataclass(frozen=True)
class InitConfig:
    # A whole model: a folder, such as the model/ of an earlier run, a repository of the hub, owner/name[@revision], a
    # .gguf file or smollm2. The command line takes its config, too, and changes only what other options name.
    model: str = ""
    # Noise on experts that are copies of a dense layer, relative to its weights.
    upcycle_noise: float = 0.0
    # An image encoder, SigLIP, CLIP or DINOv2, or a whole model whose encoder is taken: a folder or a repository.
    vision: str = ""
    # The same for model.vision.second.
    second: str = ""
    # A language model, or a whole model whose decoder is taken: a folder, a repository, a .gguf file or smollm2. Its
    # tokenizer is used too, with image tokens added.
    decoder: str = ""
    # An adapter of init.model in PEFT's layout, such as the adapter/ of an earlier run, from which those of this run go
    # on: a folder or a repository. Its files say rank, alpha, kind and layers.
    adapter: str = ""


@dataclass(frozen=True)
class ParallelConfig:
    # With several ranks: ddp (each has all weights) or fsdp (each has a part of every weight).
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # fsdp: ranks that share one copy of the weights; 0 for all; with fewer, each group has a copy (hybrid sharding).
    shard_ranks: int = 0
    # fsdp: free a block's gathered weights after the forward pass and gather them again for the backward; less memory.
    reshard_after_forward: bool = True
    # Ranks over which a mixture's experts are divided; tokens are sent to the ranks of their experts.
    expert_ranks: int = 1
    # What blocks recompute in the backward pass to save memory: nothing, all but matrix products, or everything.
    checkpointing: Literal["none", "selective", "full"] = "none"
    # Compile every block (torch.compile); worthwhile on a GPU.
    compile: bool = False


@dataclass(frozen=True)
class EvalConfig:
    # What the model is asked at the end of the run and every `every` steps: names of eval/tasks.py (scenes,
    # scenes:compositional, scenes_boxes, scenes_video, documents) or sources of records, where an answer must match the
    # record's word for word. With `every` and data.val_fraction the held-out records are a task too, held_out.
    tasks: tuple[str, ...] = ()
    # How many records of a task are asked, from its first on.
    limit: int = 512
    # At the end, also ask with grey images and with another record's, and score the commonest training answers.
    controls: bool = True
    # Steps between evaluations: validation loss (of data.val_fraction, for each source) and tasks; 0 for the end alone.
    every: int = 0
    # Which number of the evaluations decides what is kept in run_dir/model-best: val_loss, or another by its name in
    # metrics.jsonl (accuracy_held_out), of which the higher is better. If empty, val_loss, or else the accuracy of the
    # first task, which goes first where the model learns from its own answers; none keeps no model.
    best: str = ""
    # The run ends after so many evaluations in a row that were no better than the best; 0 for no such end.
    patience: int = 0
    # With several sources, the share by which the held-out loss of one may be above its best, or its accuracy below,
    # until an alert says so; 0 for no alerts. A held-out loss that is not finite is one with any number of sources.
    alert: float = 0.1
    # Largest number of micro-batches for the validation loss of a source; read once and kept.
    val_batches: int = 16
    # Steps between answers that are shown on the terminal; 0 for none.
    show_every: int = 200
    # A source of records whose first questions are shown; if empty, some questions of the first task.
    show: str = ""


@dataclass(frozen=True)
class TrainConfig:
    # Folder that the run writes to; started again with the same folder, the run continues.
    run_dir: str = "runs/scenes"
    # The model.
    model: VLMConfig = field(default_factory=VLMConfig)
    # In its place an image tower and a text tower, which objective contrastive trains; null (None) for a model.
    dual: DualConfig | None = None
    # Which weights the run starts from; random ones by default.
    init: InitConfig = field(default_factory=InitConfig)
    # Small matrices that learn in place of the model's weights.
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    # The data.
    data: DataConfig = field(default_factory=DataConfig)
    # The optimizer and its schedule.
    optim: OptimConfig = field(default_factory=OptimConfig)
    # How the run is evaluated.
    eval: EvalConfig = field(default_factory=EvalConfig)
    # How the model is distributed over ranks, and trade-offs between memory and speed.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # What to learn, a key of nanovlm.objectives.OBJECTIVES: next_token, preference, reward, distill, group,
    # ppo, online_preference, contrastive, masked.
    objective: str = "next_token"
    # Objective contrastive: what is learned of pairs of a picture and a text.
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    # Objective masked: an image encoder learns to predict masked patches.
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    # Objective preference: what is preferred to what, and how that is learned.
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    # Objectives group, ppo and online_preference: the model's own answers and their rewards.
    group: GroupConfig = field(default_factory=GroupConfig)
    # Objective ppo: the values that answers are compared with, in place of group.advantages.
    ppo: PPOConfig = field(default_factory=PPOConfig)
    # Objective distill: the teacher and what of it is learned.
    distill: DistillConfig = field(default_factory=DistillConfig)
    # Seed of the weights and of the order of the data.
    seed: int = 0
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Precision of matrix products: bf16 (autocast), fp32, or auto: bf16 on a GPU and on x86 with AVX512_BF16 or AMX.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # CPU threads; 0 takes the physical cores, divided by the ranks on the machine, and one thread with a GPU.
    threads: int = 0
    # Steps between checkpoints; one is always written at the end.
    checkpoint_every: int = 200
    # Newest checkpoints to keep.
    keep_checkpoints: int = 2
    # First and last step to record with torch's profiler, into run_dir/trace.json (chrome://tracing); 0 0 for none.
    profile: tuple[int, int] = (0, 0)
    # Also log to Weights & Biases (offline unless WANDB_MODE says otherwise).
    wandb: bool = False

    @property
    def built(self) -> VLMConfig | DualConfig:
        """The config of the model that the run trains."""
        return self.dual or self.model

    def validate(self) -> "TrainConfig":
        """Return self, or raise UserError with both values of the first contradiction."""
        parts = (self.model, self.adapter, self.preference, self.group, self.ppo, self.distill)
        for part in (*parts, self.contrastive, self.masked):
            part.validate()
        self.check_dual()
        d, o = self.data, self.optim
        has_adapters = self.adapter.rank or self.init.adapter
        for name, value in vars(self.adapter).items():
            check(
                has_adapters or value == getattr(AdapterConfig, name),
                f"adapter.{name} = {value!r} needs adapters: give adapter.rank, such as 8",
            )
        check(
            not self.init.adapter or self.init.model,
            f"init.adapter = {self.init.adapter} belongs to a model: name it by init.model",
        )
        check(
            not self.init.adapter or self.adapter.init != "pissa",
            f"adapter.init = pissa changes the model that init.adapter = {self.init.adapter} belongs to: leave one out",
        )
        check(
            self.model.quantization is None or has_adapters,
            f"model.quantization = {self.model.quantization} must be None, as codes do not learn: give adapter.rank",
        )
        check(
            not self.adapter.rank or self.init.model or self.init.decoder,
            f"adapter.rank = {self.adapter.rank} adapts a model that has learned: name one by init.model or "
            "init.decoder, or leave it out to train all weights",
        )
        check(
            not self.adapter.base or self.model.quantization is None,
            f"adapter.base = {self.adapter.base} rounds a model that is not quantised yet: leave it out to use "
            f"model.quantization = {self.model.quantization}",
        )
        for name, value, least in (
            *(
                (n, x, 0 if n in ("data.max_tiles", "data.num_epochs", "data.num_workers") else 1)
                for n, x in integers("data", d)
            ),
            ("optim.steps", o.steps, 1),
            ("optim.warmup_steps", o.warmup_steps, 0),
            ("optim.micro_batches", o.micro_batches, 0),
            ("optim.max_skipped_steps", o.max_skipped_steps, 0),
            ("parallel.shard_ranks", self.parallel.shard_ranks, 0),
            ("parallel.expert_ranks", self.parallel.expert_ranks, 1),
            ("seed", self.seed, 0),
            ("threads", self.threads, 0),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("keep_checkpoints", self.keep_checkpoints, 1),
            ("eval.limit", self.eval.limit, 1),
            ("eval.every", self.eval.every, 0),
            ("eval.patience", self.eval.patience, 0),
            ("eval.val_batches", self.eval.val_batches, 1),
            ("eval.show_every", self.eval.show_every, 0),
        ):
            check(value >= least, f"{name} = {value} must be at least {least}")
        check_finite(self)
        d.validate()
        o.validate()
        check(self.seed < 2**63, f"seed = {self.seed} must be below 2**63")
        check(self.run_dir.strip(), "run_dir is empty: name a folder")
        check(
            not self.eval.every or self.eval.tasks or d.val_fraction,
            f"eval.every = {self.eval.every} has nothing to look at: name eval.tasks or set data.val_fraction",
        )
        check(
            self.eval.every or not (self.eval.patience or self.eval.best not in ("", "none")),
            f"eval.best = {self.eval.best!r} and eval.patience = {self.eval.patience} go by the evaluations of "
            "eval.every = 0: give the steps between them",
        )
        check(0 <= self.eval.alert < 1, f"eval.alert = {self.eval.alert} must be a share: at least 0 and below 1")
        check(
            not (self.eval.patience and self.eval.best == "none"),
            f"eval.patience = {self.eval.patience} needs an eval.best to go by, not none",
        )
        check(
            self.model.has_score_head == (self.objective == "reward"),
            f"model.has_score_head = {self.model.has_score_head} does not fit objective = {self.objective}: the score "
            "head is learned by reward, and by it alone",
        )
        check(
            not self.init.model or not (self.init.vision or self.init.second or self.init.decoder),
            f"init.model = {self.init.model!r} brings all parts: init.vision = {self.init.vision!r}, init.second = "
            f"{self.init.second!r} and init.decoder = {self.init.decoder!r} must be empty",
        )
        check(
            not self.init.vision or self.model.vision is not None,
            f"init.vision = {self.init.vision!r} needs an image encoder, but model.vision = None",
        )
        check(
            not self.init.second or (self.model.vision is not None and self.model.vision.second is not None),
            f"init.second = {self.init.second!r} needs a second image encoder, but model.vision.second = None",
        )
        read = READS.get(self.objective, SETTINGS)
        for name in SETTINGS:
            part = getattr(self, name)
            readers = " or ".join(objective for objective, names in READS.items() if name in names)
            for change in differences(part, type(part)(), f"{name}.") if name not in read else ():
                raise UserError(
                    f"{change.split(':')[0]} is given, but objective = {self.objective} does not read it: it is one of "
                    f"objective = {readers}"
                )
        check(
            self.objective != "distill" or self.distill.on_policy or self.group == GroupConfig(),
            "the settings of group are given, but objective = distill reads them only with distill.on_policy = true",
        )
        check(
            not self.adapter.dropout or self.objective not in COMPARED,
            f"adapter.dropout = {self.adapter.dropout} must be 0: objective = {self.objective} compares "
            "log-probabilities with others that are computed without it",
        )
        check(
            self.group.num_generations > 1 or self.objective not in ("group", "online_preference"),
            f"group.num_generations = {self.group.num_generations} must be at least 2: objective = {self.objective} "
            "compares the answers to a question with each other",
        )
        check(
            d.train_on == "answers" or not self.model.decoder.sees_prompt,
            f"data.train_on = {d.train_on} must be answers: with model.decoder.prefix_attention = "
            f"{self.model.decoder.prefix_attention} tokens of the prompt see those that they would have to predict",
        )
        check(
            self.preference.reference != "records" or d.too_long == "skip",
            f"data.too_long = {d.too_long} must be skip: the log-probabilities of preference.reference = records are "
            "those of all tiles of the images",
        )
        first, last = self.profile
        check(
            0 < first <= last <= o.steps or first == last == 0,
            f"profile = {first} {last} must name a first step and a last one, up to optim.steps = {o.steps}",
        )
        check(
            self.parallel.strategy == "fsdp" or not self.parallel.shard_ranks,
            f"parallel.shard_ranks = {self.parallel.shard_ranks} needs parallel.strategy = fsdp, "
            f"not {self.parallel.strategy}",
        )
        if d.features:
            self.check_features()
        if self.dual is not None:
            return self
        check(
            self.init.model
            or self.init.decoder
            or d.tokenizer_size + 1024 * d.location_tokens <= self.model.decoder.vocab_size,
            f"data.tokenizer_size = {d.tokenizer_size}{' and 1024 location tokens' * d.location_tokens} is above "
            f"model.decoder.vocab_size = {self.model.decoder.vocab_size}",
        )
        check(
            d.row_length <= self.model.decoder.max_position_embeddings,
            f"data.row_length = {d.row_length} is above model.decoder.max_position_embeddings = "
            f"{self.model.decoder.max_position_embeddings}",
        )
        least = self.model.num_image_tokens
        if self.model.tiling.policy == "anyres":
            least = self.model.num_image_features
        if self.model.is_native and d.too_long == "skip":
            least = self.model.most_native_tiles
        check(
            d.row_length > least,
            f"data.row_length = {d.row_length} leaves no room for text beside one image of {least} tokens",
        )
        return self

    def check_features(self):
        """Raise UserError for what needs pictures, where only their features are read."""
        model, read = self.model, f"data.features = {self.data.features}"
        check(
            self.objective == "next_token" and self.dual is None,
            f"{read} serves objective = next_token alone: {self.objective} reads the pictures themselves",
        )
        check(model.vision is not None, f"{read} is what an image encoder makes of pictures, but model.vision = None")
        check(
            not model.is_native,
            f"{read} is for encoders that read tiles of one size: with model.tiling.policy = {model.tiling.policy} "
            "pictures are read at their own",
        )
        check(
            self.data.too_long == "skip",
            f"data.too_long = {self.data.too_long} must be skip: {read} has the features of all tiles of a picture",
        )
        check(
            not self.adapter.rank and not self.init.adapter,
            f"{read} is for runs without adapters: leave adapter.rank and init.adapter out, or data.features",
        )

    def check_dual(self):
        """Raise UserError for what contradicts a dual model, or its absence."""
        dual, loss, d = self.dual, self.contrastive.loss, self.data
        check(
            (self.objective == "contrastive") == (dual is not None),
            f"objective = {self.objective} does not fit dual = {dual}: contrastive, and it alone, trains a dual model",
        )
        if dual is None:
            return
        dual.validate()
        for changed in differences(self.model, VLMConfig(), "model."):
            raise UserError(f"{changed.split(':')[0]} is given, but the run trains a dual model: leave it out")
        check(
            loss not in ("sigmoid", "softmax") or (loss == "sigmoid") == (dual.initial_bias is not None),
            f"dual.initial_bias = {dual.initial_bias} does not fit contrastive.loss = {loss}: sigmoid learns a bias, "
            "softmax none (None)",
        )
        for name, value in (
            ("init.decoder", self.init.decoder),
            ("init.adapter", self.init.adapter),
            ("adapter.rank", self.adapter.rank),
            ("eval.tasks", self.eval.tasks),
            ("eval.show", self.eval.show),
            ("data.chat_template", d.chat_template),
        ):
            check(not value, f"{name} = {value} is for models that answer, which a dual model does not: leave it out")
        check(
            self.init.model or d.tokenizer_size <= dual.text.vocab_size,
            f"data.tokenizer_size = {d.tokenizer_size} is above dual.text.vocab_size = {dual.text.vocab_size}",
        )
        check(
            d.row_length >= dual.text.max_position_embeddings,
            f"data.row_length = {d.row_length} is below dual.text.max_position_embeddings = "
            f"{dual.text.max_position_embeddings}: a text would fit into no row",
        )


# The settings of objectives, and which of them each reads; one that is not here may read all.
SETTINGS = ("preference", "group", "ppo", "distill", "contrastive", "masked")
READS = {
    "next_token": (),
    "preference": ("preference",),
    "reward": (),
    "distill": ("distill", "group"),
    "group": ("group",),
    "ppo": ("group", "ppo"),
    "online_preference": ("preference", "group"),
    "contrastive": ("contrastive",),
    "masked": ("masked",),
}
# Objectives that learn from differences to the log-probabilities of a sampling or a reference.
COMPARED = ("preference", "group", "ppo", "online_preference")
