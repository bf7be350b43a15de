"""Angular margin-based distillation (AMD) loss.

Letters: N samples, C channels, H x W positions, g x g patches.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number

# Positions of the map that the scale-free form measures its angles on: 2 x 2.
REFERENCE_POSITIONS = 4


class _SumOfSquares(torch.autograd.Function):
    """``A = sum_c F_c^2`` in one read of F; keeps F alone; its gradient ``2 F dA`` is one read and one write."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        dtype = torch.promote_types(feature.dtype, torch.float32)
        if feature.is_cuda:  # one fused kernel; on a CPU it is slower than the blocks below
            return torch.linalg.vector_norm(feature, dim=1, dtype=dtype).square_()
        attention = feature.new_zeros((feature.size(0), *feature.shape[2:]), dtype=dtype)
        for block in feature.split(16, dim=1):  # a block stays in the cache, a squared feature map would not
            attention += block.to(dtype).square().sum(1)
        return attention

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        feature, = ctx.saved_tensors
        return torch.mul(feature, (2 * grad).unsqueeze(1), out=torch.empty_like(feature))


class _Patches:
    """Sums over a g x g grid of patches, the last row and column taking the remainder.

    ``g`` is clipped to the map, so that no patch is empty.
    """

    def __init__(self, grid: int, like: Tensor):
        height, width = like.shape[-2:]
        self.rows = self._membership(grid, height, like)  # (g, H)
        self.columns = self._membership(grid, width, like)  # (g, W)
        self.sizes = self.sum(torch.ones_like(like[:1]))  # (1, g, g)

    @staticmethod
    def _membership(grid: int, length: int, like: Tensor) -> Tensor:
        grid = min(grid, length)
        patch = (torch.arange(length, device=like.device) // (length // grid)).clamp(max=grid - 1)
        return (patch == torch.arange(grid, device=like.device).unsqueeze(1)).to(like.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """(N, H, W) to one number a patch, (N, g, g)."""
        return self.rows @ x @ self.columns.t()

    def spread(self, x: Tensor) -> Tensor:
        """(N, g, g) to each patch's number at all its positions, (N, H, W)."""
        return self.rows.t() @ x @ self.columns


def _project(attention: Tensor, patches: _Patches | None) -> Tensor:
    """Q, (N, H, W): the cosine of each position to the map; see :class:`AMDLoss`.

    ``patches`` is None for the paper's form; otherwise the scale-free Q is
    normalised within each patch.
    """
    # Q depends on A / ||A|| only, so that A may be brought to at most 1 first: A^2 cannot overflow.
    largest = attention.detach().amax(dim=(1, 2), keepdim=True).clamp(min=1)
    attention, eps = attention / largest, 1e-6 / largest
    if patches is None:
        return attention / (torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True) + eps)
    mean_square = patches.sum(attention.square()) / patches.sizes
    # sqrt has an infinite slope at 0; the masked patches are all-zero maps
    root = mean_square.where(mean_square > 0, torch.ones_like(mean_square)).sqrt() * (mean_square > 0)
    relative = attention / (patches.spread(root) + eps)
    return relative / (relative.square() + (REFERENCE_POSITIONS - 1)).sqrt()


def _angular_distance(q_s: Tensor, q_t: Tensor, margin: float, scale: float, patches: _Patches,
                      reduce_positions: str) -> Tensor:
    """Steps 3 to 6 of :class:`AMDLoss` in every patch, averaged over patches and samples: a scalar."""

    def logits(q: Tensor) -> Tensor:
        positive = scale * torch.cos(margin * torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7)))
        negative = scale * (1 - q)
        return torch.stack((-F.softplus(negative - positive), positive, negative))  # (3, N, H, W)

    def hat(x: Tensor) -> Tensor:
        square = patches.sum(x.square())
        # 1e-3 is reached only where one position holds all of the map and Neg is rounding noise
        norm = square.clamp(min=1e-6).sqrt()
        return x / patches.spread(norm)

    error = patches.sum((hat(logits(q_s)) - hat(logits(q_t))).square())  # (3, N, g, g)
    if reduce_positions == 'mean':
        error = error / patches.sizes
    return error.mean()


