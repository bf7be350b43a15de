"""CrossKD, which passes features of the student's head through the rest of the teacher's head."""
import copy
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from ..alignment import crop_to_common
from ..losses.cross_kd_loss import align_statistics, best_score, box_loss, distribution_loss, quality_focal_loss

BRANCHES = ('cls_convs', 'reg_convs')


@MODELS.register_module()
class CrossKD(nn.Module):
    """Makes cross-head predictions and compares them with the teacher's [0].

    [0] Wang, Chen, Zheng, Li, Cheng, Hou, CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024,
    arXiv 2306.11369. Details that are not in the paper follow the authors' code.

    In each branch of the head, the student's feature after the i-th convolution, before the activation, is scaled to
    the mean and standard deviation of the teacher's feature, per channel and level. It then passes through the
    activation and the rest of the teacher's frozen head. The losses compare these predictions with the teacher's own:

    - ``loss_crosskd_cls``: :func:`quality_focal_loss`, divided by the number of positives by which the student's own
      classification loss is divided in the step.
    - ``loss_crosskd_reg``: GIoU of the decoded boxes, weighted by the teacher's largest class score and divided by
      the same number. For GFL, the KL divergence of the distributions with the same weights, divided by their sum.

    So the student's head after the i-th convolution learns only from the ground truth, which avoids the conflict of the
    two targets. The teacher gets no gradient.

    Unlike the authors' code, anchors that the student's assigner ignores are not left out, and ATSS's centerness is
    not distilled.

    RetinaNet, FCOS, ATSS and GFL of MMDetection are supported. The heads of student and teacher must be equal except
    for their depth. Call :meth:`prepare` once. In each step, run both models (the teacher to the end of its neck, the
    student in mode ``loss``), then :meth:`forward`, which runs the teacher's head, then :meth:`reset`.

    Args:
        after: i. None for all convolutions of the teacher's branch except the last, as the paper's 3 of 4.
        beta: Exponent of the quality focal loss, 0 or at least 1.
        cls_loss_weight: Weight of ``loss_crosskd_cls``.
        reg_loss_weight: Weight of ``loss_crosskd_reg``. None for 4 with GFL and 1 with the others.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self,
                 after: int | None = None,
                 beta: float = 1.,
                 cls_loss_weight: float = 1.,
                 reg_loss_weight: float | None = None):
        super().__init__()
        self.after = None if after is None else check_number('CrossKD.after', after, least=1, whole=True)
        self.beta = check_number('CrossKD.beta', beta, least=0)
        if 0 < beta < 1:
            raise ValueError(f'CrossKD.beta must be 0 or at least 1, got {beta}. Between 0 and 1, the gradient is '
                             'infinite where student and teacher agree')
        self.cls_loss_weight = check_number('CrossKD.cls_loss_weight', cls_loss_weight, least=0)
        if reg_loss_weight is not None:
            check_number('CrossKD.reg_loss_weight', reg_loss_weight, least=0)
        self.reg_loss_weight = reg_loss_weight
        self._step: _Step | None = None

    @torch.no_grad()
    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Checks the heads, freezes the teacher's head and adds hooks to both models.

        Raises:
            ValueError: a model has no supported head, or the heads differ.
        """
        s_head, t_head = (_supported_head(model, name) for model, name in ((student, 'student'), (teacher, 'teacher')))
        if not isinstance(getattr(teacher, 'neck', None), nn.Module):
            raise ValueError(f'CrossKD: the teacher must have a neck, got {type(teacher).__name__} without one. Use '
                             'another base.')
        after = max(len(t_head.cls_convs) - 1, 1) if self.after is None else self.after
        _check_heads(s_head, t_head, after)
        self.after = after
        if self.reg_loss_weight is None:
            self.reg_loss_weight = 4. if hasattr(t_head, 'integral') else 1.
        t_head.requires_grad_(False)
        self._step = _Step(s_head, teacher.neck, t_head, after)

    def forward(self) -> dict[str, Tensor]:
        """Returns the losses of the step, float32 scalars.

        Raises:
            RuntimeError: :meth:`prepare` was not called, or a model did not run since the last :meth:`reset`.
        """
        if self._step is None:
            raise RuntimeError('CrossKD: call prepare(student, teacher) first')
        positives, (t_cls, t_reg), (s_cls, s_reg) = self._step.predictions()
        head = self._step.t_head
        cls = quality_focal_loss(_in_one_row(s_cls), _in_one_row(t_cls), self.beta) / positives
        weights = [best_score(logits, head.cls_out_channels) for logits in t_cls]
        if hasattr(head, 'integral'):
            reg = sum(distribution_loss(s.unflatten(1, (4, -1)), t.unflatten(1, (4, -1)), weight.squeeze(1))
                      for s, t, weight in zip(s_reg, t_reg, weights, strict=True))
            reg = reg / sum(weight.sum() for weight in weights).clamp(min=torch.finfo(torch.float32).tiny)
        else:
            boxes = (_decode(head, predictions) for predictions in (s_reg, t_reg))
            weight = torch.cat([weight.permute(0, 2, 3, 1).flatten() for weight in weights])
            reg = box_loss(*boxes, weight) / positives
        return dict(loss_crosskd_cls=self.cls_loss_weight * cls, loss_crosskd_reg=self.reg_loss_weight * reg)

    def reset(self) -> None:
        """Releases the features and the graph of the step."""
        if self._step is not None:
            self._step.reset()


