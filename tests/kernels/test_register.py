"""What holds for every public function: an operator of torch, on the GPU of its tensors, which obeys autocast."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor

from nanovlm.kernels import attention as attention_file
from nanovlm.kernels import grouped_gemm
from nanovlm.kernels import quantized_experts as quantized_experts_file
from nanovlm.kernels.attention import attention, find_runs
from nanovlm.kernels.cache_attention import attend_blocks
from nanovlm.kernels.cross_entropy import linear_cross_entropy
from nanovlm.kernels.dequant_matmul import dequant_matmul, take_apart
from nanovlm.kernels.grouped_gemm import grouped_experts
from nanovlm.kernels.quantized_experts import quantized_experts
from nanovlm.kernels.quantized_weight import make_tables
from nanovlm.model.quantized import quantize_weight
from nanovlm.model.quantized_experts import QuantizedStack
from nanovlm.train.parallel import recompute
from tests.conftest import HAS_GPU


def draw(*shape, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def packed(q, k):
    """Two documents, and the same tensor as keys and values."""
    T = q.shape[1]
    doc_ids = (torch.arange(T, device=q.device, dtype=torch.int32) > 4)[None].int()
    return attention(q, k, k, find_runs(doc_ids, torch.zeros_like(doc_ids)))[0]


def experts(x, weights, gate, up, down):
    choice = torch.arange(2 * len(x), device=x.device).view(-1, 2) % len(gate)
    return grouped_experts(x, choice, weights, gate, up, down)


def stacks(device):
    draws = [[draw(N, K, seed=e).div(K**0.5) for e in range(3)] for N, K in ((40, 24), (40, 24), (24, 40))]
    weights = [[quantize_weight(matrix, "nf4", search=False) for matrix in matrices] for matrices in draws]
    return [QuantizedStack(matrices).to(device).whole() for matrices in weights]


def loss(hidden, weight, ignore_index=-100):
    labels = torch.arange(len(hidden), device=hidden.device)
    return linear_cross_entropy(hidden, weight, torch.where(labels == 2, -100, labels), ignore_index, chunk=4)


# Functions of tensors that may all have gradients, or of which weights `make` makes one; and shapes of the tensors.
CASES = {
    "attention, packed": (packed, [(1, 12, 2, 16), (1, 12, 1, 16)]),
    "attention, causal": (lambda q, k, v: attention(q, k, v, causal=True)[0], [(2, 5, 2, 16)] * 3),
    "cross-entropy": (loss, [(7, 12), (33, 12)]),
    "experts": (experts, [(9, 24), (9, 2), (3, 40, 24), (3, 40, 24), (3, 24, 40)]),
    "experts in nf4": ("experts", [(9, 24), (9, 2)]),
    **{f"{format}, {M} rows": (format, [(M, 70), (9,)]) for format, M in (("nf4", 1), ("int8", 3), ("int4", 257))},
}


def make(case, device="cpu"):
    function, shapes = CASES[case]
    if function == "experts":
        matrices, choice = stacks(device), torch.arange(18, device=device).view(-1, 2) % 3
        function = lambda x, weights: quantized_experts(x, choice, weights, *matrices)  # noqa: E731
    elif isinstance(function, str):
        w = quantize_weight(draw(9, 70, seed=7, device=device), function, search=False)
        function = lambda x, bias: dequant_matmul(x, w, bias)  # noqa: E731
    return function, [draw(*s, device=device, seed=i).div(2).requires_grad_() for i, s in enumerate(shapes)]


def over_a_cache(q, cache):
    """Positions 0 to 8 of one row, in slots 4 to 7, 0 to 3 and 8."""
    table, last = torch.tensor([[1, 0, 2]], dtype=torch.int32, device=q.device), torch.tensor([[8]], device=q.device)
    return attend_blocks(q, cache, cache, table, last, block_size=4)


def run(function, inputs, dtype=None):
    """Output and gradients, where `dtype` is given under autocast."""
    on = contextlib.nullcontext() if dtype is None else torch.autocast(inputs[0].device.type, dtype)
    with on:
        out = function(*inputs)
    return out, *torch.autograd.grad(out.float().square().sum(), inputs)


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# --- operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_compiles_as_one_graph(case, device):
    """Forward and backward, with the same bits; keys that are also the values among them."""
    torch._dynamo.reset()
    function, inputs = make(case, device)
    assert_equal(run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs), run(function, inputs))


@pytest.mark.parametrize("case", CASES)
def test_is_exported(case, device):
    function, inputs = make(case, device)
    inputs = tuple(x.detach() for x in inputs)
    module = torch.nn.Module()
    module.forward = function
    exported = torch.export.export(module, inputs)
    assert any("nanovlm" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*inputs), function(*inputs))


def test_a_cache_compiles_and_is_exported(device):
    inputs = draw(1, 1, 2, 16, device=device), draw(9, 1, 16, device=device)
    module = torch.nn.Module()
    module.forward = over_a_cache
    torch._dynamo.reset()
    for function in (
        torch.compile(over_a_cache, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, inputs).module(),
    ):
        assert torch.equal(function(*inputs), over_a_cache(*inputs))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        over_a_cache(inputs[0].requires_grad_(), inputs[1]).sum().backward()


def operators(device):
    """Each operator with arguments; those of a backward pass come from the forward pass."""
    ops = torch.ops.nanovlm
    q, k, v, x, bias, hidden, head = (
        draw(*shape, device=device, seed=i).requires_grad_()
        for i, shape in enumerate([(1, 12, 2, 16), (1, 12, 1, 16), (1, 12, 1, 16), (3, 70), (9,), (7, 12), (33, 12)])
    )
    sinks, labels = draw(2, device=device).requires_grad_(), torch.arange(7, device=device)
    doc_ids = torch.zeros(1, 12, dtype=torch.int32, device=device)
    windows = find_runs(doc_ids, doc_ids, doc_ids + 1, window=5)
    for *runs, causal in ((*[None] * 7, 0, True), (*windows, False)):
        yield ops.attention, (q, k, v, sinks, *runs, causal, 0.25)
        forward = [t.detach() for t in (q, k, v, *ops.attention(q, k, v, sinks, *runs, causal, 0.25))]
        yield ops.attention_backward, (*forward, q.detach(), *runs, causal, 0.25)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    last = torch.arange(12, device=device)[None]
    cache = q.detach(), k[0].detach(), v[0].detach(), table, last, 4, 0.25
    yield ops.attend_blocks, (*cache, *[None] * 4)
    yield ops.attend_blocks, (*cache, last, sinks.detach(), None, None)
    yield ops.linear_cross_entropy, (hidden, head, labels, 3, 4, True, True)
    yield ops.linear_cross_entropy, (hidden, head.detach(), labels, None, 9, True, False)
    w = take_apart(quantize_weight(draw(9, 70, device=device), "nf4", search=False))
    yield ops.dequant_matmul, (x, *w, bias)
    yield ops.dequantize, (*w, torch.float16)
    tokens, *tensors = make("experts", device)[1]
    choice = torch.arange(18, device=device).view(-1, 2) % 3
    yield ops.grouped_experts, (tokens, choice, *tensors, True)
    tokens, *tensors = (t.detach() for t in (tokens, *tensors))
    yield ops.grouped_experts, (tokens, choice, *tensors, False)
    _, *kept = ops.grouped_experts(tokens, choice, *tensors, True)
    for wanted in ([True] * 5, [False, True, False, True, False]):
        yield ops.grouped_experts_backward, (tokens, tokens, *tensors, *kept, wanted)
    stack, weights = quantized_experts_file.take_apart(*stacks(device)), tensors[0]
    yield ops.quantized_experts, (tokens.clone().requires_grad_(), choice, weights, *stack, True)
    yield ops.quantized_experts, (tokens, choice, weights, *stack, False)
    _, *kept = ops.quantized_experts(tokens, choice, weights, *stack, True)
    for wanted in ([True, True], [False, True]):
        yield ops.quantized_experts_backward, (tokens, tokens, choice, weights, *kept, *stack, wanted)
    yield ops.attend_cache, (0, *(draw(2, heads, 8, device=device) for heads in (4, 2, 2)))


def test_operators_are_what_they_say(device):
    """Shapes, strides and dtypes without contents, nothing changed, nothing returned twice, and shapes that vary."""
    seen = set()
    for operator, arguments in operators(device):
        seen.add(operator.default.name().split("::")[1])
        torch.library.opcheck(operator.default, arguments)
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nanovlm::")]
    # Those that benchmarks compare with have been loaded where its test has run in this process.
    assert seen == {name for name in names if not name.endswith("_before")}


def test_selective_checkpointing_names_operators(device, monkeypatch):
    """What is kept is not computed again: by a policy of one's own, and by that of a training run."""
    function, inputs = make("attention, causal", device)
    calls, forward = [], attention_file.attend_forward
    monkeypatch.setattr(attention_file, "attend_forward", lambda *args: calls.append(1) or forward(*args))
    expected = run(function, inputs)

    def policy(_context, op, *args, **kwargs):
        is_ours = op is torch.ops.nanovlm.attention.default
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for count, wrapped in (
        (1, lambda *x: checkpoint(function, *x, use_reentrant=False, context_fn=contexts)),
        (1, recompute(function, "selective")),
        (2, recompute(function, "full")),
    ):
        calls.clear()
        assert_equal(run(wrapped, inputs), expected)
        assert len(calls) == count


