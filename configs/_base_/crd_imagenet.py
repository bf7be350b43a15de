# CRD on what the recorder 'feature' has, with the weight and sizes of arXiv 1910.10699. MMRazor's CRDLoss ignores its
# loss_weight, so a schedule holds it. Its memory of all images, 1.3 GB, is in every checkpoint.
crd = dict(
    loss_schedules=dict(loss_crd=dict(type='constant', end_factor=0.8)),
    student_recorders=dict(data=dict(type='ModuleInputs', source='')),
    pool=dict(type='TorchFunctionalConnector', function_name='adaptive_avg_pool2d', func_args=dict(output_size=1)),
    distill_losses=dict(loss_crd=dict(type='CRDLoss', neg_num=16384, sample_n=1281167, dim_out=128)),
    loss_forward_mappings=dict(
        loss_crd=dict(
            s_feats=dict(recorder='feature', from_student=True, connector='s_embed'),
            t_feats=dict(recorder='feature', from_student=False, connector='t_embed'),
            data_samples=dict(recorder='data', from_student=True, data_idx=1))),
    checkpoint=dict(max_keep_ckpts=3))
