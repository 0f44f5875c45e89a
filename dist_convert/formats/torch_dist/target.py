"""A `torch_dist` checkpoint that is to be made; a `Target`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.formats.dcp.files import PlannedFiles
from dist_convert.formats.megatron.iterations import KIND_FILE
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.pickles import pickled
from dist_convert.formats.saved import common_content, lay_out_container
from dist_convert.formats.torch_dist.catalog import DistCatalog, open_catalog
from dist_convert.formats.torch_dist.contents import COMMON_FILE
from dist_convert.formats.torch_dist.lay_out import lay_out_files
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE
from dist_convert.records import TargetFile
from dist_convert.write.checksums import KnownRange
from dist_convert.write.files import Beside, make_file, write_file
from dist_convert.write.task import Target

#: As every version of Megatron-Core from 0.13 on reads it.
_KIND = {
    "sharded_backend": TORCH_DIST,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class DistTarget(Target):
    """What is to be made, and its files before any data."""

    target: MegatronTarget
    files: PlannedFiles

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.target.fingerprint

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        self.files.make(partial, files)

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """See `Target`: the checksums of all chunks; `.metadata` and the args."""
        self.files.write_checksums(partial, files, known)
        if not is_first:
            return
        content = common_content(self.target.args.values, self.target.settings.iteration or 0, COMMON_FILE)
        common = lay_out_container(pickled(content), [])
        make_file(partial, COMMON_FILE, common.pieces, common.size_bytes)
        self.target.write_carried(partial)
        write_file(partial, KIND_FILE, json.dumps(_KIND).encode())
        self.files.write_metadata(partial)

    def beside(self) -> Mapping[str, Beside]:
        return self.target.beside()


def lay_out_torch_dist(target: MegatronTarget) -> DistTarget:
    """The files of a target.

    Raises:
        UsageError: experts that torch_dist has no keys for.
    """
    if target.architecture.experts and target.settings.dialect.experts == "habana-dynamic":
        raise UsageError(
            "Habana's dynamic experts have no keys in torch_dist",
            expected="--expert-layout sequential, te-grouped or grouped, which are saved alike",
            found="habana-dynamic",
            remedy="give one of them, or --to torch",
        )
    return DistTarget(target, lay_out_files(target))


def catalog_of_target(target: DistTarget) -> tuple[DistCatalog, tuple[TargetFile, ...]]:
    """The target as a catalog, and its files."""
    architecture, args = target.target.architecture, target.target.args.values
    return open_catalog(target.files.stored(), architecture, args, METADATA_FILE), target.files.target_files()
