"""LayoutBias: rasterising boxes and masks by area, and that it equals the dense bias it stands for."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import customdiff_kernels as ck

POSITIVE, NEGATIVE = 2.5, -1e8


def boxes(found, tokens=None, size=(4, 4), n_tokens=8, **options):
    tokens = tokens or {name: [i + 1] for i, name in enumerate(found)}
    return ck.LayoutBias.from_boxes(found, tokens, size, n_tokens, POSITIVE, NEGATIVE, **options)


def inside(layout, size, token=1):
    """Where a token's bias is positive, (h, w)."""
    return layout.dense()[0, 0, :, token].view(size) == POSITIVE


def test_a_pixel_belongs_to_the_box_that_covers_half_of_it():
    # a 4x4 grid: 0.125 is the middle of a pixel, so exactly half of it is covered; a bit less is not enough
    for edge, columns in ((0.125, 1), (0.124, 1), (0.375, 2), (0.374, 1), (0.376, 2), (1.0, 4)):
        covered = inside(boxes({"dog": (0.0, 0.0, edge, 1.0)}), (4, 4))
        assert covered.sum(1).tolist() == [columns] * 4 and covered[:, :columns].all(), edge


def test_area_decides_and_not_each_side():
    # 0.7 of the width and 0.7 of the height is 0.49 of the pixel: outside, though each side is over half
    covered = inside(boxes({"dog": (0.0, 0.0, (1 + 0.7) / 4, (1 + 0.7) / 4)}), (4, 4))
    assert covered.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]


def test_a_box_smaller_than_a_pixel_gets_the_pixel_that_it_covers_most_of():
    assert inside(boxes({"dog": (0.30, 0.55, 0.35, 0.60)}), (4, 4)).nonzero().tolist() == [[2, 1]]
    assert inside(boxes({"dog": (0.24, 0.55, 0.35, 0.60)}), (4, 4)).nonzero().tolist() == [[2, 1]]
    thin = inside(boxes({"dog": (0.30, 0.0, 0.35, 1.0)}), (4, 4))  # as long as the picture, so as long here
    assert thin.nonzero().tolist() == [[i, 1] for i in range(4)]


@st.composite
def rational_boxes(draw):
    unit = draw(st.integers(1, 24))
    x0, y0 = draw(st.integers(0, unit - 1)), draw(st.integers(0, unit - 1))
    x1, y1 = draw(st.integers(x0 + 1, unit)), draw(st.integers(y0 + 1, unit))
    size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return tuple(Fraction(x, unit) for x in (x0, y0, x1, y1)), size


@given(rational_boxes())
def test_boxes_follow_exact_arithmetic(case):
    (x0, y0, x1, y1), (h, w) = case
    share = [
        [
            max(0, min(y1, Fraction(i + 1, h)) - max(y0, Fraction(i, h)))
            * max(0, min(x1, Fraction(j + 1, w)) - max(x0, Fraction(j, w)))
            * h
            * w
            for j in range(w)
        ]
        for i in range(h)
    ]
    least = min(Fraction(1, 2), max(max(row) for row in share))
    expected = torch.tensor([[s >= least for s in row] for row in share])
    assert torch.equal(
        inside(boxes({"dog": tuple(float(x) for x in (x0, y0, x1, y1))}, size=(h, w)), (h, w)), expected
    )


