# ReviewKD over all three stages.
_base_ = './inherit_resnet8_fashion_mnist-300.py'

model = dict(
    inherit=[],
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3'],
        base=dict(type='mmkd_plugin.ReviewKDLoss'),
        adapter=dict(mid_channels=64)))
