"""TrainConfig -> the model that a run trains, with adapters where the config has them; and what the run leaves behind.

```
take_adapter    the config's adapter is that of init.adapter, if it names one
build           on the meta device: model -> quantised (adapter.base) -> adapted; then it is sharded
base_places     where the base's weights go; those of adapter.base are rounded as they come, one at a time
draw_adapter    the first values of the adapters, from those of the base
save, load      run_dir/adapter in PEFT's layout; run_dir/model, merged, or a quantised base, which needs its adapter
```
"""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanovlm import distributed
from nanovlm.config import AdapterConfig, QuantizationConfig, TrainConfig
from nanovlm.errors import UserError
from nanovlm.hub.adapters import attach, open_adapter, save_adapter
from nanovlm.hub.dual import load_dual, save_dual
from nanovlm.hub.model_folder import load_folder, save_model
from nanovlm.model.adapted import AdaptedMoE, Adapter, widen
from nanovlm.model.adapters import (
    DEFAULT,
    adapt,
    adapted_layers,
    find_adapters,
    is_adapter,
    learns,
    merged_tensors,
)
from nanovlm.model.build import meta_dual, meta_model
from nanovlm.model.dual import Dual
from nanovlm.model.quantized import TENSORS, QuantizedLinear, quantize, quantize_weight
from nanovlm.model.quantized_experts import QuantizedStack
from nanovlm.model.vlm import VLM
from nanovlm.sharded import Places, places, writable
from nanovlm.train.resume import read_config, steps_taken

# What the files of an adapter say about it, and a run that goes on from it cannot change.
FIXED = ("rank", "alpha", "use_rslora", "use_dora", "target")


def take_adapter(config: TrainConfig) -> TrainConfig:
    """Return the config with what the files of its init.adapter say in its adapter.

    What learned beside that adapter is part of it, and learns on. A run that took steps is asked instead of the files,
    which may be gone by now.
    """
    if not config.init.adapter:
        return config
    run_dir = Path(config.run_dir)
    saved = read_config(run_dir) if (run_dir / "config.json").is_file() and steps_taken(run_dir) else None
    if saved and saved.init.adapter == config.init.adapter:
        theirs = saved.adapter
    else:
        theirs = open_adapter(config.init.adapter, meta_model(config.model)).config
    for field in FIXED:
        ours, own = getattr(config.adapter, field), getattr(theirs, field)
        if ours not in (getattr(AdapterConfig, field), own):
            raise UserError(
                f"adapter.{field} = {ours!r} cannot change the {own!r} of {config.init.adapter}: leave it out"
            )
    adapter = dataclasses.replace(config.adapter, **{field: getattr(theirs, field) for field in FIXED})
    adapter = dataclasses.replace(adapter, train=tuple(dict.fromkeys(adapter.train + theirs.train)))
    return dataclasses.replace(config, adapter=adapter)


def build(config: TrainConfig) -> Any:
    """Make the model of a run on the meta device. Raises UserError for an adapter that does not fit it."""
    if config.dual is not None:
        return meta_dual(config.dual)
    model, adapter = meta_model(config.model), config.adapter
    if adapter.base:
        quantize(model, QuantizationConfig(adapter.base, experts=adapter.base_experts), search=False)
    if adapter.rank:
        adapt(model, adapter).adapters.base = config.init.model
        check_learning(model, config)
    if config.parallel.expert_ranks > 1 and any(isinstance(layer, QuantizedStack) for layer in model.modules()):
        raise UserError(
            f"parallel.expert_ranks = {config.parallel.expert_ranks} must be 1 where experts are quantised: "
            "leave adapter.base_experts out"
        )
    if config.parallel.expert_ranks > 1 and any(isinstance(layer, AdaptedMoE) for _, layer in adapted_layers(model)):
        raise UserError(
            f"parallel.expert_ranks = {config.parallel.expert_ranks} must be 1 where experts have adapters: "
            "adapter.target can leave them out"
        )
    return model


