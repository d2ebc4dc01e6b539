"""`python -m edge_razor.planner`: the child process of `plan_in_child`."""

from .child import serve

if __name__ == "__main__":
    serve()
