# AMD for detectors: RetinaNet R101 to R50. The name stays; the recommended config is its base.
_base_ = './amd/coco/amd_fpn_retinanet_r101_retinanet_r50_1x_coco.py'
