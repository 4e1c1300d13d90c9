"""The per-step optimiser on models with exact answers, against a plain Adam for each image."""

import pytest
import torch

from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Branch, Denoiser
from retour.core.grid import Step
from retour.core.guidance import Interval as GuidanceInterval
from retour.core.path import levels
from retour.core.registry import get
from retour.errors import RetourError
from retour.inverters._pivotal import Plan, Tuning
from retour.inverters.base import Job

MODEL = ProblemModel(mixture(), PATHS["vp"])
PROMPTS = ["red", "green", "blue"]
STEPS = 6
HALVES = ("uncond", "cond")
# A limit that some images meet early, some late, some never.
PLAN = Plan(inner=8, lr=0.2, stop=1e-3, slack=2e-3)


def job(images=range(3), guidance=5.0, rule=None, model=MODEL, steps=STEPS):
    prompts = [PROMPTS[k] for k in images]
    latents = points(3)[list(images)]
    grid, generator = model.grid(steps), torch.Generator()
    conditions = model.embed(prompts), model.embed([""] * len(prompts))
    return Job(model, latents, *conditions, grid, guidance, generator, rule=rule)


def tuning(half, work=None, plan=PLAN):
    work = job() if work is None else work
    # Learning begins at a spread of weights that all components share in.
    soft = torch.linspace(-2, 0, 3, dtype=torch.float64).expand(len(work.condition), 1, 3)
    work.condition = work.condition.with_tensors(embeds=soft)
    pivot = work.climb(get("solver", "ddim").make(query="noisy"), work.grid, 1.0)["x"]
    return Tuning(work, work.grid, pivot, half, plan)


def plain(half, t):
    """What the module promises, one image after the other and without any shared code."""
    work, plan, embeds, losses = t.job, t.plan, [], []
    for b in range(len(work.latents)):
        x, found, history = t.pivot[-1, b : b + 1], t.start[b : b + 1], []
        conditions = {"cond": work.condition.take([b]), "uncond": work.negative.take([b])}
        for i, step in enumerate(work.grid.walk(down=True)):

            def arrive(n, x=x, step=step, conditions=conditions):
                both = {**conditions, half: conditions[half].with_tensors(embeds=n)}
                branch = Branch("source", both["cond"], both["uncond"], work.guidance)
                prediction = Denoiser(work.model, [branch], guidance=work.rule)(x, step.t)
                alpha, sigma = levels(work.model.path, step.s, x)
                return alpha * prediction.x0 + sigma * prediction.eps

            n = found.detach().clone().requires_grad_()
            adam = torch.optim.Adam([n], lr=plan.lr * (1 - i / (2 * work.grid.steps)))
            seen = []
            for _ in range(plan.inner):
                loss = (arrive(n) - t.pivot[step.index, b : b + 1]).square().mean()
                if not loss.requires_grad:
                    break
                adam.zero_grad()
                loss.backward()
                adam.step()
                seen.append(float(loss.detach()))
                if seen[-1] < plan.stop + plan.slack * i:
                    break
            found = n.detach()
            x = arrive(found).detach()
            history.append((found, seen))
        embeds.append(torch.stack([n for n, _ in history[::-1]]))
        losses.append([seen for _, seen in history[::-1]])
    return torch.cat(embeds, dim=1), losses


@pytest.mark.parametrize("half", HALVES)
def test_each_image_and_interval_has_its_own_adam_and_stop(half):
    t = tuning(half)
    found = t.each_step()
    embeds, losses = plain(half, t)
    torch.testing.assert_close(found.embeds, embeds, rtol=0, atol=1e-9)
    counts = [[len(seen) for seen in image] for image in losses]
    assert len({n for image in counts for n in image}) > 2  # the case does have early stops
    for b, image in enumerate(losses):
        for k, seen in enumerate(image):
            row = found.losses[k, b]
            torch.testing.assert_close(row[: len(seen)], torch.tensor(seen).double())
            assert int((~row.isnan()).sum()) == len(seen) + 1


@pytest.mark.parametrize("half", HALVES)
def test_a_batch_does_and_costs_what_its_images_do_alone(half):
    together = tuning(half)
    before = together.job.ledger.rows
    whole, rows = together.each_step(), together.job.ledger.rows - before
    for b in range(3):
        alone = tuning(half, job([b]))
        before = alone.job.ledger.rows
        one = alone.each_step()
        rows -= alone.job.ledger.rows - before
        torch.testing.assert_close(whole.embeds[:, b], one.embeds[:, 0], rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.states[:, b], one.states[:, 0], rtol=0, atol=1e-9)
    assert rows == 0


@pytest.mark.parametrize("half", HALVES)
def test_an_image_stops_below_the_limit_and_not_before(half):
    t = tuning(half)
    losses = t.each_step().losses
    for step in t.grid.walk(down=True):
        limit = PLAN.stop + PLAN.slack * step.position
        for row in losses[step.index]:
            seen = row[~row.isnan()][:-1]
            assert len(seen) <= PLAN.inner and bool((seen[:-1] >= limit).all())
            assert len(seen) == PLAN.inner or float(seen[-1]) < limit


