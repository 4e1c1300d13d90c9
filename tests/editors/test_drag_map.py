"""Geometry of drags: displacement, landing, regions."""

import itertools
import math

import pytest
import torch

from retour.editors._drag_carry import between
from retour.editors._drag_map import coarser, displacements, drag_map, elasticity, finer
from retour.editors._drag_tokens import from_tokens, to_tokens
from retour.editors._drags import Pull
from retour.errors import RetourError


def rectangle(top, left, bottom, right, size=(16, 16)):
    area = torch.zeros(size, dtype=torch.bool)
    area[top:bottom, left:right] = True
    return area


def test_elasticity_is_one_at_the_handle_and_nought_on_the_circle():
    area = rectangle(2, 3, 10, 13)
    points = area.nonzero().double()
    handle = torch.tensor([5.0, 6.0], dtype=torch.float64)
    centre = torch.tensor([5.5, 7.5], dtype=torch.float64)
    radius = math.hypot(7, 9) / 2
    corners = torch.tensor([[2.0, 3.0], [9.0, 12.0]], dtype=torch.float64)
    found = elasticity(points, handle)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert float(found[(points == handle).all(1)]) == 1
    # The corners of the rectangle lie on the circle around it.
    for corner in corners:
        assert float(found[(points == corner).all(1)]) < 1e-6
    # On the way out it falls linearly, to nought where the circle is met.
    along = torch.stack([handle + k * torch.tensor([0.0, 1.0]) for k in range(7)]).double()
    values = elasticity(torch.cat([along, corners]), handle)[:7]
    reach = centre[1] + math.sqrt(radius**2 - (handle[0] - centre[0]) ** 2) - handle[1]
    torch.testing.assert_close(values, 1 - torch.arange(7).double() / reach, rtol=0, atol=1e-9)


def test_elasticity_of_handles_on_and_beyond_the_circle():
    """The ray may meet the circle twice or not at all: nothing is NaN, nothing leaves [0, 1]."""
    points = rectangle(4, 4, 9, 9).nonzero().double()
    for handle in itertools.product((-6.0, 0.0, 4.0, 6.0, 8.0, 30.0), repeat=2):
        found = elasticity(points, torch.tensor(handle, dtype=torch.float64))
        assert bool(((found >= 0) & (found <= 1)).all())
    one = elasticity(points[:1], points[0])
    assert one.tolist() == [1.0]


@pytest.mark.parametrize("shift", [(3, 0), (0, -4), (2, 4), (-3, -3), (0, 0)])
def test_a_single_move_is_exact(shift):
    area = rectangle(5, 6, 10, 12)
    found = drag_map(area, [Pull((7.2, 8.9), shift)], "move")
    landed = torch.zeros_like(area)
    for row, column in area.nonzero().tolist():
        to = (row + shift[0], column + shift[1])
        landed[to] = True
        assert int(found.source[to[0] * 16 + to[1]]) == row * 16 + column
    assert torch.equal(found.destination, landed.flatten())
    assert torch.equal(found.vacated, (area & ~landed).flatten())


@pytest.mark.parametrize("shift", [0.5, 1.5, 2.5, -0.5, -1.5])
def test_half_steps_move_all_tokens_alike(shift):
    """Banker's rounding would tear every other column out."""
    found = drag_map(rectangle(4, 4, 12, 12), [Pull((8, 8), (0, shift))], "move")
    places = found.destination.nonzero().flatten()
    steps = set((places - found.source[places]).tolist())
    assert len(places) == 64 and len(steps) == 1


def test_weights_are_in_token_units():
    found = drag_map(rectangle(0, 0, 16, 16), [Pull((8, 8), (0, 0))], "move")
    weight = found.weight.reshape(16, 16)
    assert weight[8, 8] == 1 and weight[8, 9] == 1 and weight[9, 8] == 1
    assert float(weight[8, 10]) == 0.5 and float(weight[8, 4]) == 0.25
    assert float(weight[9, 9]) == pytest.approx(1 / math.sqrt(2))


def test_opposite_drags_keep_their_size_where_the_average_cancels():
    points = rectangle(2, 2, 14, 14).nonzero().double()
    up, down = Pull((7, 8), (-4, 0)), Pull((8, 8), (4, 0))
    nearest, _ = displacements(points, [up, down], "drag")
    for pull in (up, down):
        here = (points == torch.tensor(pull.handle).double()).all(1)
        assert nearest[here].norm() == pytest.approx(4, abs=1e-12)
    between = torch.tensor([[7.5, 8.0]], dtype=torch.float64)
    everything = torch.cat([points, between])
    average, _ = displacements(everything, [up, down], "drag", "average")
    assert float(average[-1].norm()) < 0.4
    winner, _ = displacements(everything, [up, down], "drag")
    assert float(winner[-1].norm()) > 3


