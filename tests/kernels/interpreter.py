"""Triton's interpreter (TRITON_INTERPRET=1), repaired and made strict.

Imported by tests/conftest.py where there is no GPU, before the first launch. The sections below repair it, each saying
what the stock interpreter does. The strictness, which a run on a GPU does not have, is a `KernelFault` unless:

- every lane that is not masked out loads and stores within the extent of a tensor argument;
- no store has two lanes with one address, no two programs of a launch write to one address, and none reads what
  another writes, unless all of them do it by atomics;
- no sum, difference or product of signed integers overflows;
- a tensor descriptor is one that TMA takes;
- `tl.device_assert` holds.

And lanes that a mask without `other` leaves undefined are poisoned: NaN, or the largest integer. fp32 operands of a dot
that does not ask for input_precision="ieee" lose their lower bits, as they do on a GPU (tf32). fp8 is not looked after.

Written for triton 3.6 to 3.9 and numpy 2.4 and 2.5.
"""

import dataclasses
import functools
import types

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle


class KernelFault(Exception):
    """A kernel did what it must not do."""


# ---------------------------------------------------------------------------------------------------------------------
# bf16. Stock: blocks of bf16 are uint16 arrays, and sums, products, comparisons, reductions and dots work on these
# bits; casts from fp32 truncate. Here: widened to fp32, computed, rounded to nearest even, once, as GPUs do.


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 values of bf16 bit patterns uint16[...]."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Round fp32[...] to the nearest bf16, to even, as bit patterns uint16[...]."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(x) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x):
    return TensorHandle(widen(x.data), tl.float32) if is_bf16(x) else x


def through_fp32(stock):
    def op(self, *args):
        if not any(map(is_bf16, args)):
            return stock(self, *args)
        out = stock(self, *map(widened, args))
        return TensorHandle(narrow(out.data), tl.bfloat16) if out.data.dtype == np.float32 else out

    return op


FLOAT_OPS = """fadd fsub fmul fdiv frem fneg precise_divf approx_divf minimumf minnumf maximumf maxnumf clampf fma
    fcmpOLT fcmpOGT fcmpOLE fcmpOGE fcmpOEQ fcmpONE fcmpULT fcmpUGT fcmpULE fcmpUGE fcmpUEQ fcmpUNE
    fabs cos sin exp exp2 log log2 sqrt precise_sqrt rsqrt erf floor ceil"""
for name in FLOAT_OPS.split():
    stock = getattr(InterpreterBuilder, f"create_{name}", None)  # approx_divf and fneg came with triton 3.9
    if stock is not None:
        setattr(InterpreterBuilder, f"create_{name}", through_fp32(stock))


def cast_impl(self, src, dst_type, stock=InterpreterBuilder.cast_impl):
    src = widened(src)
    if dst_type.scalar == tl.bfloat16:
        return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
    return stock(self, src, dst_type)


InterpreterBuilder.cast_impl = cast_impl
# Stock: triton 3.6 and 3.7 have no bf16 constants.
InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)


def reduce_in_fp32(stock):
    def apply_impl(self, inputs):
        if not any(is_bf16(x.handle) for x in inputs):
            return stock(self, inputs)
        wide = tuple(tl.core.tensor(widened(x.handle), x.type.with_element_ty(widened(x.handle).dtype)) for x in inputs)
        outputs = stock(self, wide)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        return [
            as_bf16(y) if y.dtype == tl.float32 and is_bf16(x.handle) else y
            for x, y in zip(inputs, outputs, strict=False)
        ]

    def as_bf16(y):
        return tl.core.tensor(TensorHandle(narrow(y.handle.data), tl.bfloat16), y.type.with_element_ty(tl.bfloat16))

    return apply_impl


for operation in (interpreter.ReduceOps, interpreter.ScanOps):
    operation.apply_impl = reduce_in_fp32(operation.apply_impl)


# ---------------------------------------------------------------------------------------------------------------------
# Inline assembly. Stock: none. Here: a few instructions of PTX on 32 bits, one element at a time.


def permute_bytes(a, b, selector):
    """prmt: byte i of the result is byte number `selector >> 4 i & 7` of b, a; none repeats a sign (bit 3)."""
    if (selector & 0x8888).any():
        raise KernelFault("prmt that repeats the sign of a byte is not emulated")
    both = (b << np.uint64(32)) | a
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
    for i in range(4):
        byte = selector >> np.uint64(4 * i) & np.uint64(7)
        out |= (both >> byte * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out


PTX = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.b32": np.right_shift,
    "prmt.b32": permute_bytes,
}


def run_assembly(self, assembly, constraints, values, types_, is_pure, pack):
    """Run instructions `name out, in, ...;`; registers are names, $i are outputs and then inputs."""
    num_outputs = constraints.count("=")
    registers = {f"${num_outputs + i}": x.data.view(np.uint32).astype(np.uint64) for i, x in enumerate(values)}
    for instruction in assembly.strip("{}\n ").split(";"):
        name, _, operands = instruction.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        out, *inputs = (operand.strip() for operand in operands.split(","))
        arguments = [registers[x] if x in registers else np.uint64(int(x, 0)) for x in inputs]
        registers[out] = PTX[name](*arguments)
    shape = np.shape(values[0].data)
    results = [np.broadcast_to(registers[f"${i}"], shape).astype(np.uint32).view(np.int32) for i in range(num_outputs)]
    return types.SimpleNamespace(get_result=lambda i: TensorHandle(results[i], tl.int32))


