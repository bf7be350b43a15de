# AMD with KD at three stages, WRN-16-3 to WRN-16-1, CIFAR-10.
# The objective is that of the paper: 0.1 CE + 0.9 KD (temperature 4) + gamma * sum of AMD over three stages. The paper
# does not publish gamma; 3000 / 3 is the value that the same group uses for such a sum in its next work.
_base_ = '../../_base_/pairs/wrn16-3_wrn16-1_b128_cifar10.py'

model = dict(
    architecture=dict(head=dict(loss=dict(loss_weight=0.1))),
    distiller=dict(
        type='mmkd_plugin.AMDDistiller',
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3'],
        amd=dict(loss_weight=1000.0),
        student_recorders=dict(logits=dict(type='ModuleOutputs', source='head.fc')),
        teacher_recorders=dict(logits=dict(type='ModuleOutputs', source='head.fc')),
        distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4, loss_weight=0.9)),
        loss_forward_mappings=dict(
            loss_kd=dict(
                preds_S=dict(recorder='logits', from_student=True),
                preds_T=dict(recorder='logits', from_student=False)))))
