"""ECC: enhanced correlation coefficient maximisation, five motion models, the whole stack in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchalign._check import check_number, check_option, check_whole, message
from torchalign.aligner import Aligner, Motion, Pair, SharedOptions
from torchalign.functional.ecc import Gradients, Robust, enhanced_correlation
from torchalign.functional.levels import Level, far_level, prepare_levels
from torchalign.functional.motion import MotionModel, only_shifts
from torchalign.functional.texture import Contrast
from torchalign.types import Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ECC"]


class ECC(Aligner):
    r"""Any warp from a translation to a homography, by maximising the enhanced correlation coefficient.

    .. math:: \hat W = \arg\max_W \frac{\sum w\, \bar m(W^{-1} p)\, \bar r(p)}{\|\bar m\|_w\, \|\bar r\|_w}

    with m, r the textures of frame and reference (band-limited, of normalised local contrast), and weights w that
    are small where the two do not show the same ground: clouds without a mask and changed fields do not pull. From
    coarse to fine; every step is the closed form of Evangelidis & Psarakis for a linearised reference. What is
    estimated is the warp of this library, moving → reference: the *inverse* of what ``cv2.findTransformECC``
    returns.

    It climbs from where it starts: from the identity, translations of some 15 px, rotations of 10° and scales of
    10 % are within reach on frames of 256² (clouds halve that). With a ``max_translation`` beyond its reach, all
    translations are compared first, on a coarse level, and unless the motion is one also under rotations of ±7°; one
    beyond the limit wins if it fits better by a fifth, and the frame is ``TOO_FAR``. For a motion of translations with
    an ``init`` nothing is compared. Beyond that, give an ``init``.

    Bias: at every fraction of a pixel below 0.01 px (``benchmarks/README.md``), since frequencies beyond
    ``max_frequency``, which aliasing folds, are not seen, and what lies between two samples is a cubic B-spline
    through twice as many samples as the band needs.

    Gradients of the warp reach the cube, the reference and what made them. With ``gradients="implicit"`` they are
    those of the implicit function theorem at the optimum (the weights held fixed), at the memory of one step; that
    by ``init`` is 0, for the optimum does not depend on it. With ``"unrolled"`` they are those of the iterations.

    Args:
        motion: ``"translation"``, ``"euclidean"``, ``"similarity"``, ``"affine"`` or ``"homography"``.
        levels: of the pyramid, each of half the resolution; ``None`` for as many as leave 20 samples
            along the shorter side, 8 of frames of 200 pixels and more.
        max_iterations: on each level, and for each set of weights. ``None`` is 12 for structure, else 4.
        tolerance: a frame has converged when a step moves no point of it by more, in pixels.
        gauss_kernel_size: size in pixels, odd, of a Gaussian that both images are blurred with, as OpenCV and
            satalign have it: σ = 0.3 ((size − 1) / 2 − 1) + 0.8. The band limit makes it needless but for noise.
        sigma_blur: or its σ in pixels.
        max_frequency: the band that is used, in cycles per pixel, in (0, 0.5].
        contrast: ``"local"`` or ``"none"`` for one sensor; ``"structure"`` across sensors, see
            :class:`~torchalign.PCC`: m and r are then vectors.
        taper: share of each axis over which the window falls off, in [0, 1].
        robust: ``"agreement"``: samples are weighted by the local correlation of the two frames around them;
            ``"residual"``: by Tukey's biweight of their difference; ``"none"``: alike. The first wins by far under
            clouds, and costs nothing on clear frames (``benchmarks/README.md``). ``None`` is ``"none"`` for
            structure, else ``"agreement"``.
        gradients: ``"implicit"`` or ``"unrolled"``.
        max_sigma: frames whose predicted error is larger, in pixels, count as ``NOT_CONVERGED``. ``None`` is 1
            for structure, else 0.1.
        **shared: those of every method, see :class:`~torchalign.aligner.Aligner`.

    Status: ``NO_TEXTURE`` for flat, empty or wholly masked frames; ``NOT_CONVERGED`` where the last step was longer
    than ``tolerance``, the correlation is no more than that of unrelated scenes (5 standard deviations, 6 of
    structure, and where all translations are compared 1 more, in more parts of the frame the more places there are),
    or σ exceeds ``max_sigma``; ``AMBIGUOUS`` where along some direction the slope of the ground is
    noise; then what the gate says.

    References:
        Evangelidis & Psarakis 2008, doi:10.1109/TPAMI.2008.113; Baker & Matthews 2004,
        doi:10.1023/B:VISI.0000011205.11775.fd.

    Example:
        >>> import torchalign as ta
        >>> scene = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 9, 1, 4)
        >>> truth = torch.tensor([[[0.9998, -0.0175, 3.0], [0.0175, 0.9998, -2.0]]])  # 1°
        >>> cube = ta.warp(scene, ta.functional.affine.invert_warp(truth), interpolation="bicubic")
        >>> estimate = ta.ECC(motion="euclidean").estimate(cube, scene[0])
        >>> bool((estimate.warp - truth).abs().max() < 0.01), ta.Status(int(estimate.status[0])).name
        (True, 'OK')
    """

    def __init__(
        self,
        *,
        motion: MotionModel = "translation",
        levels: int | None = None,
        max_iterations: int | None = None,
        tolerance: float = 0.02,
        gauss_kernel_size: int | None = None,
        sigma_blur: float | None = None,
        max_frequency: float = 0.25,
        contrast: Contrast = "local",
        taper: float = 0.15,
        robust: Robust | None = None,
        gradients: Gradients = "implicit",
        max_sigma: float | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**shared)
        self.motion = check_option("motion", motion, MotionModel)
        self.contrast = check_option("contrast", contrast, Contrast)
        self.gradients = check_option("gradients", gradients, Gradients)
        self.tolerance = check_number("tolerance", tolerance, minimum=0, inclusive=False)
        self.sigma_blur = check_number("sigma_blur", sigma_blur, minimum=0, maximum=100, optional=True)
        self.max_frequency = check_number(
            "max_frequency", max_frequency, minimum=0, inclusive=False, maximum=0.5
        )
        self.taper = check_number("taper", taper, minimum=0, maximum=1)
        self.levels = None if levels is None else check_whole("levels", levels, maximum=16)
        self.gauss_kernel_size = None
        if gauss_kernel_size is not None:
            self.gauss_kernel_size = check_whole("gauss_kernel_size", gauss_kernel_size)
            if self.gauss_kernel_size % 2 == 0:
                cure = "add or take off one pixel"
                raise ValueError(message("gauss_kernel_size", "an odd size", gauss_kernel_size, cure))
            if sigma_blur is not None:
                expected = "None beside gauss_kernel_size"
                raise ValueError(message("sigma_blur", expected, sigma_blur, "give one of the two"))
        structure = contrast == "structure"
        if max_iterations is None:
            max_iterations = 12 if structure else 4
        self.max_iterations = check_whole("max_iterations", max_iterations, maximum=10_000)
        robust = ("none" if structure else "agreement") if robust is None else robust
        self.robust = check_option("robust", robust, Robust)
        max_sigma = (1.0 if structure else 0.1) if max_sigma is None else max_sigma
        self.max_sigma = check_number("max_sigma", max_sigma, minimum=0, inclusive=False, optional=True)

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> list[Level]:
        """The reference's pyramid, its gradients and their products, see :meth:`Aligner.prepare_reference`."""
        return prepare_levels(image, usable, motion=self.motion, taper=self.taper, **self._seen_as())

    def estimate_motion(self, pair: Pair, prepared: list[Level], init: Tensor | None) -> Motion:
        """See :meth:`Aligner.estimate_motion`."""
        found = enhanced_correlation(
            pair.moving,
            prepared,
            pair.usable,
            motion=self.motion,
            init=init,
            max_translation=self.max_translation,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            taper=self.taper,
            robust=self.robust,
            gradients=self.gradients,
            **self._seen_as(),
        )
        sure = found.converged & (found.sigma <= self.max_sigma)
        status = torch.where(sure, int(Status.OK), int(Status.NOT_CONVERGED))
        status = status.masked_fill(found.converged & found.ambiguous, int(Status.AMBIGUOUS))
        status = status.masked_fill(found.flat, int(Status.NO_TEXTURE))
        shifts = only_shifts(self.motion, init)
        searched = far_level(prepared, self.max_translation, init) is not None
        return Motion(
            found.warp,
            found.sigma,
            status,
            found.inliers,
            shifts,
            found.covariance,
            searched=searched and self.motion != "translation",
        )

    def _seen_as(self) -> dict[str, Any]:
        """What of an image is registered."""
        blur = self.sigma_blur or 0.0
        if self.gauss_kernel_size is not None and self.gauss_kernel_size > 1:
            blur = 0.3 * ((self.gauss_kernel_size - 1) / 2 - 1) + 0.8
        return {
            "levels": self.levels,
            "max_frequency": self.max_frequency,
            "contrast": self.contrast,
            "sigma_blur": blur,
        }