@given(rational_boxes())
def test_masks_are_brought_to_size_by_area_as_boxes_are(case):
    (x0, y0, x1, y1), size = case
    unit = 24 * 2
    x0, y0, x1, y1 = (round(x * unit) for x in (x0, y0, x1, y1))
    if x0 == x1 or y0 == y1:
        return
    mask = torch.zeros(unit, unit, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    box = boxes({"dog": (x0 / unit, y0 / unit, x1 / unit, y1 / unit)}, size=size)
    for given_mask in (mask, mask.float()):
        layout = ck.LayoutBias.from_masks({"dog": given_mask}, {"dog": [1]}, size, 8, POSITIVE, NEGATIVE)
        assert torch.equal(layout.dense(), box.dense())


def test_tokens_get_their_bias_and_others_none():
    layout = boxes({"dog": (0, 0, 0.5, 1), "cat": (0.5, 0, 1, 1)}, {"dog": [1, 3], "cat": [5]}, (2, 2))
    left, right = layout.dense()[0, 0].view(2, 2, 8).unbind(1)
    assert torch.equal(left, torch.tensor([0, POSITIVE, 0, POSITIVE, 0, NEGATIVE, 0, 0]).expand(2, -1))
    assert torch.equal(right, torch.tensor([0, NEGATIVE, 0, NEGATIVE, 0, POSITIVE, 0, 0]).expand(2, -1))


def test_overlapping_regions_favour_both_subjects_in_the_overlap():
    layout = boxes({"dog": (0, 0, 0.75, 1), "cat": (0.25, 0, 1, 1)})
    assert layout.table.shape == (1, 3, 8)  # dog, both, cat
    row = layout.dense()[0, 0].view(4, 4, 8)[0, :, 1:3]
    assert row.tolist() == [
        [POSITIVE, NEGATIVE],
        [POSITIVE, POSITIVE],
        [POSITIVE, POSITIVE],
        [NEGATIVE, POSITIVE],
    ]


def test_a_token_of_two_subjects_is_inside_in_either_region():
    layout = boxes({"a": (0, 0, 0.25, 1), "b": (0.75, 0, 1, 1)}, {"a": [1, 4], "b": [2, 4]})
    row = layout.dense()[0, 0].view(4, 4, 8)[0, :, 4]
    assert row.tolist() == [POSITIVE, NEGATIVE, NEGATIVE, POSITIVE]


def test_boxes_and_masks_together_are_what_each_is_alone():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    found, tokens = {"dog": (0, 0, 0.75, 1), "cat": (0.5, 0, 1, 1)}, {"dog": [1], "cat": [2]}
    mixed = ck.LayoutBias.from_regions(found | {"cat": mask}, tokens, (4, 4), 8, POSITIVE, NEGATIVE)
    assert torch.equal(mixed.dense(), boxes(found).dense())
    with pytest.raises(ValueError, match=r"regions\['cat'\] must satisfy"):
        ck.LayoutBias.from_regions(found | {"cat": (1, 0, 0, 1)}, tokens, (4, 4), 8, POSITIVE, NEGATIVE)


def test_every_subject_may_have_its_own_strength():
    found = {"a": (0, 0, 0.5, 1), "b": (0.25, 0, 0.75, 1)}
    tokens = {"a": [1, 3], "b": [2, 3]}  # 3 is of both

    def row(positive):
        layout = ck.LayoutBias.from_boxes(found, tokens, (4, 4), 8, positive, -1.0)
        return layout.dense()[0, 0].view(4, 4, 8)[0, :, 1:4].tolist()

    assert row({"a": 2.0, "b": 3.0}) == [[2, -1, 2], [2, 3, 3], [-1, 3, 3], [-1, -1, -1]]
    assert row({"b": 2.0, "a": 3.0}) == [[3, -1, 3], [3, 2, 3], [-1, 2, 2], [-1, -1, -1]]
    with pytest.raises(ValueError, match=r"positive must name the same .* \['a', 'b'\] and \['a'\]"):
        row({"a": 2.0})
    with pytest.raises(TypeError, match="positive of 'b' must be a number, got str"):
        row({"a": 2.0, "b": "2"})
    with pytest.raises(ValueError, match="positive of 'a' must be a number, got nan"):
        row(float("nan"))


def test_a_box_of_hardly_any_area_gets_one_pixel_and_not_the_picture():
    assert inside(boxes({"dog": (0.6, 0.3, 0.600001, 0.300001)}), (4, 4)).nonzero().tolist() == [[1, 2]]


def test_outside_every_region():
    box = {"dog": (0, 0, 0.5, 1), "cat": (0.5, 0, 0.75, 1)}
    nowhere = (slice(None), 3, slice(1, 3))
    assert (boxes(box).dense()[0, 0].view(4, 4, 8)[nowhere] == NEGATIVE).all()
    paper = boxes(box, outside=0.0).dense()[0, 0].view(4, 4, 8)
    assert (paper[nowhere] == 0).all()
    assert (paper[:, 0, 2] == NEGATIVE).all() and (
        paper[:, 2, 1] == NEGATIVE
    ).all()  # another's region is not nowhere


def test_every_attention_level_has_its_own_size():
    for size in ((64, 64), (8, 8), (6, 12), (1, 1)):
        layout = boxes({"dog": (0, 0, 0.5, 1), "cat": (0.5, 0, 1, 1)}, size=size)
        assert layout.labels.shape == (1, size[0] * size[1]) and layout.labels.dtype is torch.int32


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (3, 3)], ids=str)
def test_equals_its_dense_bias_forward_and_backward(shape, backend64):
    batch_of_labels, batch_of_table = shape
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (12, 7, 7))
    labels = torch.randint(0, 4, (batch_of_labels, 12))
    table = torch.randn(batch_of_table, 4, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    layout = ck.LayoutBias(labels, table, scale)
    leaves = (q, k, v, table, scale)
    upstream = torch.randn(3, 2, 12, 8, dtype=torch.float64)
    results = []
    for bias in (layout, layout.dense()):
        out = ck.cross_attention(q, k, v, bias)
        results.append([out, *torch.autograd.grad(out, leaves, upstream, retain_graph=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda t, s: ck.cross_attention(q, k, v, ck.LayoutBias(labels, t, s)), (table, scale)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hard_layout_keeps_text_out_of_foreign_regions(dtype, backend, device):
    layout = boxes({"dog": (0, 0, 0.5, 1), "cat": (0.5, 0, 1, 1)}, {"dog": [1], "cat": [2]}, n_tokens=3).to(
        device
    )
    q, k = (torch.randn(1, 2, n, 8, dtype=dtype, device=device) for n in (16, 3))
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype, device=device)
    v = torch.nn.functional.pad(v, (0, 6)).expand(1, 2, 3, 8)
    out = ck.cross_attention(q, k, v, layout)[0, 0].view(4, 4, 8)
    assert (out[:, 2:, 0] == 0).all() and (out[:, :2, 1] == 0).all()
    assert (out[:, :2, 0] > 0.1).all() and (out[:, 2:, 1] > 0.1).all()


def test_scale_is_a_number_or_a_tensor_and_can_be_replaced():
    labels, table = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 1, 3)
    layout = ck.LayoutBias(labels, table, 0.5)
    assert (layout.dense() == 0.5).all() and (layout.with_scale(torch.tensor(2.0)).dense() == 2).all()
    assert layout.with_scale(3).labels is layout.labels and layout.scale == 0.5
    assert layout.to("cpu").dense().equal(layout.dense())
    assert repr(layout) == "LayoutBias(batch=1, N=4, regions=1, S=3)"


def test_hidden_tokens_stay_hidden_at_every_scale():
    """Schedules of layout guidance end at 0, where a plain product would be NaN."""
    table = torch.tensor([[[0.5, -torch.inf, 2.0], [-torch.inf, 1.0, 0.0]]])
    labels = torch.tensor([[0, 1]])
    for scale in (0.0, 2.0, torch.tensor(0.0)):
        dense = ck.LayoutBias(labels, table, scale).dense()[0, 0]
        expected = torch.where(table[0].isinf(), table[0], table[0].nan_to_num() * float(scale))
        torch.testing.assert_close(dense, expected)
    scale = torch.tensor(0.0, requires_grad=True)
    table.requires_grad_()
    query, key, value = torch.randn(3, 1, 1, 3, 8).unbind()
    ck.cross_attention(query[:, :, :2], key, value, bias=ck.LayoutBias(labels, table, scale)).sum().backward()
    assert scale.grad.isfinite() and table.grad.isfinite().all()


def test_stack_gives_each_row_its_own_layout():
    one = boxes({"dog": (0, 0, 0.5, 1)}, scale=2.0)
    two = boxes({"dog": (0, 0, 0.75, 1), "cat": (0.25, 0, 1, 1)})
    both = ck.LayoutBias.stack([one, None, two]).dense()
    assert torch.equal(both, torch.cat([one.dense(), torch.zeros_like(one.dense()), two.dense()]))
    with pytest.raises(ValueError, match="at least one LayoutBias"):
        ck.LayoutBias.stack([None])
    with pytest.raises(ValueError, match=r"layouts\[1\] must have batch 1, N=16 and S=8"):
        ck.LayoutBias.stack([one, boxes({"dog": (0, 0, 1, 1)}, size=(2, 2))])
    with pytest.raises(ValueError, match=r"layouts\[1\] is on meta and the first on cpu"):
        ck.LayoutBias.stack([one, two.to("meta")])


LABELS, TABLE = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LABELS.float(), TABLE), TypeError, "labels must be integers, got float32"),
        ((LABELS.bool(), TABLE), TypeError, "labels must be integers, got bool"),
        (([0], TABLE), TypeError, "labels must be a torch.Tensor, got list"),
        ((LABELS[0], TABLE), ValueError, r"labels must have shape \(B\|1,N\)"),
        ((LABELS, TABLE[0]), ValueError, r"table must have shape \(B\|1,regions,S\)"),
        ((LABELS, TABLE.long()), TypeError, "table must be .*, got int64"),
        ((LABELS + 2, TABLE), ValueError, "labels must lie in 0 … 1 .table has 2 regions., got 2$"),
        ((LABELS - 1, TABLE), ValueError, "labels must lie in 0 .*, got -1$"),
        ((LABELS.expand(2, -1), TABLE.expand(3, -1, -1)), ValueError, "must agree in batch, got 2 and 3"),
        ((LABELS, TABLE.to("meta")), ValueError, "table is on meta and labels on cpu"),
        ((LABELS, TABLE, torch.zeros(2)), ValueError, "scale must be a number or a 0-dim tensor"),
        ((LABELS, TABLE, torch.zeros((), device="meta")), ValueError, "scale is on meta and table on cpu"),
        ((LABELS, TABLE, "x"), TypeError, "scale must be a number, got str"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)