def check_learning(model: VLM, config: TrainConfig):
    """Raise UserError where `train` names what cannot learn, or nothing."""
    patterns, names = config.adapter.train, [name for name, _ in model.named_parameters()]
    quantized = [f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    quantized += [path for path, layer in model.named_modules() if isinstance(layer, QuantizedStack)]
    targets = {id(getattr(layer, key, None)) for layer, key, _ in find_adapters(model, DEFAULT)}
    adapted = [name for name, parameter in model.named_parameters() if id(parameter) in targets]
    for pattern in patterns:
        for what, found in (("codes, which do not learn", quantized), ("an adapter", adapted)):
            if name := next((name for name in found if re.search(pattern, name)), None):
                raise UserError(f"adapter.train has a pattern {pattern!r} that names {name}, which has {what}")
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"adapter.train has a pattern {pattern!r} that holds for no parameter")


def check_drawn(config: TrainConfig, filled: Collection[str]):
    """Raise UserError where what begins with random values would keep them.

    `filled` are the parts beside the decoder that have their weights from files, such as vision and vision.second.
    """
    for name, _ in meta_model(config.model).named_parameters():
        part = "vision.second" if name.startswith("vision.second.") else name.split(".")[0]
        is_drawn = part in ("projector", "fusion", "vision", "vision.second") and part not in filled
        if is_drawn and not learns(name, config.adapter):
            raise UserError(f"{name} begins with random values and would keep them: add ^{part} to adapter.train")


# --- first values ---------------------------------------------------------------------------------------------


class Rounded:
    """A place (sharded.py) for a whole weight matrix, which is quantised as it is copied, to the nearest codes.

    Adapters learn around the rounding; nf4 has the codes of bitsandbytes. Of stacked experts it is a place for all
    matrices, and each row, those of one expert, is one for a matrix.
    """

    def __init__(self, layer: QuantizedLinear | QuantizedStack, expert: int | None = None):
        self.layer, self.expert, self.dtype = layer, expert, torch.float32
        self.shape = torch.Size(layer.shape if expert is None else layer.shape[1:])
        self.ndim, self.is_meta = len(self.shape), layer.scales.is_meta

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> "Rounded":
        if expert >= len(self):
            raise IndexError(expert)
        return Rounded(self.layer, expert)

    def is_floating_point(self) -> bool:
        return True

    def copy_(self, whole: Tensor):
        if self.ndim == 3:
            for expert, matrix in zip(range(len(self)), whole, strict=True):
                self[expert].copy_(matrix)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # means depend on the threads, and a run on more ranks must have the same codes
        weight = quantize_weight(whole.to(self.layer.scales.device), self.layer.format, self.layer.group, search=False)
        torch.set_num_threads(threads)
        for name in TENSORS:
            if (tensor := getattr(self.layer, name)) is not None:
                (tensor if self.expert is None else tensor[self.expert]).copy_(getattr(weight, name))


def base_places(model: VLM, config: AdapterConfig) -> Places:
    """Return where the weights of a model as it is stored go: all its tensors but those of adapters."""
    found = {name: place for name, place in places(model).items() if not is_adapter(name)}
    if config.base:
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear | QuantizedStack):
                for name in TENSORS:
                    found.pop(f"{path}.{name}", None)
                weight = f"{path}.weight" if isinstance(layer, QuantizedLinear) else path
                found[weight] = Rounded(layer)  # pyright: ignore[reportArgumentType]
    return found


@torch.no_grad()
def draw_adapter(model: VLM, name: str = DEFAULT):
    """Fill an adapter with its first values; the base has its own already. pissa takes them out of the base.

    Every rank goes through the same whole tensors and keeps its rows, so the values depend on the seed alone. Without
    adapters nothing is drawn.
    """
    if model.adapters is None:
        return
    config = model.adapters.configs[name]
    for layer, weight_name, adapter in find_adapters(model, name):
        shape = (*adapter.lora_B.shape[:-1], adapter.lora_A.shape[-1])
        fresh = Adapter(shape, config, adapter.lora_A.dtype, "cpu")
        is_needed = config.use_dora or config.init == "pissa"
        base = whole_base(layer, weight_name).to("cpu") if is_needed else torch.empty(0)
        rest = INITS[config.init](fresh, base).to(base.dtype)
        if rest is not base:
            writable(getattr(layer, weight_name)).copy_(rest)
        if fresh.magnitude is not None:
            fresh.magnitude.copy_(fresh.norms(rest))
        for place, values in zip(adapter.parameters(), fresh.parameters(), strict=True):
            writable(place).copy_(values)


