"""Which parameters a trainable specification selects."""

from __future__ import annotations

import pytest

from edge_razor.errors import UsageError
from edge_razor.exporters.trainable import Parameter, parameters, resolve
from tests.exporters.graphs import Builder


@pytest.fixture
def network() -> list[Parameter]:
    b = Builder()
    x = b.conv("features.0.conv", b.input(8, 8, 3), 4, 3, bn=True, activation="relu")
    x = b.conv("features.1.conv", x, 4, 3, bn=True, bias=True)
    x = b.op("Mul", x, b.op("Reshape", b.param("features.1.gamma", 4, 1, 1), b.ints(4)))
    x = b.op("Affine", x, *b.batch_norm("features.2.norm", 4))
    x = b.op("ReduceMean", x, b.ints(1, 2), keepdims=0)
    return parameters(b.model(b.linear("classifier", x, 5)))


def names(network: list[Parameter], prefix: str) -> list[str]:
    return [p.name for p in network if p.name.startswith(prefix) and p.role != "statistic"]


def test_order_is_the_forward_passs_with_each_weight_before_its_batch_norm(network: list[Parameter]) -> None:
    assert [p.name for p in network] == [
        "features.0.conv.weight",
        "features.0.conv_bn.weight",
        "features.0.conv_bn.bias",
        "features.0.conv_bn.running_mean",
        "features.0.conv_bn.running_var",
        "features.1.conv.weight",
        "features.1.conv_bn.weight",
        "features.1.conv_bn.bias",
        "features.1.conv_bn.running_mean",
        "features.1.conv_bn.running_var",
        "features.1.conv.bias",
        "features.1.gamma",
        "features.2.norm.weight",
        "features.2.norm.bias",
        "features.2.norm.running_mean",
        "features.2.norm.running_var",
        "classifier.weight",
        "classifier.bias",
    ]


def test_roles_and_layers(network: list[Parameter]) -> None:
    by_name = {p.name: p for p in network}
    assert by_name["features.1.conv.weight"] == Parameter("features.1.conv.weight", "features.1.conv", "weight")
    assert by_name["features.1.conv.bias"] == Parameter("features.1.conv.bias", "features.1.conv", "bias")
    assert by_name["features.1.gamma"].role == "scale"
    assert by_name["features.2.norm.weight"].role == "gamma"
    assert by_name["features.2.norm.bias"].role == "beta"
    assert by_name["features.2.norm.running_var"].role == "statistic"


def test_all_leaves_statistics_out(network: list[Parameter]) -> None:
    assert resolve("all", network) == [p.name for p in network if "running" not in p.name]


def test_head_is_the_last_layer(network: list[Parameter]) -> None:
    assert resolve("head", network) == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    "count,first",
    [(1, "classifier"), (2, "features.2.norm"), (3, "features.1.gamma"), (4, "features.1.conv_bn"), (99, "features.0")],
)
def test_last_layers(network: list[Parameter], count: int, first: str) -> None:
    selected = resolve(f"last:{count}", network)
    start = next(i for i, p in enumerate(network) if p.name.startswith(first))
    expected = [p for p in network[start:] if p.role != "statistic"]
    # features.1.conv.bias stands behind its BatchNorm, but belongs to a layer before it.
    assert selected == [p.name for p in expected if count != 4 or p.layer != "features.1.conv"]


def test_bias_is_everything_added(network: list[Parameter]) -> None:
    assert resolve("bias", network) == [
        "features.0.conv_bn.bias",
        "features.1.conv_bn.bias",
        "features.1.conv.bias",
        "features.2.norm.bias",
        "classifier.bias",
    ]


def test_norm_is_gamma_and_beta(network: list[Parameter]) -> None:
    expected = [p.name for p in network if ("_bn" in p.name or ".norm" in p.name) and p.role != "statistic"]
    assert resolve("norm", network) == expected


def test_globs_match_names(network: list[Parameter]) -> None:
    assert resolve("features.1.*", network) == names(network, "features.1.")
    assert resolve("features.[02]*.bias", network) == ["features.0.conv_bn.bias", "features.2.norm.bias"]
    assert resolve("classifier.bias", network) == ["classifier.bias"]


def test_terms_are_united_in_graph_order(network: list[Parameter]) -> None:
    expected = ["features.0.conv.weight", "classifier.weight", "classifier.bias"]
    assert resolve("head, features.0.conv.weight,classifier.*", network) == expected


@pytest.mark.parametrize("term", ["*.running_mean", "features.0.conv_bn.running_var"])
def test_statistics_never_train(network: list[Parameter], term: str) -> None:
    with pytest.raises(UsageError, match="statistics"):
        resolve(term, network)


def test_a_pattern_over_weights_and_statistics_selects_the_weights(network: list[Parameter]) -> None:
    assert "features.2.norm.running_mean" not in resolve("features.2.*", network)


def test_close_names_are_listed(network: list[Parameter]) -> None:
    with pytest.raises(UsageError, match=r"'clasifier.weight'.*close: classifier\.weight"):
        resolve("clasifier.weight", network)


def test_a_term_without_match_is_an_error_even_beside_one_that_matches(network: list[Parameter]) -> None:
    with pytest.raises(UsageError, match="nothing_like_it"):
        resolve("head,nothing_like_it", network)


@pytest.mark.parametrize("spec", ["", "head,", "last:0", "last:-1", "last:", "last:two", "last:²", "ALL"])
def test_wrong_terms(network: list[Parameter], spec: str) -> None:
    with pytest.raises(UsageError):
        resolve(spec, network)


def test_norm_of_a_network_without_normalization() -> None:
    b = Builder()
    found = parameters(b.model(b.linear("fc", b.input(4), 3)))
    with pytest.raises(UsageError, match="'norm' selects no parameter"):
        resolve("norm", found)


def test_names_without_dots_belong_to_the_layer_that_reads_them() -> None:
    b = Builder()
    x = b.input(4, 4, 2)
    scale, shift = b.ops(
        "BatchNormFold",
        *(b.param(n, 3, positive=True) for n in ("g", "h", "m", "v", "bias0")),
        outputs=2,
        layer="norm",
    )
    x = b.op("Conv", x, b.param("w0", 3, 2, 1, 1), scale, shift, layer="conv0")
    x = b.op("Linear", x, b.param("w1", 5, 3), None, b.param("b1", 5), layer="gemm1")
    found = parameters(b.model(x))
    assert resolve("head", found) == ["w1", "b1"]
    assert {p.layer for p in found if p.name in ("w0", "bias0", "g")} == {"conv0"}


def test_shared_parameters_are_listed_once() -> None:
    b = Builder()
    w = b.param("fc.weight", 4, 4)
    x = b.op("Linear", b.op("Linear", b.input(4), w), w)
    assert [p.name for p in parameters(b.model(x))] == ["fc.weight"]
