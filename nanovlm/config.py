"""Every setting of a model and of a run, as frozen dataclasses.

The comment above a field is its help text on the command line. Values that follow from others are
properties. `validate()` checks across fields; `from_dict` reads what `dataclasses.asdict` wrote.
"""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class VisionConfig:
    # Side of the square tile that the encoder reads, in pixels.
    image_size: int = 64
    # Side of one square patch, in pixels.
    patch_size: int = 8
    # Width of the residual stream.
    hidden_size: int = 128
    # Width of the feed-forward layer.
    intermediate_size: int = 512
    # Number of transformer blocks.
    num_hidden_layers: int = 4
    # Number of attention heads.
    num_attention_heads: int = 4
    # Epsilon of the layer norms.
    layer_norm_eps: float = 1e-6
    # Attention backend, a key of nanovlm.model.attention.ATTENTION.
    attention: str = "sdpa"

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile; pixels beyond the last are not seen, as in SigLIP (384 = 27 * 14 + 6)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2


@dataclass(frozen=True)
class ProjectorConfig:
    # Pixel shuffle: scale_factor x scale_factor neighbouring patches become one image token.
    scale_factor: int = 2


@dataclass(frozen=True)
class TilingConfig:
    # How images become tiles, a key of nanovlm.data.images.TILING: fit, aspect kept and as few tiles as carry the
    # image's detail; idefics3, the rules of Idefics3 and SmolVLM; nanovlm, those of nanoVLM; or square, every image
    # stretched to one tile.
    policy: str = "fit"
    # fit: most tiles of one image, not counting the view of the whole image that follows several tiles.
    max_tiles: int = 1
    # idefics3, nanovlm: the longest side of every image, in pixels, before it is cut (`size.longest_edge`).
    longest_edge: int = 256
    # nanovlm: bring images that are smaller to that side, too.
    enlarge: bool = False
    # nanovlm: show the whole image before its tiles.
    has_global: bool = True


@dataclass(frozen=True)
class RopeScalingConfig:
    # How rotary frequencies are slowed down for longer contexts, a key of nanovlm.model.decoder.ROPE_SCALING: none,
    # linear, llama3 or yarn.
    type: str = "none"
    # How many times longer the context becomes.
    factor: float = 1.0
    # llama3, yarn: the context that the frequencies were first trained for, in tokens.
    original_max_position_embeddings: int = 8192
    # llama3: frequencies that turn less often than this in the original context are slowed down by the whole factor.
    low_freq_factor: float = 1.0
    # llama3: those that turn more often than this are left alone.
    high_freq_factor: float = 4.0
    # yarn: frequencies that turn more often than this in the original context are left alone.
    beta_fast: float = 32.0
    # yarn: those that turn less often than this are slowed down by the whole factor.
    beta_slow: float = 1.0
    # yarn: factor on queries and keys; null (None) for 0.1 ln(factor) + 1.
    attention_factor: float | None = None


@dataclass(frozen=True)
class MoEConfig:
    # Number of experts.
    num_experts: int = 8
    # Experts that each token goes to.
    num_experts_per_tok: int = 2
    # Width of one expert.
    intermediate_size: int = 144
    # Experts that see every token beside the routed ones; together they are one layer of so many times the width.
    num_shared_experts: int = 0
    # Router scores: softmax (Mixtral, Qwen3-MoE, OLMoE) or sigmoid (DeepSeek-V3).
    scores: Literal["softmax", "sigmoid"] = "softmax"
    # Let the weights of a token's experts add up to 1 (Mixtral, DeepSeek-V3; not OLMoE).
    norm_topk_prob: bool = True
    # Factor on the weights.
    routed_scaling_factor: float = 1.0
    # In training, what the router sees is multiplied with random numbers within this of 1.
    jitter: float = 0.0
    # In training, most tokens of an expert, as a multiple of its fair share; 0 drops nothing.
    capacity_factor: float = 0.0
    # Backend, a key of nanovlm.model.moe.EXPERTS.
    experts: str = "grouped"
    # What keeps the load even: loss (Switch, over a micro-batch), global_loss (over the whole step so far), bias
    # (DeepSeek-V3, no loss), or none.
    balance: Literal["loss", "global_loss", "bias", "none"] = "loss"
    # Weight of the balance loss.
    balance_weight: float = 0.01
    # Weight of the z-loss on the router's logits.
    z_weight: float = 0.001
    # bias: how far an expert's bias moves after a step.
    bias_rate: float = 0.001


