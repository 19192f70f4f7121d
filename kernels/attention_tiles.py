"""The kernels of `attention_relevance`: gradient and relevance through softmax(scale q k^T + mask) v in tiles.

    A = exp(scale q k^T + mask - lse)      s = R_O / stab(O)           R_A = A (s v^T) / 2      R_v = v (A^T s) / 2
    s' = R_A / stab(q k^T)                 R_q = q (s' k) / 2          R_k = k (s'^T q) / 2
    dA = g v^T      dS = A (dA - g O)      dq = scale dS k             dk = scale dS^T q        dv = A^T g
    row' = sum_i row_i mean_h E_hij        E = (dA R_A)+, (dA A)+, (R_A)+ or A

Three kernels: statistics and shares per query; the query side; the key side, which also sums the read-out row. Sums
run inside a program, so nothing depends on the order in which programs end.

Source: Chefer et al., CVPR 2021, section 3; AttnLRP (Achtibat et al., ICML 2024), section 3.3; Dao et al., NeurIPS 2022
(tiles and the gradient).
"""

from __future__ import annotations

from relprop.kernels.launch import jit, tl
from relprop.kernels.stabiliser import largest, product, share, total

HALF = tl.constexpr(0)
ALPHA_BETA = tl.constexpr(1)
NONE = tl.constexpr(2)
BOOLEAN = tl.constexpr(1)
ADDITIVE = tl.constexpr(2)
GRADIENT_X_RELEVANCE = tl.constexpr(1)
GRADIENT_X_ATTENTION = tl.constexpr(2)
RELEVANCE_EDGE = tl.constexpr(3)
ATTENTION_EDGE = tl.constexpr(4)


