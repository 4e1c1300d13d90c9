import numpy as np
import pytest

from data.sprites_for_tests import make_sprites
from retour.data.palette import BACKGROUNDS
from retour.data.scenes import (
    EDIT_KINDS,
    SCALES,
    STYLE_PHRASES,
    Edit,
    Form,
    Item,
    Mix,
    Sampler,
    Scene,
    Split,
    Studio,
    edited,
    favourites,
    make_split,
    with_article,
)
from retour.data.sprites import Sprites, core_nouns

NOTHING = Split(frozenset(), frozenset())


@pytest.fixture(scope="module")
def studio():
    return Studio(make_sprites())


@pytest.fixture(scope="module")
def sampler(studio):
    mix = Mix(centred=0.4, large=0.1, small=0.1, corner=0.1, two=0.3)
    return Sampler(studio, NOTHING, seed=3, part="all", mix=mix)


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("ufo", "a ufo"),
        ("umbrella", "an umbrella"),
        ("orange owl", "an orange owl"),
        ("red scissors*", "red scissors"),
    ],
)
def test_articles(phrase, text):
    assert with_article(phrase) == text


def scene(*items, style="3d", background="sky blue"):
    return Scene(style, background, items)


@pytest.mark.parametrize(
    ("case", "form", "caption"),
    [
        (scene(Item("owl")), Form(), "a 3d render of an owl on a sky blue background"),
        (
            scene(Item("owl"), style="noto"),
            Form(background=False),
            "a noto style cartoon of an owl",
        ),
        (scene(Item("owl", "blue")), Form(style=False), "a blue owl on a sky blue background"),
        (
            scene(Item("scissors*", scale=SCALES["small"], x=0.27, y=0.27), style="twemoji"),
            Form(),
            "a flat twemoji drawing of small scissors in the top left on a sky blue background",
        ),
        (
            scene(Item("box", x=0.26), Item("owl", x=0.74), background="orange"),
            Form(),
            "a 3d render of a box to the left of an owl on an orange background",
        ),
        (
            scene(Item("ball", y=0.7), Item("owl", "pink", y=0.3)),
            Form(style=False, background=False),
            "a ball below a pink owl",
        ),
        (
            scene(Item("ball", y=0.7), Item("owl", y=0.3), Item("box")),
            Form(style=False),
            "a ball below an owl and a box on a sky blue background",
        ),
        (scene(), Form(), "a 3d render of a sky blue background"),
        (
            scene(Item("ball"), background="white"),
            Form(style=False, natural_colours=True),
            "a red ball on a white background",
        ),
    ],
)
def test_captions_say_what_is_there(studio, case, form, caption):
    assert studio.caption(case, form) == caption


def test_every_caption_names_every_choice(sampler):
    for number in range(25):
        drawn = sampler.scene(number)
        caption = sampler.studio.caption(drawn)
        assert f"{drawn.background} background" in caption
        for item in drawn.items:
            assert item.concept.rstrip("*") in caption
            assert item.colour is None or item.colour in caption


def test_scenes_follow_from_seed_and_number_alone(studio, sampler):
    again = Sampler(studio, NOTHING, seed=3, part="all", mix=sampler.mix)
    other = Sampler(studio, NOTHING, seed=4, part="all", mix=sampler.mix)
    numbers = [5, 2, 9, 2]
    assert [sampler.scene(n) for n in numbers] == [again.scene(n) for n in numbers]
    assert [sampler.caption(n) for n in numbers] == [again.caption(n) for n in numbers]
    assert [sampler.scene(n) for n in range(9)] != [other.scene(n) for n in range(9)]


def test_outside_the_masks_is_plain_background(sampler):
    for number in range(12):
        drawn = sampler.scene(number)
        image = sampler.studio.render(drawn)
        outside = ~sampler.studio.masks(drawn).any(0)
        assert (image[outside] == BACKGROUNDS[drawn.background]).all()


def test_a_lone_sprite_is_drawn_where_the_scene_says(studio):
    image_mask = studio.masks(scene(Item("box", scale=0.5, x=0.25, y=0.75)))[0]
    rows, columns = np.nonzero(image_mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 63, 0, 31)


def test_flip_mirrors(studio):
    plain, flipped = (studio.render(scene(Item("owl", scale=1.0, flip=f))) for f in (False, True))
    assert (plain[:, ::-1] == flipped).all()


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_pairs_differ_only_inside_the_mask(sampler, kind):
    for number in range(8):
        source = sampler.scene(number)
        pair = sampler.studio.pair(source, sampler.edit(number, kind))
        same = (pair.source_image == pair.target_image).all(-1)
        assert same[~pair.mask].all()
        assert pair.mask.any() or kind == "background"
        changed = pair.source_caption != pair.target_caption
        assert changed or kind in ("remove", "position")


def test_the_background_mask_is_all_that_is_not_fully_covered(studio):
    plain = scene(Item("box", scale=1.0))
    mask = studio.pair(plain, Edit("background", "pink")).mask
    alpha = studio.layer(plain.items[0], "3d")[1][..., 0]
    assert (mask == (alpha < 1)).all()


def test_removal_undoes_addition(sampler):
    source = sampler.scene(0)
    more = edited(source, sampler.edit(0, "add"))
    back = edited(more, Edit("remove", index=len(more.items) - 1))
    assert back == source


def test_unknown_edits_and_parts_are_refused(studio):
    with pytest.raises(ValueError, match="'melt'"):
        edited(scene(Item("owl")), Edit("melt", "x"))
    with pytest.raises(ValueError, match="'some'"):
        Sampler(studio, NOTHING, part="some")


def test_the_split_is_kept(studio):
    split = make_split(studio.sprites, seed=1, share=0.25, pair_share=0.2)
    parts = {part: Sampler(studio, split, part=part) for part in ("train", "pairs", "concepts")}
    keys = {part: set(sampler.keys) for part, sampler in parts.items()}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == 12
    assert {c for c, _ in keys["concepts"]} == split.concepts
    assert keys["pairs"] == split.pairs
    for number in range(40):
        drawn = parts["train"].scene(number)
        assert not any(split.held_out(item.concept, drawn.style) for item in drawn.items)


def test_the_split_follows_from_its_seed(studio):
    first, again, other = (make_split(studio.sprites, seed=s, share=0.25) for s in (1, 1, 2))
    assert first == again != other


def test_favourites_come_as_often_as_asked(studio, monkeypatch):
    monkeypatch.setattr("retour.data.scenes.favourites", lambda: frozenset({"owl"}))
    sampler = Sampler(studio, NOTHING, mix=Mix(favoured=0.9))
    first = [sampler.scene(number).items[0].concept for number in range(60)]
    assert 45 <= first.count("owl") < 60


def test_favourites_are_in_the_core_vocabulary_and_in_training():
    nouns = set(core_nouns().values())
    split = make_split(Sprites(dict.fromkeys((n, s) for n in nouns for s in STYLE_PHRASES)))
    assert favourites() <= nouns - split.concepts
