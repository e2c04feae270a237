"""TrainConfig -> the processor and the initial weights of a new run: from scratch, from parts, or from a whole model.

```
nothing            random weights, a tokenizer made from the data, or that of a distillation's teacher
init.vision        the image encoder's weights, one of the hub's or a whole model's; the projector is always random.
                   Learned positions are stretched where the run's image_size is another
init.second        those of model.vision.second, likewise
init.decoder       the decoder's weights and tokenizer, both extended by image tokens; a whole model's too
init.model         everything of another model, such as the one of an earlier stage; a dense decoder becomes a
                   mixture of experts where the config has one
init.adapter       adapters of init.model go on from those of another run
```
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nanovlm import distributed
from nanovlm.config import (
    AdapterConfig,
    DecoderConfig,
    DualConfig,
    MoEConfig,
    TrainConfig,
    VisionConfig,
    VLMConfig,
    differences,
    pick,
)
from nanovlm.data.chat import Processor
from nanovlm.data.dual import DualProcessor, train_text_tokenizer
from nanovlm.data.images import marker_tokens, plan_tiles
from nanovlm.data.tokenizer import (
    CHAT_TEMPLATES,
    COMPLETION_TEMPLATE,
    CONTINUATION_TEMPLATE,
    extend_tokenizer,
    train_tokenizer,
    with_locations,
)
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.adapters import open_adapter
from nanovlm.hub.download import find, refuse_adapter
from nanovlm.hub.dual import fill_image_tower, find_dual
from nanovlm.hub.encoders import SIGLIP, load_encoder, read_encoder, read_kind, stretch_table
from nanovlm.hub.families import IDEFICS3_TYPES
from nanovlm.hub.read import find_model
from nanovlm.hub.stored import fill_decoder, fill_vision
from nanovlm.model.adapters import is_adapter
from nanovlm.model.build import meta_model
from nanovlm.model.dual import Dual
from nanovlm.model.dual import initial_weights as dual_weights
from nanovlm.model.quantized import is_quantized
from nanovlm.model.vlm import VLM, initial_weights, skip_constructors
from nanovlm.sharded import Places, Rows, local_part, places, writable
from nanovlm.train.adapt import base_places, build, check_drawn, draw_adapter

# Settings that may differ from those of the model that a run starts from: none changes what the weights mean.
FREE_OF_MODEL = ("video_prompt",)
FREE_OF_VISION = ("attention",)
FREE_OF_DUAL = ("initial_scale", "resize", "resample")
# How many tiles, not what is in one.
FREE_OF_TILING = ("max_tiles", "longest_edge", "enlarge", "max_patches", "min_pixels", "max_pixels")
FREE_OF_DECODER = ("attention", "prefix_attention", "cross_entropy", "max_position_embeddings")
FREE_OF_MOE = ("experts", "jitter", "capacity_factor", "balance_weight", "z_weight", "bias_rate")

# The field of tiling by which a policy cuts a picture into fewer tiles; the others make one of each.
SIZES = {
    **dict.fromkeys(("fit", "internvl"), "max_tiles"),
    **dict.fromkeys(("idefics3", "nanovlm", "anyres"), "longest_edge"),
    "native": "max_patches",
    "qwen": "max_pixels",
}

SECOND, POSITIONS = "vision.second.", "vision.position_embedding.weight"
# The stacked matrices of a mixture's experts; a dense layer has one of each.
STACKS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def take_model(config: TrainConfig, theirs: VLMConfig | DualConfig | None = None) -> TrainConfig:
    """Return the config with the model of its init.model in place of its own, which is `theirs` if that is known.

    A mixture of experts of its own stays where theirs is dense, with experts of their width: it is to be upcycled.
    """
    if config.dual is not None:
        return dataclasses.replace(config, dual=theirs or find_dual(config.init.model).config)
    theirs, moe = theirs or find_model(config.init.model).config, config.model.decoder.moe
    assert isinstance(theirs, VLMConfig)
    if moe is not None and theirs.decoder.moe is None:
        moe = dataclasses.replace(moe, intermediate_size=theirs.decoder.intermediate_size)
        theirs = dataclasses.replace(theirs, decoder=dataclasses.replace(theirs.decoder, moe=moe))
    return dataclasses.replace(config, model=theirs)


def prepare(config: TrainConfig, texts: Iterable[str]) -> tuple[Any, Callable[[Any], None]]:
    """Return the processor of a new run, and a function that fills an fp32 model with initial weights.

    `texts` are for a new tokenizer. The model may be sharded: every rank goes through the same tensors in the same
    order, holds one whole tensor at a time, and keeps its rows, so the weights equal those of one rank bit for bit.
    Raises UserError that names the fields in which the config and the model that it starts from differ.
    """
    init, wanted = config.init, config.model
    if config.dual is not None:
        return _prepare_dual(config, config.dual, texts)
    if init.model:
        return _prepare_from_model(config)
    fillers, filled = [], set()  # the functions, and the encoders that they fill
    if init.vision:
        assert wanted.vision is not None
        fill_encoder, brings_second = _open_encoder(
            init.vision, wanted.vision, "vision.", bool(init.second), wanted.is_native
        )
        fillers.append(fill_encoder)
        filled |= {"vision", "vision.second"} if brings_second else {"vision"}
    if init.second:
        assert wanted.vision is not None and wanted.vision.second is not None
        fillers.append(_open_encoder(init.second, wanted.vision.second, SECOND, False, False)[0])
        filled.add("vision.second")
    check_drawn(config, filled)
    decoder = find_model(init.decoder) if init.decoder else None
    if decoder is not None:
        _refuse_quantized(init.decoder, decoder.config)
        theirs = decoder.config.decoder
        if theirs.vocab_size > wanted.decoder.vocab_size:
            raise UserError(
                f"{init.decoder} has {theirs.vocab_size} tokens, "
                f"more than decoder.vocab_size = {wanted.decoder.vocab_size}"
            )
        theirs = dataclasses.replace(_for_training(theirs, wanted.decoder), vocab_size=wanted.decoder.vocab_size)
        _check_same(init.decoder, theirs, wanted.decoder, "decoder.")
        fillers.append(lambda places: fill_decoder(places, decoder, processor.token_ids()))

    def make_processor():
        if decoder is None and config.objective == "distill" and config.distill.compares_tokens:
            theirs = find_model(config.distill.teacher).processor
            return Processor(theirs.tokenizer, _template(config, theirs.chat_template), wanted)
        if decoder is None:
            tokenizer = train_tokenizer(texts, config.data.tokenizer_size, marker_tokens(wanted))
            tokenizer = with_locations(tokenizer) if config.data.location_tokens else tokenizer
            return Processor(tokenizer, _template(config, "roles"), wanted)
        tokenizer = extend_tokenizer(decoder.processor.tokenizer, marker_tokens(wanted), wanted.image_token_id)
        return Processor(tokenizer, _template(config, decoder.processor.chat_template), wanted)

    def fill(model):
        draw(model)
        for fill_part in fillers:
            fill_part(base_places(model, config.adapter))
        draw_adapter(model)

    processor = share_processor(make_processor, wanted)
    return processor, fill


def _open_encoder(
    name: str, wanted: VisionConfig, prefix: str, has_other_second: bool, is_native: bool
) -> tuple[Callable[[Places], None], bool]:
    """Return a function that fills the encoder at `prefix` from an encoder of the hub, or that of a whole model.

    The second encoder of a whole model comes with it where one is wanted, unless `has_other_second`: the other value
    returned. The encoder may have fewer blocks than theirs, no norm after them, and, unless it reads pictures at their
    own size (`is_native`), learned positions of another grid.
    """
    theirs, fill_part, stretch = _open_vision(name)
    brings_second = theirs.second is not None and wanted.second is not None and not has_other_second
    if not brings_second:
        theirs = dataclasses.replace(theirs, second=wanted.second)
    fewer = ("num_hidden_layers",) * (wanted.num_hidden_layers <= theirs.num_hidden_layers)
    without = ("post_layernorm",) * theirs.post_layernorm
    size = ("image_size",) * (not is_native)  # else positions are stretched over each picture, from the table as it is
    _check_same(name, _with(theirs, wanted, FREE_OF_VISION + fewer + without + size), wanted, prefix)

    def fill(places):
        own = {f"vision.{key.removeprefix(prefix)}": x for key, x in places.items() if key.startswith(prefix)}
        own = {key: x for key, x in own.items() if brings_second or not key.startswith(SECOND)}
        place = own.get(POSITIONS)
        if place is None or theirs.grid_size == wanted.grid_size:
            return fill_part(own)
        table = torch.empty(theirs.class_token + theirs.num_patches, theirs.hidden_size, dtype=place.dtype)
        fill_part(own | {POSITIONS: table})
        place.copy_(stretch_table(table, theirs, wanted.grid_size, stretch))
        a, b = theirs.grid_size, wanted.grid_size
        if distributed.rank() == 0:
            print(f"the positions of {name}, {a} x {a}, are stretched to {b} x {b}", file=sys.stderr)

    return fill, brings_second


def _open_vision(name: str) -> tuple[VisionConfig, Callable[[Places], None], dict]:
    """Return the config of an encoder of the hub or of a whole model's, and a function that fills a model's.

    And how its positions are stretched (hub/encoders.py: Kind).
    """
    folder = find(name)
    refuse_adapter(folder)
    data = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "image_pooling" in data:  # ours, of a run that trained by contrast
        dual = find_dual(folder)
        return dual.config.vision, lambda places: fill_image_tower(places, dual), SIGLIP.stretch
    if data.get("model_type") not in (None, "llava", *IDEFICS3_TYPES):
        return read_encoder(folder), lambda places: load_encoder(places, folder), read_kind(folder)[1].stretch
    stored = find_model(folder)
    _refuse_quantized(name, stored.config)
    if stored.config.vision is None:
        raise UserError(f"the run cannot take its image encoder from {name}, which is a language model")
    return stored.config.vision, lambda places: fill_vision(places, stored), SIGLIP.stretch


def _prepare_dual(
    config: TrainConfig, wanted: DualConfig, texts: Iterable[str]
) -> tuple[DualProcessor, Callable[[Dual], None]]:
    init, fillers = config.init, []
    stored = find_dual(init.model) if init.model else None
    if stored is not None:
        towers = {x: _with(getattr(stored.config, x), getattr(wanted, x), FREE_OF_VISION) for x in ("vision", "text")}
        theirs = _with(dataclasses.replace(stored.config, **towers), wanted, FREE_OF_DUAL)
        _check_same(init.model, theirs, wanted, kind="dual")
        fillers.append(stored.fill)
    if init.vision:
        theirs, fill_vision_part, _ = _open_vision(init.vision)
        _check_same(init.vision, _with(theirs, wanted.vision, FREE_OF_VISION), wanted.vision, "vision.", "dual")
        fillers.append(fill_vision_part)

    def make_tokenizer() -> str:
        if stored is not None:
            return stored.processor.tokenizer.to_str()
        return train_text_tokenizer(texts, config.data.tokenizer_size).to_str()

    def fill(model: Dual):
        draw(model)
        for fill_places in fillers:
            fill_places(places(model))

    return DualProcessor(Tokenizer.from_str(distributed.from_first(make_tokenizer)), wanted), fill


def _prepare_from_model(config):
    init, wanted = config.init, config.model
    stored = find_model(init.model)
    theirs = stored.config
    if not config.adapter.rank:
        _refuse_quantized(init.model, theirs)
    moe, is_upcycled = wanted.decoder.moe, False
    if moe is not None and theirs.decoder.moe is None:
        is_upcycled = True
        check_upcycling(theirs.decoder, moe)
        theirs = dataclasses.replace(theirs, decoder=dataclasses.replace(theirs.decoder, moe=moe))
    adds_score = wanted.has_score_head and not theirs.has_score_head
    theirs = dataclasses.replace(theirs, has_score_head=adds_score or theirs.has_score_head)
    decoder, vision = _for_training(theirs.decoder, wanted.decoder), theirs.vision
    if vision is not None and wanted.vision is not None:
        vision = _with(vision, wanted.vision, FREE_OF_VISION)
    tiling = _with(theirs.tiling, wanted.tiling, FREE_OF_TILING)
    theirs = dataclasses.replace(theirs, vision=vision, tiling=tiling, decoder=decoder)
    _check_same(init.model, _with(theirs, wanted, FREE_OF_MODEL), wanted)
    first = open_adapter(init.adapter, meta_model(wanted)) if init.adapter else None

    def make_processor():
        return Processor(stored.processor.tokenizer, _template(config, stored.processor.chat_template), wanted)

    def fill_places(places: Places):
        if adds_score:
            local_part(places["score.weight"]).zero_()
        stored.fill({name: place for name, place in places.items() if name != "score.weight" or not adds_score})

    @torch.no_grad()
    def fill(model):
        if is_upcycled:
            upcycle(model, fill_places, init.upcycle_noise, config.adapter)
        else:
            fill_places(base_places(model, config.adapter))
        draw_adapter(model)
        if first is not None:
            first.fill(places(model))

    processor = share_processor(make_processor, wanted)
    check_room(processor, config)
    return processor, fill


def check_room(processor: Processor, config: TrainConfig):
    """Raise UserError where rows have no room for a square picture as the model cuts it, and none is to be cut smaller.

    Idefics3 makes every picture as large as its longest_edge, so that each would be too long.
    """
    data, side = config.data, config.model.tile_size
    if config.model.vision is None or data.too_long == "shrink":
        return
    tiling = config.model.tiling
    fewer = SIZES.get(tiling.policy)
    tokens, tiles = processor.num_image_tokens(side, side), plan_tiles(side, side, config.model).num_tiles
    smaller = f", model.tiling.{fewer} = {getattr(tiling, fewer)} to less," if fewer and tiles > 1 else ""
    for field, value, least in (
        ("row_length", data.row_length, tokens + 1),
        ("max_tiles", data.max_tiles or tiles, tiles),
    ):
        if value < least:
            raise UserError(
                f"data.{field} = {value} has no room for a square picture, which {config.init.model} cuts into {tiles} "
                f"tiles, {tokens} tokens in all: set it to at least {least}{smaller} or data.too_long to shrink"
            )


def start(config: TrainConfig, texts: Iterable[str]) -> tuple[VLM, Processor]:
    """Return the model that a run starts with, whole and in fp32 on this rank's CPU, and its processor (`prepare`)."""
    processor, fill = prepare(config, texts)
    model = build(config).to_empty(device="cpu")
    fill(model)
    return model, processor


