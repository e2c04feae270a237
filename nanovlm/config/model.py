"""The settings of a model."""

from dataclasses import dataclass, field
from typing import Literal

from nanovlm.config.fields import check, check_finite, divides, integers

# The largest numbers that are believed, above those of any model: what a damaged config says beyond them could take all
# memory or endless time before anything else shows that it is wrong.
MOST = {
    "num_hidden_layers": 2**10,
    "num_experts": 2**12,
    "max_tiles": 2**10,
    "longest_edge": 2**14,
    "max_patches": 2**14,
    "image_size": 2**14,
}
MOST_OTHERWISE, MOST_TILES = 2**24, 128  # the latter along one side of an image
MAY_BE_ZERO = ("projector.num_tokens", "decoder.sliding_window")
NATIVE = ("native", "qwen")  # tilings of which the encoder reads each picture whole


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
    # What makes patches of pixels, a key of nanovlm.model.vision.PATCHES: patch, a linear map of each; or convolution,
    # which halves the picture again and again, and for which patch_size is a power of 2.
    patches: str = "patch"
    # convolution: residual blocks of convolutions after each halving.
    convolution_blocks: int = 1
    # patch: bias in the linear map (not in CLIP).
    patch_bias: bool = True
    # A learned token before the patches that gathers what the image shows (CLIP, DINOv2).
    class_token: bool = False
    # Learned tokens beside the patches, without positions, in which the blocks can note down what is of no place.
    num_registers: int = 0
    # Positions: learned, one vector for each patch; rotary, in attention, rows and columns half of each head; or both
    # (Qwen3-VL).
    positions: Literal["learned", "rotary", "both"] = "learned"
    # rotary, both: base of the frequencies.
    rope_theta: float = 10000.0
    # How the learned positions are stretched over a native picture: centres, as an image is resized (SigLIP 2), or
    # corners, so that the first and the last position stay what they are (Qwen3-VL).
    stretch: Literal["centres", "corners"] = "centres"
    # Native pictures: side in pixels of the squares within which a block attends (Qwen2.5-VL); 0 for whole pictures.
    window_size: int = 0
    # window_size: indices of the blocks that attend over whole pictures all the same.
    full_attention_layers: tuple[int, ...] = ()
    # Norms of the blocks, a key of nanovlm.model.vision.NORMS: layer, or rms (Qwen2.5-VL).
    norm: str = "layer"
    # Activation of the feed-forward layers, a key of nanovlm.model.vision.ACTIVATIONS: gelu_tanh (SigLIP), gelu
    # (DINOv2), quick_gelu (CLIP) or silu (Qwen2.5-VL).
    hidden_act: str = "gelu_tanh"
    # The feed-forward layers are gated, as SwiGLU (Qwen2.5-VL).
    gated_mlp: bool = False
    # A layer norm before the first block (CLIP).
    pre_layernorm: bool = False
    # A layer norm after the last block.
    post_layernorm: bool = True
    # Learned factors on what each half of a block adds to the residual stream, 1 at the start (DINOv2).
    layer_scale: bool = False
    # Mean of red, green and blue, which is subtracted from pixels from 0 to 1.
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # Standard deviation of red, green and blue, by which the difference is divided.
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # An encoder beside this one, with as many patches, whose features are appended to this one's; null (None) for none.
    second: "VisionConfig | None" = None

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile; pixels beyond the last are unused, as in SigLIP (384 = 27 * 14 + 6)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def num_tokens_beside(self) -> int:
        """Tokens of the blocks that are no patches: class token and registers."""
        return self.class_token + self.num_registers

    @property
    def feature_size(self) -> int:
        """Width of the features, those of both encoders together."""
        return self.hidden_size + (self.second.feature_size if self.second else 0)

    def validate(self, where: str = "vision") -> "VisionConfig":
        """Return self, or raise UserError with both values of the first contradiction; `where` is its name."""
        least = {"num_registers": 0, "convolution_blocks": 0, "window_size": 0}
        for name, value in integers("", self):
            name = name.removeprefix(".")
            check(value >= least.get(name, 1), f"{where}.{name} = {value} must be at least {least.get(name, 1)}")
            most = MOST.get(name, MOST_OTHERWISE)
            check(value <= most, f"{where}.{name} = {value} must be at most {most}")
        for name, value in (
            ("layer_norm_eps", self.layer_norm_eps),
            ("rope_theta", self.rope_theta),
            ("std", min(self.std)),
        ):
            check(value > 0, f"{where}.{name} = {value} must be positive")
        check(self.norm != "none", f"{where}.norm = none must be layer or rms: the blocks have norms")
        full = self.full_attention_layers
        check(
            list(full) == sorted(set(full) & set(range(self.num_hidden_layers))),
            f"{where}.full_attention_layers = {full} must be indices of the {where}.num_hidden_layers = "
            f"{self.num_hidden_layers} blocks, each once and the lowest first",
        )
        check(
            not full or self.window_size > 0,
            f"{where}.full_attention_layers = {full} is for {where}.window_size, which is 0",
        )
        side, patch = self.image_size, self.patch_size
        check(self.grid_size >= 1, f"{where}.patch_size = {patch} is above {where}.image_size = {side}")
        divides(f"{where}.num_attention_heads", self.num_attention_heads, f"{where}.hidden_size", self.hidden_size)
        if self.positions != "learned":
            head = self.hidden_size // self.num_attention_heads
            divides("4 (rotary halves of rows and columns)", 4, f"{where}.hidden_size / num_attention_heads", head)
        if self.patches == "convolution":
            check(
                patch >= 2 and patch.bit_count() == 1,
                f"{where}.patch_size = {patch} must be a power of 2 for {where}.patches = convolution",
            )
        if self.second is not None:
            check(self.second.second is None, f"{where}.second.second = {self.second.second} must be None")
            second = self.second.validate(f"{where}.second")
            for name, value, needed in (
                ("window_size", second.window_size, 0),
                ("stretch", second.stretch, "centres"),
            ):
                check(value == needed, f"{where}.second.{name} = {value} must be {needed}: it is for native pictures")
            check(
                second.grid_size == self.grid_size,
                f"{where}.second has {second.grid_size} patches a side, {where} {self.grid_size}: they must be as many",
            )
        return self


