"""A decode step -> one compiled graph: all blocks of a decoder, by torch.compile.

For one token the operators of a layer take about as long to call as to run. A compiler makes one loop of a norm, of a
rotation and of an activation, and calls these and the products from one program. The attention over the cache, whose
plan is another one in each pass, stays an operator that the graph calls by its name:

```
decoder(x, rope, cache) --> run --> graph: norm, q k v, rotate --> nanovlm::attend_cache --> o, norm, gate up, ...
                             |                                          ^
                             +------ the cache of this pass (PASS) -----+
```

`inference.prepare(model, compiles=True)` compiles once for one row and once for 2 to MOST_ROWS of them, each with one
new token; everything else runs as it is written, and so does a decoder of which a layer was replaced, moved, cast or
loaded since. Sums are rounded in another order, and bf16 is rounded less often. Mixtures of experts are not compiled.
"""

import types
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.errors import UserError
from nanovlm.model.kv_cache import CachePass, cache_dtype

Decoder = Any  # that of decoder.py, which imports this file
# For more rows products take most of the time, and quantised weights are written out (packed.py).
MOST_ROWS = 16
PASS: ContextVar[CachePass | None] = ContextVar("PASS", default=None)


class CompiledSteps(nn.Module):
    """The steps of a decoder. It has no parameters, and is a module to hear that the decoder is moved or loaded."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        children = [(m._modules, name, child) for m in decoder.modules() for name, child in m.named_children()]
        self.parts: list[tuple] | None = [part for part in children if not isinstance(part[2], CompiledSteps)]
        # torch finds graphs by the code object of a function: each decoder has one of its own. What torch would ask
        # about every layer before each step, a millisecond of 9, `takes` asks.
        own = types.FunctionType(run_blocks.__code__.replace(), run_blocks.__globals__)
        options = dict(size_asserts=False, guard_filter_fn=lambda guards: ["decoder" not in g.name for g in guards])
        self.steps = torch.compile(own, fullgraph=True, options=options)  # pyright: ignore

    def is_current(self) -> bool:
        """Whether the decoder still is the one that was compiled."""
        return self.parts is not None and all(children.get(name) is child for children, name, child in self.parts)

    def takes(self, cache: CachePass, num_rows: int) -> bool:
        """Whether this is the pass of so many rows to run compiled."""
        return cache.num_new == 1 and num_rows <= MOST_ROWS and self.is_current()

    def forward(self, decoder: Decoder, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: CachePass) -> Tensor:
        """Embeddings [1, T, D] of the one new token of each row -> normed hidden states [1, T, D]."""
        token = PASS.set(cache)
        try:
            return self.steps(decoder, x_BTD, rope)
        finally:
            PASS.reset(token)

    def _apply(self, fn, recurse=True):
        self.parts = None
        return self

    def _load_from_state_dict(self, *args):
        self.parts = None

    def __deepcopy__(self, memo):
        return None


def run_blocks(decoder: Decoder, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    hidden, _routings = decoder.run_blocks(x_BTD, rope, None, Through, None)
    return hidden


class Through:
    """Stands for the cache of the pass while a graph is made."""

    @staticmethod
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = cache_dtype(v.device, v.dtype)
        out = torch.ops.nanovlm.attend_cache(layer, q[0].to(dtype), k[0].to(dtype), v[0].to(dtype))
        return out[None].to(v.dtype)


LIBRARY = torch.library.Library("nanovlm", "FRAGMENT")
LIBRARY.define("attend_cache(int layer, Tensor q, Tensor k, Tensor v) -> Tensor")


@torch.library.impl(LIBRARY, "attend_cache", "CompositeExplicitAutograd")
def attend_cache(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CachePass.attend_rows of the current pass; zeros without one, as the steps are compiled."""
    cache = PASS.get()
    return torch.zeros_like(q) if cache is None else cache.attend_rows(layer, q, k, v).contiguous()


@torch.library.register_fake("nanovlm::attend_cache", lib=LIBRARY)
def fake_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.inference_mode()
def compile_steps(decoder: Decoder) -> CompiledSteps:
    """Compile for one row and for several.

    Raises UserError for a mixture of experts, where there is no compiler, and on a CPU without AVX2, for which torch
    2.13 writes C++ that no compiler takes.
    """
    if decoder.compiled is not None and decoder.compiled.is_current():
        return decoder.compiled
    from torch._inductor.exc import InductorError, InvalidCxxCompiler  # a second to import

    if decoder.config.moe is not None:
        raise UserError("a mixture of experts cannot be compiled for inference: leave --compile out")
    if decoder.config.attention_softcap or decoder.config.attention_sinks:
        raise UserError("attention with sinks or a softcap cannot be compiled for inference: leave --compile out")
    steps, weight = CompiledSteps(decoder), decoder.embed_tokens.weight
    if weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise UserError("torch cannot compile for a CPU without AVX2: leave --compile out")
    for num_rows in (1, 2):
        x_BTD = torch.zeros(1, num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        num_tables = 2 if decoder.config.window_rope_theta else 1
        shape = (1, num_rows, num_tables, decoder.config.head_dim)
        cos, sin = (torch.zeros(shape, device=weight.device) for _ in range(2))
        if num_rows > 1:
            for tensor in (x_BTD, cos, sin):
                torch._dynamo.mark_dynamic(tensor, 1, min=2, max=MOST_ROWS)
        try:
            steps.steps(decoder, x_BTD, (cos, sin))
        except InductorError as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler):
                raise
            raise UserError("--compile needs a C++ compiler: install g++, or leave it out") from error
    return steps
