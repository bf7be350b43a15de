from .conv_adapter import ConvAdapter
from .review_kd_connector import ReviewKDConnector

__all__ = ['ConvAdapter', 'ReviewKDConnector']
