"""`python -m lte` is the `lte` command."""

from lte.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
