"""Residuals of Cones 2: their files, finding a subject in a prompt, and adding them to it."""

import pytest
import torch

import customdiff_kernels as ck

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipeline  # noqa: E402

from customdiff.concept import base_metadata, encode_prompts  # noqa: E402
from customdiff.residual import Residual, add_residuals  # noqa: E402
from customdiff.subjects import find_subject, split_subject  # noqa: E402


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny_pipeline.build(tmp_path_factory.mktemp("tiny"))
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.mark.parametrize(
    ("prompt", "name", "at"),
    [
        ("a dog and a dog", "dog", (2,)),
        ("a dog and a dog", "dog#1", (2,)),
        ("A Dog and a DOG", "dog#2", (5,)),
        ("a dog and a dog", "a#2", (4,)),
        ("photo of a red cat on the grass", "red cat", (4, 5)),
        ("a red dog and a red cat", "red cat", (6, 7)),
        ("a kxq dog", "kxq", (2, 3, 4)),  # one word of three tokens
        ("a kxq dog, kxq dog", "kxq dog#2", (7, 8, 9, 10)),
        ("a <new1> dog and a dog", "<new1> dog", (2, 3)),
        ("a <new1> dog and a dog", "dog#2", (6,)),
        ("a dog's t-cup", "t-cup", (5, 6, 7)),
    ],
)
def test_a_subject_is_found(pipe, prompt, name, at):
    assert find_subject(pipe.tokenizer, prompt, name, ["<new1>"]) == at


@pytest.mark.parametrize(
    ("prompt", "name", "message"),
    [
        (
            "a red cat",
            "dog",
            "subject 'dog' is not in the prompt 'a red cat'; write 'dog' there.*a, red, cat",
        ),
        ("a dogcat", "dog", "'dog' is not in the prompt"),
        ("a cat and a red", "red cat", "'red cat' is not in"),
        ("", "dog", "there are none"),
        ("a a a a a a a a a a a a a cat dog", "dog", "the text encoder reads of it: a, cat$"),
        ("a dog and a dog", "dog#3", "subject 'dog#3': prompt 'a dog and a dog' has 'dog' 2 times; .* dog#2"),
        ("a dog", "dog#0", "subject 'dog#0' must be a word of the prompt"),
        ("a dog", " ", "must be a word"),
        ("a dog", "#2", "must be a word"),
    ],
)
def test_a_subject_that_is_not_there(pipe, prompt, name, message):
    with pytest.raises(ValueError, match=message):
        find_subject(pipe.tokenizer, prompt, name)


def test_names_of_subjects():
    assert split_subject("garden gnome") == ("garden gnome", 1)
    assert split_subject(" dog #12 ") == ("dog", 12)
    with pytest.raises(TypeError, match="named by a string, got int"):
        split_subject(3)


def test_a_file_round_trip(tmp_path):
    residual = Residual("garden gnome", torch.randn(3, 8, dtype=torch.float64), {"training": {"steps": 5}})
    path = tmp_path / "new" / "gnome.safetensors"
    residual.save(path)
    loaded = Residual.load(path)
    assert loaded.word == "garden gnome" and loaded.metadata == {"training": {"steps": 5}}
    assert torch.equal(loaded.shift, residual.shift) and loaded.shift.dtype == torch.float32
    assert Residual.load(path, "dog").word == "dog"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_residual_is_not_taken_for_a_concept(tmp_path):
    file = tmp_path / "dog.safetensors"
    Residual("dog", torch.ones(32)).save(file)
    with pytest.raises(ck.DeltaFileError, match="its metadata says that it is a customdiff residual"):
        ck.load_delta(file)


def test_a_file_is_small(pipe, tmp_path):
    metadata = base_metadata(ck.KVStack.from_unet(pipe.unet)) | {
        "base_name": "stable-diffusion-2-1-base",
        "resolution": 512,
        "prompts": ["photo of a dog"],
        "training": {f"option_{i}": 1e-6 * i for i in range(40)},
    }
    Residual("dog", torch.randn(1024), metadata).save(tmp_path / "dog")
    assert (tmp_path / "dog").stat().st_size <= 8 * 1024


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (3, 8)])
def test_published_tensors(tmp_path, shape):
    shift = torch.randn(shape, dtype=torch.float16)
    torch.save(shift, tmp_path / "residual.pt")
    with pytest.raises(ValueError, match="residual.pt': it does not know its word: give word="):
        Residual.load(tmp_path / "residual.pt")
    loaded = Residual.load(tmp_path / "residual.pt", word="dog")
    assert loaded.word == "dog" and loaded.metadata == {}
    assert torch.equal(loaded.shift, shift.float().reshape(-1, 8))