def test_nothing_is_remembered_of_a_trace(device):
    """Tables that were made without contents are not used later, nor the other way round."""
    with FakeTensorMode():
        traced = make_tables(torch.device(device))
    real = make_tables(torch.device(device))
    assert [isinstance(x, FakeTensor) for x in (*traced, *real)] == [True, True, False, False]
    _, inputs = make("nf4, 1 rows", device)
    w = quantize_weight(draw(9, 70, device=device), "nf4", search=False)
    assert torch.equal(dequant_matmul(inputs[0], w), dequant_matmul(inputs[0], w._replace(tables=None)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_is_captured(case):
    """In a CUDA graph, forward and backward, after one call that compiles."""
    function, inputs = make(case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, inputs)
    graph.replay()
    assert_equal(captured, expected)


# --- the GPU of the tensors ----------------------------------------------------------------------------------


def test_every_launch_is_on_the_gpu_of_the_tensors(device, monkeypatch):
    if device == "cuda":
        pytest.skip("looks into the interpreter; with two GPUs see the test below")
    current, launches = [], []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    def launch(self, *args, stock=GridExecutor.__call__, **kwargs):
        launches.append(len(current))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    for function, inputs in [*map(make, CASES), (lambda *x: over_a_cache(*x), [draw(1, 1, 2, 16), draw(9, 1, 16)])]:
        out = function(*inputs)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), inputs)
        assert launches and all(launches), function
        launches.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_second_gpu(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, inputs = make(case, "cuda:0")
    there = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    assert_equal([x.to("cuda:0") for x in run(function, there)], run(function, inputs))


# --- autocast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast_computes_in_its_dtype(case, dtype, device):
    """What inputs of that dtype give; gradients come back in the dtype of the inputs."""
    function, inputs = make(case, device)
    ours = run(function, inputs, dtype)
    rounded = [x.detach().to(dtype).requires_grad_() for x in inputs]
    if case.startswith("experts"):
        rounded[1] = inputs[1]  # the factors of their outputs are used as they are
    expected = run(function, rounded)
    assert ours[0].dtype == (torch.float32 if case == "cross-entropy" else dtype)
    assert torch.equal(ours[0], expected[0])
    for ours_, theirs in zip(ours[1:], expected[1:], strict=True):
        # The gradients of experts' matrices are not rounded to 16 bits in between.
        assert ours_.dtype == torch.float32 and torch.equal(ours_.to(theirs.dtype), theirs)


def test_autocast_of_mixed_dtypes(device):
    q, k, v = (draw(1, 5, 2, 16, device=device, seed=i) for i in range(3))
    with torch.autocast(device, torch.bfloat16):
        mixed = attention(q, k.half(), v.bfloat16())[0]
        out = over_a_cache(q[:, :1], torch.cat([k[0], v[0]])[:9].half())
    assert torch.equal(mixed, attention(q.bfloat16(), k.half().bfloat16(), v.bfloat16())[0])
    assert out.dtype == torch.float16  # that of the cache, which is not copied
    with pytest.raises(ValueError, match="give one of fp32, fp16 and bf16 for all"):
        attention(q, k.half(), v.bfloat16())
    with torch.autocast(device, torch.bfloat16), pytest.raises(ValueError, match=r"torch\.float64"):
        attention(q.double(), k.double(), v.double())


def test_experts_in_fp32_are_not_copied(device, monkeypatch):
    """Under autocast the kernels read the parameters themselves; other dtypes than fp32 are cast as F.linear does."""
    function, inputs = make("experts", device)
    read, forward = [], grouped_gemm.forward

    def record(x, weights, *args):
        read.extend(args[:3])
        return forward(x, weights, *args)

    monkeypatch.setattr(grouped_gemm, "forward", record)
    _, *grads = run(function, inputs, torch.bfloat16)
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in inputs[2:]]
    assert any(not torch.equal(grad, grad.bfloat16().float()) for grad in grads[2:])
    halves = [x.detach().half() for x in inputs[2:]]
    with torch.autocast(device, torch.bfloat16):
        out = function(*inputs[:2], *halves)
    assert torch.equal(out, function(inputs[0].bfloat16(), inputs[1], *(x.bfloat16() for x in halves)))


@pytest.mark.skipif(HAS_GPU, reason="kernels run on this GPU")
@pytest.mark.parametrize("case", CASES)
def test_without_gpu_and_interpreter_compiled_code_says_so_too(case, monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    torch._dynamo.reset()
    function, inputs = make(case)
    with pytest.raises(ValueError, match=r"GPU|CPU"):
        function(*inputs)
    with pytest.raises(Exception, match=r"GPU|CPU"):
        torch.compile(function, backend="aot_eager")(*inputs)
