"""InfEdit: three branches tied by attention, on UNet and MM-DiT, and the blend between them."""

import pytest
import torch

import retour
from attention.spies import Maps
from inverters.jobs import tiny_model, tiny_picture
from retour.attention.control import AttentionControl
from retour.core.branches import Branch, Denoiser
from retour.core.control import Attending
from retour.core.loop import walk
from retour.core.model import Tokens, Word
from retour.core.registry import get
from retour.demo import examples
from retour.editors._unified import similar
from retour.editors.base import EditJob
from retour.editors.infedit import InfEdit, InfEditOptions
from retour.errors import RetourError

SOURCE, TARGET = "a red apple on a cat", "a photo of a green pear on a cat"
STEPS = 3


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def inv(request):
    model = tiny_model(request.param, wide=True)
    return retour.invert(model, tiny_picture(), SOURCE, method="virtual", steps=STEPS, guidance=5.0)


def run(inv, target=TARGET, *, scale=5.0, extra=(), editor=None, **options):
    """Edit with the virtual chain; branch -> latents. `extra` attention controls come last."""
    editor = InfEdit(InfEditOptions(**options)) if editor is None else editor
    net = inv.model
    given = [
        Branch(name, net.embed([prompt]), inv.negative, scale)
        for name, prompt in (("source", SOURCE), ("target", target))
    ]
    denoiser = Denoiser(net, editor.arrange(tuple(given)))
    job = EditJob(net, inv, denoiser.layout, {"target": (target,)}, inv.grid)
    replay = get("invert", inv.method).make(**inv.options).replay(inv)
    controls = [replay.control, editor.control(job), Attending(*extra)]
    state = replay.state.tile(len(denoiser.branches))
    end = walk(replay.solver, denoiser, state, inv.grid, down=True, controls=controls)
    return dict(denoiser.layout.split(end.x))


class QKV(AttentionControl):
    """Remembers what every layer finally attends with."""

    def __init__(self):
        self.seen = []

    def qkv(self, call, q, k, v):
        self.seen.append((call, q.clone(), k.clone(), v.clone()))
        return q, k, v


def row(call, branch, half="cond"):
    [index] = call.rows.where(branch, half).tolist()
    return index


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


# --- Attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"self_steps": 0.3, "cross_steps": 1.0}])
def test_the_same_prompt_gives_the_source(inv, options):
    ends = run(inv, SOURCE, scale=1.0, **options)
    close(ends["target"], inv.latents)
    assert torch.equal(ends["source"], inv.latents)


def test_without_control_it_is_the_two_branch_virtual_edit(inv):
    plain = retour.edit(inv, TARGET, editor="reprompt")
    close(run(inv, self_steps=0.0, cross_steps=0.0)["target"], plain.latents)
    assert (run(inv)["target"] - plain.latents).abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "rows"), [(5.0, 4), (1.0, 3)])
def test_aligned_words_get_the_layouts_maps(inv, scale, rows):
    """Where nothing is guided as well: the batch is of three rows then, all of them conditional."""
    net, target = inv.model, SOURCE.replace("red", "green")
    embeds = net.embed([SOURCE, target]).tensors["embeds"]
    alignment = similar(net.tokens(SOURCE), net.tokens(target), *embeds)
    columns = [j for j in range(len(alignment.kept)) if alignment.kept[j]]
    places = [int(alignment.matrix[:, j].argmax()) for j in columns]
    assert 1 < len(columns) < len(alignment.kept), "green is more tokens than red"
    for maps, lender in (("layout", "target-layout"), ("source", "source")):
        spy = Maps(("cross", "joint"))
        run(inv, target, scale=scale, cross_steps=1.0, maps=maps, extra=[spy])
        for call, probs in spy.seen:
            assert len(call.rows) == rows
            text = call.image_to_text(probs)
            given, wanted = text[row(call, "target")], text[row(call, lender)]
            assert torch.equal(given[..., columns], wanted[..., places])
            assert not torch.equal(given, wanted)


def test_new_words_keep_their_own_maps(inv):
    """'photo of' has no counterpart; its maps are those of the bare network."""
    target, seen = "a photo of a red apple on a cat", []
    for options in ({"cross_steps": 1.0}, {"cross_steps": 0.0}):
        spy = Maps(("cross", "joint"))
        run(inv, target, self_steps=0.0, extra=[spy], **options)
        words = {w.text: w.tokens for w in inv.model.tokens(target).words}
        seen.append((spy.seen[0], [*words["photo"], *words["of"]]))
    (call, changed), new = seen[0]
    (_, bare), _ = seen[1]
    one, other = (call.image_to_text(m)[row(call, "target")] for m in (changed, bare))
    close(one[..., new], other[..., new])
    assert (one - other).abs().max() > 1e-4


