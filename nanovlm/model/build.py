"""VLMConfig -> a model that has its shape but no weights yet: on the meta device, or in memory for files to fill."""

import torch

from nanovlm.config import VLMConfig
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM


def meta_model(config: VLMConfig) -> VLM:
    """Make a model without memory, on the meta device, in few bits where the config says so."""
    with torch.device("meta"):
        model = VLM(config)
        if config.quantization is not None:
            quantize(model, config.quantization, search=False)
    return model


def empty_model(config: VLMConfig, device: str | torch.device, dtype: torch.dtype) -> VLM:
    """Make a model whose weights are memory that nothing was written to yet, in few bits where the config says so."""
    return meta_model(config).to(dtype).to_empty(device=device)
