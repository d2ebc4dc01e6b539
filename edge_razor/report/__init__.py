"""Reports: one self-contained HTML file each, with SVG made here; no network, no framework (docs/reports.md).

`plan_page` shows what a cap is spent on, `run_page` the same with what was measured while training. Names in them come
from model bundles, which are untrusted: everything passes through `markup.element`, which escapes it.
"""

from .plan_page import plan_page
from .run_page import run_page, write_run_report

__all__ = ["plan_page", "run_page", "write_run_report"]
