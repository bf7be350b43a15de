# AMD for detectors: RetinaNet R101 to R50. This name is stable; its base is the recommended config.
_base_ = './amd/coco/amd_fpn_retinanet_r101_retinanet_r50_1x_coco.py'
