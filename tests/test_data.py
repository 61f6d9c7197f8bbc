"""Pictures and captions on disk: of any kind, and what is said of those that cannot be read."""

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image

from customdiff import data

pictures = tiny_pipeline.pictures


def test_pictures_of_any_size_and_mode(tmp_path):
    Image.new("L", (30, 50), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (64, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (16, 16), (0, 255, 0)).save(tmp_path / "small.JPG")
    (tmp_path / "notes.md").write_text("no picture")
    images = data.read_pictures(tmp_path)
    assert [image.mode for image in images] == ["RGB"] * 3
    pixels = data.to_tensor([data.square(image, 32) for image in images])
    assert pixels.shape == (3, 3, 32, 32) and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.all(pixels[0] == 1.0), "transparency is white"


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    (image,) = data.read_pictures(tmp_path)
    assert np.array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))


def test_square_takes_the_centre():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    assert data.square(image, 8).getcolors() == [(64, (0, 0, 255))]


def test_folders_without_a_usable_picture_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        data.read_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'.*empty' holds no PNG or JPEG picture, but nothing at all"):
        data.read_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "film.mov").write_text("x")
    with pytest.raises(ValueError, match="1 other entries, as film.mov"):
        data.read_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="'broken.png' in '.*empty' is not a readable picture"):
        data.read_pictures(tmp_path / "empty")


def test_an_autoencoder_in_half_precision_does_not_overflow():
    """SDXL's does, in its encoder's activations."""
    torch.manual_seed(0)
    vae, pixels = tiny_pipeline.vae().requires_grad_(False), torch.rand(3, 3, 16, 16)
    vae.encoder.conv_in.weight *= 2e5
    vae.half()
    assert not vae.encode(pixels.half()).latent_dist.mean.isfinite().all()
    found = data.encode(vae, pixels)
    assert found.mean.isfinite().all() and found.mean.dtype == torch.float32
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}


def test_captions_beside_or_in_a_table(tmp_path):
    folder = tmp_path / "dogs"
    pictures(folder, 2, seed=0, size=(8, 8))
    with pytest.raises(ValueError, match="'0.jpg' in '.*' has no caption"):
        data.read_captioned(folder)
    (folder / "captions.csv").write_text("file,caption\n0.jpg,photo of a dog\n1.png,a red dog\n")
    assert data.read_captioned(folder)[1] == ["photo of a dog", "a red dog"]
    (folder / "1.txt").write_text("a blue dog\n")
    assert data.read_captioned(folder)[1] == ["photo of a dog", "a blue dog"]
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_text('{"file_name": "0.jpg", "text": "a cat"}\n')
    assert data.read_captioned(folder)[1] == data.read_captions(folder) == ["a cat", "a blue dog"]
    (tmp_path / "list.txt").write_text("a dog\n\na cat\n")
    assert data.read_captions(tmp_path / "list.txt") == ["a dog", "a cat"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no caption"):
        data.read_captions(tmp_path / "empty.txt")
    (tmp_path / "excel.csv").write_bytes("\ufefffile,caption\r\n0.jpg,a dog\r\n".encode())
    assert data.read_captions(tmp_path / "excel.csv") == ["a dog"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "odd.jsonl",
            b'{"words": "a dog"}',
            "line 1 of '.*odd.jsonl' has no text as its \"caption\": {'words'",
        ),
        ("list.jsonl", b'\n["a dog"]', r"line 2 of '.*list.jsonl' has no text .*: \['a dog'\]"),
        ("number.jsonl", b'{"caption": 3}', "line 1 of '.*number.jsonl' has no text"),
        ("broken.jsonl", b'{"caption": "a"}\n{"caption"', "line 2 of '.*broken.jsonl' is not JSON"),
        ("short.csv", b"file,caption\na.png\n", "line 2 of '.*short.csv' has no text"),
        ("latin.txt", b"caf\xe9", "latin.txt' is not UTF-8 text"),
    ],
)
def test_caption_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_captions(tmp_path / name)
