"""SCA on exact generators: its box, its steps, its memory of the best, its cost."""

import pytest
import torch
from torch.nn import functional as F

import retour
from privacy import cases
from problems import PATHS, Mixture, ProblemModel
from retour.core.loop import walk
from retour.core.registry import get
from retour.privacy import Classifier

# The published loop: its own box, the denoiser skipped in the gradient.
PAPER = {"gradient": "skip", "reference": None, "strength": 1.0, "guidance": 4.5}


def sca(**options):
    return get("attack", "sca").make(**{**PAPER, "keep": "margin", **options})


def spied(job):
    """Starting latents and data latents of every D, in order."""
    calls, track = [], job.denoise.track

    def spy(x):
        states = track(x)
        calls.append((x.clone(), states[-1].x.clone()))
        return states

    job.denoise.track = spy
    return calls


def success(**options):
    """Per-image success on eight squares."""
    return sca(**options).attack(cases.job(cases.squares(8))).margins > 0


def test_the_start_stays_in_the_box_at_every_iteration():
    for radius, step in ((0.1, 0.04), (0.25, 0.7), (0.05, 0.05)):
        job = cases.job(cases.squares(2))
        calls = spied(job)
        found = sca(radius=radius, step_size=step).attack(job)
        assert len(calls) == 11
        for x in (*[x for x, _ in calls], found.start):
            assert (x - job.start).abs().max() <= radius + 1e-7
        assert (calls[-1][0] - job.start).abs().max() == pytest.approx(radius, abs=1e-7)


def test_a_reference_size_scales_box_and_step_by_its_root():
    """Four times as many values as 3 x 8 x 8: twice as far."""
    images = cases.squares(2)
    plain = sca(radius=0.2, step_size=0.08).attack(cases.job(images))
    scaled = sca(radius=0.1, step_size=0.04, reference=4 * 192).attack(cases.job(images))
    torch.testing.assert_close(scaled.start, plain.start, rtol=0, atol=1e-12)


def test_steps_are_those_of_the_published_loop():
    """Against the loop written out: gradient of the cross-entropy, L1 norm, momentum, sign."""
    images = cases.squares(1)
    job = cases.job(images)
    calls = spied(job)
    options = {"iterations": 4, "momentum": 0.7, "step_size": 0.03, "radius": 0.07}
    sca(**options).attack(job)
    plain = cases.job(images)
    weight = plain.classifier.function.weight.detach().double()
    x = x_T = plain.start
    g = torch.zeros_like(x)
    for k in range(5):
        torch.testing.assert_close(calls[k][0], x, rtol=0, atol=1e-12)
        z = plain.denoise(x).requires_grad_()
        logits = (z / 2 + 0.5).mean((2, 3)) @ weight
        F.cross_entropy(logits, plain.labels).backward()
        g = 0.7 * g + z.grad / z.grad.abs().sum()
        x = x_T + (x + 0.03 * torch.sign(g) - x_T).clamp(-0.07, 0.07)


