"""What most `lte` commands load sooner or later, for the process that forks them: 3 s of a core."""

import gc
import logging
from importlib import import_module

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional package
for name in ("lte.cli", "bitsandbytes", "torch._dynamo", "matplotlib.figure"):
    import_module(name)
gc.freeze()  # a collection would write to, and so copy, all that the forks share
