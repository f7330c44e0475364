"""The network of pairs, against scipy, numpy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from torchalign.functional import network
from torchalign.functional.network import (
    Edges,
    Positions,
    cell_contrast,
    choose_edges,
    components,
    consensus_scores,
    fit_slope,
    frame_keys,
    place_frames,
    position_variance,
    season_term,
    shadow_direction,
    similarity,
    solve_positions,
    spanning_tree,
)
from torchalign.functional.texture import extract_texture


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ring_and_chords(frames, chords=3):
    """Edges (i, i + k), k = 1 … chords."""
    number = torch.arange(frames)
    moving = torch.cat([(number + step) % frames for step in range(1, chords + 1)])
    return Edges(moving, number.repeat(chords), torch.ones(frames * chords, dtype=torch.bool))


def said(edges, position, noise=0.0, seed=1):
    shift = position[edges.moving] - position[edges.reference]
    return shift + noise * normal(*shift.shape, seed=seed)


# --------------------------------------------------------------------------------------------------- likeness


def test_similarity_is_the_correlation_over_common_ground():
    features, weights = normal(5, 400), (normal(5, 400, seed=2) > -0.5).double()
    features = features * weights
    found = similarity(features, weights)
    for i in range(5):
        for j in range(5):
            both = (weights[i] * weights[j]).numpy() > 0
            a, b = features[i].numpy()[both], features[j].numpy()[both]
            expected = (a @ b) / np.sqrt((a @ a) * (b @ b)) * np.sqrt(both.mean())
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-9)


def test_cells_do_not_feel_a_shift_of_a_pixel():
    scene = torch.nn.functional.avg_pool2d(normal(1, 200, 200).float(), 9, 1)[0]
    frames = torch.stack([scene[10:170, 10:170], scene[11:171, 10:170], scene[10:170, 30:190]])
    likeness = similarity(*cell_contrast(extract_texture(frames).field))
    assert likeness[0, 1] > 0.7
    assert likeness[0, 2].abs() < 0.3


def test_keys_are_of_the_frame_and_spread():
    features = normal(300, 500)
    keys = frame_keys(features, torch.ones_like(features), 4)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(frame_keys(7 * features[order], torch.ones_like(features), 4), keys[order])
    assert ((keys >= 0) & (keys < 1)).all()
    for one in keys.T.numpy():  # even in quarters, and each unlike the others
        assert np.abs(np.histogram(one, 4, (0, 1))[0] - 75).max() < 35
    assert np.abs(np.corrcoef(keys.T.numpy()) - np.eye(4)).max() < 0.2


# ------------------------------------------------------------------------------------------------------ edges


def test_the_tree_is_scipys():
    likeness = similarity(normal(40, 30), torch.ones(40, 30, dtype=torch.float64))
    parent = spanning_tree(likeness)
    expected = -minimum_spanning_tree(-(likeness.numpy() + 2)).sum() - 2 * 39
    assert float(likeness[torch.arange(1, 40), parent[1:]].sum()) == pytest.approx(expected)
    assert parent[0] == 0


def test_edges_do_not_depend_on_the_order_of_frames():
    features, weights = normal(30, 200), torch.ones(30, 200, dtype=torch.float64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))

    def pairs(features):
        edges = choose_edges(similarity(features, weights), frame_keys(features, weights, 5), neighbours=3)
        return {(int(i), int(j)) for i, j, distinct in zip(*edges, strict=True) if distinct}

    plain = pairs(features)
    assert {(int(order[i]), int(order[j])) for i, j in pairs(features[order])} == plain
    assert all(i != j and (j, i) not in plain for i, j in plain)
    degree = np.bincount(np.array(list(plain)).flatten(), minlength=30)
    assert degree.min() >= 3 + 2  # neighbours, and a ring at least
    assert len(plain) > 30 * 4


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_few_frames_make_few_edges(frames):
    features, weights = normal(frames, 50), torch.ones(frames, 50, dtype=torch.float64)
    edges = choose_edges(similarity(features, weights), frame_keys(features, weights, 3), neighbours=6)
    assert int(edges.distinct.sum()) == frames * (frames - 1) // 2


def test_empty_frames_stay_out_of_the_rings():
    features, weights = normal(20, 50), torch.ones(20, 50, dtype=torch.float64)
    empty = torch.arange(20) % 2 == 1
    likeness = similarity(features, weights).masked_fill(empty[:, None] | empty, -1.0)
    edges = choose_edges(likeness, frame_keys(features, weights, 2), neighbours=1, empty=empty)
    seen = edges.distinct & ~empty[edges.moving] & ~empty[edges.reference]
    assert int((components(edges, seen, 20)[~empty] == 0).sum()) == 10


@pytest.mark.parametrize("frames", [1, 7, 64, 500])
def test_components_are_scipys(frames):
    # a path in a scrambled order is the worst case for labels that spread
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(frames))
    edges = Edges(order[1:], order[:-1], torch.ones(frames - 1, dtype=torch.bool))
    usable = torch.stack([torch.ones(frames - 1), normal(frames - 1) > -1.5]).bool()
    for keep, found in zip(usable, components(edges, usable, frames), strict=True):
        graph = np.zeros((frames, frames))
        graph[edges.moving[keep], edges.reference[keep]] = 1
        _, expected = connected_components(graph, directed=False)
        same = expected[:, None] == expected
        np.testing.assert_array_equal((found[:, None] == found).numpy(), same)


# -------------------------------------------------------------------------------------------------- positions


def test_exact_pairs_give_exact_positions_about_their_median():
    position, edges = normal(21, 2), ring_and_chords(21)
    found = solve_positions(said(edges, position), torch.full((63,), 0.01), edges.distinct, edges, 21)
    torch.testing.assert_close(found.position, position - position.median(0).values, atol=1e-9, rtol=0)
    assert found.connected.all()
    assert float(found.closure.max()) < 1e-9
    torch.testing.assert_close(found.support, torch.full((21,), 6.0, dtype=torch.float64))


def test_least_squares_where_nothing_is_an_outlier():
    position, edges = normal(15, 2), ring_and_chords(15)
    shift, sigma = said(edges, position, noise=0.003), 0.1 + 0.05 * normal(45, seed=4).abs()
    found = solve_positions(shift, sigma, edges.distinct, edges, 15)
    design = np.zeros((45, 15))
    design[np.arange(45), edges.moving] = 1
    design[np.arange(45), edges.reference] -= 1
    weight = 1 / np.sqrt(sigma.numpy() ** 2 + 0.03**2)
    expected = np.linalg.lstsq(design * weight[:, None], shift.numpy() * weight[:, None], rcond=None)[0]
    np.testing.assert_allclose(found.position, expected - np.median(expected, 0), atol=1e-8)
    # and its covariance is the pseudo-inverse of the weighted Laplacian
    laplacian = np.linalg.pinv((design * weight[:, None] ** 2).T @ design)
    np.testing.assert_allclose(position_variance(found, edges), np.diag(laplacian), rtol=1e-6)


def test_hubers_loss_is_scipys():
    position, edges = normal(12, 2), ring_and_chords(12, 4)
    shift, sigma = said(edges, position, noise=0.02), torch.full((48,), 1.0, dtype=torch.float64)
    shift[:5] += 6.0 * normal(5, 2, seed=9)
    found = solve_positions(shift, sigma, edges.distinct, edges, 12, steps=200)
    scale = np.sqrt(1 + 0.03**2)

    def root_loss(flat):
        at = flat.reshape(12, 2)
        length = np.linalg.norm(shift.numpy() - at[edges.moving] + at[edges.reference], axis=1) / scale
        return np.sqrt(np.where(length <= 1, length**2, 2 * length - 1))

    best = least_squares(root_loss, position.numpy().flatten(), xtol=1e-14, ftol=1e-14, gtol=1e-12).x
    best = best.reshape(12, 2)
    np.testing.assert_allclose(found.position, best - np.median(best, 0), atol=2e-3)


def test_pairs_that_lie_do_not_pull():
    position, edges = normal(40, 2), ring_and_chords(40, 6)
    shift = said(edges, position, noise=0.01)
    wrong = torch.arange(240) % 6 == 0
    shift[wrong] += 3 * normal(40, 2, seed=8)
    found = solve_positions(shift, torch.full((240,), 0.01), edges.distinct, edges, 40)
    error = found.position - position
    error = (error - error.median(0).values).norm(dim=-1)
    plain = np.linalg.norm(3 * normal(40, 2, seed=8).numpy(), axis=1).mean() / 12
    assert error.quantile(0.95) < 0.03 < plain
    assert found.weight[wrong].mean() < 0.1 < 0.5 < found.weight[~wrong].mean()


def test_long_series_by_conjugate_gradients(monkeypatch):
    position, edges = normal(300, 2), ring_and_chords(300, 4)
    shift, sigma = said(edges, position, noise=0.02), 0.01 + 0.3 * normal(1200, seed=4).abs() ** 3
    usable = (edges.moving != 7) & (edges.reference != 7)  # one hangs on none
    dense = solve_positions(shift, sigma, usable, edges, 300)
    for limit in ("_DENSE", "_DENSE_VARIANCE"):
        monkeypatch.setattr(network, limit, 5)
    monkeypatch.setattr(network, "_laplacian", None)  # no matrix of all with all
    found = solve_positions(shift, sigma, usable, edges, 300)
    torch.testing.assert_close(found.position, dense.position, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.closure, dense.closure, atol=1e-6, rtol=0)
    assert torch.equal(found.connected, dense.connected)
    assert found.connected.sum() == 299
    position, edges = normal(7, 2), ring_and_chords(7, 2)
    shift = said(edges, position, 0.001).requires_grad_()

    def solve(shift):
        return solve_positions(shift, torch.full((14,), 0.05), edges.distinct, edges, 7).position

    torch.autograd.gradcheck(solve, shift)


def test_variances_of_very_long_series(monkeypatch):
    orders = [torch.randperm(400, generator=torch.Generator().manual_seed(ring)) for ring in range(6)]
    moving, reference = (torch.cat([order.roll(by) for order in orders]) for by in (0, -1))
    edges = Edges(moving, reference, torch.ones(2400, dtype=torch.bool))
    sigma = 0.01 + 0.3 * normal(2400, seed=4).abs() ** 3
    found = solve_positions(said(edges, normal(400, 2)), sigma, edges.distinct, edges, 400)
    exact = position_variance(found, edges)
    monkeypatch.setattr(network, "_DENSE_VARIANCE", 5)
    monkeypatch.setattr(network, "_laplacian", None)
    ratio = (position_variance(found, edges) / exact).log()
    assert ratio.mean().abs() < 0.03
    assert ratio.std() < 0.2


def test_a_long_chain_is_solved_to_its_end(monkeypatch):
    monkeypatch.setattr(network, "_DENSE", 5)
    number = torch.arange(1500)
    edges = Edges(number[1:], number[:-1], torch.ones(1499, dtype=torch.bool))
    position = normal(1500, 2)
    found = solve_positions(said(edges, position), torch.full((1499,), 0.05), edges.distinct, edges, 1500)
    error = (found.position - position)[1:-1]  # but for the ends, which hang on one pair
    assert (error - error.median(0).values).abs().max() < 1e-4


def test_variances_where_all_frames_are_in_place(monkeypatch):
    edges = ring_and_chords(300, 6)
    found = solve_positions(torch.zeros(1800, 2), torch.full((1800,), 0.05), edges.distinct, edges, 300)
    exact = position_variance(found, edges)
    monkeypatch.setattr(network, "_DENSE_VARIANCE", 5)
    ratio = position_variance(found, edges) / exact
    assert 0.8 < ratio.mean() < 1.25


def test_who_does_not_hang_together_is_not_connected():
    edges = Edges(
        torch.tensor([1, 2, 3, 0, 2, 5, 6, 7]),
        torch.tensor([0, 1, 2, 3, 0, 4, 5, 0]),  # 0-3, 4-6, and 7 by one pair
        torch.ones(8, dtype=torch.bool),
    )
    found = solve_positions(said(edges, normal(9, 2)), torch.full((8,), 0.1), edges.distinct, edges, 9)
    assert found.connected.tolist() == [True] * 4 + [False] * 5
    assert (found.position[4:] == 0).all()
    assert found.component.tolist() == [0, 0, 0, 0, 4, 4, 4, 0, 8]
    assert position_variance(found, edges).isfinite().all()


def test_a_batch_is_its_members_and_nan_is_no_pair():
    position, edges = normal(10, 2), ring_and_chords(10)
    shift = torch.stack([said(edges, position, 0.02), said(edges, position, 0.02, seed=7)])
    sigma = torch.full((2, 30), 0.02)
    shift[1, 3], sigma[1, 4] = torch.nan, torch.inf
    both = solve_positions(shift, sigma, edges.distinct.expand(2, 30), edges, 10)
    for one in range(2):
        alone = solve_positions(shift[one], sigma[one], edges.distinct, edges, 10)
        for together, single in zip(both, alone, strict=True):
            torch.testing.assert_close(together[one], single)
    assert both.position.isfinite().all()
    assert both.weight[1, 3:5].tolist() == [0, 0]


def test_positions_are_differentiable_by_what_pairs_say():
    position, edges = normal(7, 2), ring_and_chords(7, 2)
    shift = said(edges, position, 0.001).requires_grad_()

    def solve(shift):
        return solve_positions(shift, torch.full((14,), 0.05), edges.distinct, edges, 7).position

    torch.autograd.gradcheck(solve, shift)


def test_new_frames_lie_where_the_old_ones_say():
    truth = normal(6, 1, 2)
    shift = truth + 0.01 * normal(6, 12, 2, seed=2)
    shift[:, :3] += 5
    usable = torch.ones(6, 12, dtype=torch.bool)
    usable[5] = False
    position, variance, closure, support = place_frames(shift, torch.full((6, 12), 0.01), usable)
    assert (position - truth[:, 0])[:5].norm(dim=-1).max() < 0.05
    assert (support[:5] > 8.5).all()
    assert position[5].tolist() == [0, 0]
    assert support[5] == 0
    assert (variance[:5] > 0).all()
    assert closure.isfinite().all()


# ---------------------------------------------------------------------------------------------------- the sun


def test_shadows_point_away_from_the_sun():
    # at 45° a shadow is as long as its object is high; x is right, y is down, north is up
    found = shadow_direction(
        torch.tensor([[45.0, 180.0], [45.0, 90.0], [45.0, 0.0], [-5.0, 0.0], [30.0, 135.0]])
    )
    expected = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found[:3], expected, atol=1e-6, rtol=0)
    assert found[3].isnan().all()
    root = np.sqrt(3 / 2)  # cot 30° in both axes
    torch.testing.assert_close(found[4], torch.tensor([-root, -root], dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_slope_is_that_of_least_squares_and_forgives_outliers():
    direction = normal(60, 2)
    position = 3.0 + 0.4 * direction + 0.05 * normal(60, 2, seed=1)
    usable = torch.ones(60, dtype=torch.bool)
    slope, sigma = fit_slope(position, direction, usable, steps=1)
    centred, along = position - position.mean(0), direction - direction.mean(0)
    expected = float((centred * along).sum() / along.square().sum())
    assert float(slope) == pytest.approx(expected)
    assert float(sigma) == pytest.approx(0.05 / np.sqrt(float(along.square().sum())), rel=0.2)
    position[::6] += 9
    assert float(fit_slope(position, direction, usable)[0]) == pytest.approx(0.4, abs=0.1)
    usable[::6] = False
    position[::6] = torch.nan
    assert float(fit_slope(position, direction, usable)[0]) == pytest.approx(0.4, abs=0.03)


def as_positions(position):
    some = torch.zeros(position.shape[:-1], dtype=torch.float64)
    connected = torch.ones(position.shape[:-1], dtype=torch.bool)
    return Positions(position, some, some, some, some, some, connected.long(), connected)


def test_phenology_knows_no_direction():
    # blocks drift with the year as strongly as relief makes them, but across the shadow, too
    sun = torch.stack([25 + 35 * (torch.arange(48.0) / 4).sin().abs(), torch.full((48,), 160.0)], -1)
    direction = shadow_direction(sun)
    drift = direction.norm(dim=-1)[:, None] * 0.1 * normal(9, 1, 2, seed=6)
    blocks, still = drift + 0.01 * normal(9, 48, 2), torch.zeros(48, 2, dtype=torch.float64)
    term = season_term(as_positions(still), as_positions(blocks), torch.full((9, 48), 0.01**2), direction)
    assert float(term.significance) > 6
    assert not bool(term.present)
    assert float(term.slope) == 0


@pytest.mark.parametrize("relief", [0.0, 0.3])
def test_blocks_tell_relief_from_frames_that_were_displaced_along_the_shadow(relief):
    sun = torch.stack([25 + 35 * (torch.arange(48.0) / 4).sin().abs(), torch.full((48,), 160.0)], -1)
    direction = shadow_direction(sun)
    displaced = 0.3 * normal(48, 2) - 0.2 * direction * (relief == 0)  # by chance, on flat ground
    share = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None, None]
    blocks = displaced - relief * share * direction + 0.02 * normal(9, 48, 2, seed=3)
    whole = displaced - relief * 0.5 * direction
    term = season_term(as_positions(whole), as_positions(blocks), torch.full((9, 48), 0.02**2), direction)
    if relief == 0:
        assert not bool(term.present)
        assert float(term.slope) == 0
        assert float(term.spread.max()) < 0.03
        return
    assert bool(term.present)
    assert float(term.slope) == pytest.approx(-0.15, abs=2 * float(term.sigma))
    assert 0.01 < float(term.sigma) < 0.08
    unknown = season_term(as_positions(whole), as_positions(blocks), torch.full((9, 48), 0.02**2), None)
    assert float(unknown.slope) == 0
    torch.testing.assert_close(unknown.spread, term.spread)


def test_scores_are_of_aligned_frames():
    scene = torch.nn.functional.avg_pool2d(normal(1, 200, 200).float(), 7, 1)[0]
    frames = torch.stack(
        [scene[20 + i : 148 + i, 20 - i : 148 - i] for i in (-2, 0, 2)] + [scene[60:188, 60:188]]
    )
    accepted = torch.tensor([True, True, True, False])
    shift = torch.tensor([[2.0, -2.0], [0.0, 0.0], [-2.0, 2.0], [0.0, 0.0]])
    after, before = consensus_scores(extract_texture(frames), shift, accepted, size=(128, 128))
    assert (after[:3] > 0.98).all()
    assert (before[[0, 2]] < 0.6).all()
    assert after[3].abs() < 0.3
    assert torch.equal(after[3], before[3])
