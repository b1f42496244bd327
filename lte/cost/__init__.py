"""The planner: bytes, seconds and memory of a run that has not begun, over links of this kind.

    links      how long bytes take over TCP; how people write bandwidths and times
    model      what a round costs, and what DiLoCo and data-parallel training would
    calibrate  the rates that it is computed from: assumed, taken from a run, or tried here
    tables     all of it compared, for people and for scripts

What it is compared with is taken at its best: see `ddp_round` and `diloco_round`.
"""

from __future__ import annotations

from lte.cost.calibrate import assumed, from_run, probe, said
from lte.cost.links import Link, Site, read_table, transfer_s
from lte.cost.model import (
    Estimate,
    Rates,
    Seconds,
    ddp_round,
    ddp_run,
    diloco_round,
    gradient_bytes,
    lte_round,
    moments_bytes,
    plan_of,
)
from lte.cost.tables import Outlook, outlook, to_dict, to_text

__all__ = [
    "Estimate",
    "Link",
    "Outlook",
    "Rates",
    "Seconds",
    "Site",
    "assumed",
    "ddp_round",
    "ddp_run",
    "diloco_round",
    "from_run",
    "gradient_bytes",
    "lte_round",
    "moments_bytes",
    "outlook",
    "plan_of",
    "probe",
    "read_table",
    "said",
    "to_dict",
    "to_text",
    "transfer_s",
]
