"""A model -> three ONNX graphs in the layout of transformers.js, which onnxruntime and browsers run.

```
pixel_values, pixel_attention_mask --> vision_encoder --> image_features           encoder and projector
input_ids                          --> embed_tokens   --> inputs_embeds, in which features take the placeholders' rows
inputs_embeds, attention_mask, position_ids, past_key_values --> decoder_model_merged --> logits, present
```

A language model is one graph, `model`, from input_ids to logits. torch.export follows our own modules, so that a graph
has every encoder, projector and mixture that the model has; its config.json says what a program asks beside it. Each
graph is written as fp32, q8 and q4 (FORMATS): few bits are the codes and scales of quantized.py, read by onnxruntime's
MatMulNBits.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanovlm.config import VLMConfig
from nanovlm.errors import UserError
from nanovlm.files import flush
from nanovlm.hub.card import count_weights
from nanovlm.hub.onnx_parts import DecoderPart, EmbedPart, TextPart, VisionPart, use_few_bits
from nanovlm.model.vlm import VLM

OPSET = 23  # the first with attention and RMSNorm; tests run it in onnxruntime 1.32
# protobuf has no larger files; weights of a larger graph are in a file beside it.
LARGEST_FILE = 1_900_000_000


# ---- files ----


def check_onnx(config: VLMConfig):
    """Raise UserError that names what no graph has."""
    d, q = config.decoder, config.quantization
    problems = {
        f"decoder.prefix_attention = {d.prefix_attention!r}": (
            d.prefix_attention != "causal",
            "every token sees those before it",
        ),
        f"fusion.type = {config.fusion.type!r}": (
            config.vision is not None and config.fusion.type != "sequence",
            "image tokens are in the sequence (fusion.type = sequence)",
        ),
        "has_score_head = True": (config.has_score_head, "a model ends in logits"),
        "decoder.moe.has_bias = True": (d.moe is not None and d.moe.has_bias, "experts have no biases"),
    }
    if q is not None:
        problems[f"quantization.format = {q.format!r}"] = q.format not in ("int8", "int4"), "few bits are int8 or int4"
        problems[f"quantization.activations = {q.activations!r}"] = (
            q.activations != "none",
            "what a layer reads is not rounded",
        )
    for field, (is_there, right) in problems.items():
        if is_there:
            raise UserError(f"{field} cannot be exported to ONNX: in the graphs that are written {right}")


def make_onnx_config(config: VLMConfig, beside: dict[str, int]) -> dict:
    """Return the config.json: what programs that run the graphs ask, as the graphs themselves have the architecture.

    They take the decoder for a Llama, of which they ask the shape of the cache. `beside` is from write_graphs.
    """
    d = config.decoder
    tokens = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{field: getattr(d, field) for field in (*fields.split(), "max_position_embeddings")},
        **tokens,
    }
    own = {"transformers.js_config": {"use_external_data_format": beside}} if beside else {}
    if config.vision is None:
        return text | own
    return own | {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": config.image_token_id,
        "vision_config": {
            "model_type": "idefics3_vision",
            "image_size": config.vision.image_size,
            "patch_size": config.vision.patch_size,
        },
        "text_config": text,
        **tokens,
    }


def write_graphs(folder: Path, model: VLM, formats: Sequence[str], largest_file: int = LARGEST_FILE) -> dict[str, int]:
    """Write the graphs of an fp32 model; return the names of those whose weights are in a file of their own, and 1.

    Raises UserError without the packages that this needs.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401  torch.onnx.export imports it
    except ModuleNotFoundError as error:
        raise UserError(
            f"an export to ONNX needs the package {error.name}, which is not installed: pip install -e '.[onnx]'"
        ) from error
    beside = {}
    for suffix, name, graph in make_graphs(model, formats):
        file, size = f"{name}{suffix}.onnx", sum(x.const_value.nbytes for x in graph.graph.initializers.values())
        is_large = size > largest_file
        onnx_ir.save(graph, folder / file, external_data=f"{file}_data" if is_large else None)
        flush(folder / file)
        if is_large:
            flush(folder / f"{file}_data")
            beside[file] = 1
    return beside