@dataclass(frozen=True)
class DecoderConfig:
    # Rows of the embedding table; at least the size of the tokenizer.
    vocab_size: int = 640
    # Width of the residual stream.
    hidden_size: int = 128
    # Width of the SwiGLU feed-forward layer.
    intermediate_size: int = 384
    # Mixture of experts in place of that layer; null (None) for none.
    moe: MoEConfig | None = None
    # Number of transformer blocks.
    num_hidden_layers: int = 4
    # Number of query heads.
    num_attention_heads: int = 4
    # Number of key/value heads; each serves num_attention_heads / num_key_value_heads query heads.
    num_key_value_heads: int = 2
    # Width of one head.
    head_dim: int = 32
    # Biases in the query, key and value projections.
    qkv_bias: bool = False
    # Bias in the output projection of attention.
    o_bias: bool = False
    # RMS norm of queries and keys: none, head (each by itself, as in Qwen3) or all (together, as in OLMoE).
    qk_norm: Literal["none", "head", "all"] = "none"
    # Base of the rotary position frequencies.
    rope_theta: float = 10000.0
    # Longer contexts by slower frequencies.
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # Indices of the blocks whose attention has no positions.
    layers_without_rope: tuple[int, ...] = ()
    # Longest document that the positions were made for, in tokens.
    max_position_embeddings: int = 8192
    # Epsilon of the RMS norms.
    rms_norm_eps: float = 1e-5
    # Use the embedding table as output head.
    tie_word_embeddings: bool = True
    # Attention backend, a key of nanovlm.model.attention.ATTENTION: sdpa, torch's; triton, kernels/attention.py; or
    # flex, torch's other one.
    attention: str = "sdpa"
    # Backend of the output head with its loss, a key of nanovlm.losses.CROSS_ENTROPY: torch; or triton,
    # kernels/cross_entropy.py.
    cross_entropy: str = "torch"


@dataclass(frozen=True)
class QuantizationConfig:
    # Weights as int8 (a scale for each output), int4 (a scale and a zero point for each group) or nf4 (QLoRA's).
    format: Literal["int8", "int4", "nf4"] = "int4"
    # int4: weights in a group.
    group_size: Literal[32, 64, 128] = 64
    # Linear layers with names in which this regular expression is found; head and routers never are.
    layers: str = r"^decoder\."


