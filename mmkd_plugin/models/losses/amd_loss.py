"""Angular margin-based distillation (AMD) loss.

All maps of a call are computed together. The positions of all maps form one row. It is sorted by patch and cut into
chunks of equal length, and each chunk lies in one patch. A sum over a map or a patch is a sum over its chunks.

Letters: M maps, N samples, C channels, H x W positions of one map, g x g patches of one map, L positions of all maps,
K chunks of T positions, R regions (maps or patches), V views of the row (global, and local if g > 1).
"""
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from .pooling import adaptive_average_pool

EPS = 1e-6  # added to the norm that step 2 divides by
Q_MAX = 1 - 1e-7
MIN_NORM = 1e-3  # smallest divisor of a hat
REFERENCE_POSITIONS = 4  # K of the scale-free form, a map of 2 x 2
BLOCK = 2**18  # elements of a feature map that a CPU squares at once, so that they stay in its cache


class _SumOfSquares(torch.autograd.Function):
    """``A = sum_c F_c^2`` with one read of F. Saves F alone. The gradient ``2 F dA`` takes one read and one write."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        dtype = torch.promote_types(feature.dtype, torch.float32)
        if not feature.is_cpu:  # one fused kernel
            return torch.linalg.vector_norm(feature, dim=1, dtype=dtype).square_()
        if feature.numel() <= 4 * BLOCK:
            return feature.to(dtype).square().sum(1)
        samples, channels = (max(1, BLOCK // part.numel()) for part in (feature[0], feature[0, 0]))
        attention = feature.new_zeros((feature.size(0), *feature.shape[2:]), dtype=dtype)
        for block, result in zip(feature.split(samples), attention.split(samples)):
            for part in block.split(channels, dim=1):
                result += part.to(dtype).square().sum(1)
        return attention

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        feature, = ctx.saved_tensors
        return torch.mul(feature, (2 * grad).unsqueeze(1), out=torch.empty_like(feature))


class _Regions(NamedTuple):
    """Regions (maps or patches) of a row of chunks. In each view of the row, each chunk lies in one region."""
    chunks: Tensor  # (R, most chunks of a region), indices into the V K chunks; padded with an empty chunk
    region: Tensor  # (V, K), the region of each chunk

    def sum(self, x: Tensor, reduction: Callable[..., Tensor] = torch.sum) -> Tensor:
        """Reduces (..., V or 1, K, T) to one number per region, (..., R)."""
        by_chunk = reduction(x, dim=-1)
        by_chunk = by_chunk.expand(*by_chunk.shape[:-2], *self.region.shape).flatten(-2)
        return reduction(by_chunk[..., self.chunks], dim=-1)

    def norm(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Reduces (..., V or 1, K, T) to the L2 norm of each region, (..., R)."""
        return self.sum(x, partial(torch.linalg.vector_norm, dtype=dtype))

    def spread(self, x: Tensor) -> Tensor:
        """Expands (..., R) to the value of each chunk's region, (..., V, K, 1)."""
        return x[..., self.region].unsqueeze(-1)


class _Layout(NamedTuple):
    """Layout of the positions of all maps as chunks."""
    source: Tensor  # (1, 1, K T), the position in (L, ) at each place in the chunks; 0 if there is none
    inside: Tensor  # (K, T), 1 if the place has a position, else 0
    places: Tensor  # (1, L), the place of each position
    spheres: _Regions  # regions that step 2 normalises over
    root: Tensor  # (R of spheres, ), float64: root of the number of positions in the scale-free form, else 1
    hats: _Regions  # regions that step 6 normalises over
    weights: Tensor  # (M, R of hats), weight of each squared distance in the loss of each map


