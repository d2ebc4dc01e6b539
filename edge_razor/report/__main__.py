"""`python -m edge_razor.report`: the child process of `write_run_report`."""

from edge_razor.child import serve

from .child import answer

if __name__ == "__main__":
    serve(answer)
