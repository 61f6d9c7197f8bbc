"""The Triton kernels of short-context cross-attention; ``triton.py`` launches them.

Tile map. A value of the kernels is a tuple of tiles: DIMS covers the head dimension and KEYS one tile of
keys by one or two powers of two (``configs.split_dimension``), so 77 keys cost 80 columns and head
dimension 40 costs 48. All helpers walk those tuples at compile time; nothing else knows of the split.

- forward: a program holds one block of queries and every key: no online softmax up to 128 keys, running
  maximum and sum over further key tiles beyond.
- backward: a program keeps one key tile, K, V, dK and dV, and walks one chunk of the queries, recomputing
  P. The chunks' partial sums are added in a fixed order by a second kernel: the same bits on every run, no
  atomics. Beyond one key tile, a first pass over the keys finds what the softmax of each row needs.
- bias gradients have their own kernel (few trainings want them, and the main one keeps its registers): a
  program owns one block of the *broadcast* bias and walks the heads and batch rows that share it.

16-bit inputs are multiplied on tensor cores with float32 sums. float32 inputs use three tf32 products for one
("tf32x3"), about 2**-21 relative. All offsets that a stride enters are 64 bit.
"""

import triton
import triton.language as tl
from triton.language import constexpr

PRECISION = constexpr("tf32x3")


