from .dafa import DAFA

__all__ = ['DAFA']
