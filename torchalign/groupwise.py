"""Groupwise: a series without a reference, every frame placed by its pairs with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchalign._check import check_cube, check_device, check_mask, check_option, check_whole, message
from torchalign._host import is_on_host, map_on_host
from torchalign.aligner import Aligner, full_precision
from torchalign.functional.affine import translation_warp
from torchalign.functional.defects import enlargement
from torchalign.functional.network import (
    Edges,
    Positions,
    SeasonTerm,
    cell_contrast,
    choose_edges,
    consensus_scores,
    frame_keys,
    place_frames,
    position_variance,
    season_term,
    shadow_direction,
    similarity,
    solve_positions,
    spanning_tree,
    sum_of_pairs,
)
from torchalign.functional.phase import phase_correlation
from torchalign.functional.smoothing import nanmedian
from torchalign.functional.texture import Texture, extract_texture
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.functional.warp import resample
from torchalign.local import Local
from torchalign.pcc import PCC
from torchalign.types import Alignment, Estimate, Status, combine

__all__ = ["Frames", "Groupwise", "Season", "Solution"]

Season = Literal["report", "correct", "none"]

# Pairs that agree less than this count only where nothing else ties a frame to the series.
_LEAST_AGREEMENT = 0.4
# Shorter frames, in pixels, are not asked whether they were enlarged.
_LEAST_ENLARGED = 32
# Of pairs that have nothing in common, in pixels: measured on simulated seasons, relief and change.
_DISAGREEMENT = 0.3
# Blocks a side that disagree about the sun's part, and the fewest pixels of one; their pairs may be less sure.
_BLOCKS, _BLOCK_PIXELS, _BLOCK_SIGMA = 3, 48, 0.5
# Eager CPU: pixels of the frames of which the pairs of one batch are.
_BATCH_PIXELS = 2**21
# A block whose field has less than this mean square, or whose weights this mean, shows nothing.
_FLAT_BLOCK, _EMPTY_BLOCK = 1e-4, 0.1


class Frames(NamedTuple):
    """What is kept of the frames of a series once they have been seen.

    Attributes:
        texture: of T frames, what pairs are compared by: (T, h, w).
        size: (H, W), of the frames that were seen, in pixels.
        factor: (T,) int64, by which a frame was enlarged before it came here: 1 if it was not, or if nobody looked.
        cube: (T, C, H, W) and
        mask: (T, H, W) or ``None``, for aligners that compare pixels; ``None`` where textures do.
    """

    texture: Texture
    size: tuple[int, int]
    factor: Tensor
    cube: Tensor | None = None
    mask: Tensor | None = None


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
        if not isinstance(cast("object", aligner), Aligner):
            got = f"{aligner!r} ({type(aligner).__name__})"
            raise TypeError(
                message("aligner", "an aligner", got, "make an instance, for example torchalign.PCC()")
            )
        motions = {part.motion for part in aligner.modules() if isinstance(part, Aligner)}
        if motions != {"translation"} or any(isinstance(part, Local) for part in aligner.modules()):
            got = ", ".join(sorted(motions)) if motions != {"translation"} else "Local"
            cure = 'give one with motion="translation", for example torchalign.PCC()'
            raise ValueError(message("aligner", "a motion that is a translation", got, cure))
        self.aligner = aligner
        self.neighbours = check_whole("neighbours", neighbours, minimum=1)
        self.links = check_whole("links", links, minimum=0)
        check_option("season", season, Season)
        self.season = season

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
        series = [
            self.place(self.see(one, seen), place)
            for one, seen, place in zip(
                cube.flatten(0, -5),
                [None] * math.prod(batch[:-1]) if mask is None else mask.flatten(0, -4),
                [None] * math.prod(batch[:-1]) if sun is None else sun.flatten(0, -3),
                strict=True,
            )
        ]
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
            if self._by_textures() is not None:
                factor = torch.ones_like(seen[:, 0, 0], dtype=torch.int64)
                if min(size) >= _LEAST_ENLARGED:
                    factor = enlargement(seen, usable)
                return Frames(self.aligner.prepare_reference(seen, usable), size, factor)
            factor = torch.ones_like(seen[:, 0, 0], dtype=torch.int64)  # the aligner looks itself
            return Frames(extract_texture(seen, usable), size, factor, cube, mask)

    @staticmethod
    def join(parts: list[Frames]) -> Frames:
        """The frames of all parts."""
        if len(parts) == 1:
            return parts[0]

        def joined(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
            if all(tensor is None for tensor in tensors):
                return None
            ones = [
                torch.ones_like(other) if one is None else one
                for one, other in zip(tensors, like, strict=True)
            ]
            return torch.cat(ones)

        textures = [part.texture for part in parts]
        fields = [texture.field for texture in textures]
        texture = textures[0]._replace(
            field=torch.cat(fields),
            weights=joined([texture.weights for texture in textures], fields),
            flat=torch.cat([texture.flat for texture in textures]),
            detail=joined([texture.detail for texture in textures], fields),
            cover=joined([texture.cover for texture in textures], fields),
        )
        factor = torch.cat([part.factor for part in parts])
        if parts[0].cube is None:
            return Frames(texture, parts[0].size, factor)
        cubes = [part.cube for part in parts if part.cube is not None]
        masks = [part.mask for part in parts]
        return Frames(
            texture,
            parts[0].size,
            factor,
            torch.cat(cubes),
            joined(masks, [torch.ones_like(cube[:, 0], dtype=torch.bool) for cube in cubes]),
        )

    def place(self, frames: Frames, sun: Tensor | None = None) -> Solution:
        """Place frames that have been seen.

        Args:
            frames: T of them, of :meth:`see`.
            sun: (T, 2), as in :meth:`solve`.

        Returns:
            :class:`Solution`.
        """
        count = frames.texture.field.shape[0]
        edges, said = self._compare(frames)
        usable = said.usable
        positions = solve_positions(said.shift, said.sigma, usable, edges, count)
        variance = position_variance(positions, edges) + _own_variance(said, positions, edges, count)
        direction = None if sun is None else shadow_direction(sun)
        term = self._find_season(frames, edges, positions, direction)
        pairs = torch.stack([edges.distinct, said.ambiguous & edges.distinct]).double()
        pairs, unclear = sum_of_pairs(edges, pairs, count)
        ambiguous = (unclear > 0) & (2 * unclear >= pairs)
        estimate, widened, season = self._judge(frames, positions, variance, term, direction, ambiguous)
        dtype = frames.texture.field.dtype
        weight, residual = positions.weight.to(dtype), positions.residual.to(dtype)
        of_frames = (positions.closure.to(dtype), positions.support.to(dtype), widened, season)
        return Solution(estimate, *of_frames, edges.moving, edges.reference, weight, residual)

    def _by_textures(self) -> PCC | None:
        """The aligner, if it compares textures that are made once (vectors of structure are not kept)."""
        aligner = self.aligner
        return aligner if type(aligner) is PCC and aligner.contrast != "structure" else None

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
            likeness = similarity(
                *cell_contrast(new.texture.field, new.texture.weights),
                cell_contrast(archive.texture.field, archive.texture.weights),
            )
            reference = likeness.masked_fill(~accepted, -2.0).topk(near, -1).indices.flatten()
        moving = torch.arange(count, device=reference.device).repeat_interleave(near)
        edges = Edges(moving + old, reference, torch.ones_like(moving, dtype=torch.bool))
        said = self._ask(both, edges)
        agreement = said.agreement.view(count, near)
        sure = (agreement >= _LEAST_AGREEMENT).flatten()
        usable = (said.usable & accepted[reference] & sure).view(count, near)
        told = (said.shift + shift[reference].to(said.shift)).view(count, near, 2)
        position, variance, closure, support = place_frames(told, said.sigma.view(count, near), usable)
        share = usable / usable.sum(-1, keepdim=True).clamp(min=1)
        known = torch.where(accepted, sigma, 0.0)[reference].view(count, near).square()
        variance = variance + (share * known).sum(-1)
        connected = support >= min(2.0, max(near, 1)) - 1e-6
        ambiguous = 2 * said.ambiguous.view(count, near).sum(-1) >= max(near, 1)
        status = self._status(position, connected, ambiguous, new.texture.flat)
        dtype = new.texture.field.dtype
        place = torch.where((status == 0)[:, None], position, 0.0).to(dtype)
        by_textures = self._by_textures()
        after, before = consensus_scores(
            both.texture,
            torch.cat([torch.where(accepted[:, None], shift, 0.0).to(dtype), place]),
            torch.cat([accepted, status == 0]),
            size=new.size,
            max_frequency=0.25 if by_textures is None else by_textures.max_frequency,
            reach=self.aligner.max_translation,
        )
        found = torch.where(status == 0, variance.sqrt().to(dtype), torch.inf)
        stage = torch.where(status == 0, 0, -1)
        scores = after[old:], before[old:]
        estimate = Estimate(translation_warp(place), *scores, found, isotropic(found), status, stage)
        residual = (told - position[:, None].to(told)).norm(dim=-1).flatten()
        none = torch.zeros_like(place)
        rest = (closure.to(dtype), support.to(dtype), none[:, 0], none)
        return Solution(estimate, *rest, moving, reference, usable.flatten().to(dtype), residual)

    def _status(self, position: Tensor, connected: Tensor, ambiguous: Tensor, flat: Tensor) -> Tensor:
        """(T,), of frames that hang on others or do not, half of whose pairs are ambiguous, that show nothing."""
        far = position.norm(dim=-1) > self.aligner.max_translation
        status = torch.where(ambiguous, int(Status.AMBIGUOUS), int(Status.NOT_CONNECTED))
        status = torch.where(connected, torch.where(far, int(Status.TOO_FAR), 0), status)
        return torch.where(flat, int(Status.NO_TEXTURE), status)

    def compare(self, frames: Frames) -> tuple[Edges, Tensor, Tensor, Tensor]:
        """The pairs alone, before anything is solved.

        Args:
            frames: T of them, of :meth:`see`.

        Returns:
            E pairs, their shifts (E, 2), moving → reference, σ (E,), both in pixels, and which of them count, (E,).
        """
        edges, said = self._compare(frames)
        return edges, said.shift, said.sigma, said.usable

    def _compare(self, frames: Frames) -> tuple[Edges, _Said]:
        count = frames.texture.field.shape[0]
        edges = self._choose(frames)
        said = self._ask(frames, edges)
        usable = said.usable & edges.distinct
        usable = usable & ((said.agreement >= _LEAST_AGREEMENT) | _in_tree(said, usable, edges, count))
        return edges, said._replace(usable=usable)

    @property
    def keeps_textures(self) -> bool:
        """Whether frames are seen once, and pairs compared by little of them; else by all their pixels."""
        return self._by_textures() is not None

    def _choose(self, frames: Frames) -> Edges:
        """The pairs to compare; where numbers may be read, those that need no comparing are left out."""
        field, weights, flat = frames.texture[:3]
        with torch.no_grad():
            features, shown = cell_contrast(field, weights)
            keys = frame_keys(features, shown, 1 + self.links)
            likeness = similarity(features, shown).masked_fill(flat[:, None] | flat, -1.0)
            edges = choose_edges(likeness, keys, neighbours=self.neighbours, empty=flat)
            distinct = edges.distinct & ~flat[edges.moving] & ~flat[edges.reference]
            if not is_on_host(field.detach()):
                return edges._replace(distinct=distinct)
            kept = distinct.nonzero().squeeze(-1)
            return Edges(edges.moving[kept], edges.reference[kept], distinct[kept])

    def _ask(self, frames: Frames, edges: Edges) -> _Said:
        """The aligner's result for every pair."""
        by_textures, aligner = self._by_textures(), self.aligner
        if by_textures is not None:

            def ask(part: Edges) -> _Said:
                ends = (part.moving, part.reference)
                moving, reference = (_pick(frames.texture, end) for end in ends)
                said = _correlate_pairs(moving, reference, frames.size, by_textures, by_textures.max_sigma)
                # a pattern of the pixel grid that both show fits itself at no motion
                own, other = (frames.factor[end] for end in ends)
                patterned = (own == other) & (own > 1)
                return said._replace(
                    usable=said.usable & ~patterned, ambiguous=said.ambiguous | (patterned & ~moving.flat)
                )

            return self._in_batches(ask, edges, frames)
        assert frames.cube is not None  # see() keeps it for aligners that are no PCC
        cube, mask = frames.cube, frames.mask

        def estimate(part: Edges) -> _Said:
            masks = (None, None) if mask is None else (mask[part.moving], mask[part.reference])
            found = aligner.estimate(cube[part.moving], cube[part.reference], *masks)
            score = found.score.detach().clamp(0, 1)
            ambiguous = found.status == int(Status.AMBIGUOUS)
            return _Said(found.warp[..., 2], _widen(found.sigma, score), found.valid, score, ambiguous)

        return self._in_batches(estimate, edges, frames)

    def _in_batches(self, ask: Callable[[Edges], _Said], edges: Edges, frames: Frames) -> _Said:
        """On the CPU's cores, a few pairs at a time; all at once elsewhere."""
        count = edges.moving.shape[0]
        if not is_on_host(frames.texture.field) or count == 0:
            return ask(edges)
        step = max(1, _BATCH_PIXELS // (frames.size[0] * frames.size[1]))
        batches = [
            Edges(*(field[first : first + step] for field in edges)) for first in range(0, count, step)
        ]
        said = map_on_host(ask, batches)
        return _Said(*(torch.cat(fields) for fields in zip(*said, strict=True)))

    def _find_season(
        self, frames: Frames, edges: Edges, positions: Positions, direction: Tensor | None
    ) -> SeasonTerm | None:
        """The season term from parts of the frames; none where it is not asked for, or frames are small."""
        height, width = frames.size
        side = min(_BLOCKS, height // _BLOCK_PIXELS, width // _BLOCK_PIXELS)
        count = positions.position.shape[-2]
        if self.season == "none" or side < 2 or count == 0:
            return None
        texture = frames.texture
        samples = texture.field.shape[-2:]
        # of a part, which need be no whole number of pixels: the working grid takes it, its type does not say so
        size = cast(
            "tuple[int, int]",
            tuple(
                length // side * pixels / length for length, pixels in zip(samples, frames.size, strict=True)
            ),
        )
        options = self._by_textures() or PCC(max_translation=self.aligner.max_translation)

        def ask(part: Edges) -> _Said:
            moving, reference = (
                _in_blocks(_pick(texture, end), side) for end in (part.moving, part.reference)
            )
            return _correlate_pairs(moving, reference, size, options, _BLOCK_SIGMA)

        with torch.no_grad():
            said = self._in_batches(ask, edges, frames)
            said = _Said(*(field.transpose(0, 1) for field in said))  # (B, E)
            blocks = solve_positions(said.shift, said.sigma, said.usable & edges.distinct, edges, count)
            variance = _own_variance(said, blocks, edges, count)
            return season_term(positions, blocks, variance, direction)

    def _judge(
        self,
        frames: Frames,
        positions: Positions,
        variance: Tensor,
        term: SeasonTerm | None,
        direction: Tensor | None,
        ambiguous: Tensor,
    ) -> tuple[Estimate, Tensor, Tensor]:
        """The estimate, the season's part of σ, and its shift."""
        connected = positions.connected
        position, season = positions.position, torch.zeros_like(positions.position)
        widened = torch.zeros_like(variance)
        if term is not None:
            widened = term.spread.square() / term.blocks.clamp(min=1)
        covariance = isotropic((variance + widened).sqrt())
        if term is not None and direction is not None:
            along = direction - _middle(direction, connected)
            along = torch.where(along.isfinite(), along, 0.0)
            season = term.slope * along
            kept = torch.hypot(term.sigma, term.slope)
            if self.season == "correct":
                position, kept = position - season, term.sigma
                position = torch.where(connected[:, None], position - _middle(position, connected), 0.0)
            spread = (kept * along)[:, :, None]
            covariance = covariance + spread * spread.mT
            widened = widened + (kept * along).square().sum(-1)

        status = self._status(position, connected, ambiguous, frames.texture.flat)
        dtype = frames.texture.field.dtype
        shift = torch.where((status == 0)[:, None], position, 0.0).to(dtype)
        reach = self.aligner.max_translation
        by_textures = self._by_textures()
        frequency = 0.25 if by_textures is None else by_textures.max_frequency
        after, before = consensus_scores(
            frames.texture,
            shift.detach(),
            status == 0,
            size=frames.size,
            max_frequency=frequency,
            reach=reach,
        )
        if self.aligner.min_score is not None:
            low = (status == 0) & (after < self.aligner.min_score)
            status = torch.where(low, int(Status.LOW_SCORE), status)
            shift, after = torch.where(low[:, None], 0.0, shift), torch.where(low, before, after)
        accepted = status == 0
        sigma = torch.where(accepted, largest_sigma(covariance).to(dtype), torch.inf)
        covariance = torch.where(accepted[:, None, None], covariance.to(dtype), isotropic(sigma))
        stage = torch.where(accepted, 0, -1)
        estimate = Estimate(translation_warp(shift), after, before, sigma, covariance, status, stage)
        return estimate, widened.sqrt().to(dtype), season.to(dtype)

    def _check_sun(self, sun: Tensor | None, cube: Tensor) -> Tensor | None:
        """(..., T, 2), or ``None``."""
        expected = "a floating tensor (..., T, 2), elevation and azimuth in degrees"
        if sun is None:
            if self.season == "correct":
                cure = 'give it, or season="report"'
                raise ValueError(message("sun", f'{expected}, for season="correct"', "None", cure))
            return None
        if not isinstance(sun, Tensor) or not sun.is_floating_point():
            got = sun.dtype if isinstance(sun, Tensor) else type(sun).__name__
            raise TypeError(message("sun", expected, got, "convert it with torch.as_tensor(sun).float()"))
        check_device("sun", sun, cube)
        batch = cube.shape[:-3]
        if tuple(sun.shape) not in {(*batch, 2), (batch[-1], 2)}:
            raise ValueError(message("sun", f"shape {(*batch, 2)}", tuple(sun.shape), "one row per frame"))
        return sun.expand(*batch, 2)

    def extra_repr(self) -> str:
        """The options, as they are written in the constructor."""
        return f"neighbours={self.neighbours}, links={self.links}, season={self.season!r}"


def _pick(texture: Texture, index: Tensor) -> Texture:
    field, weights, flat, *others = (None if part is None else part[index] for part in texture)
    assert field is not None
    assert flat is not None
    return Texture(field, weights, flat, *others)


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
    found = phase_correlation(
        moving,
        reference,
        size=size,
        max_translation=options.max_translation,
        max_frequency=options.max_frequency,
        weighting=options.weighting,
        taper=options.taper,
        robust=options.robust,
        upsample_factor=options.upsample_factor,
    )
    usable = found.converged & ~found.outside & ~found.flat
    usable = usable & (found.shift.detach().norm(dim=-1) <= options.max_translation)
    ambiguous = usable & found.ambiguous
    usable = usable & (found.sigma <= max_sigma) & ~ambiguous
    if found.inliers is None:
        return _Said(found.shift, found.sigma, usable, torch.ones_like(found.sigma), ambiguous)
    # an inlier weight is the fourth power of the local correlation
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
    parent = spanning_tree(torch.maximum(table, table.mT))
    return (parent[edges.moving] == edges.reference) | (parent[edges.reference] == edges.moving)


def _own_variance(said: _Said, positions: Positions, edges: Edges, frames: int) -> Tensor:
    """(..., T): a frame's own part of its pairs' variances, half of their geometric mean."""
    weight = positions.weight.detach()
    logarithm = torch.where(weight > 0, said.sigma.detach(), 1.0).double().clamp(min=1e-6).log()
    total, mean = (sum_of_pairs(edges, values, frames) for values in (weight, weight * 2 * logarithm))
    return 0.5 * (mean / total.clamp(min=1e-9)).exp()


def _middle(vectors: Tensor, chosen: Tensor) -> Tensor:
    """(T, 2) → (2,): the median of the chosen ones."""
    values = vectors.detach().mT.masked_fill(~chosen, torch.nan)
    return (0.5 * (nanmedian(values) - nanmedian(-values))).nan_to_num(0.0)


def _stack(series: list[Solution], batch: tuple[int, ...]) -> Solution:
    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(_of_one_length(values)).unflatten(0, batch)  # type: ignore[no-untyped-call]

    estimate = combine(lambda fields: stack(list(fields)), [one.estimate for one in series])
    rest = zip(*(one[1:] for one in series), strict=True)
    return Solution(estimate, *(stack(list(fields)) for fields in rest))


def _of_one_length(values: list[Tensor]) -> list[Tensor]:
    """Pad every series to the same number of pairs, with pairs of weight 0 of the first frame with itself."""
    longest = max(len(value) for value in values)
    return [torch.cat([value, value.new_zeros(longest - len(value), *value.shape[1:])]) for value in values]