def _patches(height: int, width: int, grid: int) -> list[np.ndarray]:
    """Returns the positions of each patch, in reading order."""
    rows, columns = (np.minimum(np.arange(length) // (length // min(grid, length)), min(grid, length) - 1)
                     for length in (height, width))
    patch = (rows[:, None] * grid + columns).ravel()
    order = np.argsort(patch, kind='stable')
    return np.split(order, np.flatnonzero(np.diff(patch[order])) + 1)


@torch.compiler.disable
@lru_cache(maxsize=128)
def _layout(shapes: tuple[tuple[int, int], ...], grid: int, local_weight: float, scale_free: bool,
            dtype: torch.dtype, device: torch.device) -> _Layout:
    """Returns the layout of maps with these (H, W). At least one map must have a position."""
    patches, patch_weights, map_sizes, map_counts, map_indices = [], [], [], [], []
    start = 0
    for index, (height, width) in enumerate(shapes):
        if height * width:
            found = _patches(height, width, grid)
            patches += [start + patch for patch in found]
            patch_weights += [local_weight / len(found)] * len(found)
            map_sizes.append(height * width)
            map_counts.append(len(found))
            map_indices.append(index)
            start += height * width

    # Reductions have two stages, within a chunk and over chunks. Both are short if the length of a chunk is a root.
    length = 2**int(np.clip(np.log2(max(map(len, patches))) / 2, 3, 7))
    chunks_of_patches = [-(-len(patch) // length) for patch in patches]
    total = sum(chunks_of_patches) + 1  # the last chunk is empty
    source = np.full((total, length), -1)
    for first, patch in zip(np.cumsum([0, *chunks_of_patches]), patches):
        source[first:].reshape(-1)[:len(patch)] = patch
    places = np.empty(start, dtype=np.int64)
    places[source[source >= 0]] = np.flatnonzero(source >= 0)
    owner = np.repeat(np.arange(len(map_counts)), map_counts)  # the map of each patch
    chunks_of_maps = np.bincount(owner, chunks_of_patches).astype(int)

    def to_device(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(x).to(dtype).to(device, non_blocking=True)

    def regions(views: Sequence[np.ndarray]) -> _Regions:
        """``views`` has the number of chunks of each region, by view."""
        chunks, region, known = [], [], 0
        for view, counts in enumerate(views):
            ends = np.cumsum(counts)
            chunks += [view * total + np.arange(end - count, end) for count, end in zip(counts, ends)]
            region.append(np.append(known + np.repeat(np.arange(len(counts)), counts), known))
            known += len(counts)
        padded = np.full((len(chunks), max(map(len, chunks))), total - 1)
        for row, each in zip(padded, chunks):
            row[:len(each)] = each
        return _Regions(to_device(padded), to_device(np.stack(region)))

    views, sizes, weights, maps = [chunks_of_maps], map_sizes, np.ones(len(map_sizes)), map_indices
    if grid > 1:
        views.append(chunks_of_patches)
        sizes = map_sizes + [len(patch) for patch in patches]
        weights = np.append(weights - local_weight, patch_weights)
        maps = np.append(maps, np.repeat(map_indices, map_counts))
    if not scale_free:
        weights = weights / sizes
    return _Layout(
        source=to_device(source.clip(min=0).reshape(1, 1, -1)),
        inside=to_device(source >= 0, dtype),
        places=to_device(places[None]),
        spheres=regions(views if scale_free else views[:1]),
        root=to_device(np.sqrt(sizes) if scale_free else np.ones(len(map_sizes)), torch.float64),
        hats=regions(views),
        weights=to_device(weights * (np.arange(len(shapes))[:, None] == maps), dtype))


def _cosine(attention: Tensor, radius: Tensor, scale_free: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step 2: returns A / ``radius``, Q, and in the scale-free form their ratio."""
    u = attention / radius
    if not scale_free:
        return u, u, None
    ratio = (u.square() + (REFERENCE_POSITIONS - 1)).rsqrt_()
    return u, u * ratio, ratio


def _logits(q: Tensor, margin: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 3 and 4: returns arccos Q, P and Neg."""
    angle = torch.acos(q.clamp(-Q_MAX, Q_MAX))
    return angle, torch.cos(margin * angle).mul_(scale), (1 - q).mul_(scale)


class _AngularDistance(torch.autograd.Function):
    """Steps 2 to 6 of :class:`AMDLoss` for all maps and patches, from attention of student and teacher to (M, ).

    The gradient is computed in the forward pass, which has all values for it. Autograd saves (N, L) numbers.
    """

    @staticmethod
    def forward(ctx, layout: _Layout, margin: float, scale: float, scale_free: bool, *attention: Tensor) -> Tensor:
        source, inside, places, spheres, root, hats, weights = layout
        samples = attention[0].size(0)

        row = torch.cat([x.flatten(1) for x in attention], 1).unflatten(1, (2, -1))  # (N, 2, L)
        row = row.gather(2, source.expand(samples, 2, -1)).unflatten(2, inside.shape).mul_(inside).unsqueeze(2)
        norm = spheres.norm(row, torch.float64)  # (N, 2, R); in float32, squares of attention may overflow
        radius = norm / root + EPS
        u, q, ratio = _cosine(row, spheres.spread(radius.to(row.dtype)), scale_free)  # (N, 2, V or 1, K, T)
        angle, positive, negative = _logits(q, margin, scale)
        gap = negative - positive
        logits = torch.stack((-F.softplus(gap), positive, negative)).mul_(inside)  # (3, N, 2, V or 1, K, T)

        logits_norm = hats.norm(logits)  # (3, N, 2, R)
        clamped = logits_norm.clamp(min=MIN_NORM)
        hat = logits / hats.spread(clamped)  # (3, N, 2, V, K, T)
        difference = hat[:, :, 0] - hat[:, :, 1]
        distance = hats.norm(difference).square_()  # (3, N, R)
        loss = (distance.mean((0, 1)) * weights).sum(1)
        if not any(ctx.needs_input_grad):
            return loss

        # Hats: d|x^ - y^|^2 = 2 <x^ - y^, dx> / |x|, minus the part along x^ where |x| is not clamped.
        square = (logits_norm / clamped).square_()  # of the norms of the hats; 1 where not clamped
        along = (distance + square[:, :, 0] - square[:, :, 1]) / 2 * (square[:, :, 0] == 1)  # <x^ - y^, x^>
        factor = weights.sum(0) * (2 / (3 * samples)) / clamped[:, :, 0]
        grad = torch.addcmul(difference, hat[:, :, 0], hats.spread(along), value=-1).mul_(hats.spread(factor))
        u, q, gap, angle = (x[:, 0] for x in (u, q, gap, angle))  # the student's, (N, V or 1, K, T)
        g_combined, g_positive, g_negative = grad.sum_to_size(3, *q.shape)

        # Logits: dNeg = -s dQ, dP = s m sin(m angle) / sin(angle) dQ, dG = sigmoid(Neg - P) (dP - dNeg).
        g_combined = gap.sigmoid_().mul_(g_combined)
        slope = (margin * angle).sin_().div_(angle.sin()).mul_(q <= Q_MAX)
        grad = torch.addcmul(g_combined - g_negative, g_combined + g_positive, slope, value=margin).mul_(scale)
        if scale_free:  # dQ = 3 (u^2 + 3)^(-3/2) du
            grad.mul_(ratio[:, 0].pow(3)).mul_(REFERENCE_POSITIONS - 1)

        # Projection: du_i = (dA_i - u_i <u, dA> radius / (|A| root)) / radius.
        norm, radius = norm[:, 0] * root, radius[:, 0]
        along = spheres.sum(grad * u) * radius / norm.clamp(min=1e-300)
        grad = torch.addcmul(grad, u, spheres.spread(along.to(grad.dtype)), value=-1)
        grad.div_(spheres.spread(radius.to(grad.dtype)))
        grad = grad.sum_to_size(samples, 1, *inside.shape).flatten(1).gather(1, places.expand(samples, -1))
        ctx.save_for_backward(grad)
        ctx.shapes = [x.shape for x in attention[:len(attention) // 2]]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps = ctx.saved_tensors[0].split([shape[1:].numel() for shape in ctx.shapes], 1)
        return None, None, None, None, *((x * factor).view(shape) for x, factor, shape in zip(
            maps, grad.unbind(), ctx.shapes)), *(None for _ in ctx.shapes)


def _pool(s_attention: Tensor, t_attention: Tensor) -> list[Tensor]:
    """Average-pools (N, H, W) and (N, H', W') to the smaller height and width, in the student's dtype."""
    size = [min(lengths) for lengths in zip(s_attention.shape[1:], t_attention.shape[1:])]
    pooled = []
    for x in (s_attention, t_attention):
        if list(x.shape[1:]) != size:
            x = adaptive_average_pool(x.double(), size)
        pooled.append(x.to(s_attention.dtype))
    return pooled


def amd_logits(attention: Tensor, margin: float = 1.35, scale: float = 64.0,
               scale_free: bool = False) -> tuple[Tensor, Tensor]:
    """Returns P and Neg (steps 2 to 4 of :class:`AMDLoss`) of whole attention maps (N, H, W)."""
    norm = torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True, dtype=torch.float64)
    root = (attention.size(1) * attention.size(2))**0.5 if scale_free else 1
    _, q, _ = _cosine(attention, (norm / root + EPS).to(attention.dtype), scale_free)
    return _logits(q, margin, scale)[1:]


def amd_loss(s_features: Tensor | Sequence[Tensor],
             t_features: Tensor | Sequence[Tensor],
             margin: float = 1.35,
             scale: float = 64.0,
             local_grid: int = 1,
             local_weight: float = 0.2,
             scale_free: bool = False) -> Tensor:
    """Computes the AMD losses of pairs of feature maps, M of them; see :class:`AMDLoss` for equations and ranges.

    Args:
        s_features: student feature (N, C_S, H, W) of any float dtype, or a sequence of them.
        t_features: teacher feature (N, C_T, H', W'), or a sequence of the same length. They receive no gradient.

    Returns:
        (M, ), one loss for each pair, float32 (float64 for float64 features); zeros for an empty batch.

    Raises:
        ValueError: the features are not 4-d, the sequences differ in length, or the batch sizes differ.
    """
    s_maps, t_maps = ([x] if isinstance(x, Tensor) else list(x) for x in (s_features, t_features))
    shapes = [[tuple(x.shape) for x in maps] for maps in (s_maps, t_maps)]
    if not (s_maps and len(s_maps) == len(t_maps) and all(len(shape) == 4 for shape in sum(shapes, []))
            and len({shape[0] for shape in sum(shapes, [])}) == 1):
        raise ValueError('amd_loss: the features do not match, got s_features of shape '
                         f'{shapes[0]} and t_features of shape {shapes[1]}, expected (N, C_S, H, W) and '
                         "(N, C_T, H', W') in pairs with one N for all")
    # No autocast guard is needed: of the operations below, autocast lowers only matrix products, but not in float64.
    s_attention, t_attention = zip(*(_pool(_SumOfSquares.apply(s), _SumOfSquares.apply(t.detach()))
                                     for s, t in zip(s_maps, t_maps)))
    if not sum(x.numel() for x in s_attention):
        return torch.stack([x.sum() for x in s_attention])
    layout = _layout(tuple(tuple(x.shape[1:]) for x in s_attention), local_grid, local_weight, scale_free,
                     s_attention[0].dtype, s_attention[0].device)
    return _AngularDistance.apply(layout, margin, scale, scale_free, *s_attention, *t_attention)


@MODELS.register_module()
class AMDLoss(nn.Module):
    r"""Angular margin-based distillation (AMD) of feature maps.

    Source: Jeon, Choi, Shukla, Turaga, *Leveraging Angular Distributions for
    Improved Knowledge Distillation*, Neurocomputing 518 (2023) 466-481,
    arXiv 2302.14130. With ``F`` a feature map of student or teacher:

    1. attention map :math:`A = \sum_c F_c^2`, (N, H, W);
    2. projection on the hypersphere :math:`Q = A / (\|A\|_2 + 10^{-6})`, in
       [0, 1]: the cosine to the positive (object);
    3. positive logit with the angular margin
       :math:`P = s \cos(m \arccos Q)`, Q clamped to :math:`1 - 10^{-7}`;
    4. negative (background) logit :math:`Neg = s (1 - Q)`;
    5. :math:`G = P - \log(e^P + e^{Neg})`, elementwise;
    6. :math:`L = \frac{1}{3} [mse(\hat G_S, \hat G_T) + mse(\hat P_S, \hat P_T)
       + mse(\hat{Neg}_S, \hat{Neg}_T)]`. A hat is the L2-normalisation over
       the positions of a sample, mse the mean over N and positions.

    With ``local_grid=g > 1`` the loss is ``(1 - local_weight)`` times the above
    plus ``local_weight`` times the mean of steps 3 to 6 over g x g patches of
    Q, with hats within the patch. Patches are ``int(H / g) x int(W / g)``, the
    last ones take the remainder, and g is clipped to the map. The paper has
    g = 2 and ``local_weight`` 0.2. The loss of several maps is the sum of
    their losses.

    Deviations from the paper:

    - A hat divides by at least 1e-3; the paper has no bound. Only maps with
      all energy in one position reach it. Without it, their gradient would
      overflow.
    - If student and teacher differ in H or W, the larger attention map is
      average-pooled to the smaller height and width before step 2. Channels
      may differ: AMD needs no connector.
    - ``scale_free=True``, for dense prediction, has the same scale at every
      resolution. The paper's form vanishes on large maps. With
      :math:`\overline{A^2}` the mean of :math:`A^2` over the map, or over the
      patch in the local part, step 2 is

      .. math:: u = A / (\sqrt{\overline{A^2}} + 10^{-6}), \quad
                Q = u / \sqrt{u^2 + 3},

      and step 6 sums over positions instead of averaging. Values of one map
      lie in [0, 4]. docs/amd.md derives this form.

    The computation is in float32 (float64 for float64 features), also under
    autocast. Autograd saves the student's feature maps, which the network
    saves anyway, and one number per sample and position.

    Args:
        margin: m, in (0, 2]. Paper: 1.35.
        scale: s > 0. Paper: 64.
        local_grid: g >= 1; 1 is the global loss alone.
        local_weight: share of the local loss if g > 1, in [0, 1].
        scale_free: whether to use the form for dense prediction.
        loss_weight: factor of the result, >= 0.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from mmkd_plugin.models.losses import AMDLoss
        >>> loss = AMDLoss(scale_free=True, local_grid=2)
        >>> student = [torch.rand(2, 64, size, size, requires_grad=True) for size in (32, 16)]
        >>> teacher = [torch.rand(2, 256, size, size) for size in (32, 16)]
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> value.shape, student[0].grad.shape
        (torch.Size([]), torch.Size([2, 64, 32, 32]))
    """

    def __init__(self,
                 margin: float = 1.35,
                 scale: float = 64.0,
                 local_grid: int = 1,
                 local_weight: float = 0.2,
                 scale_free: bool = False,
                 loss_weight: float = 1.0) -> None:
        super().__init__()
        self.margin = check_number('AMDLoss.margin', margin, above=0, most=2)
        self.scale = check_number('AMDLoss.scale', scale, above=0)
        self.local_grid = check_number('AMDLoss.local_grid', local_grid, least=1, whole=True)
        self.local_weight = check_number('AMDLoss.local_weight', local_weight, least=0, most=1)
        self.loss_weight = check_number('AMDLoss.loss_weight', loss_weight, least=0)
        if not isinstance(scale_free, bool):
            raise ValueError(f'AMDLoss.scale_free must be True or False, got {scale_free!r}')
        self.scale_free = scale_free

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={getattr(self, name)}' for name in (
            'margin', 'scale', 'local_grid', 'local_weight', 'scale_free', 'loss_weight'))

    def forward(self, s_feature: Tensor | Sequence[Tensor], t_feature: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns the loss of one pair of feature maps, or the sum over a sequence each, a scalar."""
        return self.per_map(s_feature, t_feature).sum()

    def per_map(self, s_feature: Tensor | Sequence[Tensor], t_feature: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns ``loss_weight`` times :func:`amd_loss`, (M, )."""
        losses = amd_loss(s_feature, t_feature, self.margin, self.scale, self.local_grid, self.local_weight,
                          self.scale_free)
        return losses if self.loss_weight == 1 else self.loss_weight * losses
