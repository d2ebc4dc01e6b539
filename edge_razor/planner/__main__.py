"""`python -m edge_razor.planner`: the child process of `plan_in_child`."""

from edge_razor.child import serve

from .child import answer

if __name__ == "__main__":
    serve(answer)