def test_every_token_obeys_its_nearest_handle():
    points = rectangle(0, 0, 16, 16).nonzero().double()
    pulls = [Pull((3, 3), (1, 0)), Pull((12, 12), (0, 1)), Pull((3, 12), (-1, -1))]
    shift, alpha = displacements(points, pulls, "move")
    handles = torch.tensor([p.handle for p in pulls]).double()
    near = torch.cdist(points, handles)
    wanted = torch.tensor([p.shift for p in pulls]).double()[near.argmin(1)]
    assert torch.equal(shift, wanted)
    torch.testing.assert_close(alpha, 1 / near.amin(1))


@pytest.mark.parametrize("scale", [1.25, 1.5, 2.0, 3.0])
def test_a_magnified_object_has_no_gaps(scale):
    area = rectangle(6, 6, 10, 10)
    found = drag_map(area, [Pull((7.5, 7.5), (0, 0), (scale, scale))], "move")
    shape = found.destination.reshape(16, 16)
    rows, columns = shape.any(1).sum(), shape.any(0).sum()
    assert int(shape.sum()) == int(rows * columns)  # one full rectangle
    assert abs(int(rows) - 4 * scale) <= 1 and abs(int(columns) - 4 * scale) <= 1
    order = found.source.reshape(16, 16)[shape.any(1)][:, shape.any(0)]
    assert bool((order[:, 1:] % 16 >= order[:, :-1] % 16).all())  # nothing changes sides


@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_a_shrunk_object_keeps_what_is_nearest_to_the_handle(scale):
    area = rectangle(4, 4, 12, 12)
    found = drag_map(area, [Pull((8, 8), (0, 0), (scale, scale))], "move")
    shape = found.destination.reshape(16, 16)
    assert 0 < int(shape.sum()) < 64 and bool(shape[8, 8])
    assert int(found.source[8 * 16 + 8]) == 8 * 16 + 8
    assert int(found.vacated.sum()) == int((area.flatten() & ~found.destination).sum()) > 0


def test_collisions_go_to_the_largest_weight():
    """Everything is pushed against the border: the tokens nearest to the handle stay on top."""
    area = rectangle(0, 8, 16, 16)
    found = drag_map(area, [Pull((8, 10), (0, 9))], "move")
    column = found.source.reshape(16, 16)[:, 15]
    assert bool((column % 16 == 10).all())


def test_regions_are_disjoint_and_cover_everything():
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        size = (int(torch.randint(4, 20, (), generator=generator)), 12)
        area = torch.rand(size, generator=generator) < 0.4
        area[0, 0] = True
        count = int(torch.randint(0, 4, (), generator=generator))
        pulls = [
            Pull(
                tuple((torch.rand(2, generator=generator) * 12).tolist()),
                tuple((torch.randn(2, generator=generator) * 4).tolist()),
                tuple((torch.rand(2, generator=generator) + 0.5).tolist())
                if number % 2
                else (1, 1),
            )
            for _ in range(count)
        ]
        found = drag_map(area, pulls, ("drag", "move")[number % 2], band=number % 3)
        regions = torch.stack(
            [found.destination, found.vacated, found.transition, found.background]
        )
        assert bool((regions.sum(0) == 1).all())
        assert bool(area.flatten()[found.source[found.destination]].all())
        still = ~found.destination
        assert torch.equal(found.source[still], torch.arange(len(still))[still])
        assert not found.weight[still].any()


def test_a_null_drag_is_the_identity():
    area = rectangle(3, 3, 9, 9)
    for pulls in ([], [Pull((5, 5), (0, 0))]):
        for mode in ("drag", "move"):
            found = drag_map(area, pulls, mode)
            assert torch.equal(found.source, torch.arange(256))
            assert torch.equal(found.destination, area.flatten()) and not found.vacated.any()


def test_less_than_half_a_token_does_nothing():
    found = drag_map(rectangle(3, 3, 9, 9), [Pull((5, 5), (0.4, -0.4))], "move")
    assert torch.equal(found.source, torch.arange(256))


def test_the_transition_is_a_band():
    for band in (0, 1, 2):
        found = drag_map(rectangle(6, 6, 10, 10), [], band=band)
        assert torch.equal(
            (found.transition | found.destination).reshape(16, 16),
            rectangle(6 - band, 6 - band, 10 + band, 10 + band),
        )