def test_bad_labels_and_tables_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ck.LayoutBias(*arguments)


def test_labels_elsewhere_than_on_the_cpu_are_not_read():
    """Which would wait for a GPU, and cannot be captured in a CUDA graph."""
    layout = ck.LayoutBias((LABELS + 7).to("meta"), TABLE.to("meta"), torch.ones((), device="meta"))
    assert layout.dense().shape == (1, 1, 4, 3)


GOOD = {"boxes": {"dog": (0, 0, 1, 1)}, "tokens": {"dog": [1]}, "size": (4, 4), "n_tokens": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": {"dog": (0.5, 0, 0.5, 1)}}, r"boxes\['dog'\] must satisfy .* got \(0.5, 0, 0.5, 1\)"),
        ({"boxes": {"dog": (0, 0, 64, 64)}}, r"boxes\['dog'\] must satisfy"),
        ({"boxes": {"dog": (0, float("nan"), 1, 1)}}, r"boxes\['dog'\] must satisfy"),
        ({"boxes": {"dog": (0, 0, 1)}}, r"boxes\['dog'\] must be \(x0, y0, x1, y1\)"),
        ({"boxes": {}, "tokens": {}}, "boxes must name at least one subject"),
        ({"tokens": {"cat": [1]}}, r"same subjects, got \['dog'\] and \['cat'\]"),
        ({"tokens": {"dog": []}}, r"tokens\['dog'\] must be positions in 0 … 7"),
        ({"tokens": {"dog": [8]}}, r"tokens\['dog'\] must be positions in 0 … 7"),
        ({"size": 16}, r"size must be \(h, w\)"),
        ({"size": (0, 4)}, r"size must be \(h, w\)"),
    ],
)
def test_bad_boxes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ck.LayoutBias.from_boxes(**(GOOD | change), positive=1.0, negative=-1.0)