@jit
def _rows(at, columns, columns_size):
    """Rows of a matrix, at (pointer, rows, stride, size), whose elements are next to each other; 0 outside.

    [len(rows), len(columns)]
    """
    pointer, rows, stride, size = at
    inside = (rows < size)[:, None] & (columns < columns_size)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def _over_channels(a, b, a_at, b_at, size, found, OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """found + a b^T. With a chunk, a and b are read again, so many channels at a time: float32 operands of whole heads
    are larger than the registers, and what is not used is not loaded.
    """
    if CHUNK == 0:
        return product(a.to(OPERAND), tl.trans(b.to(OPERAND)), found, PRECISION)
    else:
        for start in range(0, size, CHUNK):
            channels = start + tl.arange(0, CHUNK)
            a_part = _rows(a_at, channels, size).to(OPERAND)
            b_part = _rows(b_at, channels, size).to(OPERAND)
            found = product(a_part, tl.trans(b_part), found, PRECISION)
        return found


@jit
def _last_rows(pointer, rows, stride, columns, inside):
    """Rows read once more, for the last time: held since the first time they would take the registers of the sums."""
    at = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@jit
def _logits(
    dots,
    scale,
    mask_ptr,
    queries,
    keys,
    query_size,
    key_size,
    stride_mq,
    stride_mk,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):
    """scale dots + mask, -inf where a query does not see a key; queries and keys broadcast to the shape of dots."""
    logits = dots * scale
    seen = (queries < query_size) & (keys < key_size)
    if MASK > 0:
        at = mask_ptr + queries.to(tl.int64) * stride_mq + keys.to(tl.int64) * stride_mk
        if MASK == BOOLEAN:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            logits += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    if CAUSAL:
        seen = seen & (queries >= keys)
    return tl.where(seen, logits, float("-inf"))


@jit
def _attention_relevance_statistics_kernel(
    lse_ptr,  # [B, H, Nq]
    delta_ptr,  # [T, B, H, Nq]
    s_ptr,  # [T, B, H, Nq, dv]
    q_ptr,  # [B, H, Nq, d]
    k_ptr,  # [B, Hk, Nk, d]
    o_ptr,  # [B, H, Nq, dv]
    gradient_ptr,  # [T, B, H, Nq, dv]
    relevance_ptr,  # [T, B, H, Nq, dv]
    mask_ptr,  # [B, H, Nq, Nk]
    targets,
    samples,  # B
    heads,
    groups,  # query heads per key head
    query_size,
    key_size,
    d_size,
    dv_size,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gt,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_rt,
    stride_rb,
    stride_rh,
    stride_rn,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    scale,
    epsilon,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    GRADIENT: tl.constexpr,
    RELEVANCE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = (query_size + BLOCK_Q - 1) // BLOCK_Q
    block = tl.program_id(0) % blocks
    layer = tl.program_id(0) // blocks
    sample = (layer // heads).to(tl.int64)
    head = (layer % heads).to(tl.int64)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q_ptr += sample * stride_qb + head * stride_qh
    k_ptr += sample * stride_kb + (head // groups) * stride_kh
    mask_ptr += sample * stride_mb + head * stride_mh
    q_at = (q_ptr, queries, stride_qn, query_size)
    q = _rows(q_at, d, d_size)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    normaliser = tl.full((BLOCK_Q,), 0.0, tl.float32)
    last = key_size
    if CAUSAL:
        last = tl.minimum(key_size, (block + 1) * BLOCK_Q)
    for start in range(0, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_at = (k_ptr, keys, stride_kn, key_size)
        zero = tl.full((BLOCK_Q, BLOCK_K), 0.0, tl.float32)
        dots = _over_channels(q, _rows(k_at, d, d_size), q_at, k_at, d_size, zero, OPERAND, PRECISION, CHUNK)
        logits = _logits(
            dots,
            scale,
            mask_ptr,
            queries[:, None],
            keys[None, :],
            query_size,
            key_size,
            stride_mq,
            stride_mk,
            CAUSAL,
            MASK,
        )
        higher = tl.maximum(top, largest(logits, 1))
        # Where nothing is seen yet, the difference of two infinities is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        normaliser = normaliser * tl.exp(top - base) + total(tl.exp(logits - base[:, None]), 1)
        top = higher
    # A row that sees nothing attends to nothing.
    lse = tl.where(normaliser > 0, top + tl.log(tl.where(normaliser > 0, normaliser, 1.0)), float("inf"))
    row = layer.to(tl.int64) * query_size + queries
    tl.store(lse_ptr + row, lse, mask=queries < query_size)
    PART: tl.constexpr = min(BLOCK_DV, 64)
    o_at = (o_ptr + sample * stride_ob + head * stride_oh, queries, stride_on, query_size)
    gradient_ptr += sample * stride_gb + head * stride_gh
    relevance_ptr += sample * stride_rb + head * stride_rh
    for _ in range(targets):
        delta = tl.full((BLOCK_Q,), 0.0, tl.float32)
        # Whole rows of three float32 tensors are larger than the registers.
        for start in range(0, dv_size, PART):
            channels = start + tl.arange(0, PART)
            o = _rows(o_at, channels, dv_size).to(tl.float32)
            if GRADIENT:
                g = _rows((gradient_ptr, queries, stride_gn, query_size), channels, dv_size).to(tl.float32)
                delta += total(g * o, 1)
            if RELEVANCE:
                r = _rows((relevance_ptr, queries, stride_rn, query_size), channels, dv_size).to(tl.float32)
                s = share(r, o, epsilon, KIND).to(s_ptr.dtype.element_ty)
                inside = (queries < query_size)[:, None] & (channels < dv_size)[None, :]
                tl.store(s_ptr + row[:, None] * dv_size + channels[None, :], s, mask=inside)
        if GRADIENT:
            tl.store(delta_ptr + row, delta, mask=queries < query_size)
            gradient_ptr += stride_gt
            delta_ptr += samples * heads * tl.cast(query_size, tl.int64)
        if RELEVANCE:
            relevance_ptr += stride_rt
            s_ptr += samples * heads * tl.cast(query_size, tl.int64) * dv_size


@jit
def _attention_relevance_queries_kernel(
    dq_ptr,  # [T, B, H, Nq, d]
    rq_ptr,  # [T, B, H, Nq, d]
    q_ptr,  # [B, H, Nq, d]
    k_ptr,  # [B, Hk, Nk, d]
    v_ptr,  # [B, Hk, Nk, dv]
    q_parts_ptr,  # [2, B, H, Nq, d]: q+, q-
    k_parts_ptr,  # [2, B, Hk, Nk, d]: k+, k-
    gradient_ptr,  # [T, B, H, Nq, dv]
    s_ptr,  # [T, B, H, Nq, dv]
    lse_ptr,  # [B, H, Nq]
    delta_ptr,  # [T, B, H, Nq]
    mask_ptr,  # [B, H, Nq, Nk]
    samples,
    heads,
    groups,
    query_size,
    key_size,
    d_size,
    dv_size,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gt,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    scale,
    epsilon,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    GRADIENT: tl.constexpr,
    RELEVANCE: tl.constexpr,
    QK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STREAM: tl.constexpr,
    STREAM_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = (query_size + BLOCK_Q - 1) // BLOCK_Q
    block = tl.program_id(0) % blocks
    layer = tl.program_id(0) // blocks
    target = tl.program_id(1).to(tl.int64)
    sample = (layer // heads).to(tl.int64)
    head = (layer % heads).to(tl.int64)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_ptr += sample * stride_kb + (head // groups) * stride_kh
    v_ptr += sample * stride_vb + (head // groups) * stride_vh
    mask_ptr += sample * stride_mb + head * stride_mh
    q_at = (q_ptr + sample * stride_qb + head * stride_qh, queries, stride_qn, query_size)
    q = _rows(q_at, d, d_size)
    row = layer.to(tl.int64) * query_size + queries
    rows_of_target = target * samples * heads * query_size
    lse = tl.load(lse_ptr + row, mask=queries < query_size, other=float("inf"))
    if GRADIENT:
        g_ptr = gradient_ptr + target * stride_gt + sample * stride_gb + head * stride_gh
        g_at = (g_ptr, queries, stride_gn, query_size)
        g = _rows(g_at, dv, dv_size).to(STREAM)
        delta = tl.load(delta_ptr + rows_of_target + row, mask=queries < query_size, other=0.0)
        dq = tl.full((BLOCK_Q, BLOCK_D), 0.0, tl.float32)
    if RELEVANCE:
        s_ptr += (rows_of_target + layer.to(tl.int64) * query_size) * dv_size
        s_at = (s_ptr, queries, dv_size, query_size)
        s = _rows(s_at, dv, dv_size).to(STREAM)
        rq = tl.full((BLOCK_Q, BLOCK_D), 0.0, tl.float32)
        rq_minus = tl.full((BLOCK_Q, BLOCK_D), 0.0, tl.float32)
        if QK == ALPHA_BETA:
            q_plus_ptr = q_parts_ptr + layer.to(tl.int64) * query_size * d_size
            q_minus_ptr = q_plus_ptr + samples * heads * tl.cast(query_size, tl.int64) * d_size
            q_plus_at = (q_plus_ptr, queries, d_size, query_size)
            q_minus_at = (q_minus_ptr, queries, d_size, query_size)
            q_plus = _rows(q_plus_at, d, d_size)
            q_minus = _rows(q_minus_at, d, d_size)
            key_heads = heads // groups
            k_plus_ptr = k_parts_ptr + (sample * key_heads + head // groups) * key_size * d_size
            k_minus_ptr = k_plus_ptr + samples * key_heads * tl.cast(key_size, tl.int64) * d_size
    last = key_size
    if CAUSAL:
        last = tl.minimum(key_size, (block + 1) * BLOCK_Q)
    for start in range(0, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_at = (k_ptr, keys, stride_kn, key_size)
        v_at = (v_ptr, keys, stride_vn, key_size)
        k = _rows(k_at, d, d_size)
        v = _rows(v_at, dv, dv_size).to(STREAM)
        zero = tl.full((BLOCK_Q, BLOCK_K), 0.0, tl.float32)
        dots = _over_channels(q, k, q_at, k_at, d_size, zero, OPERAND, PRECISION, CHUNK)
        logits = _logits(
            dots,
            scale,
            mask_ptr,
            queries[:, None],
            keys[None, :],
            query_size,
            key_size,
            stride_mq,
            stride_mk,
            CAUSAL,
            MASK,
        )
        attention = tl.exp(logits - lse[:, None])
        if GRADIENT:
            map_gradient = _over_channels(g, v, g_at, v_at, dv_size, zero, STREAM, STREAM_PRECISION, CHUNK)
            passed = attention * (map_gradient - delta[:, None])
            dq = product(passed.to(STREAM), k.to(STREAM), dq, STREAM_PRECISION)
        if RELEVANCE:
            map_relevance = _over_channels(s, v, s_at, v_at, dv_size, zero, STREAM, STREAM_PRECISION, CHUNK)
            map_relevance = 0.5 * attention * map_relevance
            if QK == HALF:
                shares = share(map_relevance, dots, epsilon, KIND).to(STREAM)
                rq = product(shares, k.to(STREAM), rq, STREAM_PRECISION)
            else:
                k_plus_at = (k_plus_ptr, keys, d_size, key_size)
                k_minus_at = (k_minus_ptr, keys, d_size, key_size)
                k_plus = _rows(k_plus_at, d, d_size)
                k_minus = _rows(k_minus_at, d, d_size)
                z = _over_channels(q_plus, k_plus, q_plus_at, k_plus_at, d_size, zero, OPERAND, PRECISION, CHUNK)
                z = _over_channels(q_minus, k_minus, q_minus_at, k_minus_at, d_size, z, OPERAND, PRECISION, CHUNK)
                shares = tl.where(z == 0, 0.0, share(map_relevance, z, epsilon, KIND)).to(STREAM)
                rq = product(shares, k_plus.to(STREAM), rq, STREAM_PRECISION)
                rq_minus = product(shares, k_minus.to(STREAM), rq_minus, STREAM_PRECISION)
    inside = (queries < query_size)[:, None] & (d < d_size)[None, :]
    out = (rows_of_target + row)[:, None] * d_size + d[None, :]
    if GRADIENT:
        tl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
    if RELEVANCE:
        q = _last_rows(q_ptr + sample * stride_qb + head * stride_qh, queries, stride_qn, d, inside)
        if QK == ALPHA_BETA:
            rq = tl.where(q > 0, rq, rq_minus)
        tl.store(rq_ptr + out, (0.5 * q * rq).to(rq_ptr.dtype.element_ty), mask=inside)


@jit
def _edge(attention, map_gradient, map_relevance, EDGE: tl.constexpr):
    """One head's part of E, not yet divided by the number of heads."""
    if EDGE == GRADIENT_X_RELEVANCE:
        return tl.maximum(map_gradient * map_relevance, 0.0)
    elif EDGE == GRADIENT_X_ATTENTION:
        return tl.maximum(map_gradient * attention, 0.0)
    elif EDGE == RELEVANCE_EDGE:
        return tl.maximum(map_relevance, 0.0)
    else:
        return attention


@jit
def _attention_relevance_keys_kernel(
    dk_ptr,  # [T, B, Hk, Nk, d]
    rk_ptr,  # [T, B, Hk, Nk, d]
    dv_ptr,  # [T, B, Hk, Nk, dv]
    rv_ptr,  # [T, B, Hk, Nk, dv]
    row_out_ptr,  # [T, B, Hk, Nk]
    q_ptr,  # [B, H, Nq, d]
    k_ptr,  # [B, Hk, Nk, d]
    v_ptr,  # [B, Hk, Nk, dv]
    q_parts_ptr,  # [2, B, H, Nq, d]: q+, q-
    k_parts_ptr,  # [2, B, Hk, Nk, d]: k+, k-
    gradient_ptr,  # [T, B, H, Nq, dv]
    s_ptr,  # [T, B, H, Nq, dv]
    lse_ptr,  # [B, H, Nq]
    delta_ptr,  # [T, B, H, Nq]
    row_ptr,  # [T, B, Nq]
    mask_ptr,  # [B, H, Nq, Nk]
    samples,
    heads,
    groups,
    query_size,
    key_size,
    d_size,
    dv_size,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gt,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ct,
    stride_cb,
    stride_cn,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    scale,
    epsilon,
    value_factor,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    GROUPED: tl.constexpr,
    QK: tl.constexpr,
    EDGE: tl.constexpr,
    KEY_GRADIENT: tl.constexpr,
    KEY_RELEVANCE: tl.constexpr,
    VALUE_GRADIENT: tl.constexpr,
    VALUE_RELEVANCE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STREAM: tl.constexpr,
    STREAM_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    MAP_GRADIENT: tl.constexpr = KEY_GRADIENT or EDGE == GRADIENT_X_RELEVANCE or EDGE == GRADIENT_X_ATTENTION
    MAP_RELEVANCE: tl.constexpr = KEY_RELEVANCE or EDGE == GRADIENT_X_RELEVANCE or EDGE == RELEVANCE_EDGE
    blocks = (key_size + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    layer = tl.program_id(0) // blocks
    target = tl.program_id(1).to(tl.int64)
    key_heads = heads // groups
    sample = (layer // key_heads).to(tl.int64)
    key_head = (layer % key_heads).to(tl.int64)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_at = (k_ptr + sample * stride_kb + key_head * stride_kh, keys, stride_kn, key_size)
    v_at = (v_ptr + sample * stride_vb + key_head * stride_vh, keys, stride_vn, key_size)
    k = _rows(k_at, d, d_size)
    v = _rows(v_at, dv, dv_size)
    dk = tl.full((BLOCK_K, BLOCK_D), 0.0, tl.float32)
    rk = tl.full((BLOCK_K, BLOCK_D), 0.0, tl.float32)
    rk_minus = tl.full((BLOCK_K, BLOCK_D), 0.0, tl.float32)
    dvalue = tl.full((BLOCK_K, BLOCK_DV), 0.0, tl.float32)
    rv = tl.full((BLOCK_K, BLOCK_DV), 0.0, tl.float32)
    reached = tl.full((BLOCK_K,), 0.0, tl.float32)
    if KEY_RELEVANCE and QK == ALPHA_BETA:
        k_plus_ptr = k_parts_ptr + layer.to(tl.int64) * key_size * d_size
        k_minus_ptr = k_plus_ptr + samples * key_heads * tl.cast(key_size, tl.int64) * d_size
        k_plus_at = (k_plus_ptr, keys, d_size, key_size)
        k_minus_at = (k_minus_ptr, keys, d_size, key_size)
        k_plus = _rows(k_plus_at, d, d_size)
        k_minus = _rows(k_minus_at, d, d_size)
    first = 0
    if CAUSAL:
        first = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    steps = tl.maximum((query_size - first + BLOCK_Q - 1) // BLOCK_Q, 0)
    # One loop over heads and queries: around a second one, the sums of a tile spill.
    for step in range(groups * steps):
        group = 0
        if GROUPED:
            group = step // tl.maximum(steps, 1)
        start = first + (step - group * steps) * BLOCK_Q
        head = key_head * groups + group
        rows_of_head = (sample * heads + head) * query_size
        rows_of_target = target * samples * heads * query_size + rows_of_head
        mask_at = mask_ptr + sample * stride_mb + head * stride_mh
        g_ptr = gradient_ptr + target * stride_gt + sample * stride_gb + head * stride_gh
        q_plus_ptr = q_parts_ptr + rows_of_head * d_size
        q_minus_ptr = q_plus_ptr + samples * heads * tl.cast(query_size, tl.int64) * d_size
        queries = start + tl.arange(0, BLOCK_Q)
        q_at = (q_ptr + sample * stride_qb + head * stride_qh, queries, stride_qn, query_size)
        q = _rows(q_at, d, d_size)
        lse = tl.load(lse_ptr + rows_of_head + queries, mask=queries < query_size, other=float("inf"))
        zero = tl.full((BLOCK_K, BLOCK_Q), 0.0, tl.float32)
        dots = _over_channels(k, q, k_at, q_at, d_size, zero, OPERAND, PRECISION, CHUNK)
        logits = _logits(
            dots,
            scale,
            mask_at,
            queries[None, :],
            keys[:, None],
            query_size,
            key_size,
            stride_mq,
            stride_mk,
            CAUSAL,
            MASK,
        )
        attention = tl.exp(logits - lse[None, :])
        map_gradient = zero
        map_relevance = zero
        if MAP_GRADIENT or VALUE_GRADIENT:
            g_at = (g_ptr, queries, stride_gn, query_size)
            g = _rows(g_at, dv, dv_size).to(STREAM)
            if VALUE_GRADIENT:
                dvalue = product(attention.to(STREAM), g, dvalue, STREAM_PRECISION)
            if MAP_GRADIENT:
                map_gradient = _over_channels(v, g, v_at, g_at, dv_size, zero, STREAM, STREAM_PRECISION, CHUNK)
            if KEY_GRADIENT:
                delta = tl.load(delta_ptr + rows_of_target + queries, mask=queries < query_size, other=0.0)
                passed = attention * (map_gradient - delta[None, :])
                dk = product(passed.to(STREAM), q.to(STREAM), dk, STREAM_PRECISION)
        if MAP_RELEVANCE or VALUE_RELEVANCE:
            s_at = (s_ptr + rows_of_target * dv_size, queries, dv_size, query_size)
            s = _rows(s_at, dv, dv_size).to(STREAM)
            if VALUE_RELEVANCE:
                rv = product(attention.to(STREAM), s, rv, STREAM_PRECISION)
            if MAP_RELEVANCE:
                map_relevance = _over_channels(v, s, v_at, s_at, dv_size, zero, STREAM, STREAM_PRECISION, CHUNK)
                map_relevance = 0.5 * attention * map_relevance
            if KEY_RELEVANCE:
                if QK == HALF:
                    shares = share(map_relevance, dots, epsilon, KIND).to(STREAM)
                    rk = product(shares, q.to(STREAM), rk, STREAM_PRECISION)
                else:
                    q_plus_at = (q_plus_ptr, queries, d_size, query_size)
                    q_minus_at = (q_minus_ptr, queries, d_size, query_size)
                    q_plus = _rows(q_plus_at, d, d_size)
                    q_minus = _rows(q_minus_at, d, d_size)
                    z = _over_channels(k_plus, q_plus, k_plus_at, q_plus_at, d_size, zero, OPERAND, PRECISION, CHUNK)
                    z = _over_channels(k_minus, q_minus, k_minus_at, q_minus_at, d_size, z, OPERAND, PRECISION, CHUNK)
                    shares = tl.where(z == 0, 0.0, share(map_relevance, z, epsilon, KIND)).to(STREAM)
                    rk = product(shares, q_plus.to(STREAM), rk, STREAM_PRECISION)
                    rk_minus = product(shares, q_minus.to(STREAM), rk_minus, STREAM_PRECISION)
        if EDGE > 0:
            row_at = row_ptr + target * stride_ct + sample * stride_cb + queries * stride_cn
            row = tl.load(row_at, mask=queries < query_size, other=0.0).to(tl.float32)
            reached += total(_edge(attention, map_gradient, map_relevance, EDGE) * row[None, :], 1)
    row_out = (target * samples * key_heads + layer) * key_size + keys
    inside = (keys < key_size)[:, None]
    at = row_out[:, None] * d_size + d[None, :]
    at_values = row_out[:, None] * dv_size + dv[None, :]
    if EDGE > 0:
        tl.store(row_out_ptr + row_out, reached / heads, mask=keys < key_size)
    if KEY_GRADIENT:
        tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside & (d < d_size)[None, :])
    if KEY_RELEVANCE:
        kept = inside & (d < d_size)[None, :]
        k = _last_rows(k_ptr + sample * stride_kb + key_head * stride_kh, keys, stride_kn, d, kept)
        if QK == ALPHA_BETA:
            rk = tl.where(k > 0, rk, rk_minus)
        tl.store(rk_ptr + at, (0.5 * k * rk).to(rk_ptr.dtype.element_ty), mask=kept)
    if VALUE_GRADIENT:
        tl.store(dv_ptr + at_values, dvalue.to(dv_ptr.dtype.element_ty), mask=inside & (dv < dv_size)[None, :])
    if VALUE_RELEVANCE:
        kept = inside & (dv < dv_size)[None, :]
        v = _last_rows(v_ptr + sample * stride_vb + key_head * stride_vh, keys, stride_vn, dv, kept)
        tl.store(rv_ptr + at_values, (value_factor * v * rv).to(rv_ptr.dtype.element_ty), mask=kept)
