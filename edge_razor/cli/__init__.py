"""The command line `edge-razor`. One module a command, imported when that command runs."""

from __future__ import annotations

from .entry import main

__all__ = ["main"]
