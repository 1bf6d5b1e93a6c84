"""Self-distillation's loss from logits in one read, and its gradient from one more.

A program owns a chunk of the codes and walks through a share of the groups (rows, or images with their views): its
piece of the centre is read once, a teacher's chunk once for all student views. What it writes of a row are the maximum
and sums relative to it; the last program of a share puts the chunks together, the last of all adds the shares up, both
in a fixed order. Exponentials are powers of two, of logits times log2(e) / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arrival import arrive

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)
"""A logit that is not there: its exponential is zero, and zero times it."""


@triton.jit
def is_read(p_weight, i_g, groups, V: tl.constexpr, V_PAD: tl.constexpr):
    """Whether a student row of group ``i_g`` has a weight other than 0."""
    o_v = tl.arange(0, V_PAD).to(tl.int64)
    b_w = tl.load(p_weight + o_v * groups + i_g, mask=o_v < V, other=0)
    return tl.max((b_w != 0).to(tl.int32), 0) != 0


@triton.jit
def inside(o_k, codes, EVEN: tl.constexpr):
    """Whether there are codes at these places; ``EVEN``: chunks divide them, so that no place need be asked."""
    return tl.full(o_k.shape, 1, tl.int1) if EVEN else o_k < codes


@triton.jit
def where_inside(m_k, b_x, other, EVEN: tl.constexpr):
    return b_x if EVEN else tl.where(m_k, b_x, other)


@triton.jit
def student_sums(p_student, p_weight, p_part, b_e, i_v, i_g, m_group, groups, codes, o_k, m_k, k_s,
                 V: tl.constexpr, U: tl.constexpr, U_PAD: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr):
    """Store of one student row's chunk: its maximum, Σ e^x, and Σ e·x with each teacher's e."""
    i_row = (i_v * groups + i_g).to(tl.int64)
    if p_weight is not None:
        m_group = m_group & (tl.load(p_weight + i_row) != 0)
    b_s = tl.load(p_student + i_row * codes + o_k, mask=m_k & m_group, other=0).to(tl.float32)
    b_max = tl.max(where_inside(m_k, b_s, NOTHING, EVEN), 1, keep_dims=True)
    b_x = where_inside(m_k, (b_s - b_max) * k_s, NOTHING, EVEN)
    b_sum = tl.sum(tl.exp2(b_x), 1, keep_dims=True)
    values = tl.cast(groups, tl.int64) * V * CHUNKS
    o_u = tl.arange(0, U_PAD)
    p_row = p_part + i_row * CHUNKS + tl.program_id(1) + tl.zeros((1, 1), tl.int64)
    tl.store(p_row, b_max)
    tl.store(p_row + values, b_sum)
    p_pair = p_part + (2 + o_u) * values + i_row * CHUNKS + tl.program_id(1)
    tl.store(p_pair, tl.sum(b_e * b_x, 1), mask=o_u < U)


@triton.jit(do_not_specialize=["groups", "per_program"])
def distillation_forward(
    p_student,  # (V, G, K) logits
    p_teacher,  # (U, G, K) logits
    p_centre,  # (K,) float32
    p_weight,  # (V, G) float32 or None
    p_student_temp,  # scalar float32
    p_teacher_temp,  # scalar float32
    p_part,  # (2 + U, V·G, CHUNKS) float32, scratch: maximum, Σ e^x, Σ e·x of each student row
    p_target,  # (3, U·G, CHUNKS) float32, scratch: maximum, Σ e^y, Σ e^y·y of each teacher row
    p_sums,  # (2, shares) float32, scratch: of loss and entropy
    p_counter,  # (1 + shares,) int32, see .arrival
    p_student_rows,  # (2, V·G) float32, out: maximum, log2 of the sum
    p_teacher_rows,  # (2, U·G) float32, out
    p_loss,  # scalar float32, out
    p_entropy,  # scalar float32, out
    groups, per_program, codes, share,
    V: tl.constexpr, V_PAD: tl.constexpr, U: tl.constexpr, U_PAD: tl.constexpr, OWN: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    MOST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):
    i_split = tl.program_id(1)
    o_u = tl.arange(0, U_PAD)[:, None]
    o_k = i_split * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_k = inside(o_k, codes, EVEN)
    b_c = tl.load(p_centre + o_k, mask=m_k, other=0)
    k_s = LOG2E / tl.load(p_student_temp)
    k_t = LOG2E / tl.load(p_teacher_temp)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, groups)
    values = tl.cast(groups, tl.int64) * U * CHUNKS
    for i_g in tl.range(first, last, num_stages=OUTER):
        m_group = i_g < last  # always
        if p_weight is not None:
            m_group = is_read(p_weight, i_g, groups, V, V_PAD)
        m_t = (o_u < U) & m_k & m_group
        i_target = (o_u * groups + i_g).to(tl.int64)
        b_t = tl.load(p_teacher + i_target * codes + o_k, mask=m_t, other=0).to(tl.float32) - b_c
        # What is computed of rows that are not read is never looked at.
        b_max = tl.max(where_inside(m_k, b_t, NOTHING, EVEN), 1, keep_dims=True)
        b_y = where_inside(m_k, (b_t - b_max) * k_t, NOTHING, EVEN)
        b_e = tl.exp2(b_y)
        p_row = p_target + i_target * CHUNKS + i_split
        tl.store(p_row, b_max, mask=o_u < U)
        tl.store(p_row + values, tl.sum(b_e, 1, keep_dims=True), mask=o_u < U)
        tl.store(p_row + 2 * values, tl.sum(b_e * b_y, 1, keep_dims=True), mask=o_u < U)
        if V == 1:
            student_sums(p_student, p_weight, p_part, b_e, 0, i_g, m_group, groups, codes, o_k, m_k, k_s, V, U,
                         U_PAD, EVEN, CHUNKS)
        else:
            for i_v in tl.range(0, V, num_stages=INNER):
                student_sums(p_student, p_weight, p_part, b_e, i_v, i_g, m_group, groups, codes, o_k, m_k, k_s, V, U,
                             U_PAD, EVEN, CHUNKS)
    if arrive(p_counter + 1 + tl.program_id(0), SPLITS):
        put_together(p_weight, p_part, p_target, p_sums, p_student_rows, p_teacher_rows, first, last, groups, share,
                     k_s, k_t, V, U, OWN, SPLITS, CHUNKS, ROWS)
        if arrive(p_counter, tl.num_programs(0)):
            add_shares(p_sums, p_loss, p_entropy, tl.num_programs(0), MOST)


@triton.jit
def put_together(p_weight, p_part, p_target, p_sums, p_student_rows, p_teacher_rows, first, last, groups, share,
                 k_s, k_t, V: tl.constexpr, U: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr,
                 CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """The rows of the groups ``first`` to ``last`` from their chunks; the sums of their losses and entropies."""
    rows, targets = tl.cast(groups, tl.int64) * V, tl.cast(groups, tl.int64) * U
    o_split = tl.arange(0, CHUNKS)[None, :]
    a_loss = tl.zeros((ROWS,), tl.float32)
    a_entropy = tl.zeros((ROWS,), tl.float32)
    for i in range(0, (last - first) * V, ROWS):
        o_r = i + tl.arange(0, ROWS)
        m_r = o_r < (last - first) * V
        i_v = o_r % V
        i_g = first + o_r // V
        i_row = (i_v * groups + i_g).to(tl.int64)
        b_w = tl.zeros((ROWS,), tl.float32) + share
        if p_weight is not None:
            b_w = tl.load(p_weight + i_row, mask=m_r, other=0)
            m_r = m_r & (b_w != 0)
        m = m_r[:, None] & (o_split < SPLITS)
        # Other processors wrote these: past the cache of this one.
        p_own = p_part + i_row[:, None] * CHUNKS + o_split
        b_part = tl.load(p_own, mask=m, other=NOTHING, cache_modifier=".cg")
        b_max = tl.max(b_part, 1)
        b_x = (b_part - b_max[:, None]) * k_s
        b_sum = tl.load(p_own + rows * CHUNKS, mask=m, other=0, cache_modifier=".cg")
        b_log = tl.log2(tl.where(m_r, tl.sum(b_sum * tl.exp2(b_x), 1), 1.0))
        tl.store(p_student_rows + i_row, b_max, mask=m_r)
        tl.store(p_student_rows + rows + i_row, b_log, mask=m_r)
        for u in tl.static_range(U):
            i_target = tl.cast(groups, tl.int64) * u + i_g
            p_row = p_target + i_target[:, None] * CHUNKS + o_split
            b_part = tl.load(p_row, mask=m, other=NOTHING, cache_modifier=".cg")
            b_max = tl.max(b_part, 1)
            b_y = (b_part - b_max[:, None]) * k_t
            b_f = tl.exp2(b_y)
            b_sum = tl.load(p_row + targets * CHUNKS, mask=m, other=0, cache_modifier=".cg")
            b_all = tl.where(m_r, tl.sum(b_sum * b_f, 1), 1.0)
            # Student views of one group write the same values.
            tl.store(p_teacher_rows + i_target, b_max, mask=m_r)
            tl.store(p_teacher_rows + targets + i_target, tl.log2(b_all), mask=m_r)
            b_ey = tl.load(p_row + 2 * targets * CHUNKS, mask=m, other=0, cache_modifier=".cg")
            b_ex = tl.load(p_own + (2 + u) * rows * CHUNKS, mask=m, other=0, cache_modifier=".cg")
            b_entropy = tl.log2(b_all) - tl.sum(b_f * (b_ey + b_y * b_sum), 1) / b_all
            b_loss = b_log - tl.sum(b_f * (b_ex + b_x * b_sum), 1) / b_all
            m_pair = m_r if OWN else m_r & (i_v != u)
            a_loss += tl.where(m_pair, b_w * b_loss, 0.0)
            a_entropy += tl.where(m_pair, b_w * b_entropy, 0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(a_loss, 0))
    tl.store(p_sums + tl.num_programs(0) + tl.program_id(0), tl.sum(a_entropy, 0))


@triton.jit
def add_shares(p_sums, p_loss, p_entropy, shares, MOST: tl.constexpr):
    o = tl.arange(0, MOST)
    b_loss = tl.load(p_sums + o, mask=o < shares, other=0, cache_modifier=".cg")
    b_entropy = tl.load(p_sums + shares + o, mask=o < shares, other=0, cache_modifier=".cg")
    tl.store(p_loss, tl.sum(b_loss, 0) * LN2)
    tl.store(p_entropy, tl.sum(b_entropy, 0) * LN2)


@triton.jit
def student_slope(p_student, p_weight, p_rows, p_out, b_p, b_factor, i_v, i_g, m_group, groups, codes, o_k, m_k, k_s,
                  share, V: tl.constexpr, U: tl.constexpr, U_PAD: tl.constexpr, OWN: tl.constexpr, EVEN: tl.constexpr):
    """Store of one student row's chunk of the gradient, w / τ · grad · (n·q − Σ p)."""
    i_row = (i_v * groups + i_g).to(tl.int64)
    if p_weight is not None:
        b_w = tl.load(p_weight + i_row)
        m_group = m_group & (b_w != 0)
    b_s = tl.load(p_student + i_row * codes + o_k, mask=m_k & m_group, other=0).to(tl.float32)
    b_max = tl.load(p_rows + i_row, mask=m_group, other=0)
    b_log = tl.load(p_rows + tl.cast(groups, tl.int64) * V + i_row, mask=m_group, other=0)
    b_q = tl.exp2(where_inside(m_k, (b_s - b_max) * k_s - b_log, 0.0, EVEN))
    b_n = 1.0 * U
    b_target = b_p
    if not OWN:
        o_u = tl.arange(0, U_PAD)[:, None]
        b_target = tl.where(o_u != i_v, b_p, 0.0)
        b_n = tl.where(i_v < U, U - 1.0, 1.0 * U)
    if U_PAD > 1:
        b_target = tl.sum(b_target, 0, keep_dims=True)
    if p_weight is None:
        b_d = (b_n * b_q - b_target) * (b_factor * share)
    else:
        b_d = tl.where(b_w != 0, (b_n * b_q - b_target) * (b_factor * b_w), 0.0)
    tl.store(p_out + i_row * codes + o_k, b_d.to(p_out.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["groups", "per_program"])
def distillation_backward(
    p_grad,  # scalar: gradient of the loss
    p_student,  # (V, G, K) logits
    p_teacher,  # (U, G, K) logits
    p_centre,  # (K,) float32
    p_weight,  # (V, G) float32 or None
    p_student_temp,  # scalar float32
    p_teacher_temp,  # scalar float32
    p_student_rows,  # (2, V·G) float32: maximum, log2 of the sum
    p_teacher_rows,  # (2, U·G) float32
    p_out,  # (V, G, K), out: gradient of the student
    groups, per_program, codes, share,
    V: tl.constexpr, V_PAD: tl.constexpr, U: tl.constexpr, U_PAD: tl.constexpr, OWN: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):
    o_u = tl.arange(0, U_PAD)[:, None]
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_k = inside(o_k, codes, EVEN)
    b_c = tl.load(p_centre + o_k, mask=m_k, other=0)
    k_s = LOG2E / tl.load(p_student_temp)
    k_t = LOG2E / tl.load(p_teacher_temp)
    b_factor = tl.load(p_grad).to(tl.float32) / tl.load(p_student_temp)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, groups)
    for i_g in tl.range(first, last, num_stages=OUTER):
        m_group = i_g < last  # always
        if p_weight is not None:
            m_group = is_read(p_weight, i_g, groups, V, V_PAD)
        m_t = (o_u < U) & m_k & m_group
        i_target = (o_u * groups + i_g).to(tl.int64)
        b_t = tl.load(p_teacher + i_target * codes + o_k, mask=m_t, other=0).to(tl.float32) - b_c
        m_row = (o_u < U) & m_group
        b_max = tl.load(p_teacher_rows + i_target, mask=m_row, other=0)
        b_log = tl.load(p_teacher_rows + tl.cast(groups, tl.int64) * U + i_target, mask=m_row, other=0)
        b_p = tl.exp2(where_inside(m_k, (b_t - b_max) * k_t - b_log, 0.0, EVEN))
        if U < U_PAD:
            b_p = tl.where(o_u < U, b_p, 0.0)
        if V == 1:
            student_slope(p_student, p_weight, p_student_rows, p_out, b_p, b_factor, 0, i_g, m_group, groups, codes,
                          o_k, m_k, k_s, share, V, U, U_PAD, OWN, EVEN)
        else:
            for i_v in tl.range(0, V, num_stages=INNER):
                student_slope(p_student, p_weight, p_student_rows, p_out, b_p, b_factor, i_v, i_g, m_group, groups,
                              codes, o_k, m_k, k_s, share, V, U, U_PAD, OWN, EVEN)
