"""`python -m lte` is the `lte` command."""

import os
import sys

from lte import ddp
from lte.cli import main

if __name__ == "__main__":
    code = main()
    if ddp.has_left():
        # At the interpreter's end Gloo's threads may still be waiting for Python's lock, to free a tensor;
        # that would end the process by std::terminate, after all was done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
