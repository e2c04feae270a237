"""VLMConfig -> a model without weights: on the meta device, or with uninitialised memory for files to fill."""

import torch

from nanovlm.config import DualConfig, VLMConfig
from nanovlm.model.dual import Dual
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM


def meta_model(config: VLMConfig) -> VLM:
    """Make a model on the meta device, which takes no memory; quantised if the config says so."""
    with torch.device("meta"):
        model = VLM(config)
        if config.quantization is not None:
            quantize(model, config.quantization, search=False)
    return model


def empty_model(config: VLMConfig, device: str | torch.device, dtype: torch.dtype) -> VLM:
    """Make a model whose weights are uninitialised memory; quantised if the config says so."""
    return meta_model(config).to(dtype).to_empty(device=device)


def meta_dual(config: DualConfig) -> Dual:
    """Make a dual model on the meta device."""
    with torch.device("meta"):
        return Dual(config)
