"""PCC: phase cross-correlation, the translation of every frame in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchalign._check import check_bool, check_number, check_option, message
from torchalign.aligner import Aligner, Motion, Pair, SharedOptions, undo_init
from torchalign.functional.affine import compose_warps, translation_warp
from torchalign.functional.phase import PhaseShift, Weighting, phase_correlation
from torchalign.functional.texture import Contrast, Texture, extract_texture
from torchalign.types import Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PCC"]


class PCC(Aligner):
    r"""Translations by robust, band-limited, sub-pixel phase cross-correlation.

    .. math:: \hat t = \arg\max_t \sum_{|f| < f_{max}} \psi(f)\, \mathrm{Re}\, M^*(f) R(f)\, e^{2\pi i f \cdot t}

    with M, R the spectra of frame and reference after :func:`local contrast normalisation
    <torchalign.functional.texture.local_contrast>`, correlated twice: the second time weighted by where the two
    show the same ground, so that clouds without a mask and changed fields do not pull. The maximum is found by
    Newton's method, without a grid, and is differentiable with respect to cube and reference.

    Bias: the estimate's enemy is aliasing, which pulls towards whole pixels. With ``max_frequency=0.25`` the
    bias stays below 0.01 px at every fraction of a pixel (``benchmarks/README.md``); with 0.5, the field's
    usual choice, it reaches 0.07 px on the same scenes.

    Across sensors (optical and radar, visible and infrared, a picture and a map) brightness does not correlate.
    ``contrast="structure"`` correlates :func:`the orientation of gradients
    <torchalign.functional.structure.orientation_field>` instead, as vectors; ``score`` is then the correlation of
    these vectors. What physics leaves stays: red against near infrared differs by 0.1 to 0.3 px over vegetation.

    Args:
        max_frequency: the band that is used, in cycles per pixel, in (0, 0.5].
        weighting: ψ: ``"ramp"`` (``|f|``), ``"sqrt"``, ``"phase"`` (classic), ``"none"``; see
            :func:`~torchalign.functional.phase.cross_power`. ``None`` is ``"none"`` for structure, else ``"ramp"``.
        contrast: ``"local"`` or ``"none"`` for one sensor, ``"structure"`` across sensors.
        taper: share of each axis over which the window falls off, in [0, 1]; unless it is 0, at least 8 pixels on
            each side, or a quarter of a small frame.
        robust: weight by agreement and correlate a second time. ``None`` is no for structure, else yes. (Across
            sensors the weights cost more than they gain; of one sensor's negative they gain.)
        upsample_factor: ``None`` for Newton, or n for the best of a grid of 1/n pixel, as scikit-image and
            satalign do; not differentiable.
        max_sigma: frames whose predicted error is larger, in pixels, count as ``NOT_CONVERGED``. ``None`` is 1 for
            structure, else 0.15.
        **shared: those of every method, see :class:`~torchalign.aligner.Aligner`.

    Status: ``NO_TEXTURE`` for flat, empty or wholly masked frames; ``TOO_FAR`` where a clearly higher peak lies
    beyond ``max_translation``; ``NOT_CONVERGED`` where no peak stands out of the correlation surface by 5
    standard deviations, nor the second one out of chance by 5.5, and more where more places are sought, or σ exceeds
    ``max_sigma``; ``AMBIGUOUS`` where a direction is not fixed, or σ exceeds ``max_sigma`` because parts of the frame
    disagree; then what the gate says.

    References:
        Knapp & Carter 1976, doi:10.1109/TASSP.1976.1162830; Stone et al. 2001, doi:10.1109/36.957286;
        Guizar-Sicairos et al. 2008, doi:10.1364/OL.33.000156.

    Example:
        >>> import torchalign as ta
        >>> scene = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 9, 1, 4)
        >>> reference, cube = scene[0, :, 16:144, 16:144], scene[:, :, 18:146, 13:141]
        >>> aligned, estimate = ta.PCC()(cube, reference)
        >>> estimate.warp[0, :, 2].round(decimals=2), ta.Status(int(estimate.status[0])).name
        (tensor([-3.,  2.]), 'OK')
    """

    def __init__(
        self,
        *,
        max_frequency: float = 0.25,
        weighting: Weighting | None = None,
        contrast: Contrast = "local",
        taper: float = 0.15,
        robust: bool | None = None,
        upsample_factor: int | None = None,
        max_sigma: float | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**shared)
        self.max_frequency = check_number(
            "max_frequency", max_frequency, minimum=0, inclusive=False, maximum=0.5
        )
        self.contrast = check_option("contrast", contrast, Contrast)
        self.taper = check_number("taper", taper, minimum=0, maximum=1)
        check_number("upsample_factor", upsample_factor, minimum=1, maximum=1000, optional=True)
        if upsample_factor is not None and int(upsample_factor) != upsample_factor:
            raise ValueError(message("upsample_factor", "a whole number", upsample_factor, "give an int"))
        self.upsample_factor = None if upsample_factor is None else int(upsample_factor)
        structure = contrast == "structure"
        weighting = ("none" if structure else "ramp") if weighting is None else weighting
        self.weighting = check_option("weighting", weighting, Weighting)
        self.robust = not structure if robust is None else robust
        check_bool("robust", self.robust)
        max_sigma = (1.0 if structure else 0.15) if max_sigma is None else max_sigma
        self.max_sigma = check_number("max_sigma", max_sigma, minimum=0, inclusive=False, optional=True)

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> Texture:
        """The reference's texture, see :meth:`Aligner.prepare_reference`."""
        return extract_texture(
            image, usable, max_frequency=self.max_frequency, contrast=self.contrast, cover=True
        )

    def _block_pixels(self) -> int:
        pixels = super()._block_pixels()
        return pixels // 4 if self.contrast == "structure" else pixels  # two parts, at every pixel

    def correlate(
        self, moving: Tensor | Texture, reference: Texture, usable: Tensor | None = None, **known: Any
    ) -> PhaseShift:
        """:func:`~torchalign.functional.phase.phase_correlation` with the options of this method."""
        return phase_correlation(
            moving,
            reference,
            usable,
            max_translation=self.max_translation,
            max_frequency=self.max_frequency,
            contrast=self.contrast,
            weighting=self.weighting,
            taper=self.taper,
            robust=self.robust,
            upsample_factor=self.upsample_factor,
            **known,
        )

    def estimate_motion(self, pair: Pair, prepared: Texture, init: Tensor | None) -> Motion:
        """See :meth:`Aligner.estimate_motion`.

        An ``init`` is split into what it does about the frame's centre, which is undone by resampling (exactly
        nothing for a translation), and its translation, from which the peak is refined.
        """
        moving, usable, start, about_centre = undo_init(init, pair.moving, pair.usable)
        found = self.correlate(moving, prepared, usable, start=start)
        warp = translation_warp(found.shift)
        if about_centre is not None:
            warp = compose_warps(about_centre, warp)
        status = torch.zeros_like(found.flat, dtype=torch.int64)
        sure = found.converged & (found.sigma.square() - found.misfit <= self.max_sigma**2)
        status = torch.where(sure, status, int(Status.NOT_CONVERGED))
        status = status.masked_fill(found.converged & found.ambiguous, int(Status.AMBIGUOUS))
        status = status.masked_fill(found.outside, int(Status.TOO_FAR))
        status = status.masked_fill(found.flat, int(Status.NO_TEXTURE))
        return Motion(
            warp,
            found.sigma,
            status,
            found.inliers,
            about_centre is None,
            found.covariance,
            distorted=found.sigma > self.max_sigma,
            misfit=found.misfit,
        )
