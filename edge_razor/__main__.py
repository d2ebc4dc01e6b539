"""`python -m edge_razor` is the command line `edge-razor`."""

from edge_razor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
