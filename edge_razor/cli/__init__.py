"""The command line `edge-razor`. One module a command; typer and rich are imported when `main` runs, not before."""

from __future__ import annotations

from .entry import main

__all__ = ["main"]
