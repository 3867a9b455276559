"""Our scores against clean-fid, pytorch-fid, torch-fidelity and prdc: the same pictures and the same random weights.

The tools are used as their users call them; only the download of the published weights is replaced.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
from cleanfid import fid, inception_pytorch
from prdc import compute_prdc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gen.features.inception import RESIZES, Inception
from gen.pretrained.features import convert_network
from tests.peers.conftest import agree, draw_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(official):
    return {name: torch.from_numpy(array) for name, array in official.items()}


@pytest.fixture(scope="module")
def graph(pth):
    """torch-fidelity's network: (B, 3, H, W) in [0, 255] to features, with its own TensorFlow resize."""
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(pth))
    return lambda x: network(x.round().to(torch.uint8))[0]


@pytest.fixture(scope="module")
def plain_graph(pth, weights):
    """clean-fid's graph on normalised images of 299 pixels, as the published TorchScript file holds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: weights)
        network = inception_pytorch.InceptionV3(resize_input=False, normalize_input=False).eval()
    return lambda x: network((x - 128) / 128)[0].flatten(1)


@pytest.mark.parametrize("mode", RESIZES)
def test_clean_fid(mode, scores, folders, weights, graph, plain_graph, monkeypatch):
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: weights)
    network = {"clean": plain_graph, "legacy_tensorflow": graph, "legacy_pytorch": None}[mode]
    common = {"mode": mode, "num_workers": 0, "device": CPU, "verbose": False, "use_dataparallel": False}
    fake, real = map(str, folders)
    theirs = fid.compute_fid(fake, real, custom_feat_extractor=network, **common)
    agree(f"FID of clean-fid, {mode}", scores[mode]["frechet_distance"], theirs)
    assert theirs > 0.1  # the two sets do differ


def test_modes_differ(scores):
    found = [scores[mode]["frechet_distance"] for mode in RESIZES]
    assert min(abs(a / b - 1) for i, a in enumerate(found) for b in found[:i]) > 1e-3


def test_pytorch_fid(scores, folders, weights, monkeypatch):
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: weights)
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths([str(f) for f in folders], 8, CPU, 2048, num_workers=0)
    agree("FID of pytorch-fid", scores["legacy_pytorch"]["frechet_distance"], theirs)


def test_torch_fidelity(scores, folders, pth):
    fake, real = map(str, folders)
    count = len(list(folders[0].iterdir()))
    theirs = torch_fidelity.calculate_metrics(
        input1=fake,
        input2=real,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        batch_size=8,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=count,
        kid_subsets=2,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(pth),
    )
    ours = scores["legacy_tensorflow"]
    agree("FID of torch-fidelity", ours["frechet_distance"], theirs["frechet_inception_distance"])
    agree("Inception Score of torch-fidelity", ours["inception_score"], theirs["inception_score_mean"])
    agree("KID of torch-fidelity", ours["kid"], theirs["kernel_inception_distance_mean"])
    agree("precision of torch-fidelity", ours["precision"], theirs["precision"])
    agree("recall of torch-fidelity", ours["recall"], theirs["recall"])


@pytest.fixture(scope="module")
def rows():
    """Feature-like rows: enough of them for subsets and neighbours."""
    rng = np.random.default_rng(2)
    return [np.maximum(rng.normal(m, 1, (n, 64)), 0).astype(np.float32) for m, n in ((0.1, 700), (0.3, 500))]


def test_kid_of_the_same_subsets(rows):
    from torch_fidelity.metric_kid import kid_features_to_metric

    from gen.metrics.kernels import kid

    pair = [torch.from_numpy(array) for array in rows]
    theirs = kid_features_to_metric(*pair, kid_subsets=20, kid_subset_size=300, verbose=False)
    mean, spread = kid(*rows, subsets=20, size=300)
    agree("KID of 20 subsets, torch-fidelity", mean, theirs["kernel_inception_distance_mean"])
    agree("its spread", spread, theirs["kernel_inception_distance_std"], rel=1e-3)


def test_inception_score_of_the_same_logits(rows):
    from torch_fidelity.metric_isc import isc_features_to_metric

    from gen.metrics.inception_score import InceptionScore, inception_score

    for shuffle in (True, False):
        theirs = isc_features_to_metric(torch.from_numpy(rows[0]), splits=7, shuffle=shuffle)
        ours = inception_score(rows[0], InceptionScore(len(rows[0]), splits=7, shuffle=shuffle))
        agree("Inception Score of 7 splits, torch-fidelity", ours["inception_score"], theirs["inception_score_mean"])
        agree("its spread", ours["inception_score_spread"], theirs["inception_score_std"], rel=1e-3)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage(rows, k):
    from torch_fidelity.metric_prc import prc_features_to_metric

    from gen.metrics.neighbours import manifold

    real, fake = rows
    theirs = compute_prdc(real, fake, k)
    ours = manifold(real, fake, k, strict=True)
    for name, value in theirs.items():
        agree(f"{name} of prdc, k = {k}", getattr(ours, name), value)
    pair = torch.from_numpy(fake), torch.from_numpy(real)
    closed = prc_features_to_metric(*pair, prc_neighborhood=k, verbose=False)
    ours = manifold(real, fake, k)
    assert (ours.precision, ours.recall) == pytest.approx((closed["precision"], closed["recall"]), abs=1e-4)


def test_distances_of_the_same_statistics():
    rng = np.random.default_rng(3)
    x, y = (np.maximum(rng.normal(m, 1, (400, 96)), 0) for m in (0.1, 0.2))
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    from gen.metrics.frechet import frechet_distance

    statistics = [part for rows in (x, y) for part in (rows.mean(0), np.cov(rows.T))]
    ours = frechet_distance(*statistics)
    named = [dict(zip(("mu", "sigma"), statistics[i : i + 2], strict=True)) for i in (0, 2)]
    theirs = {
        "clean-fid": fid.frechet_distance(*statistics),
        "pytorch-fid": pytorch_fid.fid_score.calculate_frechet_distance(*statistics),
        "torch-fidelity": fid_statistics_to_metric(*named, verbose=False)["frechet_inception_distance"],
    }
    for name, value in theirs.items():
        agree(f"distance of the same statistics, {name}", ours, value, rel=1e-9)


def test_torchvision(folders, tmp_path):
    """The classifier of labelled samples: torchvision's network behind torchvision's preprocessing."""
    from PIL import Image
    from torchvision.models import inception_v3
    from torchvision.transforms._presets import ImageClassification

    state = {name: torch.from_numpy(array) for name, array in draw_weights(1000).items()}
    torch.save(state, tmp_path / "net.pth")
    network = Inception("torchvision", str(tmp_path / "ours.safetensors"))
    convert_network("inception", tmp_path / "net.pth", tmp_path / "ours.safetensors")
    peer = inception_v3(weights=None, transform_input=True, aux_logits=False, init_weights=False).eval()
    peer.load_state_dict(state, strict=False)  # but for the counters of batches
    prepare = ImageClassification(crop_size=299, resize_size=342)
    pictures = [Image.open(path) for path in sorted(folders[1].iterdir())[:4]]
    with torch.no_grad():
        theirs = peer(torch.stack([prepare(picture) for picture in pictures])).numpy()
    images = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    ours = np.asarray(jax.jit(network)(network.load(), jnp.asarray(images))["logits"])
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    agree("largest logit, torchvision", ours.max(), theirs.max())