@pytest.mark.parametrize(
    ("shift", "scale"), [((2.3, -1.6), (1, 1)), ((0, 0), (2, 1.5)), ((0.2, 1), (0.5, 0.75))]
)
def test_origins_undo_the_rounding(shift, scale):
    """What stands at a place came from s + (x - e) / r, for every destination."""
    pull = Pull((7.5, 7.5), shift, scale)
    found = drag_map(rectangle(5, 5, 11, 11), [pull], "move")
    here = torch.cartesian_prod(*(torch.arange(16.0),) * 2).double()
    handle, way, ratio = (torch.tensor(v, dtype=torch.float64) for v in (pull.handle, shift, scale))
    wanted = handle + (here - handle - way) / ratio
    at = found.destination
    torch.testing.assert_close(found.origin[at], wanted[at], rtol=0, atol=1e-9)
    assert torch.equal(found.origin[~at], here[~at])
    nearest = torch.stack([found.source // 16, found.source % 16], 1).double()
    reach = (0.5 / ratio.clamp(max=1)) + 1e-9
    assert bool(((found.origin - nearest).abs() <= reach).all())


def test_what_piles_up_on_the_border_comes_from_its_winner():
    found = drag_map(rectangle(0, 8, 16, 16), [Pull((8, 10), (0, 9))], "move")
    gap = found.origin - torch.stack([found.source // 16, found.source % 16], 1)
    assert float(gap.abs().max()) <= 0.5


def test_an_elastic_drag_has_origins_within_half_a_place_of_its_winners():
    found = drag_map(rectangle(2, 2, 14, 14), [Pull((8, 8), (2.4, 0)), Pull((5, 4), (0, -1.3))])
    gap = found.origin - torch.stack([found.source // 16, found.source % 16], 1)
    assert 0 < float(gap.abs().max()) <= 0.5 + 1e-9


def test_finer_maps_say_the_same_of_every_cell():
    tokens = drag_map(rectangle(1, 2, 5, 6, (8, 10)), [Pull((2, 3), (2, -1))], "move")
    cells = finer(tokens, 2)
    z = torch.randn(3, 16, 20)
    moved = to_tokens(z, 1)[cells.source]
    wanted = to_tokens(z, 2)[tokens.source]
    assert torch.equal(from_tokens(moved, 1, (16, 20)), from_tokens(wanted, 2, (8, 10)))
    grown = tokens.vacated.reshape(8, 10).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(cells.vacated.reshape(16, 20), grown)


def test_coarser_maps_keep_regions_and_weights():
    """Everything stands where it belongs: each token reads itself."""
    cells = drag_map(rectangle(4, 4, 8, 8), [Pull((5.5, 5.5), (0, 5))], "move")
    tokens = coarser(cells, 2)
    assert tokens.size == (8, 8) and torch.equal(tokens.source, torch.arange(64))
    assert torch.equal(tokens.destination.reshape(8, 8), rectangle(2, 4, 4, 7, (8, 8)))
    assert torch.equal(tokens.vacated.reshape(8, 8), rectangle(2, 2, 4, 4, (8, 8)))
    regions = [tokens.destination, tokens.vacated, tokens.transition, tokens.background]
    assert bool((torch.stack(regions).sum(0) == 1).all())
    # Distances count in tokens of two cells; cells on which nothing landed weigh nothing.
    weight = tokens.weight.reshape(8, 8)
    assert float(weight[2, 5]) == 1
    assert float(weight[2, 4]) == pytest.approx((1 + 2 / math.hypot(1.5, 1.5)) / 4)


def test_reading_between_cells_is_bilinear():
    row, column = torch.cartesian_prod(torch.arange(5.0), torch.arange(6.0)).double().unbind(1)
    plane = torch.stack([2 * row - column + 1, row * column], 1)
    places = torch.tensor([[1.25, 2.5], [0.0, 5.0], [3.9, 4.1]]).double()
    r, c = places.unbind(1)
    wanted = torch.stack([2 * r - c + 1, r * c], 1)
    torch.testing.assert_close(between(plane, places, (5, 6)), wanted)
    beyond = between(plane, torch.tensor([[-3.0, 9.0]]).double(), (5, 6))
    torch.testing.assert_close(beyond, plane[[5]])


def test_an_empty_mask_is_refused():
    with pytest.raises(RetourError, match="covers no token"):
        drag_map(rectangle(0, 0, 0, 0), [Pull((1, 1), (1, 1))])
