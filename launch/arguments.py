"""Command lines whose mistakes are one line, as any other mistake of a user's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lte.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")