def test_boxes_and_masks_are_mappings():
    with pytest.raises(TypeError, match="boxes must map each subject to its own, got list"):
        ck.LayoutBias.from_boxes([(0, 0, 1, 1)], {"dog": [1]}, (4, 4), 8, 1.0, -1.0)
    with pytest.raises(TypeError, match="masks must map each subject to its own, got Tensor"):
        ck.LayoutBias.from_masks(torch.ones(4, 4), {"dog": [1]}, (4, 4), 8, 1.0, -1.0)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(4, 4), ValueError, r"masks\['dog'\] must be .* not empty"),
        (torch.full((4, 4), 255.0), ValueError, r"masks\['dog'\] .*values 255 … 255"),
        (torch.full((4, 4), float("nan")), ValueError, r"masks\['dog'\] must be"),
        (torch.ones(4), ValueError, r"masks\['dog'\] must have shape \(height,width\)"),
        (torch.ones(0, 4), ValueError, r"masks\['dog'\] must be"),
        ([[1]], TypeError, r"masks\['dog'\] must be a torch.Tensor, got list"),
    ],
)
def test_bad_masks_are_named(mask, error, message):
    with pytest.raises(error, match=message):
        ck.LayoutBias.from_masks({"dog": mask}, {"dog": [1]}, (4, 4), 8, 1.0, -1.0)
