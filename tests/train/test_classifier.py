"""The classifiers' trainer on drawn sprites: what it shows, what it keeps back, what it writes."""

import numpy as np
import pytest
import torch

from data.sprites_for_tests import make_sprites
from retour.data.scenes import Split, Studio
from retour.data.sprites import Sprites
from retour.privacy import load_classifier
from retour.train import classifier, vae
from retour.train.loop import Options, Trainer, step_generator


@pytest.fixture(scope="module")
def studio():
    return Studio(make_sprites())


@pytest.fixture(scope="module")
def split():
    return Split(frozenset(), frozenset({("ball", "noto")}))


def scenes(studio, split, part="train", seed=0):
    return classifier.Scenes(studio, split, seed, part)


def autoencoder():
    torch.manual_seed(0)
    return vae.make_vae((8, 8, 16)).eval()


def task(studio, split, arch="cnn", batch=8):
    torch.manual_seed(0)
    net = classifier.ARCHITECTURES[arch](len(studio.sprites.concepts))
    return classifier.ClassifierTask(scenes(studio, split), autoencoder(), batch, arch, net)


def test_compositions_and_drawings_are_kept_back(studio, split):
    train = scenes(studio, split)
    shown = [train.scene(n) for n in range(300)]
    for scene in shown:
        [item] = scene.items
        assert scene.background != train.kept_back(item.concept)
        assert (item.concept, scene.style) != ("ball", "noto")
    assert {s.items[0].concept for s in shown} == set(studio.sprites.concepts)
    for n in range(50):
        composed = scenes(studio, split, "compositions").scene(n)
        assert composed.background == train.kept_back(composed.items[0].concept)
        drawn = scenes(studio, split, "drawings").scene(n)
        assert (drawn.items[0].concept, drawn.style) == ("ball", "noto")
        assert drawn.background != train.kept_back("ball")
    with pytest.raises(ValueError, match="part must be"):
        scenes(studio, split, "all")


def test_labels_are_the_concepts(studio, split):
    train = scenes(studio, split)
    for n in range(30):
        assert train.labels[train.label(n)] == train.scene(n).items[0].concept


def test_wear_depends_on_the_number_alone(studio, split):
    train = scenes(studio, split)
    pictures = [train.image(n, worn=True) for n in range(20)]
    assert all(np.array_equal(p, train.image(n, worn=True)) for n, p in enumerate(pictures))
    assert {p.shape for p in pictures} == {(64, 64, 3)}
    assert any(not np.array_equal(p, train.image(n)) for n, p in enumerate(pictures))


def test_some_images_of_a_batch_are_decoded(studio, split):
    work = task(studio, split, batch=16)
    images, labels = work.images(3, step_generator(0, 3))
    numbers = range(48, 64)
    plain = vae.to_tensor([work.scenes.image(n, worn=True) for n in numbers])
    assert labels.tolist() == [work.scenes.label(n) for n in numbers]
    assert torch.equal(images[2:], plain[2:]) and not torch.equal(images[:2], plain[:2])
    assert images.min() >= -1 and images.max() <= 1


@pytest.mark.parametrize("arch", sorted(classifier.ARCHITECTURES))
def test_training_lowers_the_loss_and_writes_a_classifier(arch, studio, split, tmp_path):
    work = task(studio, split, arch)
    batch = work.images(0, step_generator(0, 0))
    work.images = lambda step, generator: batch
    before = float(work.loss(0, step_generator(0, 0))["loss"].detach())
    net = Trainer(work, Options(tmp_path, steps=8, batch=8, lr=2e-3, warmup=1)).fit()
    after = float(work.loss(0, step_generator(0, 0))["loss"].detach())
    assert after < before
    judge = load_classifier(tmp_path / f"emoji-classifier-{arch}")
    assert judge.name == f"emoji-{arch}" and judge.labels == tuple(studio.sprites.concepts)
    pixels = batch[0][:2] / 2 + 0.5
    torch.testing.assert_close(judge(pixels), net(batch[0][:2]).double(), rtol=0.02, atol=0.02)


def test_a_step_has_one_loss_for_one_seed(studio, split):
    work = task(studio, split)
    losses = [work.loss(5, step_generator(1, 5))["loss"] for _ in range(2)]
    assert torch.equal(*losses)


def test_accuracy_counts_hits(studio, split):
    shown = scenes(studio, split)

    class Oracle:
        """Knows the labels of the scenes in order."""

        def __init__(self):
            self.number = 0

        def __call__(self, images):
            wanted = [shown.label(self.number + k) for k in range(len(images))]
            self.number += len(images)
            # Wrong about every fourth.
            wrong = [(w + (k % 4 == 0)) % 4 for k, w in enumerate(wanted)]
            return torch.nn.functional.one_hot(torch.tensor(wrong), 4).float()

    assert classifier.accuracy(Oracle(), shown, 64) == 0.75
    assert classifier.accuracy(Oracle(), shown, 64, autoencoder()) == 0.75


def test_favourites_alone_are_classes():
    images = {("owl", "3d"): np.zeros((64, 64, 4), np.uint8), ("box", "3d"): None}
    kept = classifier.favoured(Sprites(images, {"owl": "animals", "box": "objects"}))
    assert list(kept.images) == [("owl", "3d")] and kept.groups == {"owl": "animals"}
