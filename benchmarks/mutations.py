"""Plant bugs in the kernels, one at a time, and see whether their tests notice.

    python benchmarks/mutations.py                       what has no result yet for these sources, then the table
    python benchmarks/mutations.py --only grouped_gemm   of one kernel

A bug is a change of one line in a copy of the tree, with which the tests of that kernel run until the first fails.
A result holds as long as the kernel, its tests and their judge (tests/kernels/oracle.py) stay as they are, so a run
that was stopped goes on where it was.
Writes benchmarks/results/mutations.json, and exits with 1 where fewer than 95 % were caught.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
LINKS = ("nanovlm/kernels", "nanovlm/eval")

# For each kernel: (what it is, a text that is there once, what takes its place); they differ in one line.
MUTATIONS = {
    "cross_entropy": [
        ("32-bit row offset", "i_n.to(tl.int64) * s_n", "i_n * s_n"),
        ("no row offset", "i_n.to(tl.int64) * s_n", "0 * s_n"),
        ("label of another row", "tl.load(p_labels + i_n)", "tl.load(p_labels)"),
        ("label of the vocabulary's size allowed", "& (i_y < V), other=float", "& (i_y <= V), other=float"),
        ("negative label allowed", "(i_y >= 0) & (i_y < V), other=float", "(i_y < V), other=float"),
        ("statistics start from minus infinity", "largest = -3.0e38", 'largest = -float("inf")'),
        ("statistics start from 0", "largest = -3.0e38", "largest = 0.0"),
        ("sum not rescaled", "total = total * tl.exp2((largest - larger) * LOG2E) +", "total = total +"),
        (
            "sum rescaled the wrong way",
            "tl.exp2((largest - larger) * LOG2E) + tl",
            "tl.exp2((larger - largest) * LOG2E) + tl",
        ),
        ("earlier blocks dropped", "total = total * tl.exp2((largest - larger) * LOG2E) +", "total ="),
        (
            "largest value of the last block only",
            "larger = tl.maximum(largest, tl.max(b_z, 0))",
            "larger = tl.max(b_z, 0)",
        ),
        ("largest value not kept", "        largest = larger", "        largest = largest"),
        ("base 2 for e in the sum", "tl.sum(tl.exp2((b_z - larger) * LOG2E), 0)", "tl.sum(tl.exp2(b_z - larger), 0)"),
        ("base 2 for e in the loss", "tl.log(total) +", "tl.log2(total) +"),
        ("loss without the largest value", "+ (largest - z_y)", "+ (-z_y)"),
        ("loss without the logit of the label", "+ (largest - z_y)", "+ largest"),
        ("gradient not divided", "* LOG2E) / total", "* LOG2E)"),
        ("no one-hot", "b_dz - 1.0, b_dz)", "b_dz, b_dz)"),
        ("one-hot one further", "o_v == i_y", "o_v == i_y + 1"),
        ("one-hot in every block", "o_v == i_y", "o_v % BV == i_y % BV"),
        ("gradient unmasked", "element_ty), mask=o_v < V)", "element_ty))"),
        (
            "gradient of the first block only",
            "                o_v = i_v + tl.arange(0, BV)",
            "                o_v = tl.arange(0, BV)",
        ),
        ("loss where there should be a gradient", "any(has_gradients), ignore", "False, ignore"),
        ("gradient where none was asked for", "ignore_index, gradient, BV", "ignore_index, True, BV"),
        ("blocks of half the vocabulary", "triton.next_power_of_2(V))", "triton.next_power_of_2(V // 2))"),
        ("labels of the first chunk", "labels[i : i + chunk], any", "labels[:chunk][: len(z)], any"),
        ("loss of the last chunk only", "total += each.sum()", "total = each.sum()"),
        ("gradient of hidden of one chunk", "out=dx[i : i + chunk]", "out=dx[: len(z)]"),
        ("gradient of weight of the last chunk", "else dw.add_(product)", "else product.float()"),
        ("gradient of weight added in 16 bits", "product.to(torch.float32 if N > chunk else weight.dtype)", "product"),
        ("no gradient of weight without rows", "has_gradients[1] and not N else", "False else"),
        ("gradient of hidden not scaled", "scale(dx, grad) if", "dx if"),
        ("gradient of weight not scaled", "scale(dw, grad).to", "dw.to"),
        ("second backward pass scaled twice", "scale = Tensor.mul_ if in_place", "scale = Tensor.mul_ if True"),
        ("gradient copied to be scaled", "scale = Tensor.mul_ if in_place", "scale = Tensor.mul_ if False"),
        ("loss of ignored labels", "loss = tl.where(i_y == ignore_index, 0.0, loss)", "loss = loss"),
        ("gradient of ignored labels", "b_dz = tl.where(i_y == ignore_index, 0.0, b_dz)", "b_dz = b_dz"),
        ("ignored rows multiplied with their gradient of 0", "x = x.masked_fill(", "x.masked_fill("),
        ("a program takes its first row alone", "i * tl.num_programs(0)", "0 * tl.num_programs(0)"),
        ("the last rows left out", "tl.cdiv(N - tl.program_id(0), tl.num_programs(0))", "N // tl.num_programs(0)"),
        ("strided labels read as contiguous", "labels.contiguous(), losses", "labels, losses"),
    ],
    "attention": [
        (
            "branches that begin a document see it all",
            "new_run[:, 1:] = new_doc[:, 1:] | (",
            "new_run[:, 1:] = (new_doc[:, 1:] & False) | (",
        ),
        (
            "a prefix ends one early",
            "torch.where(on_prefix, index + 1, 0).cummax(1)",
            "torch.where(on_prefix, index, 0).cummax(1)",
        ),
        (
            "rows of 32-bit offsets",
            "tl.cast(i_first, tl.int64) * (stride * UNIT) + tl.arange(0, ROWS).to(tl.int64) * (stride * UNIT)",
            "i_first * (stride * UNIT) + tl.arange(0, ROWS) * (stride * UNIT)",
        ),
        (
            "columns of the next head read as this one's",
            "mask=m_rows[:, None] & (o_h[None, :] < H), other=0.0)",
            "mask=m_rows[:, None] & (o_h[None, :] <= H), other=0.0)",
        ),
        (
            "second part of the head left out",
            "b_s = tl.dot(x_b, tl.trans(y_b), b_s,",
            "b_s = tl.dot(x_b, tl.trans(y_b),",
        ),
        (
            "strides that are no multiples of 8 cut off",
            "unit = 1 if any(stride % 8 for stride in strides) else 8",
            "unit = 1 if all(stride % 8 for stride in strides) else 8",
        ),
        ("p in tf32", 'acc_a = tl.dot(b_p, x_a, acc_a, input_precision="ieee")', "acc_a = tl.dot(b_p, x_a, acc_a)"),
        ("earlier blocks of keys dropped", "acc_a = tl.dot(b_p, x_a, acc_a, input", "acc_a = tl.dot(b_p, x_a, input"),
        (
            "whole blocks beyond the run of the last query",
            "tl.load(p_until + i_t) > last, to_first, lo_b",
            "tl.load(p_until + i_t) > i_t, to_first, lo_b",
        ),
        (
            "a span ends with the last query of a block",
            "hi_b, to_first = tl.load(p_last + last) + 1,",
            "hi_b, to_first = last + 1,",
        ),
        (
            "whole blocks up to the end of the last query's span",
            "+ 1, tl.load(p_last + i_t) + 1",
            "+ 1, tl.load(p_last + last) + 1",
        ),
        (
            "queries before the block of keys do not see it",
            "lo, lo_all = tl.load(p_since + i_b * T + lo), tl",
            "lo, lo_all = lo, tl",
        ),
        (
            "a span ends with its run",
            "new_span[:, 1:] |= span_ids[:, 1:] != span_ids[:, :-1]",
            "pass",
        ),
        (
            "whole blocks of a prefix beyond the last query's document",
            "tl.where(end_a > last, hi_a, lo_a)",
            "tl.where(end_a > i_t, hi_a, lo_a)",
        ),
        (
            "causal keys one too many unmasked",
            "all_b = tl.minimum(tl.maximum(i_t + 1 + S - T, 0), S)",
            "all_b = tl.minimum(tl.maximum(i_t + BM + S - T, 0), S)",
        ),
        (
            "causal keys a block too few",
            "hi_b = tl.minimum(tl.maximum(i_t + BM + S - T, 0), S)",
            "hi_b = tl.minimum(tl.maximum(i_t + S - T, 0), S)",
        ),
        ("causal mask off by one", "m = o_s[None, :] <= o_last[:, None]", "m = o_s[None, :] < o_last[:, None]"),
        (
            "branches see each other",
            "m = m & (o_query[:, None] < tl.load(p_until",
            "m = m & (o_query[:, None] > tl.load(p_until",
        ),
        ("spans as far from a window's keys as their last token", "o_query = o_t if WINDOW else", "o_query ="),
        (
            "largest score not kept over blocks",
            "m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)",
            "m_new = tl.max(b_s, 1) * scale_log2",
        ),
        (
            "rows without keys give NaN",
            'shift = tl.where(m_new == float("-inf"), 0.0, m_new)\n    b_p',
            "shift = m_new\n    b_p",
        ),
        (
            "scale missing in the softmax",
            "b_p = tl.exp2(b_s * scale_log2 - shift[:, None])",
            "b_p = tl.exp2(b_s - shift[:, None])",
        ),
        ("sum shrunk, accumulator not", "acc_a = acc_a * shrink[:, None]", "acc_a = acc_a * 1.0"),
        (
            "sum not shrunk",
            "return m_new, b_l * shrink + tl.sum(b_p, 1), acc_a, acc_b",
            "return m_new, b_l + tl.sum(b_p, 1), acc_a, acc_b",
        ),
        (
            "value stride for keys",
            "v_a, v_b = load_parts(point_to_rows(p_v, i_s, stride_v, BN, UNIT), m_s, H, HA, HB, MASKED)\n    acc_a",
            "v_a, v_b = load_parts(point_to_rows(p_v, i_s, stride_k, BN, UNIT), m_s, H, HA, HB, MASKED)\n    acc_a",
        ),
        (
            "division by zero for rows without keys",
            "b_l = tl.where(b_l == 0, 1.0, b_l)\n    p_out",
            "b_l = tl.where(b_l == 0, 0.0, b_l)\n    p_out",
        ),
        ("lse in powers of 2", "(b_m + tl.log2(b_l)) / LOG2E", "(b_m + tl.log2(b_l))"),
        ("sign of the sum in lse", "(b_m + tl.log2(b_l)) / LOG2E", "(b_m - tl.log2(b_l)) / LOG2E"),
        (
            "delta left out of dq",
            "b_ds = b_p * (dot_parts(g_a, g_b, v_a, v_b, HB) - b_delta[:, None])",
            "b_ds = b_p * dot_parts(g_a, g_b, v_a, v_b, HB)",
        ),
        (
            "delta without the second part of the head",
            "b_delta += tl.sum(g_b.to(tl.float32) * out_b.to(tl.float32), 1)",
            "b_delta += 0.0",
        ),
        ("lse of another head in dq", "o_stat = (i_b * N + i_n) * T + o_t", "o_stat = (i_b * N + i_n // G) * T + o_t"),
        (
            "scale missing in dq",
            "store_parts(p_dq + o_out, m_t, dq_a * scale, dq_b * scale,",
            "store_parts(p_dq + o_out, m_t, dq_a, dq_b,",
        ),
        ("scale missing in dk", "dk_a * scale, dk_b * scale, H, HA, HB)", "dk_a, dk_b, H, HA, HB)"),
        (
            "mask of dk and dv off by one",
            "m = o_s[:, None] <= (o_t + offset)[None, :]",
            "m = o_s[:, None] < (o_t + offset)[None, :]",
        ),
        (
            "offset of longer keys forgotten in dk",
            "m = o_s[:, None] <= (o_t + offset)[None, :]",
            "m = o_s[:, None] <= o_t[None, :]",
        ),
        (
            "until off by one in dk",
            "m = m & (o_t[None, :] < b_until[:, None])",
            "m = m & (o_t[None, :] <= b_until[:, None])",
        ),
        (
            "dv from ds",
            "dv_a, dv_b = add_parts(dv_a, dv_b, b_p, g_a, g_b, HB)",
            "dv_a, dv_b = add_parts(dv_a, dv_b, b_p, q_a, q_b, HB)",
        ),
        ("one query head of a group left out", "for i_g in range(G):", "for i_g in range(tl.maximum(G - 1, 1)):"),
        (
            "queries before the block of keys skipped",
            "num = tl.cdiv(tl.maximum(hi - lo, 0), BM)",
            "num = tl.maximum(hi - lo, 0) // BM",
        ),
        (
            "blocks of queries with a border taken for whole ones",
            "num_before = tl.minimum(tl.cdiv(lo_all - lo, BM), num)",
            "num_before = tl.minimum((lo_all - lo) // BM, num)",
        ),
        (
            "a window of one key more",
            "m = m & (o_near[:, None] < (tl.load(",
            "m = m & (o_near[:, None] <= (tl.load(",
        ),
        (
            "a window of one query more in dk",
            "[None, :] < b_far[:, None])",
            "[None, :] <= b_far[:, None])",
        ),
        ("whole blocks before the last query's window", "last - W + 1 - lo_b", "i_t - W + 1 - lo_b"),
        ("whole blocks of a prefix before a query's window", "near + last - i_t - W + 1", "near - W + 1"),
        ("a later branch sees as little of the prefix", "tl.where(is_alone, near, hi_a) - W", "near - W"),
        ("a branch sees as much of the prefix all along", "tl.where(is_alone, near, hi_a) - W", "hi_a - W"),
        ("the blocks before the whole ones left out", "tl.where(j < skip, j, j + full)", "j + full"),
        ("whole blocks of queries beyond a window", "tl.minimum(hi_all, i_s + W)", "hi_all"),
        ("a key seen from the first branch alone", "(own.gather(1, until.long() - 1) - run_end)", "(own - run_end)"),
        ("branches count as tokens between", "index - own + torch.where(on_prefix, own, shared)", "index"),
        ("sinks without a base", "tl.load(p_sinks + i_n) * LOG2E", "tl.load(p_sinks + i_n)"),
        ("sinks left out of the sum", "* LOG2E, b_l + 1.0", "* LOG2E, b_l"),
        ("gradient of sinks upwards", "-((sinks[:, None] - lse)", "((sinks[:, None] - lse)"),
        (
            "wrong split of the head",
            "return (H, whole // 2, rest) if whole > 32",
            "return (H, whole // 2, rest // 2) if whole > 32",
        ),
    ],
    "cache_attention": [
        ("blocks of the first row", "p_table += i_b * stride_table", "p_table += 0 * stride_table"),
        ("width of the table taken for its stride", "table.stride(0), B, T, K", "table.shape[1], B, T, K"),
        ("slots of 32 bits", "b_block.to(tl.int64) * BLOCK +", "b_block * BLOCK +"),
        ("table read beyond what is needed", "mask=m_s, other=0)", "mask=o_s >= 0, other=0)"),
        ("block left out", "b_block.to(tl.int64) * BLOCK + o_s % BLOCK", "b_block.to(tl.int64) * BLOCK"),
        (
            "block of the position before",
            "b_block = tl.load(p_table + o_s // BLOCK)",
            "b_block = tl.load(p_table + o_s // BLOCK - 1)",
        ),
        ("mask off by one", "o_s[None, :] <= o_last[:, None]", "o_s[None, :] < o_last[:, None]"),
        ("positions one too many", "num_seen = tl.max(o_last) + 1", "num_seen = tl.max(o_last) + 2"),
        ("positions one too few", "num_seen = tl.max(o_last) + 1", "num_seen = tl.max(o_last)"),
        (
            "no mask where the last query sees all",
            "tl.min(tl.where(m_r, o_last, hi)) + 1)",
            "tl.max(tl.where(m_r, o_last, hi)) + 1)",
        ),
        (
            "whole steps one position too many",
            "tl.min(tl.where(m_r, o_last, hi)) + 1)",
            "tl.min(tl.where(m_r, o_last, hi)) + 2)",
        ),
        ("last of the first row", "tl.load(p_last + i_b * T + o_t", "tl.load(p_last + o_t"),
        ("heads of a group in each other's place", "i_k * G + o_r % G", "i_k + o_r % G"),
        ("the step at the end left out", "range(full, tl.cdiv(hi - lo, BN))", "range(full, (hi - lo) // BN)"),
        ("codes of 3 bits", "decode(b_bytes & 15,", "decode(b_bytes & 7,"),
        ("upper codes are the lower ones", "decode(b_bytes >> 4,", "decode(b_bytes & 15,"),
        ("queries' upper half is the lower one", "load_part(p_rows + HALF,", "load_part(p_rows,"),
        ("upper half of the result over the lower one", "store_parts(p_rows + HALF,", "store_parts(p_rows,"),
        ("codes without their offset", "* b_scale[:, None] + b_offset[:, None]", "* b_scale[:, None]"),
        ("scales of the keys for values", "load_slots(p_v, p_vs,", "load_slots(p_v, p_ks,"),
        ("scales of the first head", "p_ks, p_vs = p_ks + i_k * 2, p_vs + i_k * 2", "p_ks, p_vs = p_ks, p_vs"),
        ("a window of one position less", "o_s[None, :] >= o_first[:, None]", "o_s[None, :] > o_first[:, None]"),
        ("positions before the window read", "        first_seen = tl.min(o_first)", "        first_seen = 0"),
        ("whole steps before the last window", "tl.max(tl.where(m_r, o_first, 0)) - lo", "tl.min(o_first) - lo"),
        ("the steps before the whole ones left out", "tl.where(j < skip + full, j - full, j)", "j"),
        ("sinks counted in every part", "        if i_part == 0:", "        if i_part >= 0:"),
        ("sinks of the first group", "tl.load(p_sinks + o_n, mask", "tl.load(p_sinks + o_r % G, mask"),
        (
            "keys' stride for values",
            "load_slots(p_v, p_vs, p_table, o_s, m_s, stride_v,",
            "load_slots(p_v, p_vs, p_table, o_s, m_s, stride_k,",
        ),
        ("keys' head for values", "p_v += i_k * stride_vn * UNIT", "p_v += i_k * stride_kn * UNIT"),
        ("sum not shrunk", "return m_new, b_l * shrink + tl.sum(b_p, 1)", "return m_new, b_l + tl.sum(b_p, 1)"),
        ("accumulator not shrunk", "acc_a = acc_a * shrink[:, None]", "acc_a = acc_a * 1.0"),
        ("second part of the head not shrunk", "acc_b = acc_b * shrink[:, None]", "acc_b = acc_b * 1.0"),
        (
            "division by zero for queries that see nothing",
            "b_l = tl.where(b_l == 0, 1.0, b_l)",
            "b_l = tl.where(b_l == 0, 0.0, b_l)",
        ),
        (
            "parts begin one late",
            "lo = first_seen + i_part * part_size",
            "lo = first_seen + i_part * part_size + i_part",
        ),
        (
            "parts that nobody sees not marked",
            'tl.full([BM], float("-inf"), tl.float32), mask=m_r)',
            'tl.full([BM], float("-inf"), tl.float32), mask=o_r < 0)',
        ),
        ("parts that nobody sees read", 'm = (b_lse > float("-inf"))', 'm = (b_lse >= float("-inf"))'),
        ("parts merged without their weights", "tl.sum(b_w[:, None] * b_x, 0)", "tl.sum(b_x, 0)"),
        ("merged parts not shrunk", "acc = acc * shrink + tl.sum(", "acc = acc + tl.sum("),
        ("sum of merged parts not shrunk", "b_m, b_l = m_new, b_l * shrink +", "b_m, b_l = m_new, b_l +"),
        ("merged queries that see nothing divided by zero", "acc / tl.where(b_l == 0, 1.0, b_l)", "acc / b_l"),
        ("lse of a part in powers of e", "b_m + tl.log2(b_l), mask", "b_m + tl.log(b_l), mask"),
        (
            "a part too few launched",
            "triton.cdiv(num_positions, LEAST_PART.value)",
            "num_positions // LEAST_PART.value",
        ),
        (
            "parts follow from the number of rows",
            "2 * num_processors(q) // (num_blocks * K)",
            "2 * num_processors(q) // (num_blocks * K * len(q))",
        ),
        ("scale of base e", "scale * LOG2E.value, most_parts", "scale, most_parts"),
        ("strided last read as contiguous", "last, has = last.contiguous(),", "last, has = last,"),
    ],
    "dequant_matmul": [
        (
            "scale of another group",
            "o_here * (PLANES * RUN) + i * RUN) // GROUP\n        b_scale",
            "o_here * (PLANES * RUN)) // GROUP\n        b_scale",
        ),
        ("int4 scale with the bits of its zero point", "(b_group & -16)", "(b_group & -1)"),
        ("int4 scale cut to bf16", "(b_group & -16)", "(b_group & -65536)"),
        ("int4 zero point of 3 bits", "b_group & 15", "b_group & 7"),
        ("int4 zero point left out", "(b_zero << SHIFT) | 0x4B000000", "0x4B000000"),
        ("int4 zero point not moved", "(b_zero << SHIFT)", "b_zero"),
        ("int8 zero point of 127", "2.0**23 + 128 * 2.0**SHIFT", "2.0**23 + 127 * 2.0**SHIFT"),
        ("int8 zero point not moved", "128 * 2.0**SHIFT", "128"),
        (
            "codes of fewer bits",
            "b_code = (b_words >> (i * BITS - SHIFT)) & ((2**BITS - 1) << SHIFT)",
            "b_code = (b_words >> (i * BITS - SHIFT)) & ((2 ** (BITS - 1) - 1) << SHIFT)",
        ),
        ("codes not moved down", "b_code = (b_words >> (i * BITS - SHIFT)) &", "b_code = b_words &"),
        ("denormal codes of fewer bits", "((2**BITS - 1) << SHIFT)).to", "((2 ** (BITS - 1) - 1) << SHIFT)).to"),
        ("denormal codes not moved down", "return ((b_words >> (i * BITS - SHIFT)) &", "return (b_words &"),
        ("denormal codes: places not undone", "(b_x * 2.0 ** (80 - i * BITS % 12))", "(b_x * 2.0**80)"),
        ("denormal codes: power of two", "b_scale * 2.0**69", "b_scale * 2.0**68"),
        ("denormal codes: zero point left out", "acc -= b_zero * b_sum", "acc -= 0 * b_zero * b_sum"),
        (
            "denormal codes: zero point unscaled",
            "bitcast=True) - 2.0**23) * b_scale",
            "bitcast=True) - 2.0**23)",
        ),
        ("denormal codes: sum of one plane", "b_sum += b_x", "b_sum = b_x"),
        ("16 bits: codes of 3 bits", "0x000F000F", "0x00070007"),
        ("16 bits: planes of another word", "b_words >> (i % 4 * 4)", "b_words >> (i * 4)"),
        ("16 bits: upper codes are the lower ones", "b_pair if i < 4 else b_pair >> 16", "b_pair"),
        ("16 bits: power of two of the other dtype", "0x4300 if DTYPE == tl.bfloat16 else 0x6400", "0x4300"),
        ("16 bits: zero point left out", "b_base = (b_zero | BASE)", "b_base = (0 * b_zero | BASE)"),
        ("nf4 pairs: upper codes are the lower ones", "b_pair if i % 2 == 0 else b_pair >> 16", "b_pair"),
        ("nf4 pairs: of other planes", "b_pairs[i // 2]", "b_pairs[i % 4]"),
        ("nf4 table: codes of 4 bits select", "and.b32 code, $4, 0x77777777", "and.b32 code, $4, 0x33333333"),
        ("nf4 table: half of another code", "shr.b32 half, $4, 1;", "shr.b32 half, $4, 2;"),
        ("nf4 table: first half alone", "and.b32 half, half, 0x44444444", "and.b32 half, half, 0x00000000"),
        ("nf4 table: bytes swapped", "prmt.b32 ${first}, a, c, 0x5140", "prmt.b32 ${first}, c, a, 0x5140"),
        ("nf4 table: the same four codes twice", "shr.b32 code, code, 16;", "shr.b32 code, code, 0;"),
        ("nf4 table: not rounded", "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "bits >> 16"),
        ("nf4 codes of 3 bits", "(b_words >> (i * BITS)) & 15", "(b_words >> (i * BITS)) & 7"),
        ("nf4 codes of the wrong plane", "(b_words >> (i * BITS)) & 15", "(b_words >> (28 - i * BITS)) & 15"),
        ("nf4 absmax without its mean", "+ tl.load(nested_offset), 7", ", 7"),
        ("nf4 absmax without its scale", "b_absmax * tl.load(nested_scales + o_group // 256)", "b_absmax"),
        ("nf4 scale of another block", "nested_scales + o_group // 256", "nested_scales + o_group // 512"),
        ("nf4 scale of a block too far", "nested_scales + o_group // 256", "nested_scales + o_group // 255"),
        ("gemv: rows beyond the last read", "tl.minimum(o_n, N - 1)[:, None]", "o_n[:, None]"),
        ("gemv: last row read twice", "tl.minimum(o_n, N - 1)[:, None]", "tl.minimum(o_n, N - 2)[:, None]"),
        ("gemv: rows beyond the last written", "m_n = o_n < N\n    if FORMAT", "m_n = o_n <= N\n    if FORMAT"),
        ("gemv: tile of another row", "TILES - 1)[None, :]  # beyond", "TILES)[None, :]  # beyond"),
        (
            "gemv: words beyond the last read",
            "mask=o_word < TILES * RUN, other=0, evic",
            "mask=o_word >= 0, other=0, evic",
        ),
        ("gemv: x beyond the last read", "tl.load(x + o_k, mask=o_k < K", "tl.load(x + o_k, mask=o_k <= K"),
        ("gemv: last x left out", "tl.load(x + o_k, mask=o_k < K", "tl.load(x + o_k, mask=o_k < K - 1"),
        ("gemv: places of codes not undone", "(b_x * 2.0 ** -(i * BITS % 12))", "b_x"),
        (
            "gemv: x of another tile",
            "o_k = o_word // RUN * (PLANES * RUN) + i * RUN + o_word % RUN\n            if WHOLE",
            "o_k = o_word // RUN * RUN + i * RUN + o_word % RUN\n            if WHOLE",
        ),
        (
            "gemv: x of another plane",
            "+ i * RUN + o_word % RUN\n            if WHOLE",
            "+ o_word % RUN\n            if WHOLE",
        ),
        (
            "gemv: groups added twice",
            "                part, b_sum = tl.zeros([BN, BW], tl.float32), tl.zeros([1, BW], tl.float32)\n    b_y",
            "                part += 0\n    b_y",
        ),
        (
            "gemv: earlier steps dropped",
            "acc += part * b_scale\n                part",
            "acc = part * b_scale\n                part",
        ),
        (
            "gemv: x read beyond the last where words end early",
            "K == w.codes.shape[1] * 32 //",
            "0 < w.codes.shape[1] * 32 //",
        ),
        ("gemv: scale left out", "acc += part * b_scale\n                part", "acc += part\n                part"),
        (
            "matmul: sums of a group kept for the next",
            "part = tl.zeros([BN, BM], tl.float32)",
            "part = acc * 0 if i == 0 else part",
        ),
        ("matmul: sums unscaled", "acc += part * b_scale\n            else", "acc += part\n            else"),
        (
            "matmul: sums of the last group only",
            "acc += part * b_scale\n            else",
            "acc = part * b_scale\n            else",
        ),
        ("matmul: sums where words of a row differ", 'shares_groups and format != "int8"', 'format != "int8"'),
        ("gemv: int8 scale of the first row", "tl.load(scales + o_n, mask", "tl.load(scales + 0 * o_n, mask"),
        ("gemv: bias left out", "b_y += tl.load(bias + o_n", "b_y += 0 * tl.load(bias + o_n"),
        ("matmul: rows of x beyond the last read", "tl.minimum(o_m, M - 1)", "o_m"),
        ("matmul: 32-bit row offset", ".to(tl.int64)[None, :] * stride_xm", "[None, :] * stride_xm"),
        ("matmul: stride of x taken for K", "[None, :] * stride_xm", "[None, :] * K"),
        (
            "matmul: every program has all steps",
            "range(tl.program_id(2), tl.cdiv(TILES * RUN, BW), SPLIT)",
            "range(tl.program_id(2), tl.cdiv(TILES * RUN, BW), 1)",
        ),
        (
            "matmul: last step left out",
            "range(tl.program_id(2), tl.cdiv(TILES * RUN, BW)",
            "range(tl.program_id(2), TILES * RUN // BW",
        ),
        (
            "matmul: words beyond the last read",
            "mask=o_word[None, :] < TILES * RUN",
            "mask=o_word[None, :] <= TILES * RUN",
        ),
        ("matmul: tile beyond the last", "tl.minimum(o_word // RUN, TILES - 1)", "(o_word // RUN)"),
        ("matmul: groups of the first tile", "tl.full([1, 1], step, tl.int32)", "tl.full([1, 1], 0, tl.int32)"),
        (
            "matmul: places of codes not undone",
            "b_scale * 2.0 ** -(i * BITS % 12)\n                acc",
            "b_scale\n                acc",
        ),
        ("matmul: x beyond the last read", "mask=o_k[:, None] < K", "mask=o_k[:, None] <= K"),
        ("matmul: planes before the last dropped", "b_x, acc, input_precision", "b_x, input_precision"),
        ("matmul: x rounded to tf32", 'input_precision="ieee"', 'input_precision="tf32"'),
        ("matmul: int8 scale left out", "acc *= tl.load(scales + o_row)", "acc *= 1.0"),
        (
            "matmul: sums of all programs in one place",
            "(tl.program_id(2).to(tl.int64) * M + o_m",
            "(tl.program_id(2).to(tl.int64) * 0 + o_m",
        ),
        ("matmul: outputs beyond the last written", "(o_n[:, None] < N))", "(o_n[:, None] <= N))"),
        ("reduce: first program's sum alone", "acc += tl.load(parts + s * SIZE", "acc += tl.load(parts + 0 * SIZE"),
        ("reduce: bias of the row", "bias + o % N", "bias + o // N"),
        ("reduce: beyond the last written", "m = o < SIZE", "m = o <= SIZE"),
        ("dequantize: columns beyond the last written", "mask=m_n & (o_k < K)", "mask=m_n & (o_k <= K)"),
        ("dequantize: rows beyond the last written", "mask=m_n & (o_k < K)", "mask=o_k < K"),
        ("dequantize: int8 scale left out", "b_w *= tl.load(scales + o_row)", "b_w *= 1.0"),
        (
            "dx through the transposed weight's dtype",
            "ctx.K, ctx.group, grad.dtype)",
            "ctx.K, ctx.group, torch.float16).to(grad.dtype)",
        ),
        ("x transposed read as it lies", "x if x.stride(1) == 1 else x.contiguous()", "x"),
    ],
    "grouped_gemm": [
        ("mask off by one along the sum", "m_k = o_k < K", "m_k = o_k <= K"),
        (
            "mask off by one along the columns",
            "m_k[:, None] & (o_n < N)[None, :]",
            "m_k[:, None] & (o_n <= N)[None, :]",
        ),
        ("mask left out where only the columns end in a block", "N % BN + K % BK != 0", "K % BK != 0"),
        (
            "only the last block is summed",
            "b_acc = tl.dot(b_rows, b_matrix.to(b_rows.dtype), b_acc,",
            "b_acc = tl.dot(b_rows, b_matrix.to(b_rows.dtype),",
        ),
        (
            "tf32",
            'tl.dot(b_rows, b_matrix.to(b_rows.dtype), b_acc, input_precision="ieee")',
            "tl.dot(b_rows, b_matrix.to(b_rows.dtype), b_acc)",
        ),
        (
            "tiles swapped with blocks of columns",
            "i // NUM_N, i % NUM_N, num_tiles",
            "i % NUM_N, i // NUM_N, num_tiles",
        ),
        (
            "a block of columns too few",
            "(W + BN - 1) // BN)\n    if first >= end:\n        return\n    o_p = first + tl.arange(0, BM)\n    # B",
            "W // BN)\n    if first >= end:\n        return\n    o_p = first + tl.arange(0, BM)\n    # B",
        ),
        (
            "rows beyond an expert's last",
            "tl.load(p_order + tl.minimum(o_p, end - 1)) // k",
            "tl.load(p_order + o_p) // k",
        ),
        ("row in place of token", "tl.minimum(o_p, end - 1)) // k", "tl.minimum(o_p, end - 1))"),
        ("token offset of 32 bits", "p_x + o_r.to(tl.int64)[:, None] * s_x", "p_x + o_r[:, None] * s_x"),
        ("stride of a matrix swapped", "o_w[None, :] * D + o_d[:, None]", "o_w[None, :] * W + o_d[:, None]"),
        ("first expert for all", "o_matrix = i_e * W * D +", "o_matrix ="),
        ("up in place of gate", "load(p_gate + o_matrix", "load(p_up + o_matrix"),
        ("expert offset of 32 bits", "return i_n, tl.load(p_tile).to(tl.int64),", "return i_n, tl.load(p_tile),"),
        ("SwiGLU without the gate's own factor", "(b_g * tl.sigmoid(b_g) * b_u)", "(tl.sigmoid(b_g) * b_u)"),
        ("gate kept in place of up", "b_u.to(p_u.dtype.element_ty)", "b_g.to(p_u.dtype.element_ty)"),
        (
            "store mask off by one row",
            "m_out = (o_p < end)[:, None] & m_w[None, :]",
            "m_out = (o_p <= end)[:, None] & m_w[None, :]",
        ),
        ("not scattered", "o_out = tl.load(p_order + o_last).to(tl.int64)", "o_out = o_last"),
        ("scattered offset of 32 bits", "tl.load(p_order + o_last).to(tl.int64)", "tl.load(p_order + o_last)"),
        ("second product left out", "if TWO:", "if not TWO:"),
        ("second matrix is the first", "p_c_matrix + i_e * W * D", "p_b_matrix + i_e * W * D"),
        ("last expert of a token left out", "for j in range(k):", "for j in range(k - 1):"),
        ("combined offset of 32 bits", "o_row = o_r.to(tl.int64) * k + j", "o_row = o_r * k + j"),
        ("weights applied in the wrong pass", "if WEIGHTED:", "if not WEIGHTED:"),
        ("weight of another place", "tl.load(p_weights + o_row, mask=m_r", "tl.load(p_weights + o_r, mask=m_r"),
        ("dweights of all columns in one place", "i_n.to(tl.int64) * P + o_row", "o_row"),
        ("dweights without up", "tl.sum(b_da * b_a, 1)", "tl.sum(b_da * b_silu, 1)"),
        ("weight missing in the backward pass", "b_da *= b_weights", "b_da *= 1.0"),
        ("derivative of SiLU", "(b_sigmoid + b_silu * (1 - b_sigmoid))", "(b_sigmoid + b_silu)"),
        ("weight missing in the gradient of down", "(b_weights * b_a).to(", "b_a.to("),
        ("gradients of gate and up swapped", "(b_da * b_silu).to(p_du", "(b_da * b_u).to(p_du"),
        ("the next expert's row added", "m_p = o_p < end\n        o_r", "m_p = o_p <= end\n        o_r"),
        (
            "an expert's rows begin one late",
            "first, end = tl.load(p_bounds + i_e),",
            "first, end = 1 + tl.load(p_bounds + i_e),",
        ),
        (
            "no zeros for an expert without tokens",
            "mask=(o_w < W)[:, None] & (o_d < D)[None, :])\n\n\n# --- backward, on",
            "mask=(first < end) & (o_w < W)[:, None] & (o_d < D)[None, :])\n\n\n# --- backward, on",
        ),
        (
            "row in place of token in a matrix's gradient, at first",
            "mask=o_first < end, other=0) // k",
            "mask=o_first < end, other=0)",
        ),
        ("row in place of token in a matrix's gradient, later", "BK < end, other=0) // k", "BK < end, other=0)"),
        ("a matrix's gradient from the same rows again", "p_order + o_p + BK, mask", "p_order + o_p, mask"),
        ("order read beyond the last row", "mask=o_p + BK < end, other=0)", "mask=o_p < end, other=0)"),
        (
            "only the last rows are summed",
            "b_out = tl.dot(b_rows, b_tokens, b_out,",
            "b_out = tl.dot(b_rows, b_tokens,",
        ),
        ("gradient offset of 32 bits", "o_out = i_e.to(tl.int64) * W * D", "o_out = i_e * W * D"),
        ("strides of down for gate", "matrix_grad(dg, x, gate, (D, 1)", "matrix_grad(dg, x, gate, (1, W)"),
        ("x in place of the output's gradient", "matrix_grad(wa, dout, down", "matrix_grad(wa, x, down"),
        ("a tile too few for each expert", "(bounds.diff() + BM - 1) // BM", "bounds.diff() // BM"),
        ("bound on the tiles too low", "+ min(num_experts, num_rows)", "+ 1"),
        (
            "tile ends belong to the expert before",
            "torch.searchsorted(tile_ends, tile, right=True)",
            "torch.searchsorted(tile_ends, tile)",
        ),
        ("tiles run into the next expert", "torch.minimum(first + BM, bounds.gather(0, expert + 1))", "first + BM"),
    ],
}


@dataclass(frozen=True)
class MutationConfig:
    # Kernel whose bugs are planted; all where it is empty.
    only: str = ""


def main(config: MutationConfig) -> int:
    kernels = [config.only] if config.only else list(MUTATIONS)
    known = {}
    if RESULTS.exists():
        known = {identity(line): line for line in read_json(RESULTS)["mutations"]}
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for kernel in kernels:
            for line in check_kernel(Path(folder), kernel, known):
                known[identity(line)] = line
                write(known)
    lines = write(known)
    caught = [line for line in lines if line["result"] != "survived"]
    for line in lines:
        if line not in caught:
            print(f"survived: {line['kernel']}: {line['what']}: {line['old']!r} -> {line['new']!r}")
    print(f"{len(caught)} of {len(lines)} planted bugs were caught ({100 * len(caught) / len(lines):.1f} %)")
    return int(len(caught) < 0.95 * len(lines))


def identity(line: dict) -> tuple:
    return line["kernel"], line["old"], line["new"]


def write(known: dict) -> list[dict]:
    """Write and return the results of the bugs that the table still has, in its order."""
    table = [(kernel, old, new) for kernel, bugs in MUTATIONS.items() for _, old, new in bugs]
    lines = [known[key] for key in table if key in known]
    environment = train.describe_environment(torch.device("cpu"), threads=1)
    counts = {"planted": len(lines), "caught": sum(line["result"] != "survived" for line in lines)}
    RESULTS.write_text(json.dumps(counts | {"environment": environment, "mutations": lines}, indent=1) + "\n")
    return lines


def copy_tree(folder: Path):
    """Copy what git tracks or would track; links stay links."""
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.toml", *LINKS]
    for name in subprocess.run(files, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def check_kernel(root: Path, kernel: str, known: dict):
    """Yield a result for each bug of a kernel that has none for these sources."""
    source, tests = root / "kernels" / f"{kernel}.py", root / "tests" / "kernels" / f"test_{kernel}.py"
    judge = root / "tests" / "kernels" / "oracle.py"
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in (source, tests, judge))).hexdigest()[:12]
    bugs = [bug for bug in MUTATIONS[kernel] if known.get((kernel, *bug[1:]), {}).get("sources") != sources]
    if not bugs:
        return
    result, failed, seconds = run_tests(root, tests, limit=3600)
    if result != "survived":
        raise UserError(f"the tests of kernels/{kernel}.py fail before a bug is planted: {failed}")
    print(f"{kernel}: its tests take {seconds:.0f} s", flush=True)
    limit = round(3 * seconds) + 10
    for number, (what, old, new) in enumerate(bugs):
        with planted(source, old, new):
            result, failed, seconds = run_tests(root, tests, limit)
        print(f"{kernel} {number + 1}/{len(bugs)}: {what}: {result} {failed} ({seconds:.0f} s)", flush=True)
        line = {"kernel": kernel, "what": what, "old": old, "new": new, "result": result, "by": failed}
        yield line | {"sources": sources}


def plant(text: str, old: str, new: str) -> str:
    """Replace `old`, which must be there exactly once and differ from `new` in one line; else raise UserError."""
    if text.count(old) != 1:
        raise UserError(f"{old!r} is there {text.count(old)} times and must be there once")
    changed = [a != b for a, b in zip(old.split("\n"), new.split("\n"), strict=True)]
    if sum(changed) != 1:
        raise UserError(f"{old!r} and {new!r} differ in {sum(changed)} lines and must in one")
    return text.replace(old, new)


@contextlib.contextmanager
def planted(path: Path, old: str, new: str):
    """Have `new` in place of `old` in a file."""
    text = path.read_text()
    path.write_text(plant(text, old, new))
    try:
        yield
    finally:
        path.write_text(text)


def run_tests(root: Path, tests: Path, limit: int) -> tuple[str, str, float]:
    """Return caught, hangs or survived, the first test that failed, and seconds of CPU, of which there are `limit`."""
    settings = dict(PYTHONPATH=str(root), OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    if os.environ.get("PYTHONPATH"):
        settings["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    command += ["--hypothesis-seed=0", str(tests)]
    before = children_seconds()
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    seconds = children_seconds() - before
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL) and seconds >= limit - 1:
        return "hangs", "", seconds
    failed = re.search(r"^FAILED \S*::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1 and failed is None):
        raise UserError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return ("caught", failed[1], seconds) if failed else ("survived", "", seconds)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    import tyro

    cli.run(lambda: sys.exit(main(tyro.cli(MutationConfig, description=__doc__))))
