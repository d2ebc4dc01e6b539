"""Reports: one self-contained HTML file each, with SVG made here; no network, no framework (docs/reports.md).

`plan_page` shows what a cap is spent on, `run_page` the same with what was measured while training, `fidelity_page` how
far compressed gradients are from the exact ones. Names in them come from model bundles, which are untrusted: everything
passes through `markup.element`, which escapes it.
"""
