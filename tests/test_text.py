"""Texts as data: files in their forms, tokenization, and a language model trained from the command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.data import BatchRing, Loader, open_source
from edge_razor.data.text import TextOptions, TextSource
from edge_razor.errors import BundleError, DataError, UsageError
from tests.text_models import MODELS, TOKENS, VOCABULARY, batch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
CLASSES = ["a", "b", "c", "d", "e"]


def make_tokenizer(path: Path, words: list[str] = WORDS, special: bool = True) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.enable_padding(length=500)  # must not matter
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def classifier(directory: Path) -> Path:
    tokenizer = make_tokenizer(directory / "tokenizer.json")
    inputs = batch("mean_pooled", 2)[0]
    return edge_razor.export(
        MODELS["mean_pooled"]("sdpa"), inputs, directory / "classifier", tokenizer=tokenizer, classes=CLASSES
    )


@pytest.fixture(scope="module")
def causal(directory: Path) -> Path:
    tokenizer = make_tokenizer(directory / "causal.json", special=False)
    return edge_razor.export(
        MODELS["gpt2"]("sdpa"),
        batch("gpt2", 2)[0],
        directory / "causal",
        tokenizer=tokenizer,
        loss="token_cross_entropy",
    )


def source(bundle: Path, path: Path, **options: Any) -> TextSource:
    with Bundle(bundle) as opened:
        made = open_source(path, opened.manifest, bundle=opened, **options)
    assert isinstance(made, TextSource)
    return made


def samples(data: TextSource) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for index in range(len(data)):
        inputs = np.full(data.input_shape, 99, data.input_dtype)
        target = np.full(data.target_shape, 99, data.target_dtype)
        assert data.read(index, inputs, target, None)
        found.append((inputs, target))
    return found


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_texts_become_tokens_mask_and_label(classifier: Path, tmp_path: Path) -> None:
    rows = [("w0 w1", "b"), ('w2, "quoted"\nover lines', "e"), ("w19", "a")]
    data = source(classifier, write_csv(tmp_path / "d.csv", rows))
    (inputs, target), (longer, _), _ = samples(data)
    assert inputs[0, :5].tolist() == [2, 4, 5, 3, 0] and not inputs[0, 4:].any()
    assert inputs[1].tolist() == [1] * 4 + [0] * (TOKENS - 4)
    assert int(target) == 1 and data.classes == tuple(CLASSES)
    assert longer[1].sum() == 9  # [CLS] w2 , " quoted " over lines [SEP]: an unknown word is one token, too
    assert data.answer.texts == 3 and data.answer.truncated == 0


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_form_gives_the_same_samples(kind: str, classifier: Path, tmp_path: Path) -> None:
    rows = [("w0 w1", "b"), ("w5 é", "c"), ("w7", "a")]
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"body": t, "y": y}) + "\n" for t, y in rows) + "\n", encoding="utf-8")
    else:
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(row) for row in [("body", "y"), *rows]]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    data = source(classifier, path, text=TextOptions("body", "y"))
    assert [(i[0, :4].tolist(), int(t)) for i, t in samples(data)] == [
        ([2, 4, 5, 3], 1),
        ([2, 9, 1, 3], 2),
        ([2, 11, 3, 0], 0),
    ]


def test_long_texts_are_cut_and_counted_or_refused(classifier: Path, tmp_path: Path) -> None:
    long = " ".join(["w1"] * (TOKENS + 30))
    path = write_csv(tmp_path / "d.csv", [("w0", "a"), (long, "b"), (" ".join(["w1"] * (TOKENS - 2)), "b")])
    data = source(classifier, path)
    (_, (cut, _), (whole, _)) = samples(data)
    assert data.answer.truncated == 1 and cut[1].all() and cut[0, 0] == 2 and cut[0, -1] == 3
    assert np.array_equal(cut, whole)
    with pytest.raises(DataError, match=r"d\.csv:3: is longer than the model's 72 tokens"):
        source(classifier, path, text=TextOptions(truncate=False))


BROKEN: dict[str, tuple[bytes, str]] = {
    "utf-8": (b'text,label\nw1,a\n"w\xff2",b\n', r":3: is not valid UTF-8 at byte 2 of the line"),
    "empty": (b"text,label\nw1,a\n   ,b\n", r":3: is empty"),
    "label": (b"text,label\nw1,a\nw2,z\n", r":3: has the label 'z'; the model has the classes a, b, c, d, e"),
    "no label": (b"text,label\nw1,a\nw2\n", r":3: has no label 'label'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_named_or_left_out_and_counted(name: str, classifier: Path, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(DataError, match=message + ".*--skip-bad"):
        source(classifier, tmp_path / "d.csv")
    data = source(classifier, tmp_path / "d.csv", skip_bad=True)
    assert len(data) == 1 and len(data.bad) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("d.csv", "body,y\nw1,a\n", "has no column 'text' but body, y; name it by --text-column"),
        ("d.csv", "text,y\nw1,a\n", "has no column 'label'.*--label-column"),
        ("d.csv", "", "has no column"),
        ("d.csv", "text,label\n", "holds no texts"),
        ("d.jsonl", '{"text": 3, "label": "a"}\n', "has no text 'text'"),
        ("d.jsonl", '["w1"]\n', "is no JSON object"),
        ("d.jsonl", '{"text": \n', "is no JSON"),
        ("d.jsonl", "[" * 100_000 + "\n", "is no JSON"),
        ("d.txt", "w1 w2\n", "has no labels"),
        ("d.json", "{}", r"give a \.csv"),
    ],
)
def test_wrong_files(file: str, content: str, message: str, classifier: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        source(classifier, tmp_path / file)


def test_a_causal_model_gets_pieces_of_all_texts_and_successors_as_targets(causal: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [f"w{i % 20}" for i in range(150)]
    (folder / "a.txt").write_text(" ".join(words[:100]), encoding="utf-8")
    (folder / "b.txt").write_text(" ".join(words[100:]), encoding="utf-8")
    data = source(causal, folder)
    stream = [4 + i % 20 for i in range(100)] + [3] + [4 + i % 20 for i in range(100, 150)] + [3]  # [SEP] ends a text
    got, wanted = [], []
    for inputs, target in samples(data):
        count = int(inputs[1].sum())
        got += inputs[0, :count].tolist()
        wanted += target[:count].tolist()
        assert (target[count:] == -100).all()
    assert got == stream[:-1] and wanted == stream[1:]
    assert data.answer.tokens == len(stream) and len(data) == 3


def test_batches_are_lists_of_the_models_inputs(classifier: Path, tmp_path: Path) -> None:
    data = source(classifier, write_csv(tmp_path / "d.csv", [(f"w{i}", "abcde"[i % 5]) for i in range(7)]))
    loader = Loader(data, np.arange(7), BatchRing(data, 4))
    first, second = [([a.copy() for a in inputs], targets.copy()) for inputs, targets in loader]
    assert [a.shape for a in first[0]] == [(4, TOKENS), (4, TOKENS)] and second[1].tolist() == [4, 0, 1]
    assert first[0][0][:, 1].tolist() == [4, 5, 6, 7]


def test_a_foreign_tokenizer_is_refused_at_export(tmp_path: Path) -> None:
    many = make_tokenizer(tmp_path / "t.json", [*WORDS, *(f"x{i}" for i in range(VOCABULARY))])
    inputs = batch("mean_pooled", 2)[0]
    with pytest.raises(UsageError, match=r"121 tokens, the model's table 97"):
        edge_razor.export(MODELS["mean_pooled"]("sdpa"), inputs, tmp_path / "b", tokenizer=many)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(BundleError, match="is no tokenizer"):
        edge_razor.export(MODELS["mean_pooled"]("sdpa"), inputs, tmp_path / "b", tokenizer=tmp_path / "broken.json")
    images = batch("vit", 2)[0]
    with pytest.raises(UsageError, match="takes no token indices"):
        edge_razor.export(MODELS["vit"]("sdpa"), images, tmp_path / "b", tokenizer=many)
    assert not (tmp_path / "b").exists()


def test_an_altered_tokenizer_in_the_bundle_is_noticed(classifier: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(classifier, tmp_path / "b")
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("w7", "w8", 1))
    with pytest.raises(BundleError, match="tokenizer.json does not match its checksum"):
        Bundle(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="tokenizer.json is missing"):
        Bundle(copy)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_razor", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_from_a_hugging_face_directory_to_a_tuned_classifier(tmp_path: Path) -> None:
    """save_pretrained → export hf: → train on a .csv → eval, without a network."""
    model = MODELS["bert"]("sdpa")
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer(tmp_path / "hf" / "tokenizer.json")
    rows = [(f"w{i % 4} w{4 + i % 3}", "xyz"[i % 3]) for i in range(120)]
    data = write_csv(tmp_path / "d.csv", rows)
    made = cli("export", f"hf:{tmp_path / 'hf'}", "-o", tmp_path / "m", "--text", 16, "--classes", "x,y,z")
    assert made.returncode == 0, made.stderr
    run = tmp_path / "run"
    options = ["--optimizer", "adamw", "--lr", "3e-3", "--epochs", 6, "--sparsity", "0.9", "--out", run]
    trained = cli("train", tmp_path / "m", "--data", data, *options)
    assert trained.returncode == 0, trained.stderr
    assert "120 texts" in trained.stdout and "accuracy" in trained.stdout
    result = cli("eval", run, "--data", data, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["accuracy"] > 0.9
    refused = cli("export", f"hf:{tmp_path / 'hf'}", "-o", tmp_path / "n", "--text", 200)
    assert refused.returncode == 2 and "positions for 80 tokens only" in refused.stderr


@pytest.mark.slow
def test_a_causal_model_learns_a_text_and_tells_its_perplexity(causal: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"w{(i * i) % 7}" for i in range(4000)), encoding="utf-8")
    options = ["--optimizer", "adamw", "--lr", "3e-3", "--epochs", 10, "--sparsity", "0.9", "--out", tmp_path / "run"]
    trained = cli("train", causal, "--data", text, *options)
    assert trained.returncode == 0, trained.stderr
    assert "perplexity" in trained.stdout
    result = cli("eval", tmp_path / "run", "--data", text)
    assert float(result.stdout.split("perplexity ")[1].split()[0]) < 3.0, result.stdout