class _Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_files_that_are_none(pipe, tmp_path):
    path = tmp_path / "dog.safetensors"
    Residual("dog", torch.randn(8), {"a": 1}).save(path)
    whole = path.read_bytes()

    def written(data):
        (tmp_path / "bad").write_bytes(data)

    cases = [
        (lambda: written(whole[:-1] + bytes([whole[-1] ^ 1])), "does not match the checksum"),
        (lambda: written(whole.replace(b'"word":"dog"', b'"word":"cat"')), "does not match the checksum"),
        (lambda: written(whole[:-5]), "not a whole safetensors file"),
        (
            lambda: written(whole.replace(b'"version":"1"', b'"version":"7"')),
            "version '7', and this .* reads 1",
        ),
        (lambda: written(b""), r"refuses it \(EOFError"),
        (lambda: written(b"\x89PNG not this"), "it is no residual"),
        (lambda: torch.save(_Trap(), tmp_path / "bad"), r"weights_only=True. refuses it"),
        (
            lambda: torch.save({"a": torch.ones(2)}, tmp_path / "bad"),
            "one tensor .tokens, E., and holds dict",
        ),
        (lambda: torch.save(torch.ones(2, 2, 8), tmp_path / "bad"), r"holds a tensor of shape \(2, 2, 8\)"),
        (
            lambda: torch.save(torch.ones(8).long(), tmp_path / "bad"),
            "must be a floating tensor, got .* int64",
        ),
        (lambda: torch.save(torch.full((8,), torch.nan), tmp_path / "bad"), "'dog' is not finite"),
        (
            lambda: tiny_pipeline.concept(pipe, 0).save(tmp_path / "bad"),
            "it is no residual; a concept's file",
        ),
    ]
    for make, message in cases:
        make()
        with pytest.raises(ValueError, match=f"residual file .*bad.*{message}"):
            Residual.load(tmp_path / "bad", word="dog")
    with pytest.raises(FileNotFoundError, match="no residual file at .*none"):
        Residual.load(tmp_path / "none")


def test_what_is_no_residual():
    for word, shift, message in [
        ("", torch.ones(8), "word must be the subject's"),
        ("dog", torch.ones(1, 1, 8), r"shift must be \(tokens, E\), got \(1, 1, 8\)"),
        ("dog", torch.ones(0, 8), r"got \(0, 8\)"),
        ("dog", torch.full((8,), torch.inf), "shift of 'dog' is not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            Residual(word, shift)
    with pytest.raises(TypeError, match="must be what JSON can hold"):
        Residual("dog", torch.ones(8), {"a": torch.ones(1)}).save("never.safetensors")


def test_another_base_is_refused(pipe):
    stack = ck.KVStack.from_unet(pipe.unet)
    residual = Residual("dog", torch.ones(32), base_metadata(stack) | {"base_name": "tiny"})
    residual.check_base(stack)
    Residual("dog", torch.ones(32)).check_base(stack)  # a published one does not know
    other = ck.KVStack(stack.weight + 1, stack.segments)
    with pytest.raises(ck.BaseMismatchError, match="residual 'dog' is of the base model tiny, base_hash"):
        residual.check_base(other)
    with pytest.raises(ck.BaseMismatchError, match="base_hash 5, and"):  # a stranger's file
        Residual("dog", torch.ones(32), {"base_hash": 5}).check_base(stack)


def test_each_row_gets_its_own_residuals(pipe):
    prompts = ["a dog and a dog", "a kxq cat", "a dog", "a <new1> dog and a cat"]
    modifiers = [{}, {}, {}, {"<new1>": torch.randn(32)}]
    teal, grey, gnome = (Residual(w, torch.randn(n, 32)) for w, n in (("dog", 1), ("dog", 1), ("kxq", 3)))
    rows = [{"dog": teal, "dog#2": grey}, {"kxq": gnome}, {}, {"dog": grey, "cat": teal}]
    with torch.no_grad():
        context = encode_prompts(pipe, prompts, modifiers).context
    before = context.clone()
    got = add_residuals(pipe, prompts, context, rows, modifiers)
    want = before.clone()
    for row, at, shift in [
        (0, 2, teal.shift[0]),
        (0, 5, grey.shift[0]),
        (3, 3, grey.shift[0]),
        (3, 6, teal.shift[0]),
        *((1, 2 + k, gnome.shift[k]) for k in range(3)),
    ]:
        want[row, at] += shift
    assert torch.equal(got, want) and torch.equal(context, before)
    half = add_residuals(pipe, prompts[:1], before[:1].half(), rows[:1])
    assert half.dtype == torch.float16


def test_residuals_that_do_not_fit(pipe):
    context = torch.zeros(1, 16, 32)
    dog = Residual("dog", torch.ones(32))
    for prompt, row, message in [
        ("a cat", {"dog": dog}, "subject 'dog' is not in the prompt 'a cat'"),
        ("a dog", {"dog": Residual("dog", torch.ones(48))}, "'dog': its residual is 48 wide .* 32"),
        ("a kxq", {"kxq": dog}, "subject 'kxq': its residual, of 'dog', is for 1 tokens, and .* is 3"),
        ("a dog", {"dog": dog, "dog#1": dog}, "subjects 'dog' and 'dog#1' are the same word"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_residuals(pipe, [prompt], context, [row])


def test_sdxl_is_refused(tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_pipeline.build_xl(tmp_path / "xl"))
    with pytest.raises(ValueError, match="this pipeline .SDXL. has two"):
        add_residuals(pipe, ["a dog"], torch.zeros(1, 16, 80), [{"dog": Residual("dog", torch.ones(80))}])
