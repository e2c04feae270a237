"""TrainConfig -> the model and processor that a new run starts with: from nothing, from parts, or from a whole model.

```
nothing            random weights, a tokenizer made from the data
init.vision        the image encoder's weights                                   the projector is always random
init.decoder       the decoder's weights and tokenizer, both made larger by the tokens of images
init.model         everything of another model, such as the one of an earlier stage; a dense decoder becomes a
                   mixture of experts where the config has one
```
"""

import dataclasses
from collections.abc import Iterable

import torch

from nanovlm.config import MoEConfig, TrainConfig, differences, pick
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.tokenizer import CHAT_TEMPLATES, extend_tokenizer, read_tokenizer, train_tokenizer
from nanovlm.files import read_json
from nanovlm.hub.configs import read_decoder, read_siglip, read_template
from nanovlm.hub.download import find
from nanovlm.hub.read import load
from nanovlm.hub.weights import load_decoder, load_vision
from nanovlm.model.build import empty_model
from nanovlm.model.vlm import VLM

# What a run may choose anew for the mixture of the model that it starts from: none changes what the weights mean.
MOE_FIELDS_OF_TRAINING = ("experts", "jitter", "capacity_factor", "balance_weight", "z_weight", "bias_rate")

# And for its decoder, for the same reason.
BACKENDS = ("attention", "cross_entropy")


def start(config: TrainConfig, texts: Iterable[str]) -> tuple[VLM, Processor]:
    """Return a model with fp32 weights, and its processor; `texts` are for a new tokenizer.

    Raises ValueError that names the fields in which the config and what the run starts from differ.
    """
    init, wanted = config.init, config.model
    if init.model:
        model, processor = load(init.model, dtype=torch.float32)
        if model.config.quantization is not None:
            format = model.config.quantization.format
            raise ValueError(
                f"the run cannot start from {init.model}, which is quantised, to {format}: "
                "name the model that it was made from"
            )
        if wanted.decoder.moe is not None and model.config.decoder.moe is None:
            model = upcycle(model, wanted.decoder.moe, init.upcycle_noise)
        backends = {field: getattr(wanted.decoder, field) for field in BACKENDS}
        decoder = dataclasses.replace(model.config.decoder, **backends)
        vision = model.config.vision
        if vision is not None and wanted.vision is not None:
            vision = dataclasses.replace(vision, attention=wanted.vision.attention)
        if decoder.moe is not None and wanted.decoder.moe is not None:
            changes = {field: getattr(wanted.decoder.moe, field) for field in MOE_FIELDS_OF_TRAINING}
            decoder = dataclasses.replace(decoder, moe=dataclasses.replace(decoder.moe, **changes))
        _check_same(init.model, dataclasses.replace(model.config, vision=vision, decoder=decoder), wanted)
        weights, model = model.state_dict(), empty_model(wanted, "cpu", torch.float32)
        model.load_state_dict(weights, assign=True)
        if config.data.chat_template:
            processor = Processor(processor.tokenizer, _template(config), wanted)
        return model, processor
    model = VLM(wanted)
    if init.vision:
        folder = find(init.vision)
        theirs = dataclasses.replace(read_siglip(folder), attention=wanted.vision.attention)
        _check_same(init.vision, theirs, wanted.vision, "vision.")
        load_vision(model, folder)
    if not init.decoder:
        tokenizer = train_tokenizer(texts, config.data.tokenizer_size, marker_tokens(wanted))
        return model, Processor(tokenizer, _template(config, "roles"), wanted)
    folder = find(init.decoder)
    theirs = read_decoder(read_json(folder / "config.json"), folder / "config.json")
    if theirs.vocab_size > wanted.decoder.vocab_size:
        raise ValueError(
            f"{init.decoder} has {theirs.vocab_size} tokens, more than decoder.vocab_size = {wanted.decoder.vocab_size}"
        )
    same = {field: getattr(wanted.decoder, field) for field in ("vocab_size", *BACKENDS)}
    _check_same(init.decoder, dataclasses.replace(theirs, **same), wanted.decoder, "decoder.")
    load_decoder(model, folder)
    tokenizer = extend_tokenizer(
        read_tokenizer(folder / "tokenizer.json"), marker_tokens(wanted), wanted.image_token_id
    )
    return model, Processor(tokenizer, _template(config, read_template(folder)), wanted)


@torch.no_grad()
def upcycle(dense: VLM, moe: MoEConfig, noise: float = 0.0) -> VLM:
    """Make every feed-forward layer of a trained model a mixture of copies of itself (arXiv 2212.05055).

    The router is random and the weights of a token's experts add up to 1, so that without noise the new model computes
    what the old one does; as each expert sees other tokens, they grow apart in training. `noise` is the standard
    deviation of what is added to the experts, relative to that of each matrix. Raises ValueError for a mixture that
    could not compute the same: experts of another width, shared experts, weights that do not add up to 1.
    """
    width = dense.config.decoder.intermediate_size
    for field, wanted in (
        ("intermediate_size", width),
        ("num_shared_experts", 0),
        ("norm_topk_prob", True),
        ("routed_scaling_factor", 1.0),
        ("capacity_factor", 0.0),
    ):
        if getattr(moe, field) != wanted:
            raise ValueError(
                f"a dense layer can become a mixture where decoder.moe.{field} = {wanted}, not {getattr(moe, field)}"
            )
    config = dataclasses.replace(dense.config, decoder=dataclasses.replace(dense.config.decoder, moe=moe))
    model = VLM(config).to(dense.decoder.embed_tokens.weight)
    old = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")):
            matrix = old[f"{name}.weight"]
            tensor.copy_(matrix + noise * matrix.std() * torch.randn_like(tensor))
        elif name in old:
            tensor.copy_(old[name])
    return model.train(dense.training)


def _template(config, otherwise=""):
    name = config.data.chat_template
    return pick(CHAT_TEMPLATES, name, "data.chat_template") if name else CHAT_TEMPLATES.get(otherwise, otherwise)


def _check_same(name, theirs, wanted, where=""):
    if changed := differences(theirs, wanted, f"model.{where}"):
        raise ValueError(f"the run cannot start from {name}, which differs from the config: {'; '.join(changed)}")