def test_each_image_s_gradients_weigh_alike_by_their_absolute_sum(monkeypatch):
    """(.6, 0) + (-.5, .5) keeps its sign; by its Euclidean norm the second one would win.

    The second image's gradients are a million times larger and say the same.
    """
    slopes = torch.tensor([[1.0, 0.0], [-3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    slopes = slopes[:, None] * torch.tensor([1.0, 1e6], dtype=torch.float64)[:, None]
    job, given = _Scripted([-1] * 3), iter(slopes.reshape(3, 2, 1, 1, 2))
    job.start = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    attack = sca(iterations=2, momentum=0.6, step_size=0.1, radius=1.0)
    monkeypatch.setattr(attack, "_judge", lambda *_: (-torch.ones(2).double(), next(given)))
    attack.attack(job)
    wanted = [[[0.0, 0.0]], [[0.1, 0.0]], [[0.2, 0.1]]]
    for x, place in zip(job.asked, wanted, strict=True):
        torch.testing.assert_close(x, torch.tensor([[place]] * 2, dtype=torch.float64))


def test_radius_zero_errs_only_where_the_reconstruction_does():
    images = [cases.square(green=g, seed=k) for k, g in enumerate((0.3, 0.5, 0.7, 0.9))]
    job = cases.job(images)
    found = sca(radius=0.0).attack(job)
    assert torch.equal(found.start, job.start)
    clean = job.classifier(job.render(job.denoise(job.start))).argmax(1) != 0
    assert torch.equal(found.margins > 0, clean)
    assert clean.any() and not clean.all()


def test_success_does_not_fall_with_the_radius():
    rates = [float(success(radius=r).float().mean()) for r in (0.0, 0.05, 0.1, 0.2)]
    assert rates == sorted(rates) and rates[-1] > rates[0]


def test_success_does_not_fall_with_iterations_image_by_image():
    results = [success(iterations=n, step_size=0.02, radius=0.2) for n in (0, 2, 5, 10)]
    for fewer, more in zip(results, results[1:], strict=False):
        assert (more >= fewer).all()
    assert results[-1].sum() > results[0].sum()


def test_the_gain_is_what_the_boxs_corner_gives():
    """D is affine with slope c here, so margins rise by gain * c * radius, up to grey levels."""
    images = cases.squares(3)
    job = cases.job(images, method="ddim")
    slope = float((job.denoise(job.start + 0.1) - job.denoise(job.start)).mean()) / 0.1
    found = sca(radius=0.2, iterations=5).attack(job)
    assert found.trace.shape == (6, 3)
    torch.testing.assert_close(found.start, job.start + 0.2 * _signs(), rtol=0, atol=1e-12)
    gain = found.trace[-1] - found.trace[0]
    torch.testing.assert_close(gain, torch.full_like(gain, 10 * slope * 0.2), rtol=0, atol=10 / 255)


def _signs():
    """Away from red, towards green and blue."""
    signs = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    return signs.expand(3, 3, cases.SIZE, cases.SIZE)


class _Scripted:
    """A generator that is the identity, and a classifier whose margins follow a script.

    Each D moves the picture by a grey level, which the classifier reads as the number of the call.
    """

    def __init__(self, margins):
        self.margins = torch.tensor(margins, dtype=torch.float64)
        self.start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        self.labels, self.images = torch.tensor([0]), torch.zeros(1, 1, 1, 1)
        self.asked = []
        self.denoise = self
        self.classifier = Classifier(self._logits, mean=(0.0,), std=(1.0,))

    def track(self, x):
        if not any(torch.equal(x, seen) for seen in self.asked):
            self.asked.append(x)
        turn = next(k for k, seen in enumerate(self.asked) if torch.equal(x, seen))
        return [torch.full_like(x, turn / 255)]

    def picked(self, state):
        return state

    def render(self, z):
        return z

    def _logits(self, images):
        grey = images.flatten(1).mean(1) * 255
        margin = self.margins[grey.round().long()]
        # The tilt gives the gradient a sign and is too small to be seen in the margin.
        return torch.stack([-1e-9 * grey, margin + 1e-9 * grey], 1)


@pytest.mark.parametrize(
    ("keep", "margins", "kept"),
    [
        ("margin", [-3, 2, 5, 1, 4], 2),
        ("margin", [-3, -2, -5, -1, -4], 3),
        ("first", [-3, 2, 5, 1, 4], 1),
        ("latest", [-3, 2, 5, 1, -4], 3),
        ("latest", [-3, -2, -1, -5, -4], 2),
    ],
)
def test_the_best_latents_are_kept_whatever_comes_after(keep, margins, kept):
    """The published code returns the last picture and remembers the latents one update late."""
    job = _Scripted(margins)
    found = sca(iterations=4, keep=keep, radius=1.0).attack(job)
    assert torch.equal(found.start, job.asked[kept])
    assert float(found.margins[0]) == pytest.approx(margins[kept], abs=1e-6)


def test_the_last_update_is_judged():
    """The published code never classifies it."""
    job = _Scripted([-3, -3, -3, -3, 1])
    found = sca(iterations=4, radius=1.0).attack(job)
    assert found.margins > 0 and torch.equal(found.start, job.asked[4])


def test_a_success_is_called_one():
    """The published flag has it the other way round."""
    assert (sca(iterations=1, radius=1.0).attack(_Scripted([2, 3])).margins > 0).all()
    assert (sca(iterations=1, radius=1.0).attack(_Scripted([-2, -3])).margins < 0).all()


def test_the_first_success_ends_the_search():
    job = _Scripted([-3, 2, 5, 1, 4])
    sca(iterations=4, keep="first", radius=1.0).attack(job)
    assert len(job.asked) == 2


def test_what_is_judged_is_the_picture_that_a_file_keeps():
    """Half a grey level decides this classifier; only the rounded picture tells."""

    def steep(images):
        above = 1e3 * (images.mean((1, 2, 3)) - 100.2 / 255)
        return torch.stack([-above, above], 1)

    job = _Fixed(cases.job([cases.square()], Classifier(steep)), 100.4)
    assert sca(iterations=0).attack(job).margins < 0


class _Fixed:
    """A job whose D gives one grey, whatever it is asked."""

    def __init__(self, job, grey):
        self.denoise, self.grey = self, 2 * grey / 255 - 1
        self.start, self.classifier, self.labels = job.start, job.classifier, job.labels
        self.render = job.render

    def track(self, x):
        return [torch.full_like(x, self.grey)]

    def picked(self, state):
        return state


def test_no_network_is_differentiated(monkeypatch):
    job = cases.job(cases.squares(2))
    graphs, network = [], type(job.model).network

    def watched(self, x, t, condition):
        graphs.append(torch.is_grad_enabled() or x.requires_grad)
        return network(self, x, t, condition)

    monkeypatch.setattr(type(job.model), "network", watched)
    sca(iterations=3).attack(job)
    assert graphs and not any(graphs)


def test_evaluations_are_counted():
    """2n for each of the N_a + 1 judged X."""
    job = cases.job(cases.squares(2), method="ddim", steps=5)
    sca(iterations=3).attack(job)
    assert job.ledger.nfe(2) == 2 * 5 * (3 + 1)


def test_a_batch_does_what_its_images_do_alone():
    images = cases.squares(4)
    together = sca(mse_weight=0.5).attack(cases.job(images))
    for k, image in enumerate(images):
        alone = sca(mse_weight=0.5).attack(cases.job([image]))
        torch.testing.assert_close(alone.start[0], together.start[k], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.trace[:, 0], together.trace[:, k], rtol=0, atol=1e-4)


def test_repeated_runs_are_equal_whatever_the_global_generator_does():
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(sca().attack(cases.job(cases.squares(2))).start)
    assert torch.equal(*runs)


def test_the_square_error_holds_the_picture_back():
    far = []
    for weight in (0.0, 100.0):
        job = cases.job(cases.squares(3))
        found = sca(radius=0.3, iterations=6, keep="latest", mse_weight=weight).attack(job)
        far.append(float((job.render(job.denoise(found.start)) - job.images).square().mean()))
    assert far[1] < far[0]


def test_a_classifier_without_a_gradient_moves_nothing():
    flat = Classifier(lambda x: 0 * x.mean((2, 3)) + torch.tensor([1.0, 0.0, 0.0]))
    job = cases.job([cases.square()], flat)
    found = sca(iterations=3).attack(job)
    assert torch.equal(found.start, job.start) and torch.isfinite(found.margins).all()


def test_a_sure_classifier_still_has_a_gradient():
    """At a margin of 30 the cross-entropy's gradient is 0 in float32, not in float64."""
    sure = cases.classifier(gain=300.0)
    job = cases.job([cases.square(red=0.6, green=0.3)], sure)
    assert sca(iterations=2).attack(job).trace[0] < -30
    assert not torch.equal(sca(iterations=2, keep="margin").attack(job).start, job.start)


def test_model_and_classifier_are_left_as_they_were():
    judge = cases.classifier()
    judge.function.train()
    job = cases.job(cases.squares(1), judge)
    sca(iterations=2).attack(job)
    assert judge.function.training
    assert all(p.grad is None for p in judge.function.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"radius": -0.1}, "radius is -0.1"),
        ({"iterations": -1}, "iterations is -1"),
        ({"step_size": 0.0}, "step_size is 0"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"keep": "best"}, "keep"),
        ({"reference": 0}, "reference is 0"),
        ({"raidus": 1}, "did you mean 'radius'"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(retour.RetourError, match=says):
        sca(**options)


def test_defaults_are_the_papers_at_the_papers_size():
    attack = get("attack", "sca").make()
    options = attack.options
    assert (options.iterations, options.step_size, options.radius) == (10, 0.04, 0.1)
    assert (options.momentum, options.mse_weight) == (1.0, 0.0)
    assert (options.inverter, options.steps, options.reference) == ("sde-dpm", 10, 4 * 64 * 64)
    usual = cases.model()
    usual.default_guidance = 7.5
    assert attack.guidance(usual) == pytest.approx(4.5)
    assert sca(guidance=3.0).guidance(usual) == 3.0


# --- The full gradient ----------------------------------------------------------------------------


def curved(method):
    """Squares in a mixture of textures, whose overlap makes the way back bend."""
    generator = torch.Generator().manual_seed(0)
    means = 0.15 * torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = Mixture(("red", "green", "blue"), (0.4, 0.3, 0.3), means, (0.4, 0.3, 0.35))
    net = ProblemModel(data, PATHS["discrete"], "v")
    both = {} if method in ("ddim", "edict") else {"inversion_guidance": 2.0, "strength": 1.0}
    return cases.job(
        cases.squares(2), method=method, steps=4, guidance=2.0, net=net, prompt="green", **both
    )


def loss(job, x):
    """What the attack raises, per image, with the graph of everything if grad is on."""
    way = job.denoise
    end = walk(
        way.replay.solver,
        way.denoiser,
        way._start(x),
        way.inversion.grid,
        down=True,
        controls=[way.replay.control],
    )
    logits = job.classifier(job.render(way.picked(end)))
    return F.cross_entropy(logits, job.labels, reduction="none")


def pulled(job, x):
    track = job.denoise.track(x)
    _, gradient = sca()._judge(job, job.denoise.picked(track[-1]))
    return job.denoise.pull(x, track, gradient)


# Two of them carry memory that a change goes through: the step before, the coupled partner.
@pytest.mark.parametrize("method", ["sde-dpm", "edit-friendly", "ddim", "edict"])
def test_the_full_gradient_is_that_of_one_graph(method):
    """In float64 on a mixture: not affine, and the network sees all values at once."""
    job = curved(method)
    x = (job.start + 0.1).requires_grad_()
    [whole] = torch.autograd.grad(loss(job, x).sum(), x)
    found = pulled(job, x.detach())
    assert whole.abs().max() > 0
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["sde-dpm", "edict"])
def test_the_full_gradient_is_that_of_finite_differences(method):
    """Of a linear aim in the data latents: classifiers are asked in float32."""
    way = curved(method).denoise
    x = way.replay.state.x
    generator = torch.Generator().manual_seed(0)
    aim, move = torch.randn(2, *x.shape, generator=generator, dtype=x.dtype)
    found = (way.pull(x, way.track(x), aim) * move).sum((1, 2, 3))
    # EDICT shows the network 16 bits of its latents: a staircase of 1e-5, seen over 2e-3.
    step, near = (1e-3, 1e-2) if method == "edict" else (1e-4, 1e-6)
    rise = (aim * (way(x + step * move) - way(x - step * move))).sum((1, 2, 3)) / (2 * step)
    torch.testing.assert_close(found, rise, rtol=near, atol=near)


def test_the_skipped_gradient_is_another_where_the_generator_is_curved():
    """What the paper's shortcut leaves out; on one Gaussian, a scalar slope, nothing."""
    for job, apart in ((curved("sde-dpm"), True), (cases.job(cases.squares(1)), False)):
        track = job.denoise.track(job.start)
        _, skipped = sca()._judge(job, job.denoise.picked(track[-1]))
        full = job.denoise.pull(job.start, track, skipped)
        cosine = F.cosine_similarity(skipped.flatten(1), full.flatten(1))
        assert bool((cosine < 0.99).all()) is apart
        assert apart or cosine.min() > 1 - 1e-9


def test_the_full_gradient_raises_the_loss_more_to_first_order():
    job = curved("sde-dpm")
    track = job.denoise.track(job.start)
    _, skipped = sca()._judge(job, job.denoise.picked(track[-1]))
    full = job.denoise.pull(job.start, track, skipped)
    rises = [loss(job, job.start + 1e-3 * g.sign()) - loss(job, job.start) for g in (full, skipped)]
    assert (rises[0] > rises[1]).all()


def test_the_full_gradient_of_a_network_is_counted_and_leaves_no_graph():
    job = cases.job(cases.squares(2), method="ddim", steps=5)
    found = sca(gradient="full", iterations=3).attack(job)
    assert job.ledger.nfe(2) == 2 * 5 * (3 + 1 + 3)
    assert not found.start.requires_grad and not found.unchanged.requires_grad
    assert not found.trace.requires_grad


def test_a_batch_with_full_gradients_does_what_its_images_do_alone():
    images = cases.squares(3)
    together = sca(gradient="full").attack(cases.job(images))
    for k, image in enumerate(images):
        alone = sca(gradient="full").attack(cases.job([image]))
        torch.testing.assert_close(alone.start[0], together.start[k], rtol=0, atol=1e-12)