def load_processor(run_dir: Path, config: TrainConfig) -> Processor | DualProcessor:
    """Return the processor of a run that took steps."""
    if config.dual is not None:
        return DualProcessor.load(run_dir, config.dual)
    return share_processor(lambda: Processor.load(run_dir, config.model), config.model)


def share_processor(make: Callable[[], Processor], config: VLMConfig) -> Processor:
    """Return the processor that `make` returns on the first rank, the only one that calls it."""
    processor = make() if distributed.rank() == 0 else None

    def describe():
        assert processor is not None
        return processor.tokenizer.to_str(), processor.chat_template

    tokenizer, template = distributed.from_first(describe)
    return processor or Processor(Tokenizer.from_str(tokenizer), template, config)


@torch.no_grad()
def draw(model: VLM | Dual):
    """Fill a model with random weights: each tensor is drawn whole, and a rank keeps its rows.

    Adapters and quantised weights are left as they are: these are read, and those drawn once the base is there.

    Raises UserError that names tensors left without values.
    """
    skip_constructors(model)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    left = {id(tensor): name for name, tensor in tensors if not (is_adapter(name) or is_quantized(name))}
    for tensor, values in dual_weights(model) if isinstance(model, Dual) else initial_weights(model):
        writable(tensor).copy_(values)
        left.pop(id(tensor))
        del values  # before the next one is drawn
    if left:
        raise UserError(f"initial_weights (nanovlm/model/vlm.py) has no values for {', '.join(left.values())}")


