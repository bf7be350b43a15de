from .composer import compose
from .text import BASES, METHODS

__all__ = ['compose', 'BASES', 'METHODS']