InterpreterBuilder.create_inline_asm = run_assembly

# ---------------------------------------------------------------------------------------------------------------------
# Other arithmetic.


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Drop the 13 bits of fp32[...] that tensor cores do not read in tf32."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc, stock=InterpreterBuilder.create_dot):
    """Stock: bf16 is wrong, fp16 right and slow, and tf32, the default for fp32 on a GPU, is as exact as fp32."""
    a, b = (
        TensorHandle(x.data.astype(np.float32), tl.float32) if x.dtype == tl.float16 else widened(x) for x in (a, b)
    )
    if a.dtype == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        # 16-bit values have no such bits to lose.
        a, b = (TensorHandle(to_tf32(x.data), tl.float32) for x in (a, b))
    return stock(self, a, b, d, input_precision, max_num_imprecise_acc)


InterpreterBuilder.create_dot = create_dot

# Stock (3.6, 3.7): tl.maximum and tl.minimum return NaN where one side is NaN; a GPU returns the other side.
InterpreterBuilder.create_maxnumf = through_fp32(lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax))
InterpreterBuilder.create_minnumf = through_fp32(lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin))


def checked(stock, op):
    def create(self, lhs, rhs):
        out = stock(self, lhs, rhs)
        if out.data.dtype.kind == "i" and out.data.itemsize < 8:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            if (exact != out.data).any():
                value = exact[exact != out.data].flat[0]
                raise KernelFault(f"{out.data.dtype} overflow: a {op.__name__} gives {value}; cast to int64 before it")
        return out

    return create


# Stock: checks this in a dozen operations of its own for every one, then never says so, since debug is off.
for name, op in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    setattr(InterpreterBuilder, f"create_{name}", checked(getattr(InterpreterBuilder, f"create_{name}"), op))
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False
)


# ---------------------------------------------------------------------------------------------------------------------
# Launches.

patch_language = interpreter._patch_lang


