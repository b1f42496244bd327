"""What most `lte` commands load sooner or later, for the process that forks them: 3 s of a core."""

import gc
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional package

import bitsandbytes  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch._dynamo  # by any optimizer's first step

import lte.cli  # noqa: F401

gc.freeze()  # a collection would write to, and so copy, all that the forks share