@dataclass(frozen=True)
class ProjectorConfig:
    # What maps patch features to image tokens, a key of nanovlm.model.projector.PROJECTORS: linear, mlp, merger (of
    # Qwen's models), pool (Gemma-3), resampler, qformer or merge.
    type: str = "linear"
    # linear, mlp, merger: scale_factor x scale_factor neighbouring patches become one image token (pixel shuffle);
    # pool: their mean does.
    scale_factor: int = 2
    # linear: a bias in the linear map (PaliGemma).
    bias: bool = False
    # resampler, qformer, merge: image tokens of one tile; 0 where they follow from scale_factor.
    num_tokens: int = 0
    # resampler, qformer: number of blocks.
    num_layers: int = 2
    # resampler, qformer: number of attention heads.
    num_attention_heads: int = 4
    # mlp, merger: norm before the linear maps, a key of nanovlm.model.vision.NORMS: none, layer or rms. It is that of a
    # patch in merger, and in mlp that of the patches of a token together.
    norm: str = "none"
    # mlp: a learned token that ends each row of an anyres picture.
    has_newline: bool = False
    # mlp, merger: epsilon of that norm.
    norm_eps: float = 1e-6
    # merger: indices of the blocks of the encoder whose outputs are mapped, too, and added to the image tokens behind
    # the first blocks of the decoder, one block each (DeepStack).
    deepstack_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class FusionConfig:
    # How the decoder sees pictures, a key of nanovlm.model.fusion.FUSION: sequence (image tokens among those of the
    # text) or cross_attention (gated layers between its blocks look at them; a tile has one token in the text).
    type: str = "sequence"
    # cross_attention: a gated layer stands before every so many-th block.
    every: int = 1
    # cross_attention: a token sees only the latest picture before it, not all those of its document before it.
    only_latest: bool = False


