"""Which rank does what: a content divided over ranks.

Pure: integers and strings, no torch, no files, no process groups. Every rank makes the same plan from the same
headers; one digest of it is compared before any byte moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.content import Content, digest
from dist_convert.plan.done import NOTHING_DONE, Done, is_transfer_done
from dist_convert.plan.limits import Limits, largest_send_bytes, limits
from dist_convert.plan.teams import Team, form_teams
from dist_convert.records import __version__, human_bytes


@dataclass(frozen=True)
class Plan:
    """A content, and its division over ranks.

    Attributes:
        content: what is converted.
        placement: "gather" or "direct".
        visible: for each rank, the source files that it can read.
        writable: for each rank, the target files that it can write, which may have the names of source files.
        teams: disjoint groups of ranks with their shares.
        limits: for each team, its members' buffer sizes.
        done: what an earlier run has written, and is left out.
    """

    content: Content
    placement: str
    visible: tuple[frozenset[str], ...]
    writable: tuple[frozenset[str], ...]
    teams: tuple[Team, ...]
    limits: tuple[Limits, ...]
    done: Done = NOTHING_DONE

    def place_of(self, rank: int) -> tuple[int, int]:
        """A rank's team, and its position in it."""
        return next((n, team.ranks.index(rank)) for n, team in enumerate(self.teams) if rank in team.ranks)


def divide(
    content: Content,
    visible: Sequence[frozenset[str]],
    *,
    placement: str,
    budget_bytes: int,
    writable: Sequence[frozenset[str]] | None = None,
    on_accelerator: bool = False,
    done: Done = NOTHING_DONE,
) -> Plan:
    """Divide a content over ranks.

    Args:
        content, placement, done: see `Plan`.
        visible: for each rank, the source files that it can read.
        budget_bytes: of memory, for each rank.
        writable: for each rank, the target files that it can write; None where the target is shared.
        on_accelerator: the ranks gather through an accelerator's memory, which the budget holds as well.

    Raises:
        BudgetTooSmall: naming the least that all teams can work with.
        UsageError, MissingShard: see `form_teams`.
    """
    visible = _interned(visible)
    writable = _interned(writable or [frozenset(file.name for file in content.files)] * len(visible))
    listed = enumerate(content.transfers)
    finished = frozenset(number for number, transfer in listed if is_transfer_done(content.ends, transfer, done))
    teams = form_teams(content.transfers, visible, writable, placement, finished)
    least = [
        Limits(largest_send_bytes(content.transfers, team, visible, writable), len(team.ranks), on_accelerator)
        for team in teams
    ]
    least_bytes = max(limit.total_bytes for limit in least)
    if budget_bytes < least_bytes:
        raise BudgetTooSmall(
            "the memory budget does not hold one step",
            expected=f"--max-memory-per-rank of at least {-(-least_bytes // 1_000_000)}MB",
            found=human_bytes(budget_bytes),
            remedy="raise --max-memory-per-rank"
            + (", or use --placement direct where every rank sees all files" if placement == "gather" else ""),
        )
    return Plan(content, placement, visible, writable, teams, tuple(limits(budget_bytes, one) for one in least), done)


def _interned(of_ranks: Sequence[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """One object for equal sets, which are then compared in no time."""
    alike = dict(zip(of_ranks, of_ranks, strict=True))
    return tuple(alike[files] for files in of_ranks)


def schedule_digest(plan: Plan) -> str:
    """Names who does what in one run; the ranks of the run compare it.

    The version stands for how teams' shares become steps.
    """
    return digest(
        {
            "version": __version__,
            "content": plan.content.digest,
            "placement": plan.placement,
            "teams": [astuple(team) for team in plan.teams],
            "limits": [astuple(limit) for limit in plan.limits],
            "done": [plan.done.stretches, sorted(map(astuple, plan.done.gapped))],
        }
    )
