"""Training with a spill file from the command line and from Python, by a plan made ahead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_razor import Trainer
from edge_razor.bundle import write_bundle
from edge_razor.cli import main
from edge_razor.errors import UsageError
from edge_razor.planner import Plan, plan
from edge_razor.planner.graph import read_graph
from edge_razor.planner.interface import read_interface
from edge_razor.planner.search import Candidate, Search
from edge_razor.planner.serialize import encode
from edge_razor.planner.storage import at_place, choose_storage
from tests.planner.conftest import mobile_network, settings

BATCH = 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, built = mobile_network()
    manifest = built.manifest | {
        "producer": "test",
        "trainable": {"spec": "all", "parameters": net.trainable},
        "state_dict": list(built.parameters),
        "aliases": {},
        "classes": None,
    }
    inference = onnx.helper.make_model(onnx.helper.make_graph([], "inference", [], []))
    path = tmp_path_factory.mktemp("spill") / "mobile.razor"
    return write_bundle(path, onnx.load_model_from_string(built.training), inference, built.parameters, manifest)


@pytest.fixture(scope="module")
def plans(bundle: Path) -> dict[str, Plan]:
    """The dense plan, and one that has every kept value in the spill file."""
    training = (bundle / "training.onnx").read_bytes()
    manifest = json.loads((bundle / "bundle.json").read_text())
    search = Search(read_graph(training, manifest["output"]["name"]), settings(batch_size=BATCH, threads=1))
    dense = choose_storage(search.graph, 4, 0, "centered")
    summary = plan(
        bundle, mem_budget=None, batch_size=BATCH, micro_batch=4, sparsity=0, threads=1, base_bytes=0
    ).summary
    made = {}
    for name, table in (("dense", dense), ("spilled", at_place(search.graph, dense, 4, dense.keys(), "spill"))):
        candidate = Candidate(search, 0.0, 4, table)
        binary = encode(
            bundle_id=hashlib.sha256(training).hexdigest(),
            batch_size=BATCH,
            micro_batch=4,
            threads=1,
            arena_bytes=candidate.accounting.arena,
            memory=candidate.memory,
            interface=read_interface(search.graph, manifest),
            train=candidate.train,
            evaluate=candidate.evaluate,
        )
        made[name] = Plan(binary, summary)
    return made


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield rng.normal(size=(BATCH, 16, 16, 3)).astype(np.float32), rng.integers(0, 10, BATCH)


def test_training_is_the_same_with_the_spill_file(bundle: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    with (
        Trainer(bundle, plan=plans["dense"]) as dense,
        Trainer(bundle, plan=plans["spilled"], spill_dir=tmp_path) as spilled,
    ):
        for x, y in batches():
            assert spilled.step(x, y) == dense.step(x, y)
        expected = dense.state_dict()
        for name, value in spilled.state_dict().items():
            np.testing.assert_array_equal(value, expected[name])
        info = spilled.spill_info()
        assert dense.spill_info().file_bytes == 0
    assert 0 < info.written_bytes == info.read_bytes <= 6 * info.file_bytes  # three steps of two micro-batches


def test_a_plan_that_spills_needs_a_directory(bundle: Path, plans: dict[str, Plan]) -> None:
    with pytest.raises(UsageError, match=r"the plan keeps .*B in a file: give spill_dir \(--spill-dir DIR\)"):
        Trainer(bundle, plan=plans["spilled"])


def test_train_reports_what_it_wrote(
    bundle: Path, plans: dict[str, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans["spilled"].save(tmp_path / "spilled.plan")
    x, y = (np.concatenate(parts) for parts in zip(*batches(), strict=True))
    np.savez(tmp_path / "data.npz", x=x, y=y)
    options = ["--plan", tmp_path / "spilled.plan", "--data", tmp_path / "data.npz", "--epochs", 1, "--val-split", 0]
    arguments = ["train", bundle, *options, "--log-every", 1]
    assert main([str(a) for a in (*arguments, "--out", tmp_path / "refused")]) == 2
    assert "--spill-dir DIR" in capsys.readouterr().err
    assert main([str(a) for a in (*arguments, "--out", tmp_path / "run", "--spill-dir", tmp_path / "absent")]) == 4
    assert "cannot make a spill file" in capsys.readouterr().err
    assert main([str(a) for a in (*arguments, "--out", tmp_path / "run", "--spill-dir", tmp_path)]) == 0
    assert "spill file: " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [line["spill_written_bytes"] for line in lines if line["event"] == "step"]
    assert len(written) == 3 and written[0] > 0 and written == [written[0] * n for n in (1, 2, 3)]