@dataclass(frozen=True)
class TilingConfig:
    # How images become tiles, a key of nanovlm.data.tilings.TILING. fit: aspect ratio kept, as few tiles as carry the
    # image's detail; square: one tile, to which it is stretched; gemma, paligemma: likewise, as these models do; crop:
    # one tile, its middle, as CLIP and LLaVA 1.5 do; idefics3, nanovlm, internvl: a grid to which it is stretched, as
    # these models do; anyres: the whole image, then the grid that fits it best (LLaVA-OneVision); native (SigLIP 2's
    # NaFlex), qwen (Qwen2.5-VL, Qwen3-VL): the encoder reads it whole, at its own aspect ratio.
    policy: str = "fit"
    # fit: largest number of tiles per image, not counting the view of the whole image that follows several tiles.
    # anyres: of how many tiles an image has at most the image tokens, whatever its grid. internvl: as in fit.
    max_tiles: int = 1
    # idefics3, nanovlm: the longest side of every image, in pixels, before it is cut (`size.longest_edge`); anyres: the
    # longest side of a grid.
    longest_edge: int = 256
    # nanovlm: also enlarge smaller images to that side.
    enlarge: bool = False
    # nanovlm: show the whole image before its tiles.
    has_global: bool = True
    # native: largest number of patches of an image, which is scaled up or down to about as many. A tile is what becomes
    # one image token, scale_factor x scale_factor patches.
    max_patches: int = 256
    # qwen: least and largest number of pixels of an image; one outside is scaled up or down.
    min_pixels: int = 3136
    max_pixels: int = 1003520


@dataclass(frozen=True)
class RopeScalingConfig:
    # How rotary frequencies are slowed down for longer contexts, a key of nanovlm.model.decoder.ROPE_SCALING: none,
    # linear, llama3 or yarn.
    type: str = "none"
    # By how many times the context grows.
    factor: float = 1.0
    # llama3, yarn: the context that the frequencies were first trained for, in tokens.
    original_max_position_embeddings: int = 8192
    # llama3: frequencies with fewer turns than this in the original context are slowed down by the whole factor.
    low_freq_factor: float = 1.0
    # llama3: frequencies with more turns than this are left unchanged.
    high_freq_factor: float = 4.0
    # yarn: frequencies with more turns than this in the original context are left unchanged.
    beta_fast: float = 32.0
    # yarn: frequencies with fewer turns than this are slowed down by the whole factor.
    beta_slow: float = 1.0
    # yarn: factor that scales queries and keys; null (None) for 0.1 ln(factor) + 1.
    attention_factor: float | None = None
    # yarn: the frequencies between the two begin and end at whole ones (not in gpt-oss).
    truncate: bool = True


