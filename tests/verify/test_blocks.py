"""How a comparison is cut, sampled and dealt: bounded blocks, the same share every time, ranks that see the files."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.compare.blocks import BLOCK_BYTES, Amount, Block, Checkpoint, blocks, deal, is_sampled
from dist_convert.errors import UsageError
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture
from dist_convert.records import Box, View, cover_fault
from tests.checkpoints import Model
from tests.to_megatron import make_hf
from tests.verify import edit_hf, flip, verify
from tests.warm import Process

ARCHITECTURE = Architecture("llama", 1, 16, 16, 1, 1, 16, 9, 9, 9, 1e-5, 1e4)
ALL = Fraction(1)


@dataclass(frozen=True)
class Listed:
    """A catalog whose regions are listed."""

    tensors: dict[str, TensorMeta]
    listed: dict[str, tuple[Region, ...]]
    architecture: Architecture = ARCHITECTURE
    is_owned: bool = True

    def regions(self, name: str) -> tuple[Region, ...]:
        return self.listed[name]

    def padding(self, name: str) -> tuple[Region, ...]:
        return ()


def checkpoint(
    tensors: dict[str, tuple[int, int]], files: dict[str, tuple[str, ...]], visible: list[set[str]], dtype: str = "BF16"
) -> Checkpoint:
    """Tensors by shape, in equal horizontal parts, one in each of their files."""

    found = {}
    for name, (rows, columns) in tensors.items():
        part = rows // len(files[name])
        found[name] = tuple(
            Region(Box(n * part, 0, part, columns), (View(file, name, dtype, 0, part, columns, columns, 1),))
            for n, file in enumerate(files[name])
        )
    catalog = Listed({name: TensorMeta(shape, dtype) for name, shape in tensors.items()}, found)
    return Checkpoint(Path("somewhere"), "a test's", True, catalog, tuple(map(frozenset, visible)))


def alone(tensors: dict[str, tuple[int, int]], dtype: str = "BF16", ranks: int = 1) -> Checkpoint:
    return checkpoint(tensors, dict.fromkeys(tensors, ("file",)), [{"file"}] * ranks, dtype)


def cut(a: Checkpoint, b: Checkpoint, sample: Fraction = ALL) -> list[Block]:
    return list(blocks(a, b, sample))


@pytest.mark.parametrize("shape", [(1, 1), (5000, 4096), (7, 3_000_000), (128256, 4096), (3, 1)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_blocks_cover_a_tensor_once_and_fit_the_buffers(shape: tuple[int, int], dtype: str) -> None:
    found = cut(alone({"t": shape}), alone({"t": shape}, dtype))
    assert cover_fault([block.box for block in found], *shape) is None
    item_bytes = 4 if dtype == "F32" else 2
    assert max(block.box.elements * item_bytes for block in found) <= BLOCK_BYTES


def test_a_block_has_the_parts_of_every_region_that_it_meets() -> None:
    a = alone({"t": (8, 16)})
    b = checkpoint({"t": (8, 16)}, {"t": ("first", "second")}, [{"first", "second"}])
    [block] = cut(a, b)
    assert [region.box for region in block.a] == [Box(0, 0, 8, 16)]
    assert [(region.box, region.replicas[0].file) for region in block.b] == [
        (Box(0, 0, 4, 16), "first"),
        (Box(4, 0, 4, 16), "second"),
    ]


def test_a_sample_has_the_first_and_the_last_block_of_every_tensor_and_a_share_of_the_others() -> None:
    model = alone({"large": (1 << 20, 1024), "small": (2, 2)})
    total = len(cut(model, model))
    assert total == 1024 + 1
    found = cut(model, model, Fraction(1, 16))
    starts = [block.box.row for block in found if block.tensor == "large"]
    assert (starts[0], starts[-1]) == (0, 1023 * 1024)
    assert found[-1].tensor == "small"
    assert 40 <= len(found) <= 90
    assert found == cut(model, model, Fraction(1, 16))


def test_a_larger_share_has_every_block_of_a_smaller_one() -> None:
    small, large = ({n for n in range(10_000) if is_sampled("t", n, Fraction(1, share))} for share in (100, 10))
    assert small < large
    assert 50 < len(small) < 150


def test_blocks_are_dealt_evenly_by_bytes() -> None:
    model = alone({"large": (1 << 16, 1024), **{f"{n}": (1, 1000) for n in range(100)}}, ranks=5)
    loads: Counter[int] = Counter()
    for rank, block in deal(model, model, ALL):
        loads[rank] += block.size_bytes
    assert sorted(loads) == [0, 1, 2, 3, 4]
    assert max(loads.values()) - min(loads.values()) <= 2 * BLOCK_BYTES


def test_a_block_goes_to_a_rank_that_sees_all_of_its_files() -> None:
    shapes = {"one": (4, 4), "two": (4, 4)}
    a = checkpoint(shapes, {"one": ("shard 0",), "two": ("shard 1",)}, [{"shard 0"}, {"shard 1"}, {"shard 1"}])
    b = alone(shapes, ranks=3)
    assert [(rank, block.tensor) for rank, block in deal(a, b, ALL)] == [(0, "one"), (1, "two")]


def test_a_block_that_no_rank_sees_as_a_whole_is_cut_at_the_borders_of_its_files() -> None:
    a = checkpoint({"t": (4, 4)}, {"t": ("shard 0", "shard 1")}, [{"shard 0"}, {"shard 1"}])
    dealt = list(deal(a, alone({"t": (4, 4)}, ranks=2), ALL))
    assert [(rank, block.box) for rank, block in dealt] == [(0, Box(0, 0, 2, 4)), (1, Box(2, 0, 2, 4))]
    assert sum((block.amount for _, block in dealt), Amount()) == Amount(16, 32, 32)


def test_copies_on_several_nodes_are_each_compared_there_and_counted_once() -> None:
    one = alone({"t": (4, 4)}, ranks=3)
    view = one.regions("t")[0].replicas[0]
    copies = tuple(replace(view, file=f"shard {n}") for n in range(3))
    a = replace(
        one,
        catalog=Listed({"t": TensorMeta((4, 4), "BF16")}, {"t": (Region(Box(0, 0, 4, 4), copies),)}),
        visible=(frozenset({"shard 0", "shard 1"}), frozenset({"shard 2"}), frozenset({"shard 2"})),
    )
    dealt = list(deal(a, one, ALL))
    assert [(rank, [v.file for v in block.a[0].replicas]) for rank, block in dealt] == [
        (0, ["shard 0", "shard 1"]),
        (1, ["shard 2"]),
    ]
    assert [block.between for _, block in dealt] == ["A and B", "copies of A and B on another node"]
    assert sum((block.amount for _, block in dealt), Amount()) == Amount(16, 96, 32, 64, 0)


def test_a_file_and_its_counterpart_that_no_rank_sees_together_are_refused() -> None:
    files = {"t": ("shard 0", "shard 1")}
    a = checkpoint({"t": (4, 4)}, files, [{"shard 0"}, {"shard 1"}])
    b = checkpoint({"t": (4, 4)}, files, [{"shard 1"}, {"shard 0"}])
    with pytest.raises(UsageError, match="no rank sees both") as caught:
        list(deal(a, b, ALL))
    assert (caught.value.tensor, caught.value.file) == ("t", "shard 0")


def test_a_bit_outside_the_sample_is_not_looked_at_and_one_inside_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(hidden=1024, ffn=32, layers=1, vocab=16 * 1024, padded_vocab=16 * 1024, tied=True)  # 16 blocks
    make_hf(tmp_path / "a", model)
    make_hf(tmp_path / "b", model)
    name = "model.embed_tokens.weight"
    inside = {number for number in range(16) if is_sampled(name, number, Fraction(1, 4))} | {0, 15}
    outside = min(set(range(16)) - inside)
    edit_hf(tmp_path / "b", flip(name, (outside * 1024, 0)))
    assert verify(tmp_path / "a", tmp_path / "b", capsys, "--sample", "1/4")[0] == 0
    assert verify(tmp_path / "a", tmp_path / "b", capsys)[0] == 1
    edit_hf(tmp_path / "b", flip(name, (max(inside - {15}) * 1024 + 5, 7)))
    code, report = verify(tmp_path / "a", tmp_path / "b", capsys, "--sample", "1/4")
    assert (code, report["values"][0]["elements"]) == (1, 1)
    assert report["values"][0]["index"] == [max(inside - {15}) * 1024 + 5, 7]
    compared = report["compared"]
    assert compared["elements"] / compared["all_elements"] == pytest.approx(len(inside) / 16, abs=0.01)


@pytest.mark.parametrize("text", ["0", "2", "-1/2", "some", "1/0"])
def test_a_share_is_above_zero_and_up_to_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "a", "b", f"--sample={text}"]) == 2
    assert f"not a share above 0 and up to 1, such as 1/16 or 0.05: '{text}'" in capsys.readouterr().err


def test_a_budget_that_holds_no_block_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf")
    hf = str(tmp_path / "hf")
    assert main(["verify", hf, hf, "--max-memory-per-rank", "20MB"]) == 2
    assert "--max-memory-per-rank of at least 30MB" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf")
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.startswith(f"B ({tmp_path / 'gone'}): the checkpoint directory does not exist")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    budget_bytes = 32_000_000
    for layers in (1, 5):  # 25 MB and 118 MB of weights
        make_hf(tmp_path / f"{layers}", Model(512, 7000, 8, 4, 64, layers, 99, 99))
    assert (tmp_path / "5" / "model.safetensors").stat().st_size > 3 * budget_bytes
    code = """
import sys
from dist_convert.__main__ import main
from dist_convert.move.report import peak_memory_bytes
for path in sys.argv[1:]:
    assert main(["verify", path, path, "--max-memory-per-rank", "32MB"]) == 0
    print(peak_memory_bytes(), file=sys.stderr)
"""
    models = [str(tmp_path / name) for name in ("1", "5")]
    done = Process(["-c", code, *models], os.environ).finish()
    assert done.returncode == 0, done.stderr
    small_bytes, large_bytes = map(int, done.stderr.split())
    assert large_bytes - small_bytes < budget_bytes / 4
