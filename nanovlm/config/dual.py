"""The settings of a dual model, an image tower and a text tower with embeddings of one space, and of contrast."""

from dataclasses import dataclass, field
from typing import Literal

from nanovlm.config.fields import check, check_finite, divides, integers
from nanovlm.config.model import MOST, MOST_OTHERWISE, VisionConfig


@dataclass(frozen=True)
class TextConfig:
    # Rows of the embedding table; at least the tokenizer's vocabulary size.
    vocab_size: int = 640
    # Width of the residual stream.
    hidden_size: int = 128
    # Width of the feed-forward layer.
    intermediate_size: int = 512
    # Number of transformer blocks.
    num_hidden_layers: int = 4
    # Number of attention heads.
    num_attention_heads: int = 4
    # Longest text, in tokens; a longer one is cut.
    max_position_embeddings: int = 64
    # Pad every text to that length with tokens that are attended to (SigLIP).
    is_padded: bool = False
    # Positions: a learned table, or rotary.
    positions: Literal["learned", "rotary"] = "learned"
    # Base of the rotary position frequencies.
    rope_theta: float = 10000.0
    # A token sees only those before it (CLIP), or its whole text.
    is_causal: bool = False
    # What stands for a text: its last position, or the mean of all, a key of nanovlm.model.dual.TEXT_POOLING.
    pooling: str = "last"
    # Activation of the feed-forward layers, a key of nanovlm.model.vision.ACTIVATIONS: gelu_tanh (SigLIP), gelu or
    # quick_gelu (CLIP).
    hidden_act: str = "gelu_tanh"
    # Epsilon of the layer norms.
    layer_norm_eps: float = 1e-6
    # Attention backend, a key of nanovlm.model.attention.ATTENTION.
    attention: str = "sdpa"


@dataclass(frozen=True)
class DualConfig:
    # Image tower.
    vision: VisionConfig = field(default_factory=VisionConfig)
    # Text tower.
    text: TextConfig = field(default_factory=TextConfig)
    # Width of the embeddings of images and texts.
    projection_size: int = 128
    # What stands for an image, a key of nanovlm.model.dual.IMAGE_POOLING: attention, a learned query that attends to
    # all tokens of the tower (SigLIP); class, its class token (CLIP); or mean, that of the patches.
    image_pooling: str = "attention"
    # Map of what stands for an image to its embedding: none (SigLIP), linear (CLIP) or affine, which has a bias.
    image_projection: Literal["none", "linear", "affine"] = "none"
    # Map of what stands for a text to its embedding: none, linear (CLIP) or affine (SigLIP).
    text_projection: Literal["none", "linear", "affine"] = "affine"
    # Factor of the cosines at the start of training; its logarithm is learned.
    initial_scale: float = 10.0
    # What is added to them at the start of training (SigLIP); null (None) for nothing (CLIP).
    initial_bias: float | None = -10.0
    # How a picture becomes a square: stretched (SigLIP), or shrunk until its shorter side fits and cut (CLIP).
    resize: Literal["stretch", "crop"] = "stretch"
    # Filter that pictures are resized with.
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    # Token id of padding.
    pad_token_id: int = 0

    @property
    def tile_size(self) -> int:
        """Side of the square that a picture becomes, in pixels."""
        return self.vision.image_size

    def validate(self) -> "DualConfig":
        """Return self, or raise UserError with both values of the first contradiction."""
        v, t = self.vision, self.text
        check_finite(self)
        v.validate("dual.vision")
        for name, value in (*integers("dual.text", t), ("dual.projection_size", self.projection_size)):
            check(value >= 1, f"{name} = {value} must be at least 1")
            most = MOST.get(name.rpartition(".")[2], MOST_OTHERWISE)
            check(value <= most, f"{name} = {value} must be at most {most}")
        for name, value in (
            ("text.layer_norm_eps", t.layer_norm_eps),
            ("text.rope_theta", t.rope_theta),
            ("initial_scale", self.initial_scale),
        ):
            check(value > 0, f"dual.{name} = {value} must be positive")
        check(v.second is None, "dual.vision.second must be None: an image tower of a dual model is one encoder")
        check(
            v.class_token or self.image_pooling != "class",
            "dual.image_pooling = class needs dual.vision.class_token = True",
        )
        heads = t.num_attention_heads
        divides("dual.text.num_attention_heads", heads, "dual.text.hidden_size", t.hidden_size)
        for name, part, projection in (("vision", v, self.image_projection), ("text", t, self.text_projection)):
            check(
                projection != "none" or part.hidden_size == self.projection_size,
                f"dual.{name}.hidden_size = {part.hidden_size} must be dual.projection_size = {self.projection_size} "
                "without a projection",
            )
        check(
            not (t.is_padded and t.is_causal),
            "dual.text.is_padded = True does not fit dual.text.is_causal = True: padding would stand for a text",
        )
        check(
            t.positions == "learned" or t.hidden_size // heads % 2 == 0,
            f"dual.text.hidden_size = {t.hidden_size} gives {heads} heads an odd width, which rotary "
            "positions cannot halve",
        )
        check(
            0 <= self.pad_token_id < t.vocab_size,
            f"dual.pad_token_id = {self.pad_token_id} is outside dual.text.vocab_size = {t.vocab_size}",
        )
        return self


@dataclass(frozen=True)
class ContrastiveConfig:
    # What is learned of all pairs of a picture and a text in a step, a key of nanovlm.objectives.contrastive.LOSSES:
    # sigmoid (SigLIP) or softmax (CLIP).
    loss: str = "sigmoid"
    # Largest factor of the cosines.
    max_scale: float = 100.0
    # Pictures whose products with the texts of a rank are computed at once; 0 for as many as fit into 128 MiB.
    chunk: int = 0
    # Weight of a captioning loss beside it (CoCa, with 2): how surprised a decoder that sees a picture's patches is by
    # its caption, the mean over its tokens and then over captions. 0 for none.
    caption_weight: float = 0.0
    # Layers of that decoder, which checkpoints have and no model keeps.
    caption_layers: int = 2

    def validate(self) -> "ContrastiveConfig":
        """Return self, or raise UserError with the value of the first contradiction."""
        check(self.max_scale > 0, f"contrastive.max_scale = {self.max_scale} must be positive")
        for name, least in (("chunk", 0), ("caption_weight", 0), ("caption_layers", 1)):
            value = getattr(self, name)
            check(value >= least, f"contrastive.{name} = {value} must be at least {least}")
        check(
            self.caption_weight or self.caption_layers == ContrastiveConfig.caption_layers,
            f"contrastive.caption_layers = {self.caption_layers} needs contrastive.caption_weight above 0",
        )
        return self
