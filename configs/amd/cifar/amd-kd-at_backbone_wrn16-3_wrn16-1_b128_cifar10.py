# AMD with KD, and AT at the same stages with the weight of CRD's benchmark.
_base_ = './amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10.py'

model = dict(
    distiller=dict(
        distill_losses={f'loss_at_{i}': dict(type='ATLoss', loss_weight=1000.0) for i in (1, 2, 3)},
        loss_forward_mappings={
            f'loss_at_{i}': dict(
                s_feature=dict(recorder=f'backbone.layer{i}', from_student=True),
                t_feature=dict(recorder=f'backbone.layer{i}', from_student=False)) for i in (1, 2, 3)
        }))
