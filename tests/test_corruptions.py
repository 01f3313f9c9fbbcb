"""Corrupted images: clean at severity 0, stronger with it, the same in any process, refused in one line."""

import importlib.util
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from semaim.data import corruptions as module
from semaim.data.corruptions import CORRUPTIONS, DIFFERENCES, SEVERITIES, Corrupt
from semaim.data.labelled import LabelledImages, evaluation_transform
from semaim.data.seeding import seeded
from semaim.errors import UserError

installed = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None,
    reason="imagecorruptions-imaug is not installed: runs after tools/setup.sh --extras corruptions",
)
#: Those whose distance from the clean image does not rise at each severity. ImageNet-C's own parameters trade one kind
#: of strength for another there: blur for the reach and number of shuffles, fewer flakes for larger ones, and cover for
#: brightness or roughness.
UNEVEN = ("glass_blur", "snow", "frost", "fog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of random pictures of 96 x 80 pixels, whose spectrum falls as 1/f, as that of photographs."""
    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(80)[:, None], np.fft.fftfreq(96)[None])[..., None] + 1 / 96
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = np.fft.ifft2(np.fft.fft2(draws.normal(size=(80, 96, 3)), axes=(0, 1)) / frequency, axes=(0, 1))
                pixels = (110 + 45 * pixels.real / pixels.real.std()).clip(0, 255).round().astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_the_names_are_imagenet_cs_fifteen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15 and set(DIFFERENCES) < set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("crop_mode", [None, "squash"])
def test_severity_0_is_the_clean_image_bit_by_bit(folder, name, crop_mode):
    """It needs no library, as nothing is done."""
    clean = LabelledImages(folder, 64, "val", crop_mode=crop_mode)
    same = LabelledImages(folder, 64, "val", crop_mode=crop_mode, corruption=name, severity=0)
    for index in (0, 5):
        assert torch.equal(clean[index]["image"], same[index]["image"])
        assert torch.equal(clean[index]["image"], clean.corrupted(name, 0)[index]["image"])


@installed
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_the_image_and_more_with_severity(folder, name):
    clean = LabelledImages(folder, 64, "val")
    distances = []
    for severity in SEVERITIES:
        images = clean.corrupted(name, severity)
        pairs = [(images[index]["image"], clean[index]["image"]) for index in range(len(clean))]
        assert all(a.shape == b.shape and a.isfinite().all() and not torch.equal(a, b) for a, b in pairs)
        distances.append(sum((a - b).square().mean().item() for a, b in pairs))
    rising = [a < b for a, b in zip(distances, distances[1:], strict=False)]
    assert all(rising) or (name in UNEVEN and distances[4] > distances[0]), distances


@installed
@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "frost", "elastic_transform"])
def test_an_image_depends_on_seed_and_index_alone(folder, name):
    def batch(seed=3, workers=0, order=range(6)):
        images = LabelledImages(folder, 32, "val", seed=seed).corrupted(name, 3)
        loader = DataLoader(images, batch_size=2, sampler=order, num_workers=workers)
        rows = {int(i): x for part in loader for i, x in zip(part["index"], part["image"], strict=True)}
        return torch.stack([rows[index] for index in range(6)])

    one = batch()
    np.random.rand(5), random.random(), torch.rand(3)
    assert torch.equal(batch(workers=2), one) and torch.equal(batch(order=[5, 3, 1, 0, 2, 4]), one)
    assert not torch.equal(batch(seed=4), one)


@installed
def test_the_drawn_numbers_differ_between_images_and_corruptions():
    grey = Image.new("RGB", (32, 32), (128, 128, 128))

    def noise(name, index):
        with seeded(0, 0, index):
            return np.asarray(Corrupt(name, 5)(grey)).astype(float).ravel() - 128

    first, again, other, shot = (noise(*of) for of in [("gaussian_noise", i) for i in (0, 0, 1)] + [("shot_noise", 0)])
    assert (first == again).all()
    for rows in (other, shot):
        assert abs(np.corrcoef(first, rows)[0, 1]) < 0.1
    state = np.random.get_state()[1].copy()
    with seeded(1):
        Corrupt("fog", 1)(grey)
    assert (np.random.get_state()[1] == state).all(), "numpy's generator is as before"


