"""How the model is distributed over ranks, and trade-offs between memory and speed.

Every rank takes its share of the micro-batches of a step (`ParallelConfig`):

```
ddp                  every rank has all weights; gradients are averaged during the backward pass
fsdp                 every rank has a shard of each weight; a block is gathered when it is needed
fsdp, shard_ranks    shards within groups of this many ranks (such as one machine), copies between groups
expert_ranks         on top of these: a rank has some of the experts, and tokens are sent to them and back
```
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanovlm import distributed
from nanovlm.config import ParallelConfig
from nanovlm.data.types import Batch
from nanovlm.distributed import num_ranks, rank
from nanovlm.errors import UserError
from nanovlm.model.decoder import Decoder
from nanovlm.model.dual import Dual, TextTower
from nanovlm.model.moe import MoE
from nanovlm.model.vision import VisionBlock, VisionEncoder
from nanovlm.model.vlm import VLM


def parallelize(
    model: VLM | Dual,
    config: ParallelConfig,
    device: torch.device,
    precision: str,
    fill: Callable[[Any], None] | None = None,
) -> Any:
    """Distribute a model over the ranks, in place; return the module that training calls instead of it.

    A model on the meta device is sharded, then given memory, which `fill` writes to; without `fill` the caller loads a
    checkpoint. Any other model must have the same weights on all ranks.
    Raises UserError if the ranks cannot be divided as the config says.
    """
    if num_ranks() % config.expert_ranks:
        raise UserError(f"ranks = {num_ranks()} cannot form groups of parallel.expert_ranks = {config.expert_ranks}")
    shard_ranks = config.shard_ranks or num_ranks()
    if num_ranks() % shard_ranks:
        raise UserError(f"ranks = {num_ranks()} cannot form groups of parallel.shard_ranks = {shard_ranks}")
    parts = [module for module in model.modules() if isinstance(module, VisionEncoder | TextTower | Decoder)]
    if isinstance(model, VLM) and model.config.vision is not None:
        parts.append(model.fusion)
    blocks = [block for part in parts for block in part.layers]
    experts = share_experts(model, config.expert_ranks, device) if config.expert_ranks > 1 else set()
    is_native = isinstance(model, VLM) and model.config.is_native
    for block in blocks:
        if config.checkpointing != "none":
            block.forward = recompute(block.forward, config.checkpointing)
        if config.compile and not (is_native and isinstance(block, VisionBlock)):
            block.compile()  # but not for native pictures: every mixture of their sizes would be compiled anew
    # Ranks that exchange gradients must use the same parameters, and with a frozen decoder a batch without images would
    # have nothing to differentiate.
    if isinstance(model, VLM):  # a dual model always does
        model.always_sees = num_ranks() > 1 or not any(p.requires_grad for p in model.decoder.parameters())
    if precision == "bf16" and model.adapters is not None:
        narrow(model)
    is_sharded = num_ranks() > 1 and config.strategy == "fsdp"
    if is_sharded:
        shard(model, blocks, experts, shard_ranks, config.reshard_after_forward, device, precision)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        if fill is not None:
            fill(model)
    if num_ranks() == 1 or is_sharded:
        return model
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    replica = Replica(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    order_buckets(replica, precision)
    # The DDP optimizer splits compiled graphs at bucket ends; torch 2.11 cannot split graphs with checkpointing.
    torch._dynamo.config.optimize_ddp = False
    return replica  # pyright: ignore[reportReturnType]


def narrow(model: VLM | Dual):
    """Hold frozen matrices in bf16, as a bf16 run multiplies them: autocast keeps only casts of what learns.

    Embeddings, with which the residual stream begins, vectors, and what is computed in fp32 stay as they are.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | MoE) and not path.endswith(("router", "score")):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1 and not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def shard(
    model: VLM | Dual,
    blocks: list[nn.Module],
    experts: set[nn.Parameter],
    shard_ranks: int,
    reshard_after_forward: bool,
    device: torch.device,
    precision: str,
):
    """Shard every weight except `experts` over the ranks; a block is gathered when it is needed.

    DoRA's magnitudes, which a gathered copy in bf16 would round, stay whole on every rank (`finish_gradients`).
    """
    if model.adapters is not None:
        model.adapters.is_by_token = False
    shape, names = (num_ranks() // shard_ranks, shard_ranks), ("replicas", "shards")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if precision == "bf16" else None
    part = functools.partial(
        fully_shard,
        mesh=mesh if shape[0] > 1 else mesh["shards"],
        reshard_after_forward=reshard_after_forward,
        # Autocast casts inputs as needed; FSDP would also round the cosines and sines of RoPE.
        mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        ignored_params=experts | set(find_magnitudes(model)),
    )
    for block in blocks:
        part(block)
    # The rest is gathered once a step, as the head is used after the forward pass; embeddings need not be freed sooner.
    part(model, reshard_after_forward=False)


class Replica(DistributedDataParallel):
    """DDP that passes attribute access on to its model, so that an objective can use either."""

    module: VLM | Dual

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def order_buckets(replica: Replica, precision: str):
    """Run the model once, after which DDP puts its buckets into their final order.

    Sums over more than two ranks depend on that order, and a resumed run must sum as an uninterrupted one does.
    """
    model, device = replica.module, next(replica.parameters()).device
    length = model.config.text.max_position_embeddings if isinstance(model, Dual) else 2
    zeros = torch.zeros(1, length, dtype=torch.int64, device=device)
    size = model.config.tile_size
    tiles = torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.compiler.set_stance("force_eager"), autocast:
        outputs = replica(Batch(zeros, zeros, zeros.int(), zeros.int(), zeros, tiles, zeros[0, :0].int()))
        if isinstance(model, Dual):
            outside = [model.logit_scale] + ([] if model.logit_bias is None else [model.logit_bias])
        else:
            outputs = [outputs]
            outside = [model.decoder.head_weight] + ([model.score.weight] if model.config.has_score_head else [])
        (outputs[0].sum() + sum(x.sum() for x in (*outputs[1:], *outside))).backward()
    replica.zero_grad()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, is_last: bool):
    """Let ranks exchange gradients only in the last backward pass of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    with model.no_sync() if isinstance(model, Replica) and not is_last else contextlib.nullcontext():
        yield


def recompute(forward: Callable, which: str) -> Callable:
    """Keep less for the backward pass: only the input (full), or the results of matrix products (selective).

    The rest is recomputed (Chen et al. 2016, arXiv 1604.06174).
    """

    def policy(_context, op, *args, **kwargs):
        is_kept = op in KEPT or op.namespace == "nanovlm"  # our kernels
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    options: dict = {"context_fn": contexts} if which == "selective" else {}

    def run(*inputs):  # torch.compile traces a function of ours, but not `checkpoint` itself
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Gather the model's tensors in the first rank's CPU memory; the other ranks get an empty dict."""
    whole = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            whole[name] = tensor.cpu()
    return whole


