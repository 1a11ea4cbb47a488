"""NASA attention as Triton kernels: Z+ - scale * Z- in one pass over the queries, and its gradients.

The names are FlashAttention's (Dao et al. 2022): m_i and l_i are a row's running maximum and sum, acc its unnormalised output, lse the
log-sum-exp of its scores, delta the row sum of o * do. Each branch is softmax(q k^T / sqrt(d)) v with an online softmax of its own; queries
are read once and the difference is written once. A branch is multiplied by its `factor`: 1 for the prompt, -scale for the negative. Sums
and softmax are fp32, logarithms to base 2. The head dimension is split into BLOCK_D, a power of two, and REST, so that a head of 72 costs
80 and not 128. Strides are (image, head, row); the last axis is contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def _head(ptr, strides, image, head):
    return ptr + image * strides[0] + head * strides[1]


@triton.jit
def _load(ptr, rows, strides, keep, offs_d, HEAD_DIM: tl.constexpr):
    """A block (rows, offs_d) of a head's matrix, 0 in rows that are not kept and beyond the last column."""
    return tl.load(ptr + rows[:, None] * strides[2] + offs_d[None, :], mask=keep[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(ptr, rows, strides, keep, offs_d, HEAD_DIM: tl.constexpr, values):
    values = values.to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] * strides[2] + offs_d[None, :], values, mask=keep[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _attended(mask_ptr, offs_n, seqlen_k, MASKED: tl.constexpr):
    """Which of these keys are attended to."""
    keep = offs_n < seqlen_k
    if MASKED:
        keep = keep & (tl.load(mask_ptr + offs_n, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b in fp32. "wide": Triton's interpreter multiplies the bits of bf16 as if they were whole numbers, so it gets fp32."""
    if PRECISION == "wide":
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _dot_transposed(a, a_rest, b, b_rest, PRECISION: tl.constexpr, REST: tl.constexpr):
    """a b^T over both pieces of the head dimension, in fp32."""
    product = _dot(a, tl.trans(b), PRECISION)
    if REST:
        product += _dot(a_rest, tl.trans(b_rest), PRECISION)
    return product


@triton.jit
def _forward_branch(
    q, q_rest, k_ptr, k_strides, v_ptr, v_strides, mask_ptr, seqlen_k, qk_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One branch of a block of queries: its output in two pieces and its lse; both 0 where no key is attended to."""
    offs_d, offs_rest = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, REST or 16)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc, acc_rest = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, REST or 16], tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        keep = _attended(mask_ptr, offs_n, seqlen_k, MASKED)
        k = _load(k_ptr, offs_n, k_strides, keep, offs_d, HEAD_DIM)
        k_rest = _load(k_ptr, offs_n, k_strides, keep, offs_rest, HEAD_DIM) if REST else k
        qk = tl.where(keep[None, :], _dot_transposed(q, q_rest, k, k_rest, PRECISION, REST) * qk_scale, float("-inf"))
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        m_finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # -inf - -inf would be NaN while no key was attended to
        p, alpha = tl.exp2(qk - m_finite[:, None]), tl.exp2(m_i - m_finite)
        m_i, l_i = m_ij, l_i * alpha + tl.sum(p, 1)
        v = _load(v_ptr, offs_n, v_strides, keep, offs_d, HEAD_DIM)
        p = p.to(v.dtype)
        acc = acc * alpha[:, None] + _dot(p, v, PRECISION)
        if REST:
            v_rest = _load(v_ptr, offs_n, v_strides, keep, offs_rest, HEAD_DIM)
            acc_rest = acc_rest * alpha[:, None] + _dot(p, v_rest, PRECISION)
    l_safe = tl.where(l_i > 0, l_i, 1.0)
    return acc / l_safe[:, None], acc_rest / l_safe[:, None], tl.where(l_i > 0, m_i + tl.log2(l_safe), 0.0)


@triton.jit
def forward_kernel(
    q_ptr, q_strides, k_pos_ptr, k_pos_strides, v_pos_ptr, v_pos_strides, mask_pos_ptr, seqlen_pos,
    k_neg_ptr, k_neg_strides, v_neg_ptr, v_neg_strides, mask_neg_ptr, seqlen_neg,
    factor_ptr, o_ptr, o_strides, heads, seqlen_q, qk_scale,
    MASKED_POS: tl.constexpr, MASKED_NEG: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The output of a block of queries of one head of one image."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < seqlen_q
    offs_d, offs_rest = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, REST or 16)
    q_ptr = _head(q_ptr, q_strides, image, head)
    q = _load(q_ptr, offs_m, q_strides, in_rows, offs_d, HEAD_DIM)
    q_rest = _load(q_ptr, offs_m, q_strides, in_rows, offs_rest, HEAD_DIM) if REST else q
    k_pos_ptr, v_pos_ptr = _head(k_pos_ptr, k_pos_strides, image, head), _head(v_pos_ptr, v_pos_strides, image, head)
    k_neg_ptr, v_neg_ptr = _head(k_neg_ptr, k_neg_strides, image, head), _head(v_neg_ptr, v_neg_strides, image, head)
    mask_pos_ptr, mask_neg_ptr = mask_pos_ptr + image * seqlen_pos, mask_neg_ptr + image * seqlen_neg
    o_pos, o_pos_rest, _ = _forward_branch(
        q, q_rest, k_pos_ptr, k_pos_strides, v_pos_ptr, v_pos_strides, mask_pos_ptr, seqlen_pos, qk_scale,
        MASKED_POS, PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, REST,
    )  # fmt: skip
    o_neg, o_neg_rest, _ = _forward_branch(
        q, q_rest, k_neg_ptr, k_neg_strides, v_neg_ptr, v_neg_strides, mask_neg_ptr, seqlen_neg, qk_scale,
        MASKED_NEG, PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, REST,
    )  # fmt: skip
    factor = tl.load(factor_ptr + image)
    o_ptr = _head(o_ptr, o_strides, image, head)
    _store(o_ptr, offs_m, o_strides, in_rows, offs_d, HEAD_DIM, o_pos + factor * o_neg)
    if REST:
        _store(o_ptr, offs_m, o_strides, in_rows, offs_rest, HEAD_DIM, o_pos_rest + factor * o_neg_rest)


@triton.jit
def _dq_branch(
    q, q_rest, do, do_rest, k_ptr, k_strides, v_ptr, v_strides, mask_ptr, seqlen_k, qk_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dq over sm_scale of one branch, in two pieces, its lse and its delta. The output is computed again instead of being kept."""
    offs_d, offs_rest = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, REST or 16)
    o, o_rest, lse = _forward_branch(
        q, q_rest, k_ptr, k_strides, v_ptr, v_strides, mask_ptr, seqlen_k, qk_scale,
        MASKED, PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, REST,
    )  # fmt: skip
    delta = tl.sum(o * do.to(tl.float32), 1)
    if REST:
        delta += tl.sum(o_rest * do_rest.to(tl.float32), 1)
    dq, dq_rest = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, REST or 16], tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        keep = _attended(mask_ptr, offs_n, seqlen_k, MASKED)
        k, v = _load(k_ptr, offs_n, k_strides, keep, offs_d, HEAD_DIM), _load(v_ptr, offs_n, v_strides, keep, offs_d, HEAD_DIM)
        k_rest = _load(k_ptr, offs_n, k_strides, keep, offs_rest, HEAD_DIM) if REST else k
        v_rest = _load(v_ptr, offs_n, v_strides, keep, offs_rest, HEAD_DIM) if REST else v
        qk = tl.where(keep[None, :], _dot_transposed(q, q_rest, k, k_rest, PRECISION, REST) * qk_scale, float("-inf"))
        ds = tl.exp2(qk - lse[:, None]) * (_dot_transposed(do, do_rest, v, v_rest, PRECISION, REST) - delta[:, None])
        dq += _dot(ds.to(k.dtype), k, PRECISION)
        if REST:
            dq_rest += _dot(ds.to(k.dtype), k_rest, PRECISION)
    return dq, dq_rest, lse, delta


@triton.jit
def dq_kernel(
    q_ptr, q_strides, k_pos_ptr, k_pos_strides, v_pos_ptr, v_pos_strides, mask_pos_ptr, seqlen_pos,
    k_neg_ptr, k_neg_strides, v_neg_ptr, v_neg_strides, mask_neg_ptr, seqlen_neg,
    factor_ptr, do_ptr, do_strides, dq_ptr, dq_strides, lse_ptr, delta_ptr, heads, seqlen_q, qk_scale, sm_scale,
    MASKED_POS: tl.constexpr, MASKED_NEG: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; and lse and delta (2, B, H, N), of the prompt and of the negative, for dk and dv."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < seqlen_q
    offs_d, offs_rest = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, REST or 16)
    q_ptr, do_ptr = _head(q_ptr, q_strides, image, head), _head(do_ptr, do_strides, image, head)
    q = _load(q_ptr, offs_m, q_strides, in_rows, offs_d, HEAD_DIM)
    do = _load(do_ptr, offs_m, do_strides, in_rows, offs_d, HEAD_DIM)
    q_rest = _load(q_ptr, offs_m, q_strides, in_rows, offs_rest, HEAD_DIM) if REST else q
    do_rest = _load(do_ptr, offs_m, do_strides, in_rows, offs_rest, HEAD_DIM) if REST else do
    k_pos_ptr, v_pos_ptr = _head(k_pos_ptr, k_pos_strides, image, head), _head(v_pos_ptr, v_pos_strides, image, head)
    k_neg_ptr, v_neg_ptr = _head(k_neg_ptr, k_neg_strides, image, head), _head(v_neg_ptr, v_neg_strides, image, head)
    mask_pos_ptr, mask_neg_ptr = mask_pos_ptr + image * seqlen_pos, mask_neg_ptr + image * seqlen_neg
    dq_pos, dq_pos_rest, lse_pos, delta_pos = _dq_branch(
        q, q_rest, do, do_rest, k_pos_ptr, k_pos_strides, v_pos_ptr, v_pos_strides, mask_pos_ptr, seqlen_pos, qk_scale,
        MASKED_POS, PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, REST,
    )  # fmt: skip
    dq_neg, dq_neg_rest, lse_neg, delta_neg = _dq_branch(
        q, q_rest, do, do_rest, k_neg_ptr, k_neg_strides, v_neg_ptr, v_neg_strides, mask_neg_ptr, seqlen_neg, qk_scale,
        MASKED_NEG, PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, REST,
    )  # fmt: skip
    factor = tl.load(factor_ptr + image)
    dq_ptr = _head(dq_ptr, dq_strides, image, head)
    _store(dq_ptr, offs_m, dq_strides, in_rows, offs_d, HEAD_DIM, (dq_pos + factor * dq_neg) * sm_scale)
    if REST:
        _store(dq_ptr, offs_m, dq_strides, in_rows, offs_rest, HEAD_DIM, (dq_pos_rest + factor * dq_neg_rest) * sm_scale)
    offs_row = tl.program_id(1).to(tl.int64) * seqlen_q + offs_m
    neg = tl.num_programs(1).to(tl.int64) * seqlen_q
    tl.store(lse_ptr + offs_row, lse_pos, mask=in_rows)
    tl.store(lse_ptr + neg + offs_row, lse_neg, mask=in_rows)
    tl.store(delta_ptr + offs_row, delta_pos, mask=in_rows)
    tl.store(delta_ptr + neg + offs_row, delta_neg, mask=in_rows)


@triton.jit
def dk_dv_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, mask_ptr, seqlen_k,
    factor_ptr, do_ptr, do_strides, lse_ptr, delta_ptr, dk_ptr, dk_strides, dv_ptr, dv_strides,
    heads, seqlen_q, qk_scale, sm_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one branch, for a block of keys of one head of one image, over all queries."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_keys = offs_n < seqlen_k
    keep = _attended(mask_ptr + image * seqlen_k, offs_n, seqlen_k, MASKED)
    offs_d, offs_rest = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, REST or 16)
    q_ptr, do_ptr = _head(q_ptr, q_strides, image, head), _head(do_ptr, do_strides, image, head)
    k_ptr, v_ptr = _head(k_ptr, k_strides, image, head), _head(v_ptr, v_strides, image, head)
    k, v = _load(k_ptr, offs_n, k_strides, keep, offs_d, HEAD_DIM), _load(v_ptr, offs_n, v_strides, keep, offs_d, HEAD_DIM)
    k_rest = _load(k_ptr, offs_n, k_strides, keep, offs_rest, HEAD_DIM) if REST else k
    v_rest = _load(v_ptr, offs_n, v_strides, keep, offs_rest, HEAD_DIM) if REST else v
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_rest, dv_rest = tl.zeros([BLOCK_N, REST or 16], tl.float32), tl.zeros([BLOCK_N, REST or 16], tl.float32)
    for start_m in range(0, seqlen_q, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_rows = offs_m < seqlen_q
        q = _load(q_ptr, offs_m, q_strides, in_rows, offs_d, HEAD_DIM)
        do = _load(do_ptr, offs_m, do_strides, in_rows, offs_d, HEAD_DIM)
        q_rest = _load(q_ptr, offs_m, q_strides, in_rows, offs_rest, HEAD_DIM) if REST else q
        do_rest = _load(do_ptr, offs_m, do_strides, in_rows, offs_rest, HEAD_DIM) if REST else do
        offs_row = tl.program_id(1).to(tl.int64) * seqlen_q + offs_m
        lse, delta = tl.load(lse_ptr + offs_row, mask=in_rows, other=0.0), tl.load(delta_ptr + offs_row, mask=in_rows, other=0.0)
        kq = _dot_transposed(k, k_rest, q, q_rest, PRECISION, REST) * qk_scale
        p = tl.exp2(tl.where(keep[:, None] & in_rows[None, :], kq, float("-inf")) - lse[None, :])
        ds = p * (_dot_transposed(v, v_rest, do, do_rest, PRECISION, REST) - delta[None, :])
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv += _dot(p, do, PRECISION)
        dk += _dot(ds, q, PRECISION)
        if REST:
            dv_rest += _dot(p, do_rest, PRECISION)
            dk_rest += _dot(ds, q_rest, PRECISION)
    factor = tl.load(factor_ptr + image)
    dk_ptr, dv_ptr = _head(dk_ptr, dk_strides, image, head), _head(dv_ptr, dv_strides, image, head)
    _store(dk_ptr, offs_n, dk_strides, in_keys, offs_d, HEAD_DIM, dk * (factor * sm_scale))
    _store(dv_ptr, offs_n, dv_strides, in_keys, offs_d, HEAD_DIM, dv * factor)
    if REST:
        _store(dk_ptr, offs_n, dk_strides, in_keys, offs_rest, HEAD_DIM, dk_rest * (factor * sm_scale))
        _store(dv_ptr, offs_n, dv_strides, in_keys, offs_rest, HEAD_DIM, dv_rest * factor)
