"""Malformed and hostile files of every format, and a saver killed at any moment."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from file_samples import every_format, sample

import customdiff_kernels as ck
from customdiff_kernels import _atomic, _safetensors

CASES_A_FORMAT = 160
HALF = {torch.float32: torch.int32, torch.int64: torch.int32, torch.float16: torch.int8}


def tensors(loaded: ck.LoadedDelta) -> dict:
    delta = loaded.delta
    if isinstance(delta, ck.LowRankDelta):
        delta = {(name, i): factor for name, pair in delta.factors.items() for i, factor in enumerate(pair)}
    return {**delta, **loaded.weights, **loaded.modifier_tokens}


def same(first: ck.LoadedDelta, second: ck.LoadedDelta) -> bool:
    """Segment by segment and word by word, to the bit."""
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def truncated(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))]


def flipped(data: bytes, generator: random.Random) -> bytes:
    """One bit or eight, half of the time in the header."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 8))):
        end = len(data) if generator.random() < 0.5 else min(len(data), 2000)
        changed[generator.randrange(end)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def spliced(data: bytes, generator: random.Random) -> bytes:
    """A piece left out, doubled, zeroed, or noise in its place."""
    start = generator.randrange(len(data))
    stop = min(len(data), start + generator.randrange(1, 200))
    piece = data[start:stop]
    new = (b"", piece * 2, bytes(len(piece)), generator.randbytes(len(piece)))[generator.randrange(4)]
    return data[:start] + new + data[stop:]


def huge(data: bytes, generator: random.Random) -> bytes:
    """A length somewhere that says gigabytes and more."""
    size = generator.choice((2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    if generator.random() < 0.3:
        return struct.pack("<Q", size) + data[8:]
    at = generator.randrange(len(data) - 8)
    return data[:at] + struct.pack("<Q", size) + data[at + 8 :]


def repacked(data: bytes, edit) -> bytes:
    """The archive of torch.save with its pickle changed and every checksum right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, edit(content) if record.filename.endswith("/data.pkl") else content)
    return buffer.getvalue()


def reopened(data: bytes, generator: random.Random) -> bytes:
    """Bits of the pickle flipped behind a right checksum, or of the JSON header."""

    def edit(program: bytes) -> bytes:
        return (flipped, spliced, truncated)[generator.randrange(3)](program, generator)

    if data.startswith(b"PK"):
        return repacked(data, edit)
    end = 8 + int.from_bytes(data[:8], "little")
    header = edit(data[8:end])
    return struct.pack("<Q", len(header)) + header + data[end:]


def altered(path: Path, generator: random.Random) -> bytes:
    """A well-formed file of wrong content: shapes, dtypes, NaN, keys that are missing or strange."""

    def wrong(tensor: torch.Tensor) -> object:
        tensor = tensor.clone()
        kind = generator.randrange(8)
        if kind < 2 and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[generator.randrange(tensor.numel())] = (float("nan"), float("inf"))[kind]
            return tensor
        return (
            tensor[:-1] if tensor.dim() else tensor,
            tensor[None],
            tensor.to(HALF.get(tensor.dtype, torch.int8)),
            tensor.reshape(-1),
            torch.ones(()),
            torch.complex(torch.ones(3), torch.ones(3)) if pickled else torch.zeros(0),
            torch.ones(2, 2).to_sparse() if pickled else torch.zeros(0, 3),
            [tensor] if pickled else torch.ones(1, 1, 1),
        )[kind]

    pickled = path.read_bytes().startswith(b"PK")
    tree, text = (torch.load(path, weights_only=True), {}) if pickled else _safetensors.read(path)
    place = tree
    while True:
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner or generator.random() < 0.3:
            break
        place = place[generator.choice(inner)]
    key = generator.choice(list(place))
    move = generator.randrange(4)
    if move == 0:
        del place[key]
    elif move == 1:
        place[f"{key}."] = place.pop(key)
    else:
        place[key] = wrong(place[key]) if isinstance(place[key], torch.Tensor) else torch.ones(2, 2)
    buffer = io.BytesIO()
    if pickled:
        torch.save(tree, buffer)
        return buffer.getvalue()
    scratch = path.with_name("altered")
    _safetensors.write(scratch, {name: value.clone() for name, value in tree.items()}, text)
    data = scratch.read_bytes()
    scratch.unlink()
    return data


def weights_file(path: Path) -> Path:
    """The file itself, or the one of weights in a folder."""
    return max(path.iterdir(), key=lambda file: file.stat().st_size) if path.is_dir() else path


def without_note(file: Path) -> None:
    """The file as a published program writes it, without our checksum."""
    if file.read_bytes().startswith(b"PK"):
        tree = torch.load(file, weights_only=True)
        del tree["customdiff"]
        torch.save(tree, file)
    else:
        tensors, _ = _safetensors.read(file)
        _safetensors.write(file, {name: value.clone() for name, value in tensors.items()}, {"format": "pt"})


@pytest.mark.parametrize("noted", [True, False], ids=["ours", "published"])
def test_no_malformed_file_is_read(noted, tmp_path):
    """3,040 of them: a clear error each, or a whole delta where nothing that can be checked was hit."""
    generator, refused, unharmed, other = random.Random(noted), 0, 0, 0
    for what, path in every_format(tmp_path, sample()).items():
        if what.startswith("customdiff") and not noted:
            continue
        file = weights_file(path)
        if not noted:
            without_note(file)
        data, whole = file.read_bytes(), ck.load_delta(path)
        for case in range(CASES_A_FORMAT):
            damage = (truncated, flipped, spliced, huge, reopened, altered)[case % 6]
            bad = damage(file, generator) if damage is altered else damage(data, generator)
            bad_file = file.with_name("bad")
            bad_file.write_bytes(bad)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = ck.load_delta(bad_file)
            except ck.DeltaFileError as error:
                assert str(path.parent) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
                refused += 1
            else:
                harm = not same(found, whole)
                assert not (noted and harm), f"{what}, case {case}: read, and not what was saved"
                assert all(bool(tensor.isfinite().all()) for tensor in tensors(found).values())
                unharmed, other = unharmed + (not harm), other + harm
            finally:
                bad_file.unlink()
        assert same(ck.load_delta(path), whole)
    # a published file has no checksum, so another value in it is as good as the right one
    assert refused > 5 * (unharmed + other), (refused, unharmed, other)


class Creates:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def legacy(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


def archive(program: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name, content in {"x/data.pkl": program, "x/version": b"3\n", **(records or {})}.items():
            new.writestr(name, content)
    return buffer.getvalue()


def tensor_program(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of {"unet": {a weight}} whose storage claims ``numel`` floats."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers(shape) + numbers(stride)
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("unet") + b"}" + text("a.attn2.to_k.weight") + tensor + b"ss."


def tower(levels: int) -> bytes:
    """The pickle of {a tuple of a tuple ... twice: None}, whose hash takes 2**levels steps."""
    floors = (b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02})q\x00" + b"".join(floors) + b"Ns."


def laughs(levels: int) -> list:
    """A list of 10**levels words, and of a few hundred bytes in a file."""
    found: list = ["a"]
    for _ in range(levels):
        found = [found] * 10
    return found


KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ENDLESS = "so often that there is no end to it"

HOSTILE = {
    "code in an archive": (lambda made: archive(legacy(Creates(made))), "names posix.system, and is refused"),
    "code in torch.save": (
        lambda made: _torch_saved({"unet": Creates(made)}),
        "names posix.system, and is refused",
    ),
    "a bare pickle": (lambda made: legacy(Creates(made)), "pickle of PyTorch before 1.6"),
    "protocol 0": (lambda made: pickle.dumps(Creates(made), protocol=0), "not a whole safetensors file"),
    "memory without end": (
        lambda made: archive(
            b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (2**44).to_bytes(6, "little") + b"\x85R."
        ),
        "names __builtin__.bytearray",
    ),
    "a storage of 8 TB": (
        lambda made: archive(tensor_program(2**41, (2**20, 2**21), (2**21, 1)), {"x/data/0": bytes(64)}),
        "torch.load|claims",
    ),
    "a storage beyond its record": (
        lambda made: archive(tensor_program(2**10, (32, 32), (32, 1)), {"x/data/0": bytes(64)}),
        "torch.load|claims",
    ),
    "one float, expanded to 4 TB": (
        lambda made: archive(tensor_program(1, (2**20, 2**20), (0, 0)), {"x/data/0": bytes(4)}),
        r"claims 4,398,046,511,104 bytes and has 4",
    ),
    "a compressed archive": (
        lambda made: archive(legacy({}), {"x/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED),
        "a compressed archive",
    ),
    "another program's archive": (lambda made: archive(b"", {"y/data.pkl": b""}), "not of torch.save"),
    "a dict within itself": (
        lambda made: archive(b"\x80\x02}q\x00X\x04\x00\x00\x00unetq\x01h\x00s."),
        "not a delta",
    ),
    "a key that hashes for days": (lambda made: archive(tower(60)), "repeats one tuple without end"),
    "words without end": (
        lambda made: _torch_saved({"state_dict": {KEY: torch.ones(2, 2)}, "modifier_token": laughs(12)}),
        ENDLESS,
    ),
    "a name without end": (
        lambda made: _torch_saved({"string_to_param": {"*": torch.ones(2)}, "name": laughs(12)}),
        ENDLESS,
    ),
    "one tensor a thousand times": (
        lambda made: _torch_saved(
            {"unet": dict.fromkeys((f"a{i}.attn2.to_k.weight" for i in range(1000)), torch.ones(100, 100))}
        ),
        "its tensors are more than 8 times its",
    ),
    "an embedding beside no matrix": (
        lambda made: _torch_saved({"state_dict": {KEY: 3, "embed": torch.ones(4)}}),
        "to_k.weight must be a matrix",
    ),
    "another pickle in capitals": (
        lambda made: archive(
            legacy({"unet": {}}), {"x/DATA.PKL": b"\x80\x02c__builtin__\nbytearray\nK\x05\x85R."}
        ),
        "not of torch.save",
    ),
    "a header of 10 GB": (lambda made: struct.pack("<Q", 10**10) + b"{" + bytes(100), "header too large"),
}


def _torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what, tmp_path):
    make, message = HOSTILE[what]
    path, made = tmp_path / "delta.bin", tmp_path / "made"
    path.write_bytes(make(made))
    with pytest.raises(ck.DeltaFileError, match=message) as caught:
        ck.load_delta(path)
    assert str(path) in str(caught.value) and not made.exists()


def test_values_may_be_shared(tmp_path):
    """As an optimizer's state shares its numbers; what is refused above is only what has no end."""
    held = {"unet": {"a.attn2.to_k.weight": torch.ones(2, 3)}}
    pairs = [(i / 8, i / 9) for i in range(10)]
    path = tmp_path / "delta.bin"
    torch.save(held | {"groups": [{"betas": pair} for pair in pairs * 20]}, path)
    assert ck.load_delta(path).weights.keys() == held["unet"].keys()


def test_the_hostile_pickle_would_run(tmp_path):
    """Else the test above proved nothing."""
    made = tmp_path / "made"
    pickle.loads(legacy(Creates(made)))
    assert made.exists()


def test_a_zip_that_claims_more_than_it_has(tmp_path):
    """The directory's sizes are checked against the file before anything is read."""
    data = bytearray(archive(legacy({"unet": {}}), {"x/data/0": bytes(64)}))
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 2**31, 2**31)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ck.DeltaFileError, match="claim more than the file's"):
        ck.load_delta(tmp_path / "x")


def test_a_flipped_value_in_a_pickled_file_is_found(tmp_path):
    """PyTorch does not look at the archive's checksums; we do."""
    path = every_format(tmp_path, sample())["delta.bin"]
    with zipfile.ZipFile(path) as opened:
        record = next(info for info in opened.infolist() if "/data/" in info.filename)
        content = opened.read(record)
    data = bytearray(path.read_bytes())
    at = data.index(content)
    data[at] ^= 1
    assert zlib.crc32(data[at : at + len(content)]) != record.CRC
    path.write_bytes(data)
    with pytest.raises(ck.DeltaFileError, match="does not match its checksum: it is damaged"):
        ck.load_delta(path)


def test_a_folder_s_list_stays_in_its_folder(tmp_path):
    held = sample()
    path = ck.save_delta(held.delta, tmp_path / "out", format="lora")
    file = path / "pytorch_lora_weights.safetensors"
    found, text = _safetensors.read(file)
    found = {name: tensor.clone() for name, tensor in found.items()}
    for name in ("../secret", "/etc/passwd", "a/b/c", "embeddings/../../x", "..", ".hidden"):
        note = json.loads(text["customdiff"]) | {"files": {name: "0" * 64}}
        _safetensors.write(file, found, {"customdiff": json.dumps(note)})
        with pytest.raises(ck.DeltaFileError, match="lists files beyond its folder"):
            ck.load_delta(path)


def test_a_folder_that_cannot_be_exchanged_stays(tmp_path, monkeypatch):
    """Where the system has no renameat2."""
    path = ck.save_delta(sample(0).delta, tmp_path / "out", format="lora")
    before = ck.load_delta(path)
    monkeypatch.setattr(_atomic.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(OSError, match="cannot replace a folder here .*; name a new one"):
        ck.save_delta(sample(1).delta, path, format="lora")
    assert same(ck.load_delta(path), before) and [entry.name for entry in tmp_path.iterdir()] == ["out"]


NURSERY = """
import os, sys
import torch
import customdiff_kernels as ck
torch.set_num_threads(1)
path, format, folder = sys.argv[1:]
deltas = [ck.load_delta(f"{folder}/{i}") for i in range(2)]
print("ready", flush=True)
for _ in sys.stdin:
    if (saver := os.fork()) == 0:
        ck.save_delta(deltas[1], path, format=format)
        print(os.getpid(), flush=True)
        while True:
            for delta in deltas:
                ck.save_delta(delta, path, format=format)
    os.waitpid(saver, 0)
    print("dead", flush=True)
"""


@pytest.mark.parametrize(("format", "kills"), [("customdiff", 20), ("delta.bin", 20), ("lora", 20)])
def test_a_killed_save_leaves_the_old_or_the_new_one(format, kills, tmp_path):
    """SIGKILL at random moments of a loop of saves: what lies at the path is always whole."""
    generator = random.Random(0)
    wanted = []
    for i in range(2):
        held = sample(i)
        scaled = ck.LowRankDelta.from_factors(
            {name: (u.repeat(200, 1), v.repeat(1, 40)) for name, (u, v) in held.delta.factors.items()}
        )
        words = {word: row.repeat(40) for word, row in held.tokens.items()}
        ck.save_delta(scaled, tmp_path / str(i), modifier_tokens=words)
        wanted.append(ck.load_delta(tmp_path / str(i)))
    target = tmp_path / "target"
    target.mkdir()
    path, seen, leftovers = target / "concept", set(), 0
    ck.save_delta(wanted[0], path, format=format)
    start = time.monotonic()
    ck.save_delta(wanted[0], path, format=format)
    once = time.monotonic() - start
    command = [sys.executable, "-c", NURSERY, str(path), format, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdout.readline() == "ready\n"
        for _ in range(kills):
            print(file=nursery.stdin, flush=True)
            saver = int(nursery.stdout.readline())
            time.sleep(generator.uniform(0, 4 * once))
            os.kill(saver, signal.SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            found = ck.load_delta(path)
            seen.add([same(found, one) for one in wanted].index(True))
            assert len(os.listdir(target)) <= 2
            leftovers += len(os.listdir(target)) == 2
        nursery.stdin.close()
    assert leftovers and seen == {0, 1}, "no kill fell into a save"
    ck.save_delta(wanted[0], path, format=format)
    assert os.listdir(target) == ["concept"] and same(ck.load_delta(path), wanted[0])
    shutil.rmtree(target)