@torch.no_grad()
def upcycle(model: VLM, fill: Callable[[Places], None], noise: float = 0.0, adapter: AdapterConfig = AdapterConfig()):
    """Fill a mixture with copies of a dense model's feed-forward layers (arXiv 2212.05055); copy the rest.

    `fill` copies the dense model's weights (see stored.py). The router is random and the weights of a token's experts
    add up to 1, so without noise the mixture computes what the dense model does; in training experts diverge, as each
    sees other tokens. `noise` is the standard deviation of the noise added to each expert matrix, relative to that of
    the matrix.
    """
    if adapter.base_experts:
        raise UserError(
            "adapter.base_experts = True rounds experts that are stored, and those of an upcycled model are made of "
            "dense layers: leave it out"
        )
    draw(model)
    mixture = base_places(model, adapter)
    stacks = {name: place for name, place in mixture.items() if name.endswith(STACKS)}
    new = tuple(f"mlp.{name}" for name in ("router.weight", "selection_bias"))
    dense = {name: place for name, place in mixture.items() if name not in stacks and not name.endswith(new)}
    # A rank's first expert temporarily holds the dense matrix; a rank without experts of this layer takes no rows.
    first = {name: stack[stack.start if isinstance(stack, Rows) else 0] for name, stack in stacks.items()}
    fill(dense | {f"{name}.weight": place for name, place in first.items()})
    for name, stack in stacks.items():
        drawn, matrix = torch.randn(stack.shape, dtype=stack.dtype), first[name]
        if isinstance(matrix, Rows):
            continue
        matrix = matrix.cpu()
        mine = stack.part_of(drawn) if isinstance(stack, Rows) else drawn
        local_part(stack).copy_(matrix + noise * matrix.std() * mine)


