"""The example app in Python: predictions while a background thread trains, pauses, and goes on after a restart."""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.toolchain import ROOT, digits_bundle


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("embed_python_app", ROOT / "examples/embed_python/app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits_bundle(folder)
    return folder


def learner(app: Any, files: Path, run: Path, **options: Any) -> Any:
    plan, weights = files / "exact.plan", files / "digits.razor/weights.safetensors"
    return app.Learner(plan, weights, run, lambda u: app.stripes(16 * u, 16), app.stripes(10**6, 60), **options)


def test_it_answers_while_it_learns_and_goes_on_after_a_restart(app: Any, files: Path, tmp_path: Path) -> None:
    images, _ = app.stripes(2 * 10**6, 50)
    first = learner(app, files, tmp_path)
    before, begin_loss = first.predict(images), first.best_loss
    first.start()
    answers = [first.predict(images) for _ in range(20)]
    assert first.wait_for_rounds(8) and first.error is None
    first.close()
    assert first.best_loss < begin_loss
    assert all(np.isfinite(a).all() for a in answers) and np.array_equal(answers[0], before)

    again = learner(app, files, tmp_path)
    assert (again.update, again.best_loss) == (first.update, first.best_loss)
    assert not np.array_equal(again.predict(images), before)  # the served weights are there before the first round
    again.start()
    assert again.wait_for_rounds(1)
    assert again.update >= first.update + 20
    again.close()


def test_a_paused_learner_does_not_step_and_still_answers(app: Any, files: Path, tmp_path: Path) -> None:
    stepped = threading.Event()

    def batch(update: int) -> Any:
        if update == 3:
            paused.pause()
            stepped.set()
        return app.stripes(16 * update, 16)

    plan, weights = files / "exact.plan", files / "digits.razor/weights.safetensors"
    paused = app.Learner(plan, weights, tmp_path, batch, app.stripes(10**6, 20), updates_a_round=5)
    paused.start()
    stepped.wait()
    images, _ = app.stripes(0, 4)
    for _ in range(30):
        paused.predict(images)
    assert paused.update <= 3 and paused.rounds == 0
    paused.resume()
    assert paused.wait_for_rounds(1) and paused.update >= 5
    paused.close()


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="needs thread priorities")
def test_training_has_a_lower_priority_than_the_app(app: Any, files: Path, tmp_path: Path) -> None:
    seen = []

    def batch(update: int) -> Any:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return app.stripes(update, 16)

    plan, weights = files / "exact.plan", files / "digits.razor/weights.safetensors"
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    nice = app.Learner(plan, weights, tmp_path, batch, app.stripes(10**6, 20), updates_a_round=1, niceness=19)
    nice.start()
    assert nice.wait_for_rounds(1)
    nice.close()
    assert set(seen) == {19} and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


@pytest.mark.parametrize("failure", ["NaN or infinite", "the camera is gone"])
def test_a_failure_ends_training_and_not_the_answers(app: Any, files: Path, tmp_path: Path, failure: str) -> None:
    def batch(update: int) -> Any:
        images, labels = app.stripes(update, 16)
        if update == 4:
            if "camera" in failure:
                raise RuntimeError(failure)
            images *= np.float32(np.inf)
        return images, labels

    plan, weights = files / "exact.plan", files / "digits.razor/weights.safetensors"
    broken = app.Learner(plan, weights, tmp_path, batch, app.stripes(10**6, 20), updates_a_round=2)
    broken.start()
    assert not broken.wait_for_rounds(9)
    assert failure in str(broken.error)
    assert np.isfinite(broken.predict(app.stripes(0, 2)[0])).all()
    broken.close()