def patch_language_once(fn):
    """Stock: patches triton.language at every launch and at every call of a device function, for milliseconds.

    And `range` over a bound that is known at run time fails in 3.6 with numpy 2.4: int() of an array of one element.
    """
    if not hasattr(tl.tensor, "__index__"):
        patch_language(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        tl.tensor.__index__ = lambda self: self.handle.data.item()
    return interpreter._LangPatchScope()  # with nothing to restore


def run_autotuned(self, *args, stock=Autotuner.run, **kwargs):
    """Stock: looks for a GPU to time the configs on. Here the first one that is left after pruning runs."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    all_configs = self.configs
    self.configs = self.prune_configs(kwargs)[:1]
    try:
        return stock(self, *args, **kwargs)
    finally:
        self.configs = all_configs


interpreter._patch_lang = patch_language_once
# Stock: builds a table of all dtypes at every load, splat and reduction.
scalar_dtype = functools.cache(interpreter._get_np_dtype)
interpreter._get_np_dtype = lambda x: np.dtype(np.uint64) if x.scalar.is_ptr() else scalar_dtype(x.scalar)
# Stock: an error in a device function loses its type and its traceback, and so does one in a kernel.
InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
triton.knobs.compilation.front_end_debugging = True
Autotuner.run = run_autotuned
# Stock: copies all storages to the CPU, where they are, and back.
GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
GridExecutor._restore_args_dev = lambda self, *args: None


# ---------------------------------------------------------------------------------------------------------------------
# Memory. Stock: reads and writes wherever a pointer points to, one program after the other.

LOAD, STORE, ATOMIC = 1, 2, 4


class Memory:
    """The memory that the tensors of one launch cover, and every access to it."""

    def __init__(self, arguments: dict):
        extents = []
        for name, x in arguments.items():
            x = getattr(x, "base", x) if not hasattr(x, "data_ptr") else x  # a tensor descriptor's tensor
            if hasattr(x, "data_ptr") and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                extents.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), name))
        self.starts, self.ends, self.names, self.log = [], [], [], []
        for start, end, name in sorted(extents):
            if self.ends and start < self.ends[-1]:  # views that overlap
                self.ends[-1] = max(self.ends[-1], end)
                self.names[-1] += f", {name}"
            else:
                self.starts.append(start)
                self.ends.append(end)
                self.names.append(name)
                self.log.append([])

    def access(self, kind: int, program: tuple, pointers: TensorHandle, mask):
        address = pointers.data.astype(np.int64)
        address = address[np.broadcast_to(np.asarray(mask), address.shape)]
        if not address.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        region = np.searchsorted(self.starts, address, side="right") - 1
        bad = (region < 0) | (address + size > np.take(self.ends, region))
        verb = {LOAD: "load", STORE: "store", ATOMIC: "atomic"}[kind]
        if bad.any():
            first = int(address[bad][0])
            _, start, end, name = min(  # the nearest argument
                (max(start - first, first - end), start, end, name)
                for start, end, name in zip(self.starts, self.ends, self.names, strict=True)
            )
            raise KernelFault(
                f"out of bounds: program {program}: {verb} of {bad.sum()} of {address.size} lanes, the first at "
                f"element {(first - start) // size} of {name}, which has {(end - start) // size}"
            )
        if kind == STORE and (np.diff(np.sort(address)) == 0).any():
            raise KernelFault(f"program {program}: two lanes of one store have one address in {self.names[region[0]]}")
        for i in np.unique(region):
            self.log[i].append((kind, program, size, address[region == i]))

    def check_races(self):
        for name, start, log in zip(self.names, self.starts, self.log, strict=True):
            programs = sorted({program for _, program, _, _ in log})
            if len(programs) < 2 or all(kind == LOAD for kind, *_ in log) or all(kind == ATOMIC for kind, *_ in log):
                continue
            unit = min(size for *_, size, _ in log)
            number = {program: i for i, program in enumerate(programs)}
            parts = [(address[:, None] + np.arange(0, size, unit)).ravel() for *_, size, address in log]
            counts = [len(part) for part in parts]
            address = np.concatenate(parts)
            kinds = np.repeat([kind for kind, *_ in log], counts)
            who = np.repeat([number[program] for _, program, _, _ in log], counts)
            order = np.argsort(address, kind="stable")
            address, kinds, who = address[order], kinds[order], who[order]
            first = np.flatnonzero(np.diff(address, prepend=-1))
            all_kinds = np.bitwise_or.reduceat(kinds, first)
            shared = np.minimum.reduceat(who, first) != np.maximum.reduceat(who, first)
            race = shared & ((all_kinds & STORE > 0) | (all_kinds == LOAD | ATOMIC))
            if race.any():
                at = address == address[first[np.argmax(race)]]
                writers = np.unique(who[at & (kinds != LOAD)])
                verb = "write to" if len(writers) > 1 else "write to and read"
                raise KernelFault(
                    f"race: programs {', '.join(str(programs[i]) for i in np.unique(who[at]))} {verb} element "
                    f"{(int(address[at][0]) - start) // unit} of {name}, and {race.sum()} more like it"
                )


memory: Memory | None = None


def call(self, *args, stock=GridExecutor.__call__, **kwargs):
    global memory
    memory = Memory(dict(zip(self.arg_names, args, strict=False)) | kwargs)
    with np.errstate(all="ignore"):  # inf and NaN are values like others
        stock(self, *args, **kwargs)
    memory.check_races()


def create_masked_load(self, ptrs, mask, other, *args, stock=InterpreterBuilder.create_masked_load, **kwargs):
    memory.access(LOAD, self.grid_idx, ptrs, mask_data(mask))
    if other is None:
        # Stock: 0, where a GPU has whatever the register held.
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        value = np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max
        other = TensorHandle(np.full(ptrs.data.shape, value, dtype), ptrs.get_element_ty())
    return stock(self, ptrs, mask, other, *args, **kwargs)


def create_masked_store(self, ptrs, value, mask, *args, stock=InterpreterBuilder.create_masked_store, **kwargs):
    memory.access(STORE, self.grid_idx, ptrs, mask_data(mask))
    return stock(self, ptrs, value, mask, *args, **kwargs)


def create_atomic_rmw(self, operation, ptr, val, mask, *args, stock=InterpreterBuilder.create_atomic_rmw):
    memory.access(ATOMIC, self.grid_idx, ptr, mask.data)
    return stock(self, operation, ptr, val, mask, *args)


def create_atomic_cas(self, ptr, *args, stock=InterpreterBuilder.create_atomic_cas):
    memory.access(ATOMIC, self.grid_idx, ptr, True)
    return stock(self, ptr, *args)


def validate(self, stock=interpreter.TensorDescHandle.validate):
    """Stock: looks at alignment alone. Loads and stores come to create_masked_load and create_masked_store above.

    CUDA driver API, cuTensorMapEncodeTiled: up to 256 elements a side of a block, strides of less than 2^40 bytes. Of
    strides of 0 it says nothing.
    """
    stock(self)
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    strides = [int(stride.data.item()) for stride in self.strides[:-1]]
    if any(not 0 < stride * size < 2**40 for stride in strides):
        raise KernelFault(f"a descriptor has strides {strides}, which must be above 0 and below {2**40 // size}")
    if max(self.block_shape) > 256:
        raise KernelFault(f"a descriptor's block of {list(self.block_shape)} has a side above 256")


interpreter.TensorDescHandle.validate = validate


def mask_data(mask):
    return mask.data if isinstance(mask, TensorHandle) else mask  # descriptors of triton 3.6 pass an array


GridExecutor.__call__ = call
InterpreterBuilder.create_masked_load = create_masked_load
InterpreterBuilder.create_masked_store = create_masked_store
InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
InterpreterBuilder.create_atomic_cas = create_atomic_cas
