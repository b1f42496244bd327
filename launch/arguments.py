"""Command lines whose mistakes are one line, as any other mistake of a user's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from lte.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, and takes `overrides` also after options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, which gives all positional arguments their values at the first of them: what comes
        behind an option, it leaves over. It parses the rest of a command's line by this, too."""
        found, left = super().parse_known_args(args, namespace)
        if isinstance(overrides := getattr(found, "overrides", None), list):
            late = [word for word in left if "=" in word and not word.startswith("-")]
            found.overrides = [*overrides, *late]
            left = [word for word in left if word not in late]
        return found, left