def test_early_all_look_as_the_source_and_the_layout_moves_its_values(inv):
    spy = QKV()
    run(inv, self_steps=1.0, cross_steps=0.0, extra=[spy])
    # In the first step all are alike anyway; the last one, r = 1, is no longer early.
    calls = [s for s in spy.seen if s[0].site.kind != "cross" and s[0].step.position == 1]
    assert calls
    for call, q, k, v in calls:
        part = call.image
        source = row(call, "source")
        for branch, half in (("target", "cond"), ("target", "uncond"), ("target-layout", "cond")):
            other = row(call, branch, half)
            assert torch.equal(q[other][:, part], q[source][:, part])
            assert torch.equal(k[other][:, part], k[source][:, part])
        layout, target = row(call, "target-layout"), row(call, "target")
        assert torch.equal(v[layout][:, part], v[source][:, part])
        assert not torch.equal(v[target][:, part], v[source][:, part])


def test_early_ends_where_its_part_of_the_steps_is_reached(inv):
    """r < r_self, strictly: of three steps, two thirds make the first one early only."""
    spy = QKV()
    run(inv, self_steps=2 / 3, cross_steps=0.0, extra=[spy])
    seen = [s for s in spy.seen if s[0].site.kind != "cross" and s[0].step.position == 1]
    assert seen
    for call, _, k, _ in seen:
        source, target = row(call, "source"), row(call, "target")
        assert not torch.equal(k[target][:, call.image], k[source][:, call.image])


def test_late_the_layout_asks_as_the_target_and_is_answered_by_the_source(inv):
    spy = QKV()
    run(inv, self_steps=0.0, cross_steps=0.0, extra=[spy])
    for call, q, k, v in spy.seen:
        if call.site.kind == "cross" or call.step.position == 0:
            continue
        part = call.image
        source, target, layout = (row(call, n) for n in ("source", "target", "target-layout"))
        assert torch.equal(q[layout][:, part], q[target][:, part])
        assert torch.equal(k[layout][:, part], k[source][:, part])
        assert torch.equal(v[layout][:, part], v[source][:, part])
        assert not torch.equal(k[target][:, part], k[source][:, part])


def test_the_source_never_notices(inv):
    plain = run(inv, self_steps=0.0, cross_steps=0.0)
    for options in ({}, {"self_steps": 1.0, "cross_steps": 1.0, "edit_words": "pear"}):
        assert torch.equal(run(inv, **options)["source"], plain["source"])


def sentence(*words):
    return Tokens(
        (0, *range(1, len(words) + 1), 99), tuple(Word(w, (k + 1,)) for k, w in enumerate(words))
    )


def test_the_most_similar_two_of_each_gap_are_aligned():
    """Gaps of unequal size, so that mixing up the prompts would show."""
    source = Tokens((0, 1, 5, 6, 7, 2, 99), tuple(Word(str(k), (k,)) for k in range(1, 6)))
    target = Tokens((0, 1, 8, 9, 2, 10, 99), tuple(Word(str(k), (k,)) for k in range(1, 6)))
    old, new = torch.eye(7, 8), torch.zeros(7, 8)
    new[2, 0] = 1  # 8 is like nothing in its gap
    new[3] = old[4] + 0.1 * old[2]  # 9 is like 7
    found = similar(source, target, old, new)
    assert found.matrix[4, 3] == 1 and found.kept[3] == 1
    assert found.kept[2] == 0 and found.kept[5] == 0  # one pair a gap; no gap across from 10
    assert (found.matrix.sum(0) <= 1).all()
    for i, j in ((0, 0), (1, 1), (5, 4), (6, 6)):
        assert found.matrix[i, j] == 1


# --- Blend ----------------------------------------------------------------------------------------


def test_where_keep_words_look_the_source_returns(inv):
    ends = run(inv, keep_words="apple", keep_threshold=0.0)
    assert torch.equal(ends["target"], inv.latents)
    ends = run(inv, keep_words="apple", keep_threshold=1.0)
    close(ends["target"], run(inv)["target"])


def test_outside_of_edit_words_the_layout_shows(inv):
    ends = run(inv, edit_words="pear", edit_threshold=1.0)
    assert torch.equal(ends["target"], ends["target-layout"])
    published = run(inv, edit_words="pear", edit_threshold=1.0, blend_last=False)
    assert not torch.equal(published["target"], published["target-layout"])


