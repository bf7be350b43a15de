from .cifar_mobilenet_v2 import CIFARMobileNetV2
from .cifar_resnet import CIFARResNet
from .cifar_vgg import CIFARVGG

__all__ = ['CIFARMobileNetV2', 'CIFARResNet', 'CIFARVGG']