def describe(config: ParallelConfig) -> str:
    """Describe the number of ranks and how the model is distributed over them."""
    if num_ranks() == 1:
        return "one rank"
    experts = f", experts on groups of {config.expert_ranks}" if config.expert_ranks > 1 else ""
    return f"{num_ranks()} ranks, {config.strategy}{experts}"


# --- experts -------------------------------------------------------------------------------------------------


class SharedExperts:
    """A backend of moe.py that sends each token to the ranks of its experts and its results back (all-to-all, twice).

    `mesh` has the dimensions "replicas" and "experts"; the ranks along the second have E / ranks experts each.
    """

    def __init__(self, run_experts: Callable, mesh: DeviceMesh):
        self.run_experts, self.replicas = run_experts, mesh["replicas"].get_group()
        self.group, self.num_ranks = mesh["experts"].get_group(), mesh["experts"].size()

    def __call__(self, x: Tensor, choice: Tensor, weights: Tensor, gate: DTensor, up: DTensor, down: DTensor) -> Tensor:
        experts = [part.to_local() for part in (gate, up, down)]
        k, num_experts = choice.shape[1], len(experts[0])
        order = choice.flatten().argsort(stable=True)  # by expert, and so by rank
        sent = choice.flatten()[order]
        num_sent = (sent // num_experts).bincount(minlength=self.num_ranks)
        num_received = torch.empty_like(num_sent)
        dist.all_to_all_single(num_received, num_sent, group=self.group)
        sizes = num_received.tolist(), num_sent.tolist()  # the host needs them: the only wait for the device
        received = sent.new_empty(sum(sizes[0]))
        dist.all_to_all_single(received, sent, *sizes, group=self.group)
        rows = all_to_all_single_autograd(x.repeat_interleave(k, dim=0)[order], *sizes, self.group)
        out = self.run_experts(rows, (received % num_experts)[:, None], rows.new_ones(len(rows), 1), *experts)
        out = all_to_all_single_autograd(out, sizes[1], sizes[0], self.group)
        return (weights[..., None] * out[order.argsort()].unflatten(0, (-1, k))).sum(1)


def share_experts(model: VLM | Dual, expert_ranks: int, device: torch.device) -> set[nn.Parameter]:
    """Divide each mixture's experts over the ranks and send tokens to them; return the experts' parameters."""
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    if not mixtures:
        raise UserError(f"parallel.expert_ranks = {expert_ranks} needs a mixture of experts, but decoder.moe = None")
    if (num_experts := mixtures[0].config.num_experts) % expert_ranks:
        raise UserError(
            f"decoder.moe.num_experts = {num_experts} cannot be divided by parallel.expert_ranks = {expert_ranks}"
        )
    if mixtures[0].config.has_bias:
        raise UserError(f"parallel.expert_ranks = {expert_ranks} must be 1 for decoder.moe.has_bias = True")
    shape = (num_ranks() // expert_ranks, expert_ranks)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "experts"))
    experts = set()
    for module in mixtures:
        for name in ("gate_proj", "up_proj", "down_proj"):
            whole = getattr(module, name)
            part = distribute_tensor(whole.detach(), mesh["experts"], [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
            experts.add(getattr(module, name))
        module.run_experts = SharedExperts(module.run_experts, mesh)
    return experts


def find_magnitudes(model: nn.Module) -> list[nn.Parameter]:
    """Return DoRA's magnitudes."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".magnitude")]


# --- gradients -----------------------------------------------------------------------------------------------


@torch.no_grad()
def finish_gradients(model: VLM | Dual, beside: list[nn.Parameter]):
    """Average gradients of divided experts over all ranks; each holds the sum over the ranks of its group.

    So are those of parameters `beside` the model, which all ranks have and each has used.
    """
    if isinstance(model, FSDPModule):
        beside = beside + [magnitude for magnitude in find_magnitudes(model) if magnitude.requires_grad]
    grads = [parameter.grad for parameter in beside if parameter.grad is not None]
    assert len(grads) == len(beside)
    if grads and num_ranks() > 1:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / num_ranks()).split([len(grad.flatten()) for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.run_experts, SharedExperts):
            for parameter in (module.gate_proj, module.up_proj, module.down_proj):
                if isinstance(parameter.grad, DTensor):
                    grad = parameter.grad.to_local()
                    dist.all_reduce(grad, group=module.run_experts.replicas)
                    grad /= num_ranks()


def clear_unused(model: VLM | Dual, num_tiles: int):
    """Clear the gradients of encoder, projector and fusion in a step without images.

    And those of a head that no reward comes from. Every rank runs them, so they may have zero gradients, with which
    weight decay and momentum would move them. `num_tiles` is this rank's.
    """
    if isinstance(model, Dual):  # a step without pictures has no pairs
        return
    if model.config.vision is not None and not distributed.add_up({"tiles": num_tiles})["tiles"]:
        model.vision.zero_grad()
        model.projector.zero_grad()
        model.fusion.zero_grad()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of `max_norm`; return the norm before, fp32 scalar."""
    by_mesh = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    if not by_mesh:
        return torch.zeros((), device=parameters[0].device)
    norms = []
    for group in by_mesh.values():
        norm = nn.utils.get_total_norm([parameter.grad for parameter in group])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