@dataclass(frozen=True)
class VLMConfig:
    # Image encoder; null (None) for a language model that sees no images.
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    # Patch features to image tokens.
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    # Images to tiles.
    tiling: TilingConfig = field(default_factory=TilingConfig)
    # Language model.
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    # Linear layers in few bits, as nanovlm/quant.py makes them of a trained model; null (None) for none.
    quantization: QuantizationConfig | None = None
    # Token id of padding.
    pad_token_id: int = 0
    # Token id over whose embeddings the image features are written; null (None) without an image encoder.
    image_token_id: int | None = 1
    # Token id that ends an assistant turn.
    eos_token_id: int = 2
    # Other token ids at which an answer ends.
    stop_token_ids: tuple[int, ...] = ()
    # Token id that the chat template writes as bos_token; null (None) where it writes none.
    bos_token_id: int | None = None

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens that one tile fills."""
        if self.vision is None:
            return 0
        return self.vision.num_patches // self.projector.scale_factor**2

    def validate(self) -> "VLMConfig":
        """Return self, or raise ValueError with both values of the first contradiction."""
        v, d, scale = self.vision, self.decoder, self.projector.scale_factor
        parts = {
            "projector": self.projector,
            "tiling": self.tiling,
            "decoder": d,
            "decoder.rope_scaling": d.rope_scaling,
        }
        parts |= {"vision": v} if v else {}
        if d.moe is not None:
            experts = d.moe.num_experts
            _check(
                1 <= d.moe.num_experts_per_tok <= experts,
                f"decoder.moe.num_experts_per_tok = {d.moe.num_experts_per_tok} must be between 1 and "
                f"decoder.moe.num_experts = {experts}",
            )
            for name, least in (
                ("num_experts", 1),
                ("intermediate_size", 1),
                ("num_shared_experts", 0),
                ("jitter", 0),
                ("capacity_factor", 0),
                ("balance_weight", 0),
                ("z_weight", 0),
                ("bias_rate", 0),
            ):
                value = getattr(d.moe, name)
                _check(value >= least, f"decoder.moe.{name} = {value} must be at least {least}")
            for name, width in (("hidden_size", d.hidden_size), ("moe.intermediate_size", d.moe.intermediate_size)):
                _check(
                    d.moe.experts != "grouped" or width % 8 == 0,  # torch wants rows of a multiple of 16 bytes
                    f"decoder.{name} = {width} must be a multiple of 8 for decoder.moe.experts = grouped",
                )
        for name, value in (pair for part, config in parts.items() for pair in _integers(part, config)):
            _check(value >= 1, f"{name} = {value} must be at least 1")
        _divides(
            "decoder.num_key_value_heads", d.num_key_value_heads, "decoder.num_attention_heads", d.num_attention_heads
        )
        _divides("2 (rotary halves)", 2, "decoder.head_dim", d.head_dim)
        for index in d.layers_without_rope:
            _check(
                0 <= index < d.num_hidden_layers,
                f"decoder.layers_without_rope names block {index}, but decoder.num_hidden_layers = "
                f"{d.num_hidden_layers}",
            )
        _check(d.rope_scaling.factor >= 1, f"decoder.rope_scaling.factor = {d.rope_scaling.factor} must be at least 1")
        _check(
            (v is None) == (self.image_token_id is None),
            f"image_token_id = {self.image_token_id} does not fit vision = {v}: both or neither must be None",
        )
        if v is not None:
            _check(v.grid_size >= 1, f"vision.patch_size = {v.patch_size} is above vision.image_size = {v.image_size}")
            _divides("projector.scale_factor", scale, "vision.image_size // vision.patch_size", v.grid_size)
            _divides("vision.num_attention_heads", v.num_attention_heads, "vision.hidden_size", v.hidden_size)
            if self.tiling.policy == "nanovlm":
                _divides("vision.image_size", v.image_size, "tiling.longest_edge", self.tiling.longest_edge)
        ids = {name: getattr(self, name) for name in ("pad_token_id", "image_token_id", "eos_token_id", "bos_token_id")}
        ids_and_stops = [*ids.items(), *(("stop_token_ids", value) for value in self.stop_token_ids)]
        for name, value in ids_and_stops:
            _check(
                value is None or 0 <= value < d.vocab_size,
                f"{name} = {value} is outside decoder.vocab_size = {d.vocab_size}",
            )
        for name in ("pad_token_id", "eos_token_id"):
            _check(
                ids[name] != self.image_token_id,
                f"{name} = {ids[name]} must differ from image_token_id = {self.image_token_id}",
            )
        return self


@dataclass(frozen=True)
class InitConfig:
    # A whole model: a folder, such as the model/ of an earlier run, or a repository of the hub, owner/name[@revision].
    model: str = ""
    # Noise on experts that are copies of a dense layer, relative to its weights.
    upcycle_noise: float = 0.0
    # A SigLIP encoder for the image encoder, folder or repository.
    vision: str = ""
    # A language model for the decoder, folder or repository; its tokenizer is taken too, and made larger.
    decoder: str = ""


@dataclass(frozen=True)
class DataConfig:
    # Where the samples come from: scenes (scenes:color,cells for questions of these kinds alone), a .jsonl file,
    # .parquet or .tar files, a folder, or hub:owner/name.
    sources: tuple[str, ...] = ("scenes",)
    # How often each source is read, relative to the others; without weights each sample once an epoch.
    weights: tuple[float, ...] = ()
    # Read the sources one after the other, as lessons: so many samples of each before the next; the last has no number.
    lessons: tuple[int, ...] = ()
    # Tokens in a packed row; a longer document is skipped and counted.
    row_length: int = 256
    # Most image tiles in a packed row; 0 for any number.
    max_tiles: int = 0
    # Passes over the data before the run ends, if its steps do not end first; 0 for any number.
    num_epochs: int = 0
    # Processes that read samples beside the training, for each micro-batch; 0 reads in the training process.
    num_workers: int = 0
    # Share of the samples that a hash of their contents keeps out of training.
    val_fraction: float = 0.0
    # Least ratings of a turn in FineVision: relevance, visual dependency, image correspondence, formatting.
    min_ratings: tuple[int, int, int, int] = (0, 0, 0, 0)
    # Stop when more than this share of the samples is corrupt or too long.
    max_bad_fraction: float = 0.05
    # Rows in a batch (a micro-batch, when gradients are accumulated).
    batch_rows: int = 16
    # Documents to choose from when rows are packed; more waste less and need more memory.
    pack_buffer: int = 128
    # Read each pass over the source in another order.
    shuffle: bool = True
    # Size of the byte-level BPE vocabulary that is made from the data where no model brings a tokenizer.
    tokenizer_size: int = 640
    # How messages are written, a key of nanovlm.data.tokenizer.CHAT_TEMPLATES; empty for the tokenizer's own way.
    chat_template: str = ""


@dataclass(frozen=True)
class ParamRule:
    # Regular expression searched in the parameter's name.
    pattern: str
    # Factor on optim.lr; null (None) freezes the parameter.
    lr_scale: float | None = 1.0
    # Decoupled weight decay.
    weight_decay: float = 0.0
    # Which optimizer updates it; muon takes matrices only.
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class ParallelConfig:
    # With several ranks: ddp (each has all weights) or fsdp (each has a part of every weight).
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # fsdp: ranks that hold the weights together; 0 for all, fewer make copies of such groups (hybrid sharding).
    shard_ranks: int = 0
    # fsdp: give a block's gathered weights back after the forward pass, and gather them again; less memory.
    reshard_after_forward: bool = True
    # Ranks that share out the experts of a mixture, to which tokens then travel.
    expert_ranks: int = 1
    # What blocks compute again in the backward pass instead of keeping it: nothing, all but matrix products, or all.
    checkpointing: Literal["none", "selective", "full"] = "none"
    # Compile every block (torch.compile); pays on a GPU.
    compile: bool = False


@dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate.
    lr: float = 1e-3
    # Optimizer steps of the whole run.
    steps: int = 1000
    # Steps of linear warm-up.
    warmup_steps: int = 20
    # How the rate falls after the warm-up: cosine, or wsd: held at the peak, then a line to the end.
    schedule: Literal["cosine", "wsd"] = "cosine"
    # Where the line of wsd begins, as a fraction of the steps.
    decay_start: float = 0.8
    # The rate ends at this fraction of the peak.
    min_lr_ratio: float = 0.02
    # Gradients are scaled down to this global norm.
    max_grad_norm: float = 1.0
    # Micro-batches of a step, shared out evenly among the ranks; 0 for one on each rank.
    micro_batches: int = 0
    # Steps with a loss or gradient that is not finite are left out; more of them than this stop the run.
    max_skipped_steps: int = 10
    # AdamW: decay of the first and second moments.
    betas: tuple[float, float] = (0.9, 0.99)
    # Muon: momentum.
    momentum: float = 0.95
    # Parameter groups: the first rule whose pattern is found in a parameter's name holds.
    rules: tuple[ParamRule, ...] = (
        ParamRule(r"(norm|embed|embedding|bias)", weight_decay=0.0),
        ParamRule(r"", weight_decay=0.01),
    )


@dataclass(frozen=True)
class TrainConfig:
    # Where the run writes everything; started again with the same folder it continues.
    run_dir: str = "runs/scenes"
    # The model.
    model: VLMConfig = field(default_factory=VLMConfig)
    # Which weights the run starts from; random ones where nothing is named.
    init: InitConfig = field(default_factory=InitConfig)
    # The data.
    data: DataConfig = field(default_factory=DataConfig)
    # The optimizer and its schedule.
    optim: OptimConfig = field(default_factory=OptimConfig)
    # How the model lies on several ranks and what it trades for memory or speed.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # What to learn, a key of nanovlm.objectives.OBJECTIVES.
    objective: str = "next_token"
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
    # Steps between sample answers (about held-out scenes, so none with eval_scenes 0) on the terminal; 0 for none.
    sample_every: int = 200
    # Held-out scenes a split in the final evaluation; 0 skips it.
    eval_scenes: int = 512
    # First and last step to record with torch's profiler, into run_dir/trace.json (chrome://tracing); 0 0 for none.
    profile: tuple[int, int] = (0, 0)
    # Also log to Weights & Biases (offline unless WANDB_MODE says otherwise).
    wandb: bool = False

    def validate(self) -> "TrainConfig":
        """Return self, or raise ValueError with both values of the first contradiction."""
        self.model.validate()
        d, o = self.data, self.optim
        _check(
            self.model.quantization is None,
            f"model.quantization = {self.model.quantization} must be None: a model is quantised once it is trained",
        )
        for name, value, least in (
            *(
                (n, x, 0 if n in ("data.max_tiles", "data.num_epochs", "data.num_workers") else 1)
                for n, x in _integers("data", d)
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
            ("sample_every", self.sample_every, 0),
            ("eval_scenes", self.eval_scenes, 0),
        ):
            _check(value >= least, f"{name} = {value} must be at least {least}")
        for name, value in (("val_fraction", d.val_fraction), ("max_bad_fraction", d.max_bad_fraction)):
            _check(0 <= value <= 1, f"data.{name} = {value} must be between 0 and 1")
        _check(
            len(d.weights) in (0, len(d.sources)),
            f"data.weights has {len(d.weights)} entries, data.sources {len(d.sources)}",
        )
        _check(
            len(d.lessons) in (0, len(d.sources) - 1),
            f"data.lessons has {len(d.lessons)} entries; it needs one for each of the {len(d.sources)} data.sources "
            "but the last, or none",
        )
        _check(not (d.lessons and d.weights), "data.lessons and data.weights exclude each other: give one of them")
        _check(all(length > 0 for length in d.lessons), f"data.lessons = {d.lessons} must be positive")
        _check(
            not self.init.model or not (self.init.vision or self.init.decoder),
            f"init.model = {self.init.model!r} brings all parts: init.vision = {self.init.vision!r} and "
            f"init.decoder = {self.init.decoder!r} must be empty",
        )
        _check(
            not self.init.vision or self.model.vision is not None,
            f"init.vision = {self.init.vision!r} needs an image encoder, but model.vision = None",
        )
        first, last = self.profile
        _check(
            0 < first <= last <= o.steps or first == last == 0,
            f"profile = {first} {last} must name a first step and a last one, up to optim.steps = {o.steps}",
        )
        _check(
            self.parallel.strategy == "fsdp" or not self.parallel.shard_ranks,
            f"parallel.shard_ranks = {self.parallel.shard_ranks} needs parallel.strategy = fsdp, "
            f"not {self.parallel.strategy}",
        )
        _check(o.lr > 0, f"optim.lr = {o.lr} must be positive")
        _check(0 <= o.decay_start < 1, f"optim.decay_start = {o.decay_start} must be at least 0 and below 1")
        _check(0 <= o.min_lr_ratio <= 1, f"optim.min_lr_ratio = {o.min_lr_ratio} must be between 0 and 1")
        for name, value in (*(("optim.betas", beta) for beta in o.betas), ("optim.momentum", o.momentum)):
            _check(0 <= value < 1, f"{name} = {value} must be at least 0 and below 1")
        for rule in o.rules:
            _check(rule.weight_decay >= 0, f"the weight_decay {rule.weight_decay} of {rule.pattern!r} is negative")
            try:
                re.compile(rule.pattern)
            except re.error as error:
                raise ValueError(f"optim.rules: {rule.pattern!r} is no regular expression: {error}") from error
        _check(o.max_grad_norm > 0, f"optim.max_grad_norm = {o.max_grad_norm} must be positive")
        _check(
            self.init.model or self.init.decoder or d.tokenizer_size <= self.model.decoder.vocab_size,
            f"data.tokenizer_size = {d.tokenizer_size} is above "
            f"model.decoder.vocab_size = {self.model.decoder.vocab_size}",
        )
        _check(
            d.row_length > self.model.num_image_tokens,
            f"data.row_length = {d.row_length} leaves no room for text beside one image "
            f"of {self.model.num_image_tokens} tokens",
        )
        return self


def pick(table: dict, key: str, field: str):
    """Return `table[key]`, or raise ValueError that names the field, the value and the keys there are."""
    if key not in table:
        raise ValueError(f"{field} = {key!r} is unknown; there are {', '.join(table)}")
    return table[key]


def from_dict(cls, data, where: str = ""):
    """Build the dataclass `cls` from parsed JSON.

    Missing fields take their defaults. Raises ValueError that names the field and the nearest known
    one for an unknown field, and the expected type for a value of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or cls.__name__} must be a JSON object, got {data!r}")
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted(data.keys() - known):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"unknown field {where + name!r}; the nearest known field is {where + nearest!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in data.items()})


def differences(a, b, where: str = "") -> list[str]:
    """List the dotted fields in which two configs of one class differ, with both values."""
    lines = []
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            lines += differences(x, y, f"{where}{f.name}.")
        elif x != y:
            lines.append(f"{where}{f.name}: {x!r} against {y!r}")
    return lines


def _convert(hint, value, where):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where + ".")
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"{where} must have {len(args)} entries, got {value!r}")
        return tuple(_convert(args[0], x, f"{where}[{i}]") for i, x in enumerate(value))
    if origin is Literal and value in args:
        return value
    if origin is types.UnionType and value is None and type(None) in args:
        return None
    if origin is types.UnionType:
        return _convert(args[0], value, where)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    expected = f"one of {list(args)}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} must be {expected}, got {value!r}")


def _integers(prefix, config):
    return [(f"{prefix}.{k}", v) for k, v in vars(config).items() if type(v) is int]


def _check(ok, message):
    if not ok:
        raise ValueError(message)


def _divides(name, divisor, other, number):
    _check(number % divisor == 0, f"{name} = {divisor} must divide {other} = {number}")
