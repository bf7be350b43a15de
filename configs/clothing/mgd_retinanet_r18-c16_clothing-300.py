# MGD at every level of the pyramid.
_base_ = './inherit_retinanet_r18-c16_clothing-300.py'

model = dict(
    distiller=dict(
        student_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
        teacher_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
        connectors={
            f'mask_{i}': dict(type='MGDConnector', student_channels=64, teacher_channels=64, lambda_mgd=0.65)
            for i in range(3)
        },
        distill_losses={f'loss_mgd_{i}': dict(type='MGDLoss', alpha_mgd=2e-5) for i in range(3)},
        loss_forward_mappings={
            f'loss_mgd_{i}': dict(
                preds_S=dict(recorder='neck', from_student=True, data_idx=i, connector=f'mask_{i}'),
                preds_T=dict(recorder='neck', from_student=False, data_idx=i)) for i in range(3)
        }))
