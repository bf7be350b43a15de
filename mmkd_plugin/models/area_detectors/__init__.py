from .dam import DAM

__all__ = ['DAM']
