"""NASA attention as Triton kernels: Z+ - scale * Z- in one pass over the queries, and its gradients.

Each branch is softmax(q k^T / sqrt(d)) v with a softmax of its own, kept online (Dao et al. 2022) so that keys may be streamed; queries are
read once and the difference is written once. A branch counts `factor` times: 1 the prompt, -scale the negative. Sums and softmax are fp32,
logarithms to base 2. A head is taken in two pieces, MAIN, a power of two, and REST, so that a head of 72 costs 80 and not 128.
Strides are (image, head, row); the last axis lies dense.
"""

import triton
import triton.language as tl


@triton.jit
def _matrix(pointer, strides, image, head):
    return pointer + image * strides[0] + head * strides[1]


@triton.jit
def _load(matrix, rows, strides, keep, columns, SIZE: tl.constexpr):
    """Rows of a matrix, (rows, columns), 0 where they do not count and beyond its last column."""
    return tl.load(matrix + rows[:, None] * strides[2] + columns[None, :], mask=keep[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def _store(matrix, rows, strides, keep, columns, SIZE: tl.constexpr, values):
    values = values.to(matrix.dtype.element_ty)
    tl.store(matrix + rows[:, None] * strides[2] + columns[None, :], values, mask=keep[:, None] & (columns < SIZE)[None, :])


@triton.jit
def _counted(mask, places, tokens, MASKED: tl.constexpr):
    """Which of some keys count."""
    keep = places < tokens
    if MASKED:
        keep = keep & (tl.load(mask + places, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b in fp32. "wide": Triton's interpreter multiplies the bits of bf16 as if they were whole numbers, so it gets fp32."""
    if PRECISION == "wide":
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(a, b, input_precision=PRECISION)
    return found


@triton.jit
def _product(a, a_rest, b, b_rest, PRECISION: tl.constexpr, REST: tl.constexpr):
    """a b^T over both pieces, fp32."""
    found = _dot(a, tl.trans(b), PRECISION)
    if REST:
        found += _dot(a_rest, tl.trans(b_rest), PRECISION)
    return found


@triton.jit
def _attend(
    q, q_rest, k, k_strides, v, v_strides, mask, tokens, to_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One branch of a block of queries: its output in two pieces, and the logarithm of its softmax's sum; 0 where no key counts."""
    columns, more = tl.arange(0, MAIN), MAIN + tl.arange(0, REST or 16)
    largest, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    out, out_rest = tl.zeros([QUERIES, MAIN], tl.float32), tl.zeros([QUERIES, REST or 16], tl.float32)
    for start in range(0, tokens, KEYS):
        places = start + tl.arange(0, KEYS)
        keep = _counted(mask, places, tokens, MASKED)
        keys = _load(k, places, k_strides, keep, columns, SIZE)
        keys_rest = _load(k, places, k_strides, keep, more, SIZE) if REST else keys
        scores = tl.where(keep[None, :], _product(q, q_rest, keys, keys_rest, PRECISION, REST) * to_log2, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        level = tl.where(now == float("-inf"), 0.0, now)  # while no key has counted there is nothing to measure from
        weights, shrink = tl.exp2(scores - level[:, None]), tl.exp2(largest - level)
        largest, total = now, total * shrink + tl.sum(weights, 1)
        values = _load(v, places, v_strides, keep, columns, SIZE)
        weights = weights.to(values.dtype)
        out = out * shrink[:, None] + _dot(weights, values, PRECISION)
        if REST:
            values_rest = _load(v, places, v_strides, keep, more, SIZE)
            out_rest = out_rest * shrink[:, None] + _dot(weights, values_rest, PRECISION)
    divisor = tl.where(total > 0, total, 1.0)
    return out / divisor[:, None], out_rest / divisor[:, None], tl.where(total > 0, largest + tl.log2(divisor), 0.0)


@triton.jit
def forward_kernel(
    q, q_strides, k_pos, kp_strides, v_pos, vp_strides, mask_pos, tokens_pos, k_neg, kn_strides, v_neg, vn_strides, mask_neg, tokens_neg,
    factor, out, out_strides, heads, queries, to_log2,
    MASKED_POS: tl.constexpr, MASKED_NEG: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program: a block of queries of one head of one image."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    there = rows < queries
    columns, more = tl.arange(0, MAIN), MAIN + tl.arange(0, REST or 16)
    q = _matrix(q, q_strides, image, head)
    block = _load(q, rows, q_strides, there, columns, SIZE)
    block_rest = _load(q, rows, q_strides, there, more, SIZE) if REST else block
    k_pos, v_pos = _matrix(k_pos, kp_strides, image, head), _matrix(v_pos, vp_strides, image, head)
    k_neg, v_neg = _matrix(k_neg, kn_strides, image, head), _matrix(v_neg, vn_strides, image, head)
    mask_pos, mask_neg = mask_pos + image * tokens_pos, mask_neg + image * tokens_neg
    plus, plus_rest, _ = _attend(
        block, block_rest, k_pos, kp_strides, v_pos, vp_strides, mask_pos, tokens_pos, to_log2,
        MASKED_POS, PRECISION, QUERIES, KEYS, SIZE, MAIN, REST,
    )  # fmt: skip
    minus, minus_rest, _ = _attend(
        block, block_rest, k_neg, kn_strides, v_neg, vn_strides, mask_neg, tokens_neg, to_log2,
        MASKED_NEG, PRECISION, QUERIES, KEYS, SIZE, MAIN, REST,
    )  # fmt: skip
    times = tl.load(factor + image)
    out = _matrix(out, out_strides, image, head)
    _store(out, rows, out_strides, there, columns, SIZE, plus + times * minus)
    if REST:
        _store(out, rows, out_strides, there, more, SIZE, plus_rest + times * minus_rest)


@triton.jit
def _query_gradient(
    q, q_rest, up, up_rest, k, k_strides, v, v_strides, mask, tokens, to_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Of one branch, for `up`, the gradient of its output: that of the queries over sqrt(d), the softmax's level and <output, up> a row.

    The output is computed once more instead of being kept.
    """
    columns, more = tl.arange(0, MAIN), MAIN + tl.arange(0, REST or 16)
    out, out_rest, level = _attend(
        q, q_rest, k, k_strides, v, v_strides, mask, tokens, to_log2, MASKED, PRECISION, QUERIES, KEYS, SIZE, MAIN, REST
    )
    shared = tl.sum(out * up.to(tl.float32), 1)
    if REST:
        shared += tl.sum(out_rest * up_rest.to(tl.float32), 1)
    down, down_rest = tl.zeros([QUERIES, MAIN], tl.float32), tl.zeros([QUERIES, REST or 16], tl.float32)
    for start in range(0, tokens, KEYS):
        places = start + tl.arange(0, KEYS)
        keep = _counted(mask, places, tokens, MASKED)
        keys, values = _load(k, places, k_strides, keep, columns, SIZE), _load(v, places, v_strides, keep, columns, SIZE)
        keys_rest = _load(k, places, k_strides, keep, more, SIZE) if REST else keys
        values_rest = _load(v, places, v_strides, keep, more, SIZE) if REST else values
        scores = tl.where(keep[None, :], _product(q, q_rest, keys, keys_rest, PRECISION, REST) * to_log2, float("-inf"))
        slope = tl.exp2(scores - level[:, None]) * (_product(up, up_rest, values, values_rest, PRECISION, REST) - shared[:, None])
        down += _dot(slope.to(keys.dtype), keys, PRECISION)
        if REST:
            down_rest += _dot(slope.to(keys.dtype), keys_rest, PRECISION)
    return down, down_rest, level, shared


@triton.jit
def query_gradient_kernel(
    q, q_strides, k_pos, kp_strides, v_pos, vp_strides, mask_pos, tokens_pos, k_neg, kn_strides, v_neg, vn_strides, mask_neg, tokens_neg,
    factor, up, up_strides, down, down_strides, levels, shares, heads, queries, to_log2, shrink,
    MASKED_POS: tl.constexpr, MASKED_NEG: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The queries' gradient; and levels and shares (2, B, H, N), of the prompt and of the negative, for the keys' gradients."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    there = rows < queries
    columns, more = tl.arange(0, MAIN), MAIN + tl.arange(0, REST or 16)
    q, up = _matrix(q, q_strides, image, head), _matrix(up, up_strides, image, head)
    block, given = _load(q, rows, q_strides, there, columns, SIZE), _load(up, rows, up_strides, there, columns, SIZE)
    block_rest = _load(q, rows, q_strides, there, more, SIZE) if REST else block
    given_rest = _load(up, rows, up_strides, there, more, SIZE) if REST else given
    k_pos, v_pos = _matrix(k_pos, kp_strides, image, head), _matrix(v_pos, vp_strides, image, head)
    k_neg, v_neg = _matrix(k_neg, kn_strides, image, head), _matrix(v_neg, vn_strides, image, head)
    mask_pos, mask_neg = mask_pos + image * tokens_pos, mask_neg + image * tokens_neg
    plus, plus_rest, level_pos, share_pos = _query_gradient(
        block, block_rest, given, given_rest, k_pos, kp_strides, v_pos, vp_strides, mask_pos, tokens_pos, to_log2,
        MASKED_POS, PRECISION, QUERIES, KEYS, SIZE, MAIN, REST,
    )  # fmt: skip
    minus, minus_rest, level_neg, share_neg = _query_gradient(
        block, block_rest, given, given_rest, k_neg, kn_strides, v_neg, vn_strides, mask_neg, tokens_neg, to_log2,
        MASKED_NEG, PRECISION, QUERIES, KEYS, SIZE, MAIN, REST,
    )  # fmt: skip
    times = tl.load(factor + image)
    down = _matrix(down, down_strides, image, head)
    _store(down, rows, down_strides, there, columns, SIZE, (plus + times * minus) * shrink)
    if REST:
        _store(down, rows, down_strides, there, more, SIZE, (plus_rest + times * minus_rest) * shrink)
    place = tl.program_id(1).to(tl.int64) * queries + rows
    branch = tl.num_programs(1).to(tl.int64) * queries
    tl.store(levels + place, level_pos, mask=there)
    tl.store(levels + branch + place, level_neg, mask=there)
    tl.store(shares + place, share_pos, mask=there)
    tl.store(shares + branch + place, share_neg, mask=there)


@triton.jit
def key_gradient_kernel(
    q, q_strides, k, k_strides, v, v_strides, mask, tokens, factor, up, up_strides, levels, shares, k_down, kd_strides, v_down, vd_strides,
    heads, queries, to_log2, shrink,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The keys' and values' gradients of one branch. A program: a block of keys of one head of one image, over all queries."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    places = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = places < tokens
    keep = _counted(mask + image * tokens, places, tokens, MASKED)
    columns, more = tl.arange(0, MAIN), MAIN + tl.arange(0, REST or 16)
    q, up = _matrix(q, q_strides, image, head), _matrix(up, up_strides, image, head)
    k, v = _matrix(k, k_strides, image, head), _matrix(v, v_strides, image, head)
    keys, values = _load(k, places, k_strides, keep, columns, SIZE), _load(v, places, v_strides, keep, columns, SIZE)
    keys_rest = _load(k, places, k_strides, keep, more, SIZE) if REST else keys
    values_rest = _load(v, places, v_strides, keep, more, SIZE) if REST else values
    k_sum, v_sum = tl.zeros([KEYS, MAIN], tl.float32), tl.zeros([KEYS, MAIN], tl.float32)
    k_sum_rest, v_sum_rest = tl.zeros([KEYS, REST or 16], tl.float32), tl.zeros([KEYS, REST or 16], tl.float32)
    for start in range(0, queries, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        there = rows < queries
        block, given = _load(q, rows, q_strides, there, columns, SIZE), _load(up, rows, up_strides, there, columns, SIZE)
        block_rest = _load(q, rows, q_strides, there, more, SIZE) if REST else block
        given_rest = _load(up, rows, up_strides, there, more, SIZE) if REST else given
        row = tl.program_id(1).to(tl.int64) * queries + rows
        level, shared = tl.load(levels + row, mask=there, other=0.0), tl.load(shares + row, mask=there, other=0.0)
        scores = _product(keys, keys_rest, block, block_rest, PRECISION, REST) * to_log2
        weights = tl.exp2(tl.where(keep[:, None] & there[None, :], scores, float("-inf")) - level[None, :])
        slope = weights * (_product(values, values_rest, given, given_rest, PRECISION, REST) - shared[None, :])
        weights, slope = weights.to(given.dtype), slope.to(block.dtype)
        v_sum += _dot(weights, given, PRECISION)
        k_sum += _dot(slope, block, PRECISION)
        if REST:
            v_sum_rest += _dot(weights, given_rest, PRECISION)
            k_sum_rest += _dot(slope, block_rest, PRECISION)
    times = tl.load(factor + image)
    k_down, v_down = _matrix(k_down, kd_strides, image, head), _matrix(v_down, vd_strides, image, head)
    _store(k_down, places, kd_strides, inside, columns, SIZE, k_sum * (times * shrink))
    _store(v_down, places, vd_strides, inside, columns, SIZE, v_sum * times)
    if REST:
        _store(k_down, places, kd_strides, inside, more, SIZE, k_sum_rest * (times * shrink))
        _store(v_down, places, vd_strides, inside, more, SIZE, v_sum_rest * times)