def test_outside_of_edit_words_the_source_shows_as_the_paper_writes_it(inv):
    options = {"edit_words": "pear", "elsewhere": "source"}
    assert torch.equal(run(inv, edit_threshold=1.0, **options)["target"], inv.latents)
    ends = run(inv, editor=Steep(InfEditOptions(edit_threshold=0.4, **options)))
    assert torch.equal(ends["target"][..., :3], inv.latents[..., :3])
    assert (ends["target"] - inv.latents)[..., 3:].abs().amax((0, 1, 2)).min() > 1e-3


class Steep(InfEdit):
    """Its words look to the right: heat rises from 0 to 1 across the picture."""

    def control(self, job):
        control = super().control(job)
        control._heat = lambda places, size: torch.linspace(0, 1, size[1]).expand(size)
        return control


def test_each_place_shows_what_the_words_say(inv):
    """Of 8 columns three show the layout, three the target, and the last two the source."""
    options = {"edit_words": "pear", "keep_words": "apple"}
    options |= {"edit_threshold": 0.4, "keep_threshold": 0.8}
    ends = run(inv, editor=Steep(InfEditOptions(**options)))
    target, between, source = (ends[n] for n in ("target", "target-layout", "source"))
    assert torch.equal(target[..., :3], between[..., :3])
    assert torch.equal(target[..., 6:], source[..., 6:])
    for other in (between, source):
        assert (target - other)[..., 3:6].abs().amax((0, 1, 2)).min() > 1e-3


def test_words_are_checked(inv):
    for options, said in (
        ({"edit_words": "apple"}, "edit_words"),
        ({"keep_words": "pear"}, "keep"),
    ):
        with pytest.raises(RetourError, match=said):
            run(inv, **options)


# --- The whole job --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["virtual", "edit-friendly", "sde-dpm"])
def test_cost_and_mates(method):
    inv = retour.invert(
        tiny_model(), tiny_picture(), SOURCE, method=method, steps=4, guidance=5.0, strength=1.0
    )
    result = retour.edit(inv, TARGET, editor="infedit")
    assert result.record["nfe_edit"] == 4 * 4
    assert len(result.images) == 1
    assert (result.source - inv.latents).abs().max() < 1e-5


def test_inversions_that_correct_the_source_alone_are_refused():
    inv = retour.invert(tiny_model(), tiny_picture(), SOURCE, method="direct", steps=2)
    with pytest.raises(RetourError, match="virtual"):
        retour.edit(inv, TARGET, editor="infedit")


def test_a_batch_does_what_its_images_do_alone():
    model = tiny_model(wide=True)
    pictures, prompts = [tiny_picture(k) for k in range(2)], [SOURCE, "a cat on a red pear"]
    targets = [TARGET, "a cat on a green pear"]
    options = {"edit_words": "auto", "edit_threshold": 0.5}
    batch = retour.invert(model, pictures, prompts, method="virtual", steps=3)
    edited = retour.edit(batch, targets, editor="infedit", **options)
    for k in range(2):
        one = retour.invert(model, pictures[k], prompts[k], method="virtual", steps=3)
        alone = retour.edit(one, targets[k], editor="infedit", **options)
        close(edited.latents[k], alone.latents[0])


def test_several_targets_have_a_layout_each():
    inv = retour.invert(tiny_model(wide=True), tiny_picture(), SOURCE, method="virtual", steps=3)
    both = retour.edit(inv, [TARGET, "a red pear on a cat"], editor="infedit")
    alone = retour.edit(inv, "a red pear on a cat", editor="infedit")
    close(both.latents[1], alone.latents[0])


@pytest.mark.parametrize("option", ["cross_steps", "self_steps", "edit_threshold"])
def test_options_are_checked(option):
    with pytest.raises(RetourError, match=option):
        get("edit", "infedit").make(**{option: 1.5})


@pytest.mark.slow
def test_virtual_inversion_keeps_more_of_the_background_than_ddim_at_equal_cost():
    """60 evaluations each: DDIM 12 up and 4 x 12 down, the virtual chain 3 x 20."""
    pictures, edits = examples()
    net, missed = retour.load("emoji-unet"), {"ddim": 0.0, "virtual": 0.0}
    for edit in [e for e in edits if e.kind == "colour"]:
        picture, prompt = pictures[edit.image]
        for method, steps in (("ddim", 12), ("virtual", 20)):
            inv = retour.invert(net, picture, prompt, method=method, steps=steps)
            result = retour.edit(inv, edit.target, editor="p2p")
            assert result.record["nfe"] == 60
            kept = net.decode(inv.latents)[0]
            plain = (kept - kept[:, :1, :1]).abs().amax(0) < 0.1
            change = (net.decode(result.latents)[0] - kept).square().mean(0)
            missed[method] += float(change[plain].mean())
    assert missed["virtual"] < missed["ddim"]
