# One half of SoKD: FitNet, and the distinctive areas.
_base_ = './fitnet_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(dam=dict(anchor='boxes')))