def part_ranks(config: TrainConfig):
    """Let dropout have other masks on each rank from now on; without it nothing changes."""
    if config.adapter.dropout and distributed.rank():
        torch.manual_seed((config.seed + 0x9E3779B1 * distributed.rank()) % 2**63)  # a CPU's generator reads 32 bits


def whole_base(layer: torch.nn.Module, name: str) -> Tensor:
    """Return a layer's own weight, dequantised, of all ranks."""
    weight = layer if isinstance(layer, QuantizedLinear) else getattr(layer, name)
    weight = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# Each fills the A [(E,) r, in] and B [(E,) out, r] of an adapter and returns the base that it then is added to.


def draw_kaiming(adapter: Adapter, base: Tensor) -> Tensor:
    """PEFT's default: A uniform up to 1 / sqrt(in), B zero."""
    bound = adapter.lora_A.shape[-1] ** -0.5
    adapter.lora_A.uniform_(-bound, bound)
    adapter.lora_B.zero_()
    return base


def draw_gaussian(adapter: Adapter, base: Tensor) -> Tensor:
    """PEFT's gaussian: A normal with standard deviation 1 / r, B zero."""
    adapter.lora_A.normal_(std=1 / adapter.lora_A.shape[-2])
    adapter.lora_B.zero_()
    return base


def draw_orthogonal(adapter: Adapter, base: Tensor) -> Tensor:
    """PEFT's orthogonal: A and B small, not zero, and B A zero on average, as they use other rows of one rotation."""
    *experts, rank, num_inputs = adapter.lora_A.shape
    rotation = torch.linalg.qr(torch.randn(*experts, rank, rank)).Q
    adapter.lora_A.copy_((torch.randn(*experts, num_inputs, rank // 2) @ rotation[..., 0::2, :]).mT / 10)
    adapter.lora_B.copy_(torch.randn(*experts, rank // 2, adapter.lora_B.shape[-2]).mT @ rotation[..., 1::2, :] / 10)
    return base


def draw_pissa(adapter: Adapter, base: Tensor) -> Tensor:
    """The r largest singular values, which the base loses (Meng et al. 2024, arXiv 2404.02948)."""
    rank = adapter.lora_A.shape[-2]
    u, values, v = torch.linalg.svd(base.float(), full_matrices=False)
    root = (values[..., :rank] / adapter.scale).sqrt()
    adapter.lora_A.copy_(root[..., None] * v[..., :rank, :])
    adapter.lora_B.copy_(u[..., :rank] * root[..., None, :])
    return base - adapter.scale * (adapter.lora_B @ adapter.lora_A)


INITS = {"kaiming": draw_kaiming, "gaussian": draw_gaussian, "orthogonal": draw_orthogonal, "pissa": draw_pissa}


# --- what a run leaves behind ----------------------------------------------------------------------------------


def save(run_dir: Path, suffix: str, model: VLM | Dual, processor, tensors: dict[str, Tensor]):
    """Write run_dir/model and run_dir/adapter, both names with a suffix, from the tensors of all ranks.

    The model is merged, or, as a quantised one would be rounded again, the base, which needs its adapter. pissa's
    adapter does not fit the model that the run started from, and is not written.
    """
    if isinstance(model, Dual):
        return save_dual(run_dir / f"model{suffix}", model, processor, tensors)
    if model.adapters is None:
        return save_model(run_dir / f"model{suffix}", model, processor, tensors)
    config = model.adapters.configs[DEFAULT]
    tensors = {name: widen(x) if x.dtype == torch.bfloat16 else x for name, x in tensors.items()}  # as all runs do
    if config.base:  # not the model that the run rounded
        model.adapters.base = str((run_dir / f"model{suffix}").resolve())
    if config.init != "pissa":
        save_adapter(run_dir / f"adapter{suffix}", model, DEFAULT, tensors)
    if model.config.quantization is None:
        tensors = merged_tensors(model, tensors)
    base = {name: x for name, x in tensors.items() if not is_adapter(name)}
    save_model(run_dir / f"model{suffix}", model, processor, base)


def load(run_dir: Path, config: TrainConfig, device: torch.device) -> tuple[Any, Any]:
    """Read the model and the processor that `save` wrote, in evaluation mode."""
    if config.dual is not None:
        return load_dual(run_dir / "model", device)
    model, processor = load_folder(run_dir / "model", device)
    if config.adapter.rank and model.config.quantization is not None:
        attach(model, run_dir / "adapter")
    return model.eval(), processor
