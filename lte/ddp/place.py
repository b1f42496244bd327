"""Which of a run's workers a process is: torchrun says so in the environment, as does `lte train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lte.config import Recipe
from lte.errors import ConfigError

MEETING = "LTE_MEETING"
"""Variable: file by which the workers that `lte train` started on this machine find each other."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among all of its group.

    Attributes:
        number: of this worker, torch's rank. size: workers in all.
        local_number, local_size: on this machine.
        meeting: file of `MEETING`; '' where torchrun's variables tell where to meet.
    """

    number: int
    size: int
    local_number: int
    local_size: int
    meeting: str = ""

    @property
    def is_first(self) -> bool:
        """Whether it keeps the run: records, evaluations, checkpoints."""
        return self.number == 0

    def environment(self) -> dict[str, str]:
        """Variables of which `place_of` makes this place."""
        return {
            "RANK": str(self.number),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_number),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            MEETING: self.meeting,
        }


def place_of(recipe: Recipe, environment: Mapping[str, str]) -> Place | None:
    """The place that the environment gives this process; None where it says nothing of any.

    Raises:
        ConfigError: the group is not of the recipe's size, or the environment says only half of it.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    needed = ["RANK", "WORLD_SIZE", *([] if environment.get(MEETING) else ["MASTER_PORT"])]
    wrong = [name for name in needed if not environment.get(name, "").isdecimal()]
    if not environment.get(MEETING) and not environment.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if wrong:
        raise ConfigError(
            [
                f"{', '.join(wrong)}: not as torchrun sets it, while RANK and WORLD_SIZE are set; start this"
                " by torchrun, or unset these"
            ]
        )
    number, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if size != recipe.train.workers:
        raise ConfigError(
            [
                f"train.workers: {recipe.train.workers}, but torchrun started {size} processes; set"
                f" train.workers={size}"
            ]
        )
    return Place(
        number=number,
        size=size,
        local_number=int(environment.get("LOCAL_RANK", number)),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        meeting=environment.get(MEETING, ""),
    )
