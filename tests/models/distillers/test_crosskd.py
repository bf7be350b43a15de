"""CrossKD on small real detectors."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import detection_batch
from mmengine.hub import get_config

from mmkd_plugin.models.distillers.crosskd import CrossKD
from mmkd_plugin.models.losses.cross_kd_loss import quality_focal_loss

HEADS = dict(RetinaHead='retinanet/retinanet_r50_fpn_1x_coco.py',
             FCOSHead='fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
             ATSSHead='atss/atss_r50_fpn_1x_coco.py',
             GFLHead='gfl/gfl_r50_fpn_1x_coco.py')
CLASSES = 3


def config(head, base_channels=8, **fields):
    model = get_config(f'mmdet::{HEADS[head]}').model
    model.backbone.update(depth=18, base_channels=base_channels, init_cfg=None, style='pytorch', frozen_stages=-1,
                          norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False)
    model.neck.update(in_channels=[base_channels * 2**i for i in range(4)], out_channels=32)
    model.bbox_head.update(dict(in_channels=32, feat_channels=32, stacked_convs=2, num_classes=CLASSES), **fields)
    return model


def pair(build, head='RetinaHead', s_fields=(), t_fields=()):
    student, teacher = build(config(head, **dict(s_fields))), build(config(head, 16, **dict(t_fields)), seed=1)
    for model in (student, teacher):
        torch.nn.init.normal_(list(model.bbox_head.parameters())[0])
        for name, parameter in model.bbox_head.named_parameters():  # as trained ones are, far from equal predictions
            if name.endswith('weight') and parameter.dim() == 4:
                torch.nn.init.normal_(parameter, std=0.08)
    return student, teacher.eval()


def step(student, teacher, size=64):
    """What the algorithm runs in a step: the teacher to its neck, the student in mode loss."""
    data = student.data_preprocessor(detection_batch(size=size, num_classes=CLASSES), True)
    with torch.no_grad():
        teacher.extract_feat(data['inputs'])
    return student(**data, mode='loss')


@pytest.mark.parametrize('head', HEADS)
def test_gradients_reach_the_student_up_to_the_cut_and_never_the_teacher(build, head):
    student, teacher = pair(build, head)
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    step(student, teacher)
    losses = crosskd()
    assert list(losses) == ['loss_crosskd_cls', 'loss_crosskd_reg']
    for name, branch, other in (('loss_crosskd_cls', 'cls', 'reg'), ('loss_crosskd_reg', 'reg', 'cls')):
        value = losses[name]
        assert value.dtype == torch.float32 and value.dim() == 0 and value.isfinite() and value > 0
        student.zero_grad()
        value.backward(retain_graph=True)
        reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert 'backbone.conv1.weight' in reached and f'bbox_head.{branch}_convs.0.conv.weight' in reached
        assert not any(name.startswith((f'bbox_head.{branch}_convs.1', f'bbox_head.{other}_convs')) for name in reached)
        assert not any(name.startswith('bbox_head') and 'convs' not in name for name in reached)  # no predictor
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(p.requires_grad for p in teacher.bbox_head.parameters())


@pytest.mark.parametrize('head', HEADS)
def test_equal_models_have_zero_loss(build, head):
    _, teacher = pair(build, head)
    student = copy.deepcopy(teacher)
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    step(student, teacher)
    assert all(value.item() == pytest.approx(0, abs=2e-3) for value in crosskd().values())


def test_predictions_and_losses_agree_with_the_definition(build):
    student, teacher = pair(build)
    crosskd = CrossKD(cls_loss_weight=2., reg_loss_weight=3.)
    crosskd.prepare(student, teacher)
    data = student.data_preprocessor(detection_batch(num_classes=CLASSES), True)
    factors = []
    student.bbox_head.loss_cls.register_forward_hook(
        lambda _, __, kwargs, ___: factors.append(kwargs['avg_factor']), with_kwargs=True)
    student.eval()
    with torch.no_grad():
        t_maps, s_maps = teacher.extract_feat(data['inputs']), student.extract_feat(data['inputs'])
        t_scores, t_deltas = teacher.bbox_head(t_maps)
    student(**data, mode='loss')
    losses = crosskd()

    def finish(branch, predictor, s, t):
        s, t = (getattr(model.bbox_head, branch)[0].conv(x) for model, x in ((student, s), (teacher, t)))
        flat = [x.transpose(0, 1).flatten(1).double() for x in (s, t)]
        (s_mean, t_mean), (s_std, t_std) = ([x.view(1, -1, 1, 1) for x in each] for each in (
            [f.mean(1) for f in flat], [f.std(1, unbiased=False) for f in flat]))
        x = ((s - s_mean) / s_std * t_std + t_mean).float().relu()
        return predictor(getattr(teacher.bbox_head, branch)[1](x))

    positives, expected_cls, expected_reg = factors[0], 0., 0.
    coder = teacher.bbox_head.bbox_coder
    sizes = [x.shape[2:] for x in t_maps]
    for i, anchors in enumerate(teacher.bbox_head.prior_generator.grid_priors(sizes, device='cpu')):
        logits = finish('cls_convs', teacher.bbox_head.retina_cls, s_maps[i], t_maps[i])
        deltas = finish('reg_convs', teacher.bbox_head.retina_reg, s_maps[i], t_maps[i])
        expected_cls += quality_focal_loss(logits, t_scores[i])
        for n in range(2):
            score = t_scores[i][n].permute(1, 2, 0).reshape(-1, CLASSES).sigmoid().max(1).values
            s_boxes, t_boxes = (coder.decode(anchors, x[n].permute(1, 2, 0).reshape(-1, 4))
                                for x in (deltas, t_deltas[i]))
            low, high = torch.maximum(s_boxes[:, :2], t_boxes[:, :2]), torch.minimum(s_boxes[:, 2:], t_boxes[:, 2:])
            overlap = (high - low).clamp(min=0).prod(1)
            union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (s_boxes, t_boxes)) - overlap
            hull = (torch.maximum(s_boxes[:, 2:], t_boxes[:, 2:])
                    - torch.minimum(s_boxes[:, :2], t_boxes[:, :2])).prod(1)
            expected_reg += (score * (1 - overlap / union + (hull - union) / hull)).sum()
    assert losses['loss_crosskd_cls'].item() == pytest.approx(2 * expected_cls.item() / positives, rel=1e-3)
    assert losses['loss_crosskd_reg'].item() == pytest.approx(3 * expected_reg.item() / positives, rel=1e-3)


def test_gfl_compares_distributions(build):
    student, teacher = pair(build, 'GFLHead')
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    assert crosskd.reg_loss_weight == 4
    step(student, teacher)
    value = crosskd()['loss_crosskd_reg'].item()
    _, (t_cls, t_reg), (_, s_reg) = crosskd._step.predictions()
    total = weights = 0.
    for cls, t, s in zip(t_cls, t_reg, s_reg, strict=True):
        score = cls.sigmoid().amax(1)
        t, s = (F.log_softmax(x.unflatten(1, (4, 17)), 2) for x in (t, s))
        kl = F.kl_div(s, t, reduction='none', log_target=True).sum(2).mean(1)
        total, weights = total + (kl * score).sum(), weights + score.sum()
    assert value == pytest.approx(4 * (total / weights).item(), rel=1e-4)


def test_finite_in_float32_under_autocast(build):
    student, teacher = pair(build, 'FCOSHead')
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        step(student, teacher)
        losses = crosskd()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_a_teacher_in_half_precision(build):
    student, teacher = pair(build)
    teacher.bfloat16()
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    data = student.data_preprocessor(detection_batch(num_classes=CLASSES), True)
    with torch.no_grad():
        teacher.extract_feat(data['inputs'].bfloat16())
    student(**data, mode='loss')
    losses = crosskd()
    sum(losses.values()).backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert student.backbone.conv1.weight.grad.abs().sum() > 0


def test_nothing_piles_up_and_nothing_is_saved(build):
    student, teacher = pair(build)
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    for _ in range(3):
        step(student, teacher)
        crosskd()
    assert {len(record.levels) for record in crosskd._step.features.values()} == {5}
    crosskd.reset()
    assert {len(record.levels) for record in crosskd._step.features.values()} == {0}
    assert not crosskd.state_dict() and not list(crosskd.modules())[1:]
    with pytest.raises(RuntimeError, match='teacher must run to the end of its neck and the student in mode loss'):
        crosskd()


def test_a_copy_of_the_models_has_records_of_its_own(build):
    student, teacher = pair(build)
    crosskd = CrossKD()
    crosskd.prepare(student, teacher)
    copied = copy.deepcopy(torch.nn.ModuleList([student, teacher, crosskd]))
    step(*copied[:2])
    assert all(value.isfinite() for value in copied[2]().values())
    assert copied[2]._step.rest.retina_cls is copied[1].bbox_head.retina_cls
    with pytest.raises(RuntimeError, match='in each step'):
        crosskd()


def test_the_teachers_own_head_is_left_alone(build):
    _, teacher = pair(build)
    keys, maps = list(teacher.state_dict()), [torch.randn(1, 32, n, n) for n in (8, 4, 2, 1, 1)]
    expected = teacher.bbox_head(maps)
    student = pair(build)[0]
    CrossKD().prepare(student, teacher)
    assert list(teacher.state_dict()) == keys
    for a, b in zip(teacher.bbox_head(maps), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(('s_fields', 't_fields', 'kwargs', 'message'), [
    (dict(feat_channels=64), {}, {}, 'equal channels, got 64 and 32'),
    (dict(num_classes=5), {}, {}, 'equal classes, got 5 and 3'),
    ({}, dict(stacked_convs=3), dict(after=3), "student's head has 2 convolutions.*got 3"),
    ({}, {}, dict(after=0), r'CrossKD\.after.*>= 1, got 0'),
    ({}, {}, dict(beta=-1), r'CrossKD\.beta.*>= 0, got -1'),
    ({}, {}, dict(reg_loss_weight='a'), r"CrossKD\.reg_loss_weight.*got 'a'"),
])
def test_heads_that_do_not_fit(build, s_fields, t_fields, kwargs, message):
    with pytest.raises(ValueError, match=message):
        crosskd = CrossKD(**kwargs)
        crosskd.prepare(*pair(build, s_fields=s_fields, t_fields=t_fields))


def test_other_heads_and_levels_are_refused(build):
    retina, fcos = build(config('RetinaHead')), build(config('FCOSHead'))
    retina.bbox_head.use_sigmoid_cls = False
    with pytest.raises(ValueError, match="student's RetinaHead must classify by sigmoid"):
        CrossKD().prepare(retina, fcos)
    retina.bbox_head.use_sigmoid_cls = True
    with pytest.raises(ValueError, match='equal heads, got RetinaHead and FCOSHead'):
        CrossKD().prepare(retina, fcos)
    with pytest.raises(ValueError, match='teacher must have one of the heads RetinaHead.*got Linear without bbox_head'):
        CrossKD().prepare(retina, torch.nn.Linear(1, 1))
    retina.bbox_head.__class__ = type('PISARetinaHead', (type(retina.bbox_head), ), {})
    with pytest.raises(ValueError, match='student must have one of the heads.*got RetinaNet with PISARetinaHead'):
        CrossKD().prepare(retina, fcos)
    model = config('RetinaHead')
    model.neck.num_outs = 4
    model.bbox_head.anchor_generator.strides = [8, 16, 32, 64]
    with pytest.raises(ValueError, match='equal strides'):
        CrossKD().prepare(build(model), build(config('RetinaHead')))
