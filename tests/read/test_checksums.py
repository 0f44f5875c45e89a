"""A record whose bytes are not those of its checksum is an error that names the tensor, once it is read whole."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import CorruptFile
from dist_convert.read.file_reader import FileReader, make_buffer
from dist_convert.read.record_checks import RecordChecks
from dist_convert.records import View
from tests.checkpoints import Model, hf_tensors, make
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import make_hf

FILE, NAME, START = "file", "decoder.final_layernorm.weight", 16
DATA = bytes(range(96))
WHOLE = (0, 96)
THIRDS = ((0, 32), (32, 64), (64, 96))


def read(root: Path, pieces: tuple[tuple[int, int], ...], checksum: int) -> None:
    (root / FILE).write_bytes(bytes(START) + DATA + bytes(8))
    files = FileReader(root, make_buffer(256), {}, RecordChecks({FILE: [START, len(DATA), checksum]}))
    for first, end in pieces:
        view = View(FILE, NAME, "F32", START + first, (end - first) // 4, 1, 1, 1)
        files.read(view, "F32", 0, make_buffer(96), 0)
    files.close()


@pytest.mark.parametrize(
    "pieces",
    [
        (WHOLE,), THIRDS, THIRDS[::-1], (THIRDS[1], THIRDS[0], THIRDS[2]), (THIRDS[0], THIRDS[2], THIRDS[1]),
        ((0, 48), *THIRDS), ((0, 32), (0, 48), (32, 64), (48, 96), (64, 96)), (*THIRDS[:2], *THIRDS),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_is_read_whole_is_compared_with_its_checksum(
    pieces: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    read(tmp_path, pieces, zlib.crc32(DATA))
    with pytest.raises(CorruptFile, match="not those that were saved") as caught:
        read(tmp_path, pieces, 0x12345678)
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))
    assert caught.value.expected.startswith("CRC-32 12345678 of 96 bytes at offset 16")
    assert caught.value.found == f"{zlib.crc32(DATA):08x}"


@pytest.mark.parametrize("pieces", [THIRDS[:2], THIRDS[1:], ((4, 96),), ((0, 104),), ((0, 48), (44, 96))], ids=str)
def test_a_record_that_is_read_in_part_or_with_overlaps_is_not_compared(
    pieces: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    (tmp_path / FILE).write_bytes(bytes(START + 104))
    files = FileReader(tmp_path, make_buffer(256), {}, RecordChecks({FILE: [START, len(DATA), 0x12345678]}))
    for first, end in pieces:
        files.read(View(FILE, NAME, "F32", START + first, (end - first) // 4, 1, 1, 1), "F32", 0, make_buffer(104), 0)
    files.close()


def test_records_that_touch_are_compared_each_for_itself(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(DATA * 2)
    records = [0, len(DATA), zlib.crc32(DATA), len(DATA), len(DATA), 0x12345678]
    files = FileReader(tmp_path, make_buffer(256), {}, RecordChecks({FILE: records}))
    *firsts, last = (
        View(FILE, NAME, "F32", first, (end - first) // 4, 1, 1, 1)
        for first, end in ((64, 96), (96, 128), (0, 64), (128, 192))
    )
    for view in firsts:
        files.read(view, "F32", 0, make_buffer(96), 0)
    with pytest.raises(CorruptFile, match="not those that were saved"):
        files.read(last, "F32", 0, make_buffer(96), 0)
    files.close()


@pytest.mark.parametrize(
    ("pieces", "is_read"), [(((0, 64),), True), (((16, 48), (60, 96)), True), (((0, 44),), False)], ids=str
)
def test_what_a_record_lacks_that_was_read_but_for_a_little_is_read_to_compare_it(
    pieces: tuple[tuple[int, int], ...], is_read: bool, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_bytes(bytes(START) + DATA + bytes(8))
    for checksum in (zlib.crc32(DATA), 0x12345678):
        files = FileReader(tmp_path, make_buffer(8), {}, RecordChecks({FILE: [START, len(DATA), checksum]}))
        for first, end in pieces:
            view = View(FILE, NAME, "F32", START + first, (end - first) // 4, 1, 1, 1)
            files.read(view, "F32", 0, make_buffer(96), 0)
        with pytest.raises(CorruptFile) if is_read and checksum == 0x12345678 else nullcontext():
            files.read_missing()
        files.close()


def make_pickled(root: Path) -> Path:
    make_hf(root, Model())
    (root / "model.safetensors").unlink()
    torch.save(hf_tensors(Model()), root / "pytorch_model.bin")
    return root / "pytorch_model.bin"


def make_torch(root: Path) -> Path:
    make(root, Model())
    return root / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"


def make_dist(root: Path) -> Path:
    make_distributed(root, Model(), keys="layers")
    return root / "iter_0000004" / "__0_0.distcp"


MAKERS = {"torch": make_torch, "torch_dist": make_dist, "pytorch_model.bin": make_pickled}


def damage(file: Path) -> None:
    """Change one bit of the final norm, or of what has its values: all of them are 1.0 and more in none of the rest."""
    data = bytearray(file.read_bytes())
    norm = hf_tensors(Model())["model.norm.weight"].view(torch.uint8).numpy().tobytes()
    at = data.index(norm)
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_flipped_bit_of_a_tensor_ends_a_conversion_with_its_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(MAKERS[kind](tmp_path / "in"))
    to = "torch" if kind == "pytorch_model.bin" else "huggingface"
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to, "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert "the bytes of a tensor are not those that were saved" in printed
    assert "norm.weight" in printed or "layernorm.weight" in printed
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_flipped_bit_of_a_vocabulary_with_padding_ends_a_conversion(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Model().vocab < Model().padded_vocab
    file = MAKERS[kind](tmp_path / "in")
    data = bytearray(file.read_bytes())
    data[data.index(hf_tensors(Model())[name].view(torch.uint8).numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "huggingface", "--device", "cpu"]
    assert main(command) == 1
    assert "the bytes of a tensor are not those that were saved" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_a_flipped_bit_is_named_where_a_program_reads_the_tensor(kind: str, tmp_path: Path) -> None:
    damage(MAKERS[kind](tmp_path / "in"))
    with (
        dist_convert.open(tmp_path / "in") as model,
        pytest.raises(CorruptFile, match="not those that were saved"),
    ):
        model.get_tensor("model.norm.weight")


def without_checksums(make_file: Callable[[Path], Path], root: Path) -> Path:
    torch.serialization.set_crc32_options(False)
    try:
        return make_file(root)
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_file_that_was_saved_without_checksums_has_none_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_checksums(make_torch, tmp_path / "in")
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "huggingface", "--device", "cpu"]
    assert main(command) == 0, capsys.readouterr().err