@triton.jit
def _load(ptr, rows, n_rows, stride, DIM: constexpr, DIMS: constexpr, ALIGN: constexpr):
    """Rows of a (n_rows, DIM) matrix as column tiles (rows, DIMS[i]), zero outside it."""
    starts = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    tiles = ()
    for i in tl.static_range(len(DIMS)):
        columns = i * DIMS[0] + tl.arange(0, DIMS[i])
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        tiles = tiles + (tl.load(ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(ptr, rows, n_rows, stride, tiles, DIM: constexpr, DIMS: constexpr, ALIGN: constexpr):
    starts = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    for i in tl.static_range(len(DIMS)):
        columns = i * DIMS[0] + tl.arange(0, DIMS[i])
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        tl.store(ptr + starts[:, None] + columns[None, :], tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(ptr, first, n_keys, stride, KEYS: constexpr, DIM: constexpr, DIMS: constexpr,
               ALIGN: constexpr):  # fmt: skip
    """One key tile of K or V: a tuple over KEYS of tuples over DIMS."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        rows = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        tiles = tiles + (_load(ptr, rows, n_keys, stride, DIM, DIMS, ALIGN),)
    return tiles


@triton.jit
def _zeros(ROWS: constexpr, DIMS: constexpr):
    tiles = ()
    for i in tl.static_range(len(DIMS)):
        tiles = tiles + (tl.zeros([ROWS, DIMS[i]], tl.float32),)
    return tiles


@triton.jit
def _zero_keys(KEYS: constexpr, DIMS: constexpr):
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        tiles = tiles + (_zeros(KEYS[j], DIMS),)
    return tiles


@triton.jit
def _scaled(tiles, factor):
    out = ()
    for i in tl.static_range(len(tiles)):
        out = out + (tiles[i] * factor,)
    return out


@triton.jit
def _added(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + y[i],)
    return out


@triton.jit
def _dot_nt(x, y):
    """x yᵀ for row blocks x, y split along the summed dimension."""
    acc = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(x)):
        acc = tl.dot(x[i], tl.trans(y[i]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dot_nn(acc, x, y):
    """acc + x y for one tile x and a row block y split along its columns."""
    out = ()
    for i in tl.static_range(len(y) - 1, -1, -1):
        out = (tl.dot(x.to(y[i].dtype), y[i], acc[i], input_precision=PRECISION),) + out
    return out


@triton.jit
def _dot_tn(acc, x, y):
    """acc + xᵀ y, as above."""
    return _dot_nn(acc, tl.trans(x.to(y[0].dtype)), y)


@triton.jit
def _row_max(tiles):
    top = tl.max(tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tl.max(tiles[j], 1))
    return top


@triton.jit
def _row_sum(tiles):
    total = tl.sum(tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[j], 1)
    return total


@triton.jit
def _exp(tiles, shift):
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + (tl.exp(tiles[j] - shift[:, None]),)
    return out


@triton.jit
def _at_most(tiles, top):
    """Scores that are computed again may round above the maximum, and huge ones far above. NaN stays."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + (tl.where(tiles[j] > top[:, None], top[:, None], tiles[j]),)
    return out


@triton.jit
def _finite(top):
    """The row maximum as a shift: a row without any key is shifted by 0; its exponentials are 0, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _bias_rows(labels_ptr, rows, n_queries):
    """The row of the bias matrix that each query reads: its label in a layout, else itself."""
    if labels_ptr is not None:
        index = tl.load(labels_ptr + rows, mask=rows < n_queries, other=0)
    else:
        index = rows
    return index.to(tl.int64)


@triton.jit
def _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows,
            KEYS: constexpr):  # fmt: skip
    """q kᵀ·scale + bias as tiles (rows, KEYS[j]); -inf past the last key."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        columns = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        s = _dot_nt(q, k[j]) * scale
        if bias_ptr is not None:
            inside = (rows < n_queries) & (bias_rows >= 0) & (bias_rows < n_bias_rows)
            where = bias_rows[:, None] * bias_sn + columns[None, :].to(tl.int64) * bias_ss
            s += tl.load(bias_ptr + where, mask=inside[:, None] & (columns < n_keys)[None, :], other=0.0).to(
                tl.float32
            )
        tiles = tiles + (tl.where(columns[None, :] < n_keys, s, float("-inf")),)
    return tiles


@triton.jit
def fwd_kernel(q_ptr, k_ptr, v_ptr, out_ptr, bias_ptr, labels_ptr,
                q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn,
                bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                heads, n_queries, n_keys, n_blocks, scale,
                DIM: constexpr, DIMS: constexpr, KEYS: constexpr, TILE: constexpr, BLOCK: constexpr,
                ONE_TILE: constexpr, ALIGN: constexpr):  # fmt: skip
    # heads fastest: neighbours read the same lines of (B,N,H,D) memory, bias and labels
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    block = (pid // heads) % n_blocks
    b = (pid // heads // n_blocks).to(tl.int64)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    out_ptr += tl.multiple_of(b * out_sb + h * out_sh, ALIGN)
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb

    rows = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)  # (BLOCK, DIM)
    bias_rows = _bias_rows(labels_ptr, rows, n_queries)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = _zeros(BLOCK, DIMS)
    for first in range(0, TILE if ONE_TILE else n_keys, TILE):  # one turn is no loop after compilation
        k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)  # (TILE, DIM)
        v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        s = _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss,
                    n_bias_rows, KEYS)  # fmt: skip
        before = top
        top = tl.maximum(before, _row_max(s))
        p = _exp(s, _finite(top))
        if not ONE_TILE:
            fade = tl.exp(before - _finite(top))
            total *= fade
            acc = _scaled(acc, fade[:, None])
        total += _row_sum(p)
        for j in tl.static_range(len(KEYS)):
            acc = _dot_nn(acc, p[j], v[j])
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    _store(out_ptr, rows, n_queries, out_sn, _scaled(acc, norm[:, None]), DIM, DIMS, ALIGN)


@triton.jit
def stats_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr,
                  g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                  bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                  stats_stride, heads, n_queries, n_keys, n_blocks, scale,
                  DIM: constexpr, DIMS: constexpr, KEYS: constexpr, TILE: constexpr, BLOCK: constexpr,
                  ALIGN: constexpr):  # fmt: skip
    """What a backward over several key tiles needs of each row: max s, 1/Σexp(s − max) and D = Σ P∘dP."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    block = (pid // heads) % n_blocks
    b = (pid // heads // n_blocks).to(tl.int64)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    g_ptr += tl.multiple_of(b * g_sb + h * g_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    stats_ptr += (b * heads + h) * n_queries
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb

    rows = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)
    g = _load(g_ptr, rows, n_queries, g_sn, DIM, DIMS, ALIGN)
    bias_rows = _bias_rows(labels_ptr, rows, n_queries)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_keys, TILE):
        k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
        v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        s = _scores(q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss,
                    n_bias_rows, KEYS)  # fmt: skip
        before = top
        top = tl.maximum(before, _row_max(s))
        p = _exp(s, _finite(top))
        weighted = ()
        for j in tl.static_range(len(KEYS)):
            weighted = weighted + (p[j] * _dot_nt(g, v[j]),)
        fade = tl.exp(before - _finite(top))
        total = total * fade + _row_sum(p)
        delta = delta * fade + _row_sum(weighted)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(stats_ptr + rows, _finite(top), mask=rows < n_queries)
    tl.store(stats_ptr + stats_stride + rows, norm, mask=rows < n_queries)
    tl.store(stats_ptr + 2 * stats_stride + rows, delta * norm, mask=rows < n_queries)


@triton.jit
def _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale,
                     bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows, stats_ptr, stats_stride,
                     KEYS: constexpr):  # fmt: skip
    """P and ∂L/∂s = P∘(dP − D) of a block of queries and one key tile, each as tiles (rows, KEYS[j])."""
    s = _scores(
        q, k, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows, bias_sn, bias_ss, n_bias_rows, KEYS
    )
    dp = ()
    for j in tl.static_range(len(KEYS)):
        dp = dp + (_dot_nt(g, v[j]),)
    if stats_ptr is None:  # every key is here
        p = _exp(s, _finite(_row_max(s)))
        total = _row_sum(p)
        p = _scaled(p, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None])
        weighted = ()
        for j in tl.static_range(len(KEYS)):
            weighted = weighted + (p[j] * dp[j],)
        delta = _row_sum(weighted)
    else:
        top = tl.load(stats_ptr + rows, mask=rows < n_queries, other=0.0)
        norm = tl.load(stats_ptr + stats_stride + rows, mask=rows < n_queries, other=0.0)
        delta = tl.load(stats_ptr + 2 * stats_stride + rows, mask=rows < n_queries, other=0.0)
        p = _scaled(_exp(_at_most(s, top), top), norm[:, None])
    ds = ()
    for j in tl.static_range(len(KEYS)):
        ds = ds + (p[j] * (dp[j] - delta[:, None]),)
    return p, ds


@triton.jit
def bwd_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr,
                dq_ptr, dk_ptr, dv_ptr,
                g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                dq_st, dq_sb, dq_sh, dq_sn, bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                stats_stride, heads, n_queries, n_keys, n_chunks, n_tiles, chunk, scale,
                DIM: constexpr, DIMS: constexpr, KEYS: constexpr, TILE: constexpr, BLOCK: constexpr,
                RELOAD: constexpr, ALIGN: constexpr):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    part = (pid // heads) % n_chunks
    tile = (pid // heads // n_chunks) % n_tiles
    b = (pid // heads // n_chunks // n_tiles).to(tl.int64)
    row_of_head = b * heads + h
    g_ptr += tl.multiple_of(b * g_sb + h * g_sh, ALIGN)
    q_ptr += tl.multiple_of(b * q_sb + h * q_sh, ALIGN)
    k_ptr += tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
    v_ptr += tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
    if bias_ptr is not None:
        bias_ptr += b * bias_sb + h * bias_sh
    if labels_ptr is not None:
        labels_ptr += b * labels_sb
    if stats_ptr is not None:
        stats_ptr += row_of_head * n_queries
    if dq_ptr is not None:
        dq_ptr += tl.multiple_of(tile.to(tl.int64) * dq_st + b * dq_sb + h * dq_sh, ALIGN)

    first = tile * TILE
    k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)  # (TILE, DIM)
    v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
    dk = _zero_keys(KEYS, DIMS)
    dv = _zero_keys(KEYS, DIMS)
    for start in range(part * chunk, min(part * chunk + chunk, n_queries), BLOCK):
        if RELOAD:
            k = _load_keys(k_ptr, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
            v = _load_keys(v_ptr, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        rows = start + tl.arange(0, BLOCK)
        q = _load(q_ptr, rows, n_queries, q_sn, DIM, DIMS, ALIGN)  # (BLOCK, DIM); zero past the last query,
        g = _load(g_ptr, rows, n_queries, g_sn, DIM, DIMS, ALIGN)  # so such rows add nothing to dK and dV
        bias_rows = _bias_rows(labels_ptr, rows, n_queries)
        p, ds = _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale, bias_ptr, bias_rows,
                                 bias_sn, bias_ss, n_bias_rows, stats_ptr, stats_stride, KEYS)  # fmt: skip
        if dq_ptr is not None:
            dq = _zeros(BLOCK, DIMS)
            for j in tl.static_range(len(KEYS)):
                dq = _dot_nn(dq, ds[j], k[j])
            _store(dq_ptr, rows, n_queries, dq_sn, _scaled(dq, scale), DIM, DIMS, ALIGN)
        if dk_ptr is not None:
            new_dk = ()
            new_dv = ()
            for j in tl.static_range(len(KEYS)):
                new_dv = new_dv + (_dot_tn(dv[j], p[j], g),)
                new_dk = new_dk + (_dot_tn(dk[j], ds[j], q),)
            dv = new_dv
            dk = new_dk

    if dk_ptr is not None:  # partial sums (chunks, B, H, n_keys, DIM), without gaps
        batch = tl.num_programs(0) // heads // n_chunks // n_tiles
        offset = (part * batch * heads + row_of_head) * n_keys * DIM
        for j in tl.static_range(len(KEYS)):
            rows = first + j * KEYS[0] + tl.arange(0, KEYS[j])
            _store(dk_ptr + offset, rows, n_keys, DIM, _scaled(dk[j], scale), DIM, DIMS, 1)
            _store(dv_ptr + offset, rows, n_keys, DIM, dv[j], DIM, DIMS, 1)


@triton.jit
def sum_kernel(dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr,
                dk_sb, dk_sh, dk_sn, dv_sb, dv_sh, dv_sn, heads, n_keys, n_blocks, n_parts, part_stride,
                DIM: constexpr, DIMS: constexpr, BLOCK: constexpr, ALIGN: constexpr):  # fmt: skip
    """dK and dV: the chunks' partial sums, added first to last."""
    pid = tl.program_id(0)
    rows = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    row_of_head = (pid // n_blocks).to(tl.int64)
    b = row_of_head // heads
    h = row_of_head % heads
    offset = row_of_head * n_keys * DIM
    dk = _zeros(BLOCK, DIMS)
    dv = _zeros(BLOCK, DIMS)
    for _ in range(n_parts):
        dk = _added(dk, _load(dk_parts_ptr + offset, rows, n_keys, DIM, DIM, DIMS, 1))
        dv = _added(dv, _load(dv_parts_ptr + offset, rows, n_keys, DIM, DIM, DIMS, 1))
        offset += part_stride
    if dk_ptr is not None:
        _store(dk_ptr + b * dk_sb + h * dk_sh, rows, n_keys, dk_sn, dk, DIM, DIMS, ALIGN)
    if dv_ptr is not None:
        _store(dv_ptr + b * dv_sb + h * dv_sh, rows, n_keys, dv_sn, dv, DIM, DIMS, ALIGN)


@triton.jit
def bias_bwd_kernel(g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, labels_ptr, stats_ptr, grad_ptr,
                     g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
                     bias_sb, bias_sh, bias_sn, bias_ss, n_bias_rows, labels_sb,
                     grad_sp, grad_sb, grad_sh, grad_sn, stats_stride, heads, shared_heads, shared_batch,
                     n_queries, n_keys, n_blocks, n_tiles, scale,
                     DIM: constexpr, DIMS: constexpr, KEYS: constexpr, TILE: constexpr,
                     BLOCK: constexpr, ONE_ROW: constexpr, ALIGN: constexpr):  # fmt: skip
    """∂L/∂bias summed over the heads and batch rows that share it: (parts, bias batch, bias heads, rows, S).

    A program owns one block of queries and one key tile of one bias matrix. Three endings: the rows
    themselves; their sum where one row serves all queries (ONE_ROW); their sum by label (a layout). The
    sums are one part a block of queries.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    tile = (pid // n_blocks) % n_tiles
    matrix = pid // n_blocks // n_tiles
    bias_heads = heads // shared_heads
    first_h = matrix % bias_heads
    first_b = matrix // bias_heads

    rows = block * BLOCK + tl.arange(0, BLOCK)
    first = tile * TILE
    acc = ()
    for j in tl.static_range(len(KEYS)):
        acc = acc + (tl.zeros([BLOCK, KEYS[j]], tl.float32),)
    for turn in range(shared_heads * shared_batch):
        h = (first_h + turn % shared_heads).to(tl.int64)
        b = (first_b + turn // shared_heads).to(tl.int64)
        q = _load(q_ptr + tl.multiple_of(b * q_sb + h * q_sh, ALIGN), rows, n_queries, q_sn, DIM, DIMS, ALIGN)
        g = _load(g_ptr + tl.multiple_of(b * g_sb + h * g_sh, ALIGN), rows, n_queries, g_sn, DIM, DIMS, ALIGN)
        k_head = k_ptr + tl.multiple_of(b * k_sb + h * k_sh, ALIGN)
        v_head = v_ptr + tl.multiple_of(b * v_sb + h * v_sh, ALIGN)
        k = _load_keys(k_head, first, n_keys, k_sn, KEYS, DIM, DIMS, ALIGN)
        v = _load_keys(v_head, first, n_keys, v_sn, KEYS, DIM, DIMS, ALIGN)
        if labels_ptr is not None:
            bias_rows = _bias_rows(labels_ptr + b * labels_sb, rows, n_queries)
        else:
            bias_rows = _bias_rows(None, rows, n_queries)
        matrix_ptr = bias_ptr + b * bias_sb + h * bias_sh
        row_stats = stats_ptr + (b * heads + h) * n_queries
        p, ds = _score_gradients(q, g, k, v, rows, n_queries, first, n_keys, scale, matrix_ptr, bias_rows,
                                 bias_sn, bias_ss, n_bias_rows, row_stats, stats_stride, KEYS)  # fmt: skip
        acc = _added(acc, ds)

    grad_ptr += first_b.to(tl.int64) * grad_sb + first_h.to(tl.int64) * grad_sh
    for j in tl.static_range(len(KEYS)):
        columns = first + j * KEYS[0] + tl.arange(0, KEYS[j])
        if labels_ptr is not None:  # a layout's table has one row a label and no head dimension
            labels = _bias_rows(labels_ptr + first_b * labels_sb, rows, n_queries)
            for start in range(0, n_bias_rows, 16):
                regions = start + tl.arange(0, 16)
                member = regions[:, None] == labels[None, :]
                total = tl.dot(member.to(tl.float32), acc[j], input_precision=PRECISION)
                where = block.to(tl.int64) * grad_sp + regions[:, None] * grad_sn + columns[None, :]
                tl.store(
                    grad_ptr + where,
                    total,
                    mask=(regions < n_bias_rows)[:, None] & (columns < n_keys)[None, :],
                )
        elif ONE_ROW:
            total = tl.sum(acc[j], 0)  # rows past the last query have g = 0, hence ∂L/∂s = 0
            tl.store(grad_ptr + block.to(tl.int64) * grad_sp + columns, total, mask=columns < n_keys)
        else:
            where = rows[:, None].to(tl.int64) * grad_sn + columns[None, :]
            tl.store(grad_ptr + where, acc[j], mask=(rows < n_queries)[:, None] & (columns < n_keys)[None, :])


@triton.jit
def gram_kernel(x_ptr, gram_ptr, sum_ptr, x_sb, x_sh, x_sn, heads, n_rows, n_chunks, chunk,
                 DIM: constexpr, DIMS: constexpr, SLICE: constexpr, N_SLICES: constexpr,
                 BLOCK: constexpr, ALIGN: constexpr):  # fmt: skip
    """SLICE rows of xᵀx (DIM, DIM) and of Σ rows (DIM,), over one chunk of the rows of one head."""
    pid = tl.program_id(0)
    columns = (pid % N_SLICES) * SLICE + tl.arange(0, SLICE)
    part = (pid // N_SLICES) % n_chunks
    row_of_head = (pid // N_SLICES // n_chunks).to(tl.int64)
    x_ptr += tl.multiple_of((row_of_head // heads) * x_sb + (row_of_head % heads) * x_sh, ALIGN)
    gram = _zeros(SLICE, DIMS)
    total = tl.zeros([SLICE], tl.float32)
    for start in range(part * chunk, min(part * chunk + chunk, n_rows), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, rows, n_rows, x_sn, DIM, DIMS, ALIGN)
        starts = tl.multiple_of(rows.to(tl.int64) * x_sn, ALIGN)
        mask = (rows < n_rows)[:, None] & (columns < DIM)[None, :]
        slice = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
        gram = _dot_tn(gram, slice, x)
        total += tl.sum(slice.to(tl.float32), 0)
    offset = (row_of_head * n_chunks + part) * DIM
    _store(gram_ptr + offset * DIM, columns, DIM, DIM, gram, DIM, DIMS, 1)
    tl.store(sum_ptr + offset + columns, total, mask=columns < DIM)