class _Step:
    """Records of both heads in a step, by hooks. It is not a module, because the heads belong to their models.

    Only the latest record per level is kept, so that validation between steps does not accumulate records.
    """

    def __init__(self, s_head: nn.Module, t_neck: nn.Module, t_head: nn.Module, after: int):
        self.t_head = t_head
        self.levels = len(t_head.prior_generator.strides)
        self.features = {}
        for side, head in (('student', s_head), ('teacher', t_head)):
            for branch in BRANCHES:
                activate = getattr(head, branch)[after - 1].activate
                activate.inplace = False  # otherwise it overwrites the record
                self.features[side, branch] = _Inputs(activate, self.levels)
        self.maps = _Outputs(t_neck)
        self.positives = _AverageFactor(s_head.loss_cls)
        self.feeds = [_Feed() for _ in BRANCHES]
        self.rest = _rest_of(t_head, after, self.feeds)

    def predictions(self) -> tuple[float | Tensor, tuple, tuple]:
        """Returns the number of positives, the teacher's predictions and the cross-head predictions. Predictions are
        (classes, boxes), each a list of levels."""
        if self.maps.value is None or self.positives.value is None:
            raise RuntimeError('CrossKD: in each step, the teacher must run to the end of its neck and the student in '
                               'mode loss')
        dtype = next(self.t_head.parameters()).dtype
        maps = [x.to(dtype, memory_format=torch.contiguous_format) for x in self.maps.value]
        with torch.no_grad():
            t_predictions = self.t_head.forward(maps)[:2]  # .forward, to skip hooks of the head
        student, teacher = ([list(self.features[side, branch].levels) for branch in BRANCHES]
                            for side in ('student', 'teacher'))
        aligned = [[align_statistics(*crop_to_common(s, t)).to(dtype) for s, t in zip(*levels, strict=True)]
                   for levels in zip(student, teacher, strict=True)]
        s_predictions = self._finish(aligned)
        t_predictions = tuple([crop_to_common(s, t)[1] for s, t in zip(*levels, strict=True)]
                              for levels in zip(s_predictions, t_predictions, strict=True))
        return self.positives.value, t_predictions, s_predictions

    def _finish(self, features: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Runs the rest of the teacher's head on features of both branches."""
        for feed, levels in zip(self.feeds, features, strict=True):
            feed.levels = list(levels)
        self.rest.training = self.t_head.training
        return self.rest(range(self.levels))[:2]  # each branch reads its feed instead of the argument

    def reset(self) -> None:
        for record in self.features.values():
            record.levels.clear()
        self.maps.value = self.positives.value = None


class _Inputs:
    """The last inputs of a module, one per level."""

    def __init__(self, module: nn.Module, levels: int):
        self.levels: deque[Tensor] = deque(maxlen=levels)
        module.register_forward_pre_hook(self)

    def __call__(self, _, inputs: tuple) -> None:
        self.levels.append(inputs[0])


class _Outputs:
    """The last output of a module."""

    def __init__(self, module: nn.Module):
        self.value: Sequence[Tensor] | None = None
        module.register_forward_hook(self)

    def __call__(self, _, inputs: tuple, output: Sequence[Tensor]) -> None:
        self.value = output


class _AverageFactor:
    """The last divisor of a loss of MMDetection."""

    def __init__(self, loss: nn.Module):
        self.value: float | Tensor | None = None
        loss.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _, inputs: tuple, kwargs: dict) -> None:
        self.value = kwargs['avg_factor']


