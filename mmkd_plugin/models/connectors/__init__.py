from .conv_adapter import ConvAdapter
from .fitnet_connector import FitNetConnector
from .review_kd_connector import ReviewKDConnector

__all__ = ['ConvAdapter', 'FitNetConnector', 'ReviewKDConnector']