@pytest.mark.parametrize("half", HALVES)
def test_the_last_loss_is_the_distance_from_the_pivot(half):
    """Interval k ends at the pivot's state k, and the next one goes on from where it arrived."""
    t = tuning(half)
    found = t.each_step()
    away = (found.states - t.pivot).square().mean((2, 3, 4))
    last = (~found.losses.isnan()).sum(-1, keepdim=True) - 1
    torch.testing.assert_close(found.losses.gather(-1, last)[..., 0], away[:-1])
    assert torch.equal(found.states[-1], t.pivot[-1])


@pytest.mark.parametrize("half", HALVES)
def test_more_steps_come_nearer(half):
    gaps = []
    for inner in (0, 1, 3, 10, 30):
        t = tuning(half, plan=Plan(inner, lr=0.05))
        gaps.append(float((t.each_step().states[0] - t.job.latents).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.1 * gaps[0]


@pytest.mark.parametrize("half", HALVES)
def test_one_embedding_for_all_comes_nearer_too_but_less(half):
    plan = Plan(10, lr=0.1)
    t = tuning(half, plan=plan)
    shared = t.all_steps()
    assert torch.equal(shared.embeds, shared.embeds[:1].expand_as(shared.embeds))
    gaps = [
        float((states[0] - t.job.latents).square().mean())
        for states in (tuning(half, plan=Plan(0, lr=0.1)).each_step().states, shared.states)
    ]
    own = float((t.each_step().states[0] - t.job.latents).square().mean())
    assert own < gaps[1] < gaps[0]


def test_at_guidance_one_the_null_embedding_has_no_gradient_and_stays():
    """uncond + 1 (cond - uncond): both slopes cancel exactly, so nothing is asked."""
    t = tuning("uncond", job(guidance=1.0))
    asked = t.job.ledger.rows
    found = t.each_step()
    assert torch.equal(found.embeds, t.start.expand_as(found.embeds))
    assert t.job.ledger.rows - asked == 3 * STEPS
    branch = Branch("source", t.job.condition, None)
    x = t.pivot[-1]
    for step in t.grid.walk(down=True):
        p = Denoiser(MODEL, [branch])(x, step.t)
        alpha, sigma = levels(MODEL.path, step.s, x)
        x = alpha * p.x0 + sigma * p.eps
    torch.testing.assert_close(found.states[0], x, rtol=0, atol=1e-13)


def test_a_prompt_matters_at_guidance_one():
    t = tuning("cond", job(guidance=1.0))
    assert not torch.equal(t.each_step().embeds[0], t.start)


@pytest.mark.parametrize("half", HALVES)
def test_the_guidance_rule_of_the_job_is_learned_against(half):
    """Outside of its interval there is no guidance: a null embedding waits, a prompt's learns."""
    times = MODEL.grid(STEPS).times
    rule = GuidanceInterval(times[1], times[3])  # asked at times 1 to 3: intervals 0 to 2
    t = tuning(half, job(rule=rule))
    found = t.each_step()
    torch.testing.assert_close(found.embeds, plain(half, t)[0], rtol=0, atol=1e-9)
    moved = [not torch.equal(e, t.start) for e in found.embeds]
    assert moved == [True] * 3 + [half == "cond"] * 3


def test_the_rate_falls_to_half_whatever_the_number_of_steps():
    """Published code writes lr (1 - i/100): nothing at 100 steps, and backwards beyond."""
    plan = Plan(10, lr=0.01)
    for count in (4, 50, 200):
        rates = [plan.rate(Step(k, count, 1.0, 0.0, True)) for k in range(count)]
        assert rates[-1] == 0.01 and min(rates) > 0.005
    assert plan.rate(Step(49 - 30, 50, 1.0, 0.0, True)) == pytest.approx(0.01 * (1 - 30 / 100))


def test_losses_that_are_not_numbers_are_refused():
    broken = ProblemModel(mixture(), PATHS["vp"])
    t = tuning("uncond", job(model=broken))
    t.pivot[2] = torch.nan
    with pytest.raises(RetourError, match="the losses hold .* NaN .* float32"):
        t.each_step()


def test_float16_networks_are_refused():
    half_precision = ProblemModel(mixture(), PATHS["vp"])
    half_precision.dtype = torch.float16
    with pytest.raises(RetourError, match="float16.*load it with dtype='float32'"):
        tuning("cond", job(model=half_precision))


def test_inference_mode_is_refused_and_no_grad_is_not():
    with torch.inference_mode(), pytest.raises(RetourError, match="use torch.no_grad, or none"):
        tuning("cond", job())
    with torch.no_grad():
        t = tuning("uncond")
        assert not torch.equal(t.each_step().embeds[0], t.start)


def test_embeddings_of_a_half_precision_encoder_are_learned_in_float32():
    work = job()
    work.negative = work.negative.with_tensors(embeds=work.negative.tensors["embeds"].bfloat16())
    assert tuning("uncond", work).each_step().embeds.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{"inner": -1}, {"lr": -0.1}, {"stop": float("nan")}, {"decay": 2.0}]
)
def test_bad_plans_are_refused(settings):
    with pytest.raises(RetourError, match="choose a number"):
        Plan(**{"inner": 10, "lr": 0.01, **settings})