class _Feed(nn.Module):
    """Returns the stored features of the next level, whatever its input."""

    def __init__(self):
        super().__init__()
        self.levels: list[Tensor] = []

    def forward(self, _) -> Tensor:
        return self.levels.pop(0)


def _rest_of(head: nn.Module, after: int, feeds: Sequence[_Feed]) -> nn.Module:
    """Returns a head with the same modules that begins with the activation of the convolution ``after``.

    It does not have the hooks of ``head``.
    """
    rest = copy.copy(head)
    for name in ('_modules', '_forward_hooks', '_forward_pre_hooks'):
        rest.__dict__[name] = OrderedDict(head._modules if name == '_modules' else {})
    for branch, feed in zip(BRANCHES, feeds, strict=True):
        convs = getattr(head, branch)
        setattr(rest, branch, nn.ModuleList([feed, nn.ReLU(), *convs[after:]]))
    return rest


def _supported_head(model: nn.Module, name: str) -> nn.Module:
    from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead
    head, supported = getattr(model, 'bbox_head', None), (RetinaHead, FCOSHead, ATSSHead, GFLHead)
    names = ', '.join(each.__name__ for each in supported)
    if type(head) not in supported:
        given = type(model).__name__ + (' without bbox_head' if head is None else f' with {type(head).__name__}')
        raise ValueError(f'CrossKD: the {name} must have one of the heads {names}, got {given}. Use another base.')
    if not head.use_sigmoid_cls:
        raise ValueError(f'CrossKD: the {name}\'s {type(head).__name__} must classify by sigmoid, got softmax. '
                         'Use another base.')
    return head


def _check_heads(s_head: nn.Module, t_head: nn.Module, after: int) -> None:
    """Raises ``ValueError`` if the student's features do not fit the teacher's head."""
    if type(s_head) is not type(t_head):
        raise ValueError(f'CrossKD: student and teacher must have equal heads, got {type(s_head).__name__} and '
                         f'{type(t_head).__name__}. Use another base.')
    for side, head in (('student', s_head), ('teacher', t_head)):
        if after > len(head.cls_convs):
            raise ValueError(f'CrossKD.after: the {side}\'s head has {len(head.cls_convs)} convolutions in a branch, '
                             f'got {after}. Choose at most {len(head.cls_convs)}.')
        activations = [getattr(getattr(head, branch)[after - 1], 'activate', None) for branch in BRANCHES]
        if not all(isinstance(each, nn.ReLU) for each in activations):
            raise ValueError(f'CrossKD: convolution {after} of the {side}\'s head must end in a ReLU, got '
                             f'{[type(each).__name__ for each in activations]}. Use another base.')
    for what, s_value, t_value in (
        ('classes', s_head.num_classes, t_head.num_classes),
        ('strides', list(s_head.prior_generator.strides), list(t_head.prior_generator.strides)),
        ('channels', s_head.feat_channels, t_head.feat_channels)):
        if s_value != t_value:
            raise ValueError(f'CrossKD: the heads of student and teacher must have equal {what}, got {s_value} and '
                             f'{t_value}. Change the student\'s bbox_head, or use another base.')


def _in_one_row(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(1) for level in levels], 1)


def _decode(head: nn.Module, predictions: Sequence[Tensor]) -> Tensor:
    """Returns boxes in pixels, (n, 4), ordered by level, image, row, column and anchor."""
    priors = head.prior_generator.grid_priors([x.shape[2:] for x in predictions], device=predictions[0].device)
    images = len(predictions[0])
    flat = [x.float().permute(0, 2, 3, 1).reshape(-1, 4) for x in predictions]
    return head.bbox_coder.decode(torch.cat([level.repeat(images, 1) for level in priors]), torch.cat(flat))
