"""Scores of pictures of normals: PSNR, and the error near sharp edges (SNE, as in Dora-bench)."""

import numpy as np
from scipy import ndimage

from tasks.metrics import Surface, fibonacci_sphere
from tasks.rendering import orbit_camera, render_normals


def normal_scores(
    predicted: Surface, reference: Surface, views: int = 22, size: int = 512
) -> dict[str, float]:
    """Compare normal pictures from `views` directions around the shape, size pixels a side.

    An empty prediction is compared as pictures of nothing.
    Normals are in the world's frame, turned towards the camera, and zero where nothing is seen.
    normal_psnr_db: over pixels that either mesh covers, of colours (n + 1) / 2, peak 1.
    sharp_normal_error: mean squared length of the normals' difference, in [0, 4], over pixels
    near edges of the reference's normal picture (Canny's gradient and hysteresis, dilated), as
    Dora-bench does. Their units aren't published: compare only figures from this function.
    """
    squared, covered, edge_squared, edges = 0.0, 0, 0.0, 0
    for direction in fibonacci_sphere(views):
        azimuth = np.degrees(np.arctan2(direction[2], direction[0]))
        camera = orbit_camera(azimuth, np.degrees(np.arcsin(direction[1])), focal_mm=50)
        ours, our_mask = render_normals(*predicted, camera, size)
        truth, mask = render_normals(*reference, camera, size)
        difference = ((ours - truth) ** 2).sum(-1)
        squared += difference[mask | our_mask].sum()
        covered += int(np.count_nonzero(mask | our_mask))
        near_edge = sharp_edges(truth) & mask
        edge_squared += difference[near_edge].sum()
        edges += int(np.count_nonzero(near_edge))
    if not covered:
        raise ValueError("neither mesh is visible: both must lie in [-1, 1]^3")
    error = squared / covered / 3 / 4  # a channel, and colours have half the normals' range
    return {
        "normal_psnr_db": float(-10 * np.log10(max(error, 1e-10))),
        "sharp_normal_error": float(edge_squared / edges) if edges else 0.0,
    }


def sharp_edges(
    normals: np.ndarray, low: float = 0.15, high: float = 0.4, dilation: int = 2
) -> np.ndarray:
    """Return the mask [H, W] of pixels within `dilation` pixels of an edge of normals [H, W, 3].

    low, high: hysteresis thresholds of the gradient's length a pixel, after a Gaussian of 1 pixel.
    Without Canny's thinning, which a dilation undoes anyway.
    """
    smooth = ndimage.gaussian_filter(normals, (1, 1, 0))
    gradients = [ndimage.sobel(smooth, axis) / 8 for axis in (0, 1)]
    strength = np.sqrt(sum((g**2).sum(-1) for g in gradients))
    labels, count = ndimage.label(strength > low, np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[np.unique(labels[strength > high])] = True
    strong[0] = False
    return ndimage.binary_dilation(strong[labels], np.ones((3, 3)), iterations=dilation)