@installed
def test_parameters_are_those_of_imagenet_c():
    """Written down from make_imagenet_c.py: what noise, brightness and contrast do to one grey can be calculated."""
    grey = Image.new("RGB", (224, 224), (128, 128, 128))

    def pixels(name, severity):
        with seeded(0):
            return np.asarray(Corrupt(name, severity)(grey)).astype(float) / 255

    for severity, sigma, rate, share, light in zip(
        SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), (60, 25, 12, 5, 3), (0.03, 0.06, 0.09, 0.17, 0.27),
        (0.1, 0.2, 0.3, 0.4, 0.5), strict=True,
    ):  # fmt: skip
        level = 128 / 255
        draws = np.random.default_rng(0)
        normal = np.clip(level + draws.normal(0, sigma, 200_000), 0, 1).std()
        poisson = np.clip(draws.poisson(level * rate, 200_000) / rate, 0, 1).std()
        assert pixels("gaussian_noise", severity).std() == pytest.approx(normal, rel=0.02)
        assert pixels("shot_noise", severity).std() == pytest.approx(poisson, rel=0.02)
        assert np.isin(pixels("impulse_noise", severity), (0, 1)).mean() == pytest.approx(share, rel=0.05)
        assert pixels("brightness", severity).mean() == pytest.approx(min(1, level + light), abs=0.005)
    halves = np.full((64, 64, 3), 64, np.uint8)
    halves[:32] = 192
    for severity, kept in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        found = np.asarray(Corrupt("contrast", severity)(Image.fromarray(halves))).astype(float)
        assert found[0, 0, 0] - found[-1, 0, 0] == pytest.approx(128 * kept, abs=1.01)


@installed
@pytest.mark.parametrize("crop_mode", [None, "center"])
def test_the_crop_is_corrupted_before_it_is_normalised(folder, crop_mode):
    transform = evaluation_transform(40, 1.0, crop_mode=crop_mode, corruption="pixelate", severity=2)
    steps = [type(step) for step in transform.transforms]
    place = steps.index(Corrupt)
    assert place == 2 and steps[place + 1] in (MaybeToTensor, v2.PILToTensor)
    seen = []
    transform.transforms[place].function = lambda image, severity: seen.append(image) or image
    transform(Image.open(folder / "val/a/0.png"))
    assert seen[0].size == (40, 40) and seen[0].mode == "RGB"


@installed
def test_only_validation_images_are_corrupted(folder):
    clean, noisy = {}, {"corruption": "gaussian_noise", "severity": 3}
    train, val = (
        [LabelledImages(folder, 32, split, "none", **options)[0]["image"] for options in (clean, noisy)]
        for split in ("train", "val")
    )
    assert torch.equal(*train) and not torch.equal(*val)


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 3, "unknown corruption 'gausian_noise': did you mean gaussian_noise"),
        ("fog", 6, "severity 6 of fog: give a whole number from 1 to 5"),
        ("fog", 2.0, "severity 2.0 of fog: give a whole number from 1 to 5"),
        ("fog", True, "severity True of fog: give a whole number from 1 to 5"),
    ],
)
def test_refused(name, severity, message):
    with pytest.raises(UserError, match=message):
        Corrupt(name, severity)


@pytest.mark.parametrize("given", [{"corruption": "fog"}, {"severity": 3}])
def test_a_corruption_without_a_severity_is_refused(folder, given):
    with pytest.raises(UserError, match="dataset.corruption is .* and dataset.severity .*: set both or none$"):
        LabelledImages(folder, 64, "val", **given)


@installed
def test_images_too_small_for_the_library_are_refused(folder):
    with pytest.raises(UserError, match="images of 31 pixels cannot be corrupted: 32 or more are needed$"):
        LabelledImages(folder, 31, "val", corruption="fog", severity=1)


def test_a_missing_library_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="^corruptions need no-such-package, which is missing: .*corruptions"):
        LabelledImages(folder, 32, "val", corruption="fog", severity=1)