def graph_card(name: str, model: VLM, formats: Sequence[str]) -> str:
    """Return the README.md of an export."""
    sees = model.config.vision is not None
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return f"""---
library_name: transformers.js
pipeline_tag: {"image-text-to-text" if sees else "text-generation"}
---

# {name}

{count_weights(model.config) / 1e6:.2f} M parameters as ONNX graphs in {", ".join(formats)}, written by nanovlm.

```js
import {{ {"AutoProcessor" if sees else "AutoTokenizer"}, {kind} }} from "@huggingface/transformers";
const model = await {kind}.from_pretrained("{name}", {{ dtype: "{formats[0]}" }});
```
"""


def make_graphs(model: VLM, formats: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the suffix of a format, the name of a graph, and the graph."""
    config = model.config
    for name in formats:
        format, suffix = FORMATS[name]
        copied = copy.deepcopy(model).eval()
        use_few_bits(copied, format)
        if config.vision is None:
            yield suffix, "model", trace_text(TextPart(copied.decoder, format), config)
        else:
            yield suffix, "vision_encoder", trace_vision(copied, config)
            yield suffix, "embed_tokens", trace_embed(EmbedPart(copied.decoder, format))
            yield suffix, "decoder_model_merged", trace_text(DecoderPart(copied.decoder, format), config)


# Names of sizes: transformers.js looks for batch_size, and begins with a cache of 0 tokens for any other name.
ROWS, TOKENS, PAST, SEEN = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def trace_vision(model: VLM, config: VLMConfig):
    assert config.vision is not None
    side = config.tile_size
    inputs = torch.zeros(2, 3, 3, side, side), torch.ones(2, 3, side, side, dtype=torch.bool)
    sizes = {0: ROWS, 1: "num_images"}
    names = ["pixel_values", "pixel_attention_mask"], ["image_features"]
    return trace(VisionPart(model), inputs, (sizes, sizes), *names)


def trace_embed(part: EmbedPart):
    return trace(
        part, (torch.zeros(2, 3, dtype=torch.long),), ({0: ROWS, 1: TOKENS},), ["input_ids"], ["inputs_embeds"]
    )


def trace_text(part: DecoderPart | TextPart, config: VLMConfig):
    d, B, T, P = config.decoder, 2, 3, 4
    first = torch.zeros(B, T, d.hidden_size) if isinstance(part, DecoderPart) else torch.zeros(B, T, dtype=torch.long)
    mask, positions = torch.ones(B, P + T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    past = [torch.zeros(B, d.num_key_value_heads, P, d.head_dim) for _ in range(2 * d.num_hidden_layers)]
    tokens = {0: ROWS, 1: TOKENS}
    sizes = tokens, {0: ROWS, 1: SEEN}, tokens, {}, tuple({0: ROWS, 2: PAST} for _ in past)
    layers = [f"{i}.{kind}" for i in range(d.num_hidden_layers) for kind in ("key", "value")]
    name = "inputs_embeds" if isinstance(part, DecoderPart) else "input_ids"
    return trace(
        part,
        (first, mask, positions, torch.tensor(1), *past),
        sizes,
        [name, "attention_mask", "position_ids", "num_logits_to_keep", *(f"past_key_values.{x}" for x in layers)],
        ["logits", *(f"present.{x}" for x in layers)],
    )


def trace(part: nn.Module, inputs: tuple, sizes: tuple, input_names: list[str], output_names: list[str]):
    """Return the graph of a part, without the notes on where in our files each node is from."""
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            part.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=sizes,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: sort_stable},
        )
    assert program is not None
    graph = program.model
    for noted in (graph, graph.graph, *graph.graph.all_nodes(), *graph.graph.initializers.values()):
        noted.metadata_props.clear()
    for node in graph.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    for value in graph.graph.inputs:
        value.metadata_props.clear()
    return graph


def sort_stable(x, stable=True, dim=-1, descending=False):
    """Translate torch's sort along the last dimension, which the exporter lacks; of equals TopK takes the first."""
    from onnxscript import opset23 as op

    assert dim == -1
    size = op.Shape(x, start=-1)
    return op.TopK(x, size, axis=-1, largest=int(descending), sorted=1)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def quiet():
    """Silence what the exporter says of packages that it does not need and of names that sizes share."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield
    logger.setLevel(level)


# Variant -> format of the decoder's weights, and what file names end with, as in transformers.js.
FORMATS = {"fp32": (None, ""), "q8": ("int8", "_quantized"), "q4": ("int4", "_q4")}
