"""TrainConfig -> the model and processor that a new run starts with: from nothing, from parts, or from a whole model.

```
nothing            random weights, a tokenizer made from the data
init.vision        the image encoder's weights                                   the projector is always random
init.decoder       the decoder's weights and tokenizer, both made larger by the tokens of images
init.model         everything of another model, such as the one of an earlier stage
```
"""

import dataclasses
from collections.abc import Iterable

import torch

from nanovlm import hf
from nanovlm.checkpoint import read_json
from nanovlm.config import TrainConfig, differences, pick
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.tokenizer import CHAT_TEMPLATES, extend_tokenizer, read_tokenizer, train_tokenizer
from nanovlm.model.vlm import VLM


def start(config: TrainConfig, texts: Iterable[str]) -> tuple[VLM, Processor]:
    """Return a model with fp32 weights, and its processor; `texts` are for a new tokenizer.

    Raises ValueError that names the fields in which the config and what the run starts from differ.
    """
    init, wanted = config.init, config.model
    if init.model:
        model, processor = hf.load(init.model, dtype=torch.float32)
        decoder = dataclasses.replace(model.config.decoder, attention=wanted.decoder.attention)
        _check_same(init.model, dataclasses.replace(model.config, decoder=decoder), wanted)
        if config.data.chat_template:
            processor = Processor(processor.tokenizer, _template(config), wanted)
        return model, processor
    model = VLM(wanted)
    if init.vision:
        folder = hf.find(init.vision)
        _check_same(init.vision, hf.read_siglip(folder), wanted.vision, "vision.")
        hf.load_vision(model, folder)
    if not init.decoder:
        tokenizer = train_tokenizer(texts, config.data.tokenizer_size, marker_tokens(wanted))
        return model, Processor(tokenizer, _template(config, "roles"), wanted)
    folder = hf.find(init.decoder)
    theirs = hf.read_decoder(read_json(folder / "config.json"), folder / "config.json")
    if theirs.vocab_size > wanted.decoder.vocab_size:
        raise ValueError(
            f"{init.decoder} has {theirs.vocab_size} tokens, more than decoder.vocab_size = {wanted.decoder.vocab_size}"
        )
    same = {field: getattr(wanted.decoder, field) for field in ("vocab_size", "attention")}
    _check_same(init.decoder, dataclasses.replace(theirs, **same), wanted.decoder, "decoder.")
    hf.load_decoder(model, folder)
    tokenizer = extend_tokenizer(
        read_tokenizer(folder / "tokenizer.json"), marker_tokens(wanted), wanted.image_token_id
    )
    return model, Processor(tokenizer, _template(config, hf.read_template(folder)), wanted)


def _template(config, otherwise=""):
    name = config.data.chat_template
    return pick(CHAT_TEMPLATES, name, "data.chat_template") if name else CHAT_TEMPLATES.get(otherwise, otherwise)


def _check_same(name, theirs, wanted, where=""):
    if changed := differences(theirs, wanted, f"model.{where}"):
        raise ValueError(f"the run cannot start from {name}, which differs from the config: {'; '.join(changed)}")