def check_upcycling(decoder: DecoderConfig, moe: MoEConfig):
    """Raise UserError for a mixture that could not compute what a dense decoder does.

    It has experts of another width or kind, shared experts, or weights that do not add up to 1.
    """
    for field, wanted in (
        ("intermediate_size", decoder.intermediate_size),
        ("num_shared_experts", 0),
        ("norm_topk_prob", True),
        ("routed_scaling_factor", 1.0),
        ("capacity_factor", 0.0),
        ("has_bias", False),
    ):
        if getattr(moe, field) != wanted:
            raise UserError(
                f"a dense layer can become a mixture where decoder.moe.{field} = {wanted}, not {getattr(moe, field)}"
            )
    if decoder.hidden_act != "silu":
        raise UserError(
            f"a dense layer can become a mixture where decoder.hidden_act = silu, not {decoder.hidden_act}: experts "
            "are SwiGLU"
        )


def _template(config: TrainConfig, otherwise: str) -> str:
    """Return the template that the config names, or else another: the name of one, or one itself."""
    if name := config.data.chat_template:
        return pick(CHAT_TEMPLATES, name, "data.chat_template")
    if otherwise.endswith(CONTINUATION_TEMPLATE):
        return otherwise.removesuffix(CONTINUATION_TEMPLATE) + COMPLETION_TEMPLATE
    return CHAT_TEMPLATES.get(otherwise, otherwise)


def _for_training(theirs: DecoderConfig, wanted: DecoderConfig) -> DecoderConfig:
    """Return their config with what may differ, as it does not change what the weights mean."""
    theirs = _with(theirs, wanted, FREE_OF_DECODER)
    if theirs.moe is None or wanted.moe is None:
        return theirs
    return dataclasses.replace(theirs, moe=_with(theirs.moe, wanted.moe, FREE_OF_MOE))


def _with(theirs, wanted, fields):
    return dataclasses.replace(theirs, **{field: getattr(wanted, field) for field in fields})


def _refuse_quantized(name, config):
    if config.quantization is not None:
        raise UserError(
            f"the run cannot start from {name}, which is quantised, to {config.quantization.format}: "
            "name the model that it was made from, or, as init.model, give it adapters (adapter.rank)"
        )


def _check_same(name, theirs, wanted, where="", kind="model"):
    if changed := differences(theirs, wanted, f"{kind}.{where}"):
        raise UserError(f"the run cannot start from {name}, which differs from the config: {'; '.join(changed)}")
