"""The figure of features over depth: it runs small, its numbers are those of the networks, its files are pictures."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "feature_reuse_figure.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
    spec = importlib.util.spec_from_file_location("feature_reuse_figure", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass resolves annotations through sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


SMALL = ["--depth", "4", "--width", "8", "--batch_size", "32"]


def test_it_draws_both_data_sets_and_the_networks_learn(example, tmp_path):
    results = example.main([*SMALL, "--steps", "80", "--learning_rate", "0.01", "--output_dir", str(tmp_path)])
    assert set(results) == {"digits", "moons"}
    for name, methods in results.items():
        assert list(methods) == ["plain training", "stochastic depth", "feature reuse"]
        with Image.open(tmp_path / f"feature_distribution_{name}.png") as image:
            assert image.width == 1430
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50
        assert all(told["accuracy"] > (0.7 if name == "moons" else 0.3) for told in methods.values())
        assert len({told["spread, last depth / first"] for told in methods.values()}) == 3
    again = example.main([*SMALL, "--steps", "80", "--learning_rate", "0.01", "--output_dir", str(tmp_path)])
    assert again == results


def test_features_are_those_of_the_forward(example):
    torch.manual_seed(0)
    model = example.Network(3, 2, depth=4, width=8)
    x = torch.randn(5, 3)
    features = model.features(x)
    assert features.shape == (5, 5, 8)
    assert torch.equal(model.head(features[-1]), model(x))
    assert torch.equal(model.blocks[1](features[1]), features[2])


def test_blocks_that_do_nothing_leave_the_distribution_as_it_is(example):
    model = example.Network(2, 2, depth=3, width=8)
    for block in model.blocks:
        torch.nn.init.zeros_(block.linear.weight)
    told = example.describe(model, example.load("moons", seed=0))
    assert told["distance of neighboring distributions"] == 0
    assert told["cosine of consecutive features"] == pytest.approx(1)
    assert told["spread, last depth / first"] == 1
    assert told["lowest without one block"] == told["accuracy"]


def test_plain_training_drops_nothing_and_the_others_do(example, tmp_path):
    options = example.parse([*SMALL, "--steps", "6", "--output_dir", str(tmp_path)])
    data = example.load("moons", seed=0)
    models = {method: example.train(data, method, options).state_dict() for method in example.METHODS}
    plain = models.pop("plain training")
    for method, weights in models.items():
        assert not torch.equal(weights["head.weight"], plain["head.weight"]), method


def test_likeness_of_neighbors_is_what_it_says(example):
    torch.manual_seed(0)
    model, data = example.Network(2, 2, depth=3, width=8), example.load("moons", seed=0)
    told = example.describe(model, data)
    with torch.no_grad():
        features = model.features(data.test_x)
    cosines, distances = [], []
    for below, above in itertools.pairwise(features):
        norms = below.norm(dim=1) * above.norm(dim=1)
        cosines.append(((below * above).sum(1) / norms).mean())
        shapes = [((at - at.mean()) / at.std()).flatten().sort().values for at in (below, above)]
        distances.append((shapes[0] - shapes[1]).abs().mean())
    assert told["cosine of consecutive features"] == pytest.approx(float(sum(cosines) / 3), rel=1e-5)
    assert told["distance of neighboring distributions"] == pytest.approx(float(sum(distances) / 3), rel=1e-4)