@MODELS.register_module()
class AMDLoss(nn.Module):
    r"""Angular margin-based distillation of one feature map.

    Source: Jeon, Choi, Shukla, Turaga, *Leveraging Angular Distributions for
    Improved Knowledge Distillation*, Neurocomputing 518 (2023) 466-481,
    arXiv 2302.14130. With ``F`` the feature of student or teacher:

    1. attention map :math:`A = \sum_c F_c^2`, (N, H, W);
    2. projection on the hypersphere :math:`Q = A / (\|A\|_2 + 10^{-6})`, in
       [0, 1]: the cosine to the positive (object);
    3. positive logit with the angular margin
       :math:`P = s \cos(m \arccos Q)`, Q clamped to :math:`1 - 10^{-7}`;
    4. negative (background) logit :math:`Neg = s (1 - Q)`;
    5. :math:`G = P - \log(e^P + e^{Neg})`, elementwise;
    6. :math:`L = \frac{1}{3} [mse(\hat G_S, \hat G_T) + mse(\hat P_S, \hat P_T)
       + mse(\hat{Neg}_S, \hat{Neg}_T)]`, a hat being the L2-normalisation over
       the positions of a sample, mse the mean over N and positions. A hat
       divides by 1e-3 at least, where the paper has no bound: only maps with all
       energy in one position reach it, and their gradient would overflow.

    With ``local_grid=g > 1`` the loss is ``(1 - local_weight)`` times the above
    plus ``local_weight`` times the mean of steps 3 to 6 over g x g patches of
    the globally normalised Q, hats within the patch. Patches are
    ``int(H / g) x int(W / g)``, the last ones take the remainder, and g is
    clipped to the map. The paper has g = 2 and ``local_weight`` 0.2.

    **Scale-free form** (``scale_free=True``; ours, for dense prediction). The
    paper's form dies on large maps, for three reasons: (a) :math:`Q \sim
    1/\sqrt{HW}`, so every angle tends to 90 degrees, where P and Neg are a
    constant plus a deviation that vanishes; (b) a hat divides by a norm that
    grows as :math:`\sqrt{HW}`, and (c) the mean over positions divides its
    square by HW again. The cosine of step 2 compares one position with all:

    .. math:: Q_i = A_i / \sqrt{A_i^2 + \textstyle\sum_{j \ne i} A_j^2}.

    Only the sum depends on the resolution. The scale-free form puts the sum that
    a map of K positions with the same mean square would have in its place:

    .. math:: Q_i = A_i / \sqrt{A_i^2 + (K - 1)\,\overline{A^2}}
              = u_i / \sqrt{u_i^2 + K - 1}, \quad
              u_i = A_i / (\sqrt{\overline{A^2}} + 10^{-6}).

    On a uniform map every angle is then :math:`\arccos(1/\sqrt K)`, at any
    resolution; here K = 4, the 2 x 2 map, 60 degrees, where :math:`\cos(m
    \theta)` is far from linear and the margin acts (on ReLU of Gaussian noise
    the cosine between the gradients for m = 1.35 and m = 1 is 0.64 at 8 x 8
    and 0.67 at 100 x 168; see docs/amd.md). That settles (a). For (b) and (c) step 6 sums over positions
    instead of averaging: :math:`\|\hat x_S - \hat x_T\|^2 = 2 - 2\cos(x_S, x_T)`
    has no HW left, whether the map is small or large. As u is strictly
    increasing in A and hats of Neg fix Q up to a factor that P and its margin
    fix, the loss is zero exactly where :math:`u_S = u_T`. Values lie in [0, 4];
    patches normalise u within themselves.

    Cost: each feature map is read once forward; backward reads the student's
    once and writes its gradient once. Autograd keeps the student feature, which
    the network keeps anyway, and tensors of size (N, H, W). The sum of squares
    works in blocks of 16 channels on a CPU and in one kernel on a GPU, never
    squaring a whole feature map. Maps are computed in float32 (float64 if the
    feature is), also under autocast.

    If student and teacher differ in H or W, the larger attention map is
    average-pooled to the smaller height and width before step 2. Channels may
    differ freely: AMD needs no connector.

    Args:
        margin: m, in (0, 2]. Paper: 1.35.
        scale: s > 0. Paper: 64.
        local_grid: g >= 1; 1 is the global loss alone.
        local_weight: share of the local loss where g > 1, in [0, 1].
        scale_free: whether to use the form for dense prediction.
        loss_weight: factor of the result, >= 0.

    Raises:
        ValueError: an argument is out of its range.
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

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            s_feature: student feature (N, C_S, H, W), any float dtype.
            t_feature: teacher feature (N, C_T, H', W'); receives no gradient.

        Returns:
            A float32 scalar (float64 for float64 features), times
            ``loss_weight``; zero for an empty batch.

        Raises:
            ValueError: the features are not 4-d, or of different batch sizes.
        """
        if s_feature.dim() != 4 or t_feature.dim() != 4 or s_feature.size(0) != t_feature.size(0):
            raise ValueError('AMDLoss expects s_feature (N, C_S, H, W) and t_feature (N, C_T, H\', W\'), got '
                             f'{tuple(s_feature.shape)} and {tuple(t_feature.shape)}')
        with torch.autocast(s_feature.device.type, enabled=False):
            a_s = _SumOfSquares.apply(s_feature)
            a_t = _SumOfSquares.apply(t_feature.detach()).to(a_s.dtype)
            if a_s.numel() == 0:
                return a_s.sum()
            if a_s.shape != a_t.shape:
                size = [min(s, t) for s, t in zip(a_s.shape[1:], a_t.shape[1:])]
                a_s, a_t = F.adaptive_avg_pool2d(a_s, size), F.adaptive_avg_pool2d(a_t, size)
            loss = self._distance(a_s, a_t, grid=1)
            if self.local_grid > 1:
                loss = torch.lerp(loss, self._distance(a_s, a_t, self.local_grid),
                                  loss.new_tensor(self.local_weight))
            return self.loss_weight * loss

    def per_map(self, s_feature, t_feature):
        return torch.stack([self(s, t) for s, t in zip(s_feature, t_feature)])

    def _distance(self, a_s: Tensor, a_t: Tensor, grid: int) -> Tensor:
        patches = _Patches(grid, a_s)
        q_s, q_t = (_project(a, patches if self.scale_free else None) for a in (a_s, a_t))
        return _angular_distance(q_s, q_t, self.margin, self.scale, patches,
                                 'sum' if self.scale_free else 'mean')
