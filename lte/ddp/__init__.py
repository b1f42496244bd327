"""Data-parallel training by torch's DistributedDataParallel: what LTE is compared with.

The same tasks, data, optimizers, schedules and records as LTE's, and no server: worker n reads what the
worker of slot n would, and all step by the mean of their gradients.

    place       which worker this process is
    attempt     which processes are alive at the same time
    traffic     bytes that the kernel counted on the group's connections
    exchange    how gradients travel
    group       the workers, as each sees the others
    trainer     the local steps of one
    keeper      records, evaluations and checkpoints, by the first
    run         all of it
"""

from lte.ddp.group import Group, has_left
from lte.ddp.place import Place, place_of
from lte.ddp.run import check, train

__all__ = ["Group", "Place", "check", "has_left", "place_of", "train"]
