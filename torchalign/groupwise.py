"""Groupwise: a series without a reference, every frame placed by its pairs with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchalign._check import (
    check_cube,
    check_device,
    check_floating,
    check_kind,
    check_mask,
    check_option,
    check_whole,
    message,
)
from torchalign._host import is_on_host, map_on_host
from torchalign.aligner import Aligner, full_precision
from torchalign.functional import network
from torchalign.functional.affine import translation_warp
from torchalign.functional.defects import enlargement
from torchalign.functional.network import Edges, Positions, SeasonTerm, median_of, sum_of_pairs
from torchalign.functional.texture import Texture, extract_texture
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.functional.warp import resample
from torchalign.local import Local
from torchalign.pcc import PCC
from torchalign.types import Alignment, Estimate, Fields, Status, combine, each_field

__all__ = ["Frames", "Groupwise", "Season", "Solution"]

Season = Literal["report", "correct", "none"]

# Pairs that agree less than this count only where nothing else ties a frame to the series.
_LEAST_AGREEMENT = 0.4

# Of pairs that have nothing in common, in pixels: measured on simulated seasons, relief and change.
_DISAGREEMENT = 0.3
# Blocks a side that disagree about the sun's part, and the fewest pixels of one; their pairs may be less sure.
_BLOCKS, _BLOCK_PIXELS, _BLOCK_SIGMA = 3, 48, 0.5
# Eager CPU: pixels of the frames of which the pairs of one batch are.
_BATCH_PIXELS = 2**21
# A block whose field has less than this mean square, or whose weights this mean, shows nothing.
_FLAT_BLOCK, _EMPTY_BLOCK = 1e-4, 0.1


class Frames(NamedTuple):
    """What is kept of the frames of a series once they have been seen."""

    texture: Texture  #: of T frames, what pairs are compared by: (T, h, w)
    size: tuple[int, int]  #: (H, W), of the frames that were seen, in pixels
    #: (T,) int64, by which a frame was enlarged before it came here: 1 if it was not, or if nobody looked
    factor: Tensor
    cube: Tensor | None = None  #: (T, C, H, W), for aligners that compare pixels; ``None`` where textures do
    mask: Tensor | None = None  #: (T, H, W), likewise


class Solution(NamedTuple):
    """What :meth:`Groupwise.solve` finds, one row a frame.

    Attributes:
        estimate: the :class:`~torchalign.types.Estimate`.
        closure: (..., T), root mean square per axis of what the frame's pairs say less what the positions say, in
            pixels: how well its pairs agree. No accuracy: an error that all its pairs share closes.
        support: (..., T), the summed weight of the frame's pairs, each at most 1.
        sigma_season: (..., T), what of ``sigma`` comes from the sun and from parts of the frame that disagree, in
            pixels.
        season_shift: (..., T, 2), the shift (x, y) that the sun's place explains, in pixels: removed by
            ``season="correct"``, and only reported by ``"report"``. 0 where there is none, or none is known.
        moving, reference, weight, residual: (..., E), the pairs: which two frames, what the pair counts in [0, 1],
            and the length in pixels of what it says less what the positions say.
    """

    estimate: Estimate
    closure: Tensor
    support: Tensor
    sigma_season: Tensor
    season_shift: Tensor
    moving: Tensor
    reference: Tensor
    weight: Tensor
    residual: Tensor


class _Said(NamedTuple):
    """The results of pairs."""

    shift: Tensor  # (..., E, 2), moving → reference
    sigma: Tensor  # (..., E)
    usable: Tensor  # (..., E)
    agreement: Tensor  # (..., E), in [0, 1]
    ambiguous: Tensor  # (..., E), more than one place fits


class Groupwise(nn.Module):
    r"""Align a whole series without a reference.

    A reference decides for all: a median of mixed seasons is displaced by phenology alone, one frame looks like its
    own season only. Here each frame is compared with the frames that look most like it, and with a few drawn at
    random (from the frames themselves: their order does not matter); all positions follow from all pairs by robust
    least squares, see :mod:`torchalign.functional.network`. Where frames lie in common is not defined by that: the
    median of all positions is at 0.

    What a network sees, and what it does not: a pair that is wrong contradicts the others, and counts little. An
    error that belongs to the frame does not: shading and cast shadows move with the sun, a frame seems displaced to
    each other frame alike, and every triangle closes. ``closure`` is therefore no accuracy. Parts of the frame,
    though, differ in relief and disagree about it. From 3 × 3 blocks (2 × 2 of small frames, none below 96 pixels)
    ``sigma`` learns how much; and where ``sun`` is given, how far the frame as a whole follows the shadow.

    Only translations: what is solved is a graph of differences. The same network can carry richer motions, if
    positions become warps, differences their logarithms (all affine parameters about the frame's centre), and each
    pair has a covariance of all of them; that is not built.

    Args:
        aligner: what compares two frames, of a motion that is a translation. :class:`~torchalign.PCC` compares
            kept textures, at a fraction of its usual cost; any other compares all pairs of frames anew.
            Its ``max_translation`` bounds every pair, and how far a frame may lie from the median of all.
        neighbours: how many of the most similar frames each is compared with.
        links: how many rings through all frames, in an order drawn from them, are compared besides. They tie
            seasons together; without them each season may lie elsewhere.
        season: what is done about the sun's part: ``"report"`` (default) tells it and widens ``sigma`` by it,
            ``"correct"`` removes it where blocks and frames agree that it is there, ``"none"`` does not look.

    Status: ``NO_TEXTURE`` for flat, empty or wholly masked frames; ``NOT_CONNECTED`` for frames that less than two
    consistent pairs tie to the largest group of frames (foreign ones, overcast ones); ``AMBIGUOUS`` instead where
    half of the pairs fit more than one place (stripes; frames that were all enlarged by one factor k, whose pixel
    grid fits itself: give every k-th pixel, ``cube[..., ::k, ::k]``); ``TOO_FAR``. ``score`` and
    ``score_before`` are correlations with the mean of all other accepted frames, aligned; of textures.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range or unknown, or the aligner's motion is no translation.

    References:
        see :mod:`torchalign.functional.network`.

    Example:
        >>> import torchalign as ta
        >>> scene = torch.rand(1, 160, 160, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 9, 1, 4)
        >>> cube = torch.stack([scene[:, 16 + i : 144 + i, 16 - i : 144 - i] for i in range(5)])
        >>> aligned, estimate = ta.Groupwise(ta.PCC())(cube)
        >>> estimate.warp[:, :, 2].round(decimals=1).tolist()
        [[2.0, -2.0], [1.0, -1.0], [0.0, 0.0], [-1.0, 1.0], [-2.0, 2.0]]
    """

    def __init__(
        self, aligner: Aligner, *, neighbours: int = 6, links: int = 6, season: Season = "report"
    ) -> None:
        super().__init__()
        cure = "make an instance, for example torchalign.PCC()"
        check_kind("aligner", aligner, Aligner, "an aligner", cure, optional=False)
        motions = {part.motion for part in aligner.modules() if isinstance(part, Aligner)}
        if motions != {"translation"} or any(isinstance(part, Local) for part in aligner.modules()):
            got = ", ".join(sorted(motions)) if motions != {"translation"} else "Local"
            cure = 'give one with motion="translation", for example torchalign.PCC()'
            raise ValueError(message("aligner", "a motion that is a translation", got, cure))
        self.aligner = aligner
        self.neighbours = check_whole("neighbours", neighbours, minimum=1)
        self.links = check_whole("links", links, minimum=0)
        self.season = check_option("season", season, Season)

    def forward(self, cube: Tensor, mask: Tensor | None = None, sun: Tensor | None = None) -> Alignment:
        """Align every frame with all others; arguments and errors as in :meth:`solve`.

        Returns:
            ``Alignment(aligned, estimate)``: all bands resampled once, in the cube's dtype; frames that were not
            accepted come back bit for bit.
        """
        estimate = self.estimate(cube, mask, sun)
        with full_precision(cube):
            mask = None if mask is None else mask.expand(*cube.shape[:-3], *cube.shape[-2:])
            # known to be shifts, without asking for their numbers
            shift = estimate.warp[..., 2]
            aligned = resample(cube, shift, mask=mask, **self.aligner._resampling()).values
        if self.aligner.fill_value is not None:
            aligned = torch.where(estimate.valid[..., None, None, None], aligned, cube)
        return Alignment(aligned, estimate)

    def estimate(self, cube: Tensor, mask: Tensor | None = None, sun: Tensor | None = None) -> Estimate:
        """:meth:`solve`'s estimate alone."""
        return self.solve(cube, mask, sun).estimate

    def solve(self, cube: Tensor, mask: Tensor | None = None, sun: Tensor | None = None) -> Solution:
        """Place the frames of one series, or of several.

        Args:
            cube: (..., T, C, H, W), floating.
            mask: bool, broadcastable to (..., T, H, W), True = usable. NaN and ±inf are unusable without it.
            sun: (T, 2) or (..., T, 2), floating: elevation and azimuth of the sun in degrees, the latter clockwise
                from the image's up; NaN where unknown. Needed for ``season="correct"``.

        Returns:
            :class:`Solution`.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: a shape or a device does not fit, or ``sun`` is missing.
        """
        check_cube(cube)
        batch, size = cube.shape[:-3], cube.shape[-2:]
        mask = check_mask("mask", mask, (*batch, *size), cube)
        if mask is not None:
            mask = mask.expand(*batch, *size)
        sun = self._check_sun(sun, cube)
        if len(batch) == 1:
            return self.place(self.see(cube, mask), sun)
        parts = [
            [None] * math.prod(batch[:-1]) if part is None else part.flatten(0, len(batch) - 2)
            for part in (cube, mask, sun)
        ]
        series = [self.place(self.see(one, seen), place) for one, seen, place in zip(*parts, strict=True)]
        if not series:  # the rows of one, of none
            one = self.place(self.see(cube.new_zeros(cube.shape[-4:])))
            return each_field(one, lambda rows: rows.new_empty((*batch[:-1], *rows.shape)))
        return _stack(series, batch[:-1])

    def see(self, cube: Tensor, mask: Tensor | None = None) -> Frames:
        """Extract what placing frames needs, once; frames may be seen a few at a time.

        Args:
            cube: (T, C, H, W).
            mask: (T, H, W) bool, or ``None``.

        Returns:
            :class:`Frames`, whose tensors of several parts may be joined along T by :meth:`join`.
        """
        with full_precision(cube):
            seen, usable = self.aligner._extract_channel(cube, mask)
            size = (seen.shape[-2], seen.shape[-1])
            if self.keeps_textures:
                texture = self.aligner.prepare_reference(seen, usable)
                return Frames(texture, size, enlargement(seen, usable))
            factor = torch.ones_like(seen[:, 0, 0], dtype=torch.int64)  # the aligner looks itself
            return Frames(extract_texture(seen, usable), size, factor, cube, mask)

    @staticmethod
    def join(parts: list[Frames]) -> Frames:
        """The frames of all parts."""
        if len(parts) == 1:
            return parts[0]

        def masked(part: Frames) -> Frames:
            """As if there were a mask, of what is all usable."""
            texture, mask = part.texture, part.mask
            if texture.weights is None:
                ones = torch.ones_like(texture.field)
                texture = texture._replace(weights=ones, cover=ones)
            if mask is None and part.cube is not None:
                mask = torch.ones_like(part.cube[:, 0], dtype=torch.bool)
            return part._replace(texture=texture, mask=mask)

        if any(part.texture.weights is not None or part.mask is not None for part in parts):
            parts = [masked(part) for part in parts]
        return combine(torch.cat, parts)

    def place(self, frames: Frames, sun: Tensor | None = None) -> Solution:
        """Place frames that have been seen.

        Args:
            frames: T of them, of :meth:`see`.
            sun: (T, 2), as in :meth:`solve`.

        Returns:
            :class:`Solution`.
        """
        count, dtype = frames.texture.field.shape[0], frames.texture.field.dtype
        edges, said = self._compare(frames)
        positions = network.solve_positions(said.shift, said.sigma, said.usable, edges, count)
        position, connected = positions.position, positions.connected
        variance = network.position_variance(positions, edges) + _own_variance(said, positions, edges, count)
        direction = None if sun is None else network.shadow_direction(sun)
        term = self._find_season(frames, edges, positions, direction)
        season, widened = torch.zeros_like(position), torch.zeros_like(variance)
        if term is not None:
            widened = term.spread.square() / term.blocks.clamp(min=1)
        covariance = isotropic((variance + widened).sqrt())
        if term is not None and direction is not None:
            along = direction - median_of(direction, connected)
            along = torch.where(along.isfinite(), along, 0.0)
            season = term.slope * along
            kept = torch.hypot(term.sigma, term.slope)
            if self.season == "correct":
                position, kept = position - season, term.sigma
                gauge = median_of(position.detach(), connected)
                position = torch.where(connected[:, None], position - gauge, 0.0)
            spread = (kept * along)[:, :, None]
            covariance = covariance + spread * spread.mT
            widened = widened + (kept * along).square().sum(-1)

        pairs = torch.stack([edges.distinct, said.ambiguous & edges.distinct]).double()
        pairs, unclear = sum_of_pairs(edges, pairs, count)
        ambiguous = (unclear > 0) & (2 * unclear >= pairs)
        status = self._status(position, connected, ambiguous, frames.texture.flat)
        estimate = self._conclude(frames, position, covariance, status)
        of_frames = (positions.closure, positions.support, widened.sqrt(), season)
        of_frames = each_field(of_frames, lambda values: values.to(dtype))
        weight, residual = positions.weight.to(dtype), positions.residual.to(dtype)
        return Solution(estimate, *of_frames, edges.moving, edges.reference, weight, residual)

    @property
    def keeps_textures(self) -> bool:
        """Whether frames are seen once, and pairs compared by little of them; else by all their pixels."""
        return type(self.aligner) is PCC and self.aligner.contrast != "structure"  # vectors are not kept

    def extend(
        self, new: Frames, archive: Frames, shift: Tensor, sigma: Tensor, accepted: Tensor
    ) -> Solution:
        """Place new frames on old ones, which stay where they are: each on its own, by those most like it.

        Args:
            new: N frames, of :meth:`see`.
            archive: T frames.
            shift: (T, 2), where the old frames lie, in pixels.
            sigma: (T,), their 1-σ errors, in pixels.
            accepted: (T,) bool, those that count.

        Returns:
            :class:`Solution` of the N new frames; their ``reference`` are numbers of old ones.
        """
        count, old = new.texture.flat.shape[0], archive.texture.flat.shape[0]
        near = min(2 * self.neighbours, old)
        both = self.join([archive, new])
        with torch.no_grad():
            cells = (network.cell_contrast(*part.texture[:2]) for part in (new, archive))
            likeness = network.similarity(*next(cells), next(cells))
            chosen = likeness.masked_fill(~accepted, -2.0).topk(near, -1).indices  # (N, near)
        reference = chosen.flatten()
        moving = torch.arange(count, device=reference.device).repeat_interleave(near)
        edges = Edges(moving + old, reference, torch.ones_like(moving, dtype=torch.bool))
        said = each_field(self._ask(both, edges), lambda values: values.view(count, near, *values.shape[1:]))
        usable = said.usable & accepted[chosen] & (said.agreement >= _LEAST_AGREEMENT)
        told = said.shift + shift[chosen].to(said.shift)
        position, variance, closure, support = network.place_frames(told, said.sigma, usable)
        share = usable / usable.sum(-1, keepdim=True).clamp(min=1)
        variance = variance + (share * torch.where(accepted, sigma, 0.0)[chosen].square()).sum(-1)
        connected = support >= min(2.0, max(near, 1)) - 1e-6
        ambiguous = 2 * said.ambiguous.sum(-1) >= max(near, 1)
        status = self._status(position, connected, ambiguous, new.texture.flat)
        known_places = torch.where(accepted[:, None], shift, 0.0), accepted
        estimate = self._conclude(both, position, isotropic(variance.sqrt()), status, known_places)
        dtype = new.texture.field.dtype
        residual = (told - position[:, None].to(told)).norm(dim=-1).flatten()
        none = torch.zeros_like(position, dtype=dtype)
        rest = (closure.to(dtype), support.to(dtype), none[:, 0], none)
        return Solution(estimate, *rest, moving, reference, usable.flatten().to(dtype), residual)

    def _status(self, position: Tensor, connected: Tensor, ambiguous: Tensor, flat: Tensor) -> Tensor:
        """(T,), of frames that hang on others or do not, half of whose pairs are ambiguous, that show nothing."""
        far = position.norm(dim=-1) > self.aligner.max_translation
        status = torch.where(ambiguous, int(Status.AMBIGUOUS), int(Status.NOT_CONNECTED))
        status = torch.where(connected, torch.where(far, int(Status.TOO_FAR), 0), status)
        return torch.where(flat, int(Status.NO_TEXTURE), status)

    def _compare(self, frames: Frames) -> tuple[Edges, _Said]:
        count = frames.texture.field.shape[0]
        edges = self._choose(frames)
        said = self._ask(frames, edges)
        usable = said.usable & edges.distinct
        usable = usable & ((said.agreement >= _LEAST_AGREEMENT) | _in_tree(said, usable, edges, count))
        return edges, said._replace(usable=usable)

    def _choose(self, frames: Frames) -> Edges:
        """The pairs to compare; where numbers may be read, those that need no comparing are left out."""
        field, weights, flat = frames.texture[:3]
        with torch.no_grad():
            features, shown = network.cell_contrast(field, weights)
            keys = network.frame_keys(features, shown, 1 + self.links)
            likeness = network.similarity(features, shown).masked_fill(flat[:, None] | flat, -1.0)
            edges = network.choose_edges(likeness, keys, neighbours=self.neighbours, empty=flat)
            distinct = edges.distinct & ~flat[edges.moving] & ~flat[edges.reference]
            if not is_on_host(field.detach()):
                return edges._replace(distinct=distinct)
            kept = distinct.nonzero().squeeze(-1)
            return each_field(edges._replace(distinct=distinct), lambda end: end[kept])

    @property
    def _correlator(self) -> PCC:
        """What compares textures: the aligner, or what is like it."""
        aligner: Any = self.aligner
        return aligner if self.keeps_textures else PCC(max_translation=aligner.max_translation)

    def _ask(self, frames: Frames, edges: Edges) -> _Said:
        """The aligner's result for every pair."""
        return self._in_batches(
            self._ask_textures if self.keeps_textures else self._ask_pixels, edges, frames
        )

    def _ask_textures(self, part: Edges, frames: Frames) -> _Said:
        moving, reference = (_taken(frames.texture, end) for end in part[:2])
        correlator = self._correlator
        said = _correlate_pairs(moving, reference, frames.size, correlator, correlator.max_sigma)
        # a pattern of the pixel grid that both show fits itself at no motion
        own, other = (frames.factor[end] for end in part[:2])
        patterned = (own == other) & (own > 1)
        ambiguous = said.ambiguous | (patterned & ~moving.flat)
        return said._replace(usable=said.usable & ~patterned, ambiguous=ambiguous)

    def _ask_pixels(self, part: Edges, frames: Frames) -> _Said:
        assert frames.cube is not None  # see() keeps it for aligners that are no PCC
        masks = (None, None) if frames.mask is None else (frames.mask[end] for end in part[:2])
        found = self.aligner.estimate(*(frames.cube[end] for end in part[:2]), *masks)
        score = found.score.detach().clamp(0, 1)
        ambiguous = found.status == int(Status.AMBIGUOUS)
        return _Said(found.warp[..., 2], _widen(found.sigma, score), found.valid, score, ambiguous)

    def _in_batches(self, ask: Callable[[Edges, Frames], _Said], edges: Edges, frames: Frames) -> _Said:
        """On the CPU's cores, a few pairs at a time; all at once elsewhere."""
        count = edges.moving.shape[0]
        if not is_on_host(frames.texture.field) or count == 0:
            return ask(edges, frames)
        step = max(1, _BATCH_PIXELS // math.prod(frames.size))
        batches = [_taken(edges, slice(first, first + step)) for first in range(0, count, step)]
        return combine(torch.cat, map_on_host(lambda part: ask(part, frames), batches))

    def _ask_blocks(self, part: Edges, frames: Frames) -> _Said:
        """For every pair of frames, each of their parts' result: (E, B)."""
        side = _blocks_aside(frames.size)
        moving, reference = (_in_blocks(_taken(frames.texture, end), side) for end in part[:2])
        samples = frames.texture.field.shape[-2:]
        # of a part, which need be no whole number of pixels: the working grid takes it, its type does not say so
        size: Any = tuple(
            length // side * pixels / length for length, pixels in zip(samples, frames.size, strict=True)
        )
        return _correlate_pairs(moving, reference, size, self._correlator, _BLOCK_SIGMA)

    def _find_season(
        self, frames: Frames, edges: Edges, positions: Positions, direction: Tensor | None
    ) -> SeasonTerm | None:
        """The season term from parts of the frames; none where it is not asked for, or frames are small."""
        count = positions.position.shape[-2]
        if self.season == "none" or _blocks_aside(frames.size) < 2 or count == 0:
            return None
        with torch.no_grad():
            said = self._in_batches(self._ask_blocks, edges, frames)
            said = each_field(said, lambda field: field.transpose(0, 1))  # (B, E)
            usable = said.usable & edges.distinct
            blocks = network.solve_positions(said.shift, said.sigma, usable, edges, count)
            variance = _own_variance(said, blocks, edges, count)
            return network.season_term(positions, blocks, variance, direction)

    def _conclude(
        self,
        frames: Frames,
        position: Tensor,
        covariance: Tensor,
        status: Tensor,
        before_them: tuple[Tensor, Tensor] | None = None,
    ) -> Estimate:
        """The gate on the last N of the frames; those before them lie where they are, if they are accepted."""
        count, dtype = len(status), frames.texture.field.dtype
        shift = torch.where((status == 0)[:, None], position, 0.0).to(dtype)
        places, accepted = shift.detach(), status == 0
        if before_them is not None:
            places = torch.cat([before_them[0].to(dtype), places])
            accepted = torch.cat([before_them[1], accepted])
        scores = network.consensus_scores(
            frames.texture,
            places,
            accepted,
            size=frames.size,
            max_frequency=self._correlator.max_frequency,
            reach=self.aligner.max_translation,
        )
        after, before = (score[len(score) - count :] for score in scores)
        if self.aligner.min_score is not None:
            low = (status == 0) & (after < self.aligner.min_score)
            status = torch.where(low, int(Status.LOW_SCORE), status)
            shift, after = torch.where(low[:, None], 0.0, shift), torch.where(low, before, after)
        accepted = status == 0
        sigma = torch.where(accepted, largest_sigma(covariance).to(dtype), torch.inf)
        covariance = torch.where(accepted[:, None, None], covariance.to(dtype), isotropic(sigma))
        stage = torch.where(accepted, 0, -1)
        return Estimate(translation_warp(shift), after, before, sigma, covariance, status, stage)

    def _check_sun(self, sun: Tensor | None, cube: Tensor) -> Tensor | None:
        """(..., T, 2), or ``None``."""
        shape = "(..., T, 2), elevation and azimuth in degrees"
        if sun is None:
            if self.season == "correct":
                expected = f'a floating tensor {shape}, for season="correct"'
                raise ValueError(message("sun", expected, "None", 'give it, or season="report"'))
            return None
        check_floating("sun", sun, shape, "convert it with torch.as_tensor(sun).float()")
        check_device("sun", sun, cube)
        batch = cube.shape[:-3]
        if tuple(sun.shape) not in {(*batch, 2), (batch[-1], 2)}:
            raise ValueError(message("sun", f"shape {(*batch, 2)}", tuple(sun.shape), "one row per frame"))
        return sun.expand(*batch, 2)

    def extra_repr(self) -> str:
        """The options, as they are written in the constructor."""
        return f"neighbours={self.neighbours}, links={self.links}, season={self.season!r}"


def _taken(parts: Fields, rows: Tensor | slice) -> Fields:
    return each_field(parts, lambda part: part[rows])


def _blocks_aside(size: tuple[int, int]) -> int:
    return min(_BLOCKS, *(length // _BLOCK_PIXELS for length in size))


def _in_blocks(texture: Texture, side: int) -> Texture:
    """(T, h, w) → (T, side², h // side, w // side): parts of the frames."""

    def cut(values: Tensor) -> Tensor:
        rows, columns = (length // side for length in values.shape[-2:])
        parts = values[:, : rows * side, : columns * side].reshape(-1, side, rows, side, columns)
        return parts.transpose(2, 3).flatten(1, 2)

    field, weights, flat = texture[:3]
    field, weights = cut(field), None if weights is None else cut(weights)
    empty = flat[:, None] | (field.square().mean((-2, -1)) <= _FLAT_BLOCK)
    if weights is not None:
        empty = empty | (weights.mean((-2, -1)) < _EMPTY_BLOCK)
    return Texture(field, weights, empty)


def _correlate_pairs(
    moving: Texture, reference: Texture, size: tuple[int, int], options: PCC, max_sigma: float
) -> _Said:
    found = options.correlate(moving, reference, size=size)
    usable = found.converged & ~found.outside & ~found.flat
    usable = usable & (found.shift.detach().norm(dim=-1) <= options.max_translation)
    ambiguous = usable & found.ambiguous
    usable = usable & (found.sigma <= max_sigma) & ~ambiguous
    agreement = torch.ones_like(found.sigma)
    if found.inliers is not None:  # a weight is the fourth power of the local correlation
        agreement = found.inliers.detach().mean((-2, -1)).clamp(0, 1).sqrt().sqrt()
    return _Said(found.shift, _widen(found.sigma, agreement), usable, agreement, ambiguous)


def _widen(sigma: Tensor, agreement: Tensor) -> Tensor:
    """Widen σ where two frames share little ground: the rest biases the shift, and σ does not include that."""
    return torch.hypot(sigma, _DISAGREEMENT * (1 - agreement).square())


def _in_tree(said: _Said, usable: Tensor, edges: Edges, frames: int) -> Tensor:
    """(E,) bool: pairs of the maximum spanning tree of the usable ones' agreement."""
    if frames == 0:
        return usable
    place = edges.moving * frames + edges.reference
    value = torch.where(usable, said.agreement.detach(), -2.0)
    table = torch.full((frames * frames,), -2.0, dtype=value.dtype, device=value.device)
    table = table.scatter_reduce(0, place, value, "amax").view(frames, frames)
    parent = network.spanning_tree(torch.maximum(table, table.mT))
    return (parent[edges.moving] == edges.reference) | (parent[edges.reference] == edges.moving)


def _own_variance(said: _Said, positions: Positions, edges: Edges, frames: int) -> Tensor:
    """(..., T): a frame's own part of its pairs' variances, half of their geometric mean."""
    weight = positions.weight.detach()
    logarithm = torch.where(weight > 0, said.sigma.detach(), 1.0).double().clamp(min=1e-6).log()
    total, mean = (sum_of_pairs(edges, values, frames) for values in (weight, weight * 2 * logarithm))
    return 0.5 * (mean / total.clamp(min=1e-9)).exp()


def _stack(series: list[Solution], batch: tuple[int, ...]) -> Solution:
    """One of all series, with the same number of pairs: pairs of weight 0 of the first frame with itself besides."""

    def stack(values: tuple[Tensor, ...]) -> Tensor:
        longest = max(map(len, values))
        rows = [torch.cat([one, one.new_zeros(longest - len(one), *one.shape[1:])]) for one in values]
        return torch.stack(rows).unflatten(0, batch)  # type: ignore[no-untyped-call]

    return combine(stack, series)