@dataclass(frozen=True)
class MoEConfig:
    # Number of experts.
    num_experts: int = 8
    # Experts that each token goes to.
    num_experts_per_tok: int = 2
    # Width of one expert.
    intermediate_size: int = 144
    # Indices of the blocks that are mixtures, lowest first; empty for all of them. The others have a dense layer of
    # decoder.intermediate_size, as the first block of DeepSeek-V2, or every other one.
    layers: tuple[int, ...] = ()
    # Shared experts, which see every token; together they are one layer of this many times the width of an expert.
    num_shared_experts: int = 0
    # Router scores: softmax (Mixtral, Qwen3-MoE, OLMoE) or sigmoid (DeepSeek-V3).
    scores: Literal["softmax", "sigmoid"] = "softmax"
    # Let the weights of a token's experts add up to 1 (Mixtral, DeepSeek-V3; not OLMoE).
    norm_topk_prob: bool = True
    # Factor that the weights are multiplied by.
    routed_scaling_factor: float = 1.0
    # Biases of the router and of the experts, and a clamped gate (gpt-oss), with experts = loop.
    has_bias: bool = False
    # has_bias: the largest input of a gate, and of what it multiplies the largest size.
    swiglu_limit: float = 7.0
    # In training, the router's input is multiplied by random numbers from 1 - jitter to 1 + jitter.
    jitter: float = 0.0
    # In training, the most tokens an expert takes, as a multiple of its fair share; 0 drops nothing.
    capacity_factor: float = 0.0
    # Backend of the experts, a key of nanovlm.model.moe.EXPERTS: loop, grouped (torch's grouped_mm) or triton.
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
    # Rows of the embedding table; at least the tokenizer's vocabulary size.
    vocab_size: int = 640
    # Width of the residual stream.
    hidden_size: int = 128
    # Width of the SwiGLU feed-forward layer.
    intermediate_size: int = 384
    # Mixture of experts in place of the feed-forward layer; null (None) for none.
    moe: MoEConfig | None = None
    # Number of transformer blocks.
    num_hidden_layers: int = 4
    # Number of query heads.
    num_attention_heads: int = 4
    # Number of key/value heads; each serves num_attention_heads / num_key_value_heads query heads.
    num_key_value_heads: int = 2
    # Width of one head.
    head_dim: int = 32
    # Activation of the feed-forward layers' gate, a key of nanovlm.model.moe.GATES: silu (SwiGLU) or gelu_tanh (Gemma).
    hidden_act: str = "silu"
    # Biases in the query, key and value projections.
    qkv_bias: bool = False
    # Bias in the output projection of attention.
    o_bias: bool = False
    # RMS norm of queries and keys: none, head (each by itself, as in Qwen3) or all (together, as in OLMoE).
    qk_norm: Literal["none", "head", "all"] = "none"
    # Sliding window: how many tokens of its document a query sees up to its own, which counts; 0 for all of them.
    sliding_window: int = 0
    # sliding_window: indices of the blocks that see whole documents all the same.
    full_attention_layers: tuple[int, ...] = ()
    # sliding_window: base of the rotary frequencies in blocks with a window, which rope_scaling leaves as they are
    # (Gemma-3); 0 for the frequencies of all other blocks.
    window_rope_theta: float = 0.0
    # Factor of the scores of attention; 0 for 1 / sqrt(head_dim).
    attention_scale: float = 0.0
    # Scores become softcap * tanh(score / softcap) (Gemma-2), with attention = plain; 0 for none.
    attention_softcap: float = 0.0
    # A learned score of each head for looking at nothing (gpt-oss), with attention = plain or triton.
    attention_sinks: bool = False
    # Base of the rotary position frequencies.
    rope_theta: float = 10000.0
    # Slower rotary frequencies for longer contexts.
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # M-RoPE: how many of the frequencies turn with a token's place in time, with the row and with the column of an
    # image token in a native picture (nanovlm/model/mrope.py); empty for plain rotary positions.
    rope_sections: tuple[int, ...] = ()
    # M-RoPE: whether the three take turns from the highest frequency on (Qwen3-VL), or come one after another.
    rope_interleaved: bool = False
    # Indices of the blocks whose attention has no rotary positions.
    layers_without_rope: tuple[int, ...] = ()
    # Longest document that the positions are made for, in tokens.
    max_position_embeddings: int = 8192
    # Epsilon of the RMS norms.
    rms_norm_eps: float = 1e-5
    # What is added to the weights of the RMS norms: 1 in Gemma, whose weights begin at 0.
    norm_offset: float = 0.0
    # RMS norms also of what attention and the feed-forward layer add to the residual stream (Gemma).
    sandwich_norms: bool = False
    # Factor of token embeddings: sqrt(hidden_size) in Gemma.
    embedding_scale: float = 1.0
    # Factor of what attention and the feed-forward layer add to the residual stream (Granite).
    residual_scale: float = 1.0
    # Factor of the logits (Granite).
    logit_scale: float = 1.0
    # Use the embedding table as output head.
    tie_word_embeddings: bool = True
    # Which tokens also see those behind them: none (causal), the image tokens of a picture each other (images), or all
    # tokens of the first prompt, pictures included, each other: without its last one, with which each of several
    # answers begins (prompt), or all, for one answer to a prompt (whole_prompt, as in PaliGemma). Answers are always
    # causal.
    prefix_attention: Literal["causal", "images", "prompt", "whole_prompt"] = "causal"
    # Attention backend, a key of nanovlm.model.attention.ATTENTION: sdpa (torch's scaled_dot_product_attention), triton
    # (kernels/attention.py), flex (torch's flex_attention) or plain (scores written out).
    attention: str = "sdpa"
    # Backend of the output head with its loss, a key of nanovlm.objectives.losses.CROSS_ENTROPY: torch or triton
    # (kernels/cross_entropy.py).
    cross_entropy: str = "torch"

    @property
    def mixtures(self) -> tuple[int, ...]:
        """Indices of the blocks that have a mixture of experts in place of the dense feed-forward layer."""
        return () if self.moe is None else self.moe.layers or tuple(range(self.num_hidden_layers))

    @property
    def sees_prompt(self) -> bool:
        """Whether tokens of the first prompt also see those behind them."""
        return self.prefix_attention in ("prompt", "whole_prompt")

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each block, 0 where it has none."""
        full = self.full_attention_layers
        return tuple(0 if i in full else self.sliding_window for i in range(self.num_hidden_layers))


@dataclass(frozen=True)
class QuantizationConfig:
    # Weights as int8 or fp8 (e4m3; a scale for each output), int4 (a scale and a zero point for each group) or nf4
    # (QLoRA's).
    format: Literal["int8", "int4", "nf4", "fp8"] = "int4"
    # int4: weights in a group.
    group_size: Literal[32, 64, 128] = 64
    # Linear layers in whose names this regular expression is found; the head and routers are never quantised.
    layers: str = r"^decoder\."
    # int8: what the layers read is rounded to 8 bits, too, with a scale for each token, found as it is computed.
    activations: Literal["none", "int8"] = "none"
    # Also the experts of mixtures, where it is found in the names of all three of their stacked matrices.
    experts: bool = False


@dataclass(frozen=True)
class VLMConfig:
    # Image encoder; null (None) for a language model without images.
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    # Patch features to image tokens.
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    # How the decoder sees image tokens.
    fusion: FusionConfig = field(default_factory=FusionConfig)
    # Images to tiles.
    tiling: TilingConfig = field(default_factory=TilingConfig)
    # Language model.
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    # A head that scores a whole answer with one number: a reward model, which objective reward trains.
    has_score_head: bool = False
    # Low-bit linear layers, which nanovlm/model/quantized.py makes from a trained model; null (None) for none.
    quantization: QuantizationConfig | None = None
    # How a video is written, a key of nanovlm.data.video.PROMPTS: smolvlm says how many frames of how long a video
    # follow, and the time of each, as SmolVLM2 does; times gives the time of each in seconds.
    video_prompt: Literal["smolvlm", "times"] = "smolvlm"
    # Token id of padding.
    pad_token_id: int = 0
    # Token id of the image placeholders, whose embeddings image features replace; null (None) without an image encoder.
    image_token_id: int | None = 1
    # Token id that ends an assistant turn.
    eos_token_id: int = 2
    # Other token ids at which an answer ends.
    stop_token_ids: tuple[int, ...] = ()
    # Token id that the chat template writes as bos_token; null (None) where it writes none.
    bos_token_id: int | None = None

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens that one tile fills; one, where fusion looks at its features beside the sequence.

        Of anyres, whose pictures have as many as data/places.py says, one, too.
        """
        if self.vision is None:
            return 0
        if self.tiling.policy == "anyres":
            return 1
        return self.num_image_features if self.fusion.type == "sequence" else 1

    @property
    def num_image_features(self) -> int:
        """Features that the projector makes of one tile."""
        if self.vision is None:
            return 0
        return self.projector.num_tokens or self.num_tile_patches // self.projector.scale_factor**2

    @property
    def num_tile_patches(self) -> int:
        """Patches of one tile; 0 without an image encoder."""
        return 0 if self.vision is None else (self.tile_size // self.vision.patch_size) ** 2

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels; 0 without an image encoder."""
        if self.vision is None:
            return 0
        return self.vision.patch_size * self.projector.scale_factor if self.is_native else self.vision.image_size

    @property
    def is_native(self) -> bool:
        """Whether the encoder reads pictures at their own size, from tiles of one image token."""
        return self.vision is not None and self.tiling.policy in NATIVE

    @property
    def has_grids(self) -> bool:
        """Whether the image tokens of a picture follow from its grid, and not from the number of its tiles."""
        return self.vision is not None and self.tiling.policy in (*NATIVE, "anyres")

    @property
    def most_native_tiles(self) -> int:
        """Most tiles, and image tokens, of a picture that the encoder reads at its own size."""
        if self.tiling.policy == "qwen":
            return self.tiling.max_pixels // self.tile_size**2
        return self.tiling.max_patches // self.num_tile_patches

    def validate(self) -> "VLMConfig":
        """Return self, or raise UserError with both values of the first contradiction."""
        v, d, scale = self.vision, self.decoder, self.projector.scale_factor
        parts = {
            "projector": self.projector,
            "fusion": self.fusion,
            "tiling": self.tiling,
            "decoder": d,
            "decoder.rope_scaling": d.rope_scaling,
        }
        if d.moe is not None:
            experts = d.moe.num_experts
            check(
                1 <= d.moe.num_experts_per_tok <= experts,
                f"decoder.moe.num_experts_per_tok = {d.moe.num_experts_per_tok} must be between 1 and "
                f"decoder.moe.num_experts = {experts}",
            )
            layers, num_layers = d.moe.layers, d.num_hidden_layers
            check(
                list(layers) == sorted(set(layers)) and all(0 <= i < num_layers for i in layers),
                f"decoder.moe.layers = {layers} must be indices of the decoder.num_hidden_layers = {num_layers} "
                "blocks, each once and the lowest first",
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
                check(value >= least, f"decoder.moe.{name} = {value} must be at least {least}")
            check(
                not d.moe.has_bias or d.moe.experts == "loop",
                f"decoder.moe.experts = {d.moe.experts} must be loop for decoder.moe.has_bias = True",
            )
            limit = d.moe.swiglu_limit
            check(limit > 0, f"decoder.moe.swiglu_limit = {limit} must be positive")
            check(
                d.moe.has_bias or limit == MoEConfig.swiglu_limit,
                f"decoder.moe.swiglu_limit = {limit} is for decoder.moe.has_bias, which is False",
            )
            check(
                d.hidden_act == "silu",
                f"decoder.hidden_act = {d.hidden_act} must be silu for a mixture of experts, which is SwiGLU",
            )
            for name, width in (("hidden_size", d.hidden_size), ("moe.intermediate_size", d.moe.intermediate_size)):
                check(
                    d.moe.experts != "grouped" or width % 8 == 0,  # torch needs rows of a multiple of 16 bytes
                    f"decoder.{name} = {width} must be a multiple of 8 for decoder.moe.experts = grouped",
                )
        check_finite(self)
        if v is not None:
            v.validate()
        numbers = [pair for part, config in parts.items() for pair in integers(part, config)]
        for name, value in numbers:
            least = 0 if name in MAY_BE_ZERO else 1
            check(value >= least, f"{name} = {value} must be at least {least}")
        for name, value in numbers + (integers("decoder.moe", d.moe) if d.moe else []):
            most = MOST.get(name.rpartition(".")[2], MOST_OTHERWISE)
            check(value <= most, f"{name} = {value} must be at most {most}")
        for name, value in (
            ("decoder.rms_norm_eps", d.rms_norm_eps),
            ("decoder.rope_theta", d.rope_theta),
            ("projector.norm_eps", self.projector.norm_eps),
        ):
            check(value > 0, f"{name} = {value} must be positive")
        if v is not None and self.tiling.policy in ("idefics3", "nanovlm", "anyres"):
            check(
                self.tiling.longest_edge <= MOST_TILES * v.image_size,
                f"tiling.longest_edge = {self.tiling.longest_edge} is more than {MOST_TILES} tiles of "
                f"vision.image_size = {v.image_size}",
            )
        divides(
            "decoder.num_key_value_heads", d.num_key_value_heads, "decoder.num_attention_heads", d.num_attention_heads
        )
        divides("2 (rotary halves)", 2, "decoder.head_dim", d.head_dim)
        if d.rope_sections:
            check(
                len(d.rope_sections) == 3 and sum(d.rope_sections) == d.head_dim // 2 and min(d.rope_sections) >= 0,
                f"decoder.rope_sections = {d.rope_sections} must be three numbers whose sum is half of "
                f"decoder.head_dim = {d.head_dim}",
            )
            check(
                v is None or self.is_native,
                f"decoder.rope_sections = {d.rope_sections} needs the grids of native pictures, but tiling.policy = "
                f"{self.tiling.policy}",
            )
        check(
            d.rope_sections or not d.rope_interleaved,
            "decoder.rope_interleaved = True is for decoder.rope_sections, which is empty",
        )
        for index in d.layers_without_rope:
            check(
                0 <= index < d.num_hidden_layers,
                f"decoder.layers_without_rope names block {index}, but decoder.num_hidden_layers = "
                f"{d.num_hidden_layers}",
            )
        check_attention(d)
        check(
            self.fusion.every <= d.num_hidden_layers,
            f"fusion.every = {self.fusion.every} is above decoder.num_hidden_layers = {d.num_hidden_layers}",
        )
        if v is not None and self.fusion.only_latest:
            most = {"fit": self.tiling.max_tiles, "internvl": self.tiling.max_tiles}
            most |= dict.fromkeys(("square", "gemma", "paligemma", "crop"), 1)
            check(
                most.get(self.tiling.policy, self.tiling.longest_edge / v.image_size) <= 1,
                "fusion.only_latest = True needs pictures of one tile, but tiling.policy = "
                f"{self.tiling.policy} may cut them: choose square",
            )
        check(d.rope_scaling.factor >= 1, f"decoder.rope_scaling.factor = {d.rope_scaling.factor} must be at least 1")
        check(
            (v is None) == (self.image_token_id is None),
            f"image_token_id = {self.image_token_id} does not fit vision = {v}: both or neither must be None",
        )
        if v is not None:
            if self.is_native:
                self.check_native()
            else:
                for name, value, otherwise in (
                    ("vision.window_size", v.window_size, 0),
                    ("vision.stretch", v.stretch, "centres"),
                    ("projector.deepstack_layers", self.projector.deepstack_layers, ()),
                ):
                    check(
                        value == otherwise,
                        f"{name} = {value} needs pictures that are read whole, but tiling.policy = "
                        f"{self.tiling.policy}",
                    )
            kind = self.projector.type
            for name, value, otherwise, readers in (
                ("bias", self.projector.bias, False, ("linear",)),
                ("norm", self.projector.norm, "none", ("mlp", "merger")),
            ):
                check(
                    value == otherwise or kind in readers,
                    f"projector.{name} = {value} must be {otherwise} for projector.type = {kind}: it is for "
                    f"{' and '.join(readers)}",
                )
            is_anyres = self.tiling.policy == "anyres"
            check(
                self.projector.has_newline == is_anyres and (self.projector.type == "mlp" or not is_anyres),
                f"projector.type = {self.projector.type} and projector.has_newline = {self.projector.has_newline} do "
                f"not fit tiling.policy = {self.tiling.policy}: anyres, and it alone, has newlines, and needs mlp",
            )
            check(
                not is_anyres or self.fusion.type == "sequence",
                f"fusion.type = {self.fusion.type} must be sequence for tiling.policy = anyres",
            )
            if is_anyres:
                divides("vision.image_size", v.image_size, "tiling.longest_edge", self.tiling.longest_edge)
            if not self.is_native and not self.projector.num_tokens:
                divides("projector.scale_factor", scale, "vision.image_size // vision.patch_size", v.grid_size)
            if self.tiling.policy == "nanovlm":
                divides("vision.image_size", v.image_size, "tiling.longest_edge", self.tiling.longest_edge)
        ids = {name: getattr(self, name) for name in ("pad_token_id", "image_token_id", "eos_token_id", "bos_token_id")}
        ids_and_stops = [*ids.items(), *(("stop_token_ids", value) for value in self.stop_token_ids)]
        for name, value in ids_and_stops:
            check(
                value is None or 0 <= value < d.vocab_size,
                f"{name} = {value} is outside decoder.vocab_size = {d.vocab_size}",
            )
        for name in ("pad_token_id", "eos_token_id"):
            check(
                ids[name] != self.image_token_id,
                f"{name} = {ids[name]} must differ from image_token_id = {self.image_token_id}",
            )
        return self

    def check_native(self):
        """Raise UserError for what does not go with an encoder that reads pictures at their own size."""
        v, scale = self.vision, self.projector.scale_factor
        assert v is not None
        for name, value, needed in (
            ("patches", v.patches, "patch"),
            ("class_token", v.class_token, False),
            ("num_registers", v.num_registers, 0),
            ("second", v.second, None),
        ):
            check(value == needed, f"vision.{name} = {value} must be {needed} for tiling.policy = {self.tiling.policy}")
        check(
            self.fusion.type == "sequence",
            f"fusion.type = {self.fusion.type} must be sequence for tiling.policy = {self.tiling.policy}",
        )
        check(
            self.num_image_features == 1,
            f"projector.type = {self.projector.type} makes {self.num_image_features} tokens of a tile, but for "
            f"tiling.policy = {self.tiling.policy} scale_factor x scale_factor patches must become one",
        )
        layers = self.projector.deepstack_layers
        check(
            len(layers) < self.decoder.num_hidden_layers
            and list(layers) == sorted(set(layers))
            and all(0 <= i < v.num_hidden_layers for i in layers),
            f"projector.deepstack_layers = {layers} must be indices of the vision.num_hidden_layers = "
            f"{v.num_hidden_layers} blocks, lowest first, and fewer than decoder.num_hidden_layers = "
            f"{self.decoder.num_hidden_layers}",
        )
        check(
            not layers or self.projector.type == "merger",
            f"projector.type = {self.projector.type} must be merger for projector.deepstack_layers = {layers}",
        )
        check(
            v.window_size % self.tile_size == 0,
            f"vision.window_size = {v.window_size} must be a multiple of the {self.tile_size} pixels of an image token",
        )
        if self.tiling.policy == "qwen":
            least, most = self.tiling.min_pixels, self.tiling.max_pixels
            check(
                self.tile_size**2 <= most and least <= most,
                f"tiling.max_pixels = {most} must be at least tiling.min_pixels = {least} and the "
                f"{self.tile_size**2} pixels of one image token",
            )
            return
        check(
            self.tiling.max_patches >= scale**2,
            f"tiling.max_patches = {self.tiling.max_patches} is too few for one image token, which takes {scale**2}: "
            f"the square of projector.scale_factor = {scale}",
        )


def check_attention(d: DecoderConfig):
    """Raise UserError for a window, sinks or a softcap that do not go with the rest of a decoder."""
    check(
        list(d.full_attention_layers) == sorted(set(d.full_attention_layers) & set(range(d.num_hidden_layers))),
        f"decoder.full_attention_layers = {d.full_attention_layers} must be indices of the decoder.num_hidden_layers = "
        f"{d.num_hidden_layers} blocks, each once and the lowest first",
    )
    for name in ("full_attention_layers", "window_rope_theta"):
        check(
            not getattr(d, name) or d.sliding_window > 0,
            f"decoder.{name} = {getattr(d, name)} is for decoder.sliding_window, which is 0",
        )
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        check(getattr(d, name) > 0, f"decoder.{name} = {getattr(d, name)} must be positive")
    for name in ("window_rope_theta", "attention_scale", "attention_softcap"):
        check(getattr(d, name) >= 0, f"decoder.{name} = {getattr(d, name)} must be at least 0")
    for name, backends in (("attention_softcap", ("plain",)), ("attention_sinks", ("plain", "triton"))):
        check(
            not getattr(d, name) or d.attention in backends,
            f"decoder.attention = {d.attention} must be {' or '.join(backends)} "
            f"for decoder.{name} = {getattr(d, name)}",
        )
