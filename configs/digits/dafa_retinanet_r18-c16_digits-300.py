# The other half of SoKD: FitNet, and the refined teacher.
_base_ = './sokd_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(dam=None))
