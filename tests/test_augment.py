"""Pictures moved, mirrored and resized: what is valid of them, and the words that tell their size."""

import torch

from customdiff import augment


def test_shifted_copies_keep_the_pictures_first():
    pixels = torch.rand(2, 3, 16, 16)
    copies = augment.shifted(pixels, 4, 0.125, torch.Generator().manual_seed(0))
    assert copies.shape == (8, 3, 16, 16)
    assert torch.equal(copies[:2], pixels)
    assert augment.shifted(pixels, 4, 0.0, torch.Generator()) is pixels
    core = pixels[0, :, 4:12, 4:12]
    windows = copies[2].unfold(1, 8, 1).unfold(2, 8, 1).movedim(0, 2)
    assert (windows == core).flatten(2).all(-1).sum() == 1, "a copy is the picture, moved"


def test_resized_copies_tell_their_size():
    """Appendix D: one in three enlarged to 1.2-1.4, the others 0.4-1.0, with words below 0.6."""
    pixels = torch.rand(3, 3, 48, 48) * 0.8 + 0.1
    pictures, masks, words = augment.resized(pixels, 20, 0.4, torch.Generator().manual_seed(0))
    assert len(pictures) == len(masks) == len(words) == 60
    smaller = 0
    for i, (picture, mask, word) in enumerate(zip(pictures, masks, words, strict=True)):
        share = float(mask.mean()) ** 0.5
        assert not picture[(mask == 0).expand_as(picture)].any(), "nothing but zeros around the picture"
        if share == 1:  # all of it is picture: whole, or a window of an enlarged one
            assert word in (*augment.LARGE_WORDS, "")
            continue
        smaller += 1
        assert 0.39 < share < 1 and (word in augment.SMALL_WORDS) == (share < augment.SMALL)
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        found = picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert abs(float(found.mean() - pixels[i % 3].mean())) < 0.05, "the whole picture, smaller"
    assert 0.5 < smaller / len(words) < 0.85


def test_two_pictures_side_by_side():
    """Both halves show the middle of their own picture, at 0.7 of its size, at the bottom."""
    columns = torch.linspace(-0.5, 0.5, 48).expand(2, 3, 48, 48)
    pictures = augment.side_by_side(columns, (columns + 0.1).flip(-1))
    assert pictures.shape == (2, 3, 48, 48)
    for half, slope, lift in ((pictures[..., :24], 1, 0.0), (pictures[..., 24:], -1, 0.1)):
        assert torch.allclose(half.mean(), torch.tensor(lift), atol=0.01), "the middle is in the middle"
        steps = half.diff(dim=-1)
        assert torch.allclose(steps, torch.tensor(slope / 47 / 0.7), atol=2e-3), "smaller, not squeezed"
    rows, height = columns.mT, round(0.7 * 48)
    picture = augment.side_by_side(rows, rows)[0]
    assert (picture[:, :-height] == picture[:, -height : 1 - height]).all(), "its upper edge, repeated"
    assert torch.allclose(picture[:, -1], torch.tensor(0.5), atol=0.01), "all of its height"


def test_half_of_the_copies_are_mirrored_with_their_masks():
    pixels, masks = torch.rand(40, 3, 8, 8), (torch.rand(40, 1, 8, 8) < 0.5).float()
    mirrored, valid = augment.flipped(pixels, masks, torch.Generator().manual_seed(0))
    turned = (mirrored != pixels).flatten(1).any(1)
    assert 8 < turned.sum() < 32
    assert torch.equal(mirrored[turned], pixels[turned].flip(-1)) and torch.equal(
        valid[turned], masks[turned].flip(-1)
    )
    assert torch.equal(mirrored[~turned], pixels[~turned]) and torch.equal(valid[~turned], masks[~turned])


def test_where_the_words_of_size_stand():
    prompt = "photo of a <new1> dog"
    assert augment.sized(prompt, "", "after") == augment.sized(prompt, "", "before") == prompt
    assert augment.sized(prompt, "zoomed in", "after") == "photo of a <new1> dog, zoomed in"
    assert augment.sized(prompt, "zoomed in", "before") == "zoomed in photo of a <new1> dog"
    assert augment.sized(prompt, "far away", "before") == "a far away photo of a <new1> dog"
