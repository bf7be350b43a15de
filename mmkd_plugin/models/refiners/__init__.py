from .agreement import agreement_score
from .dafa import DAFA, Draw

__all__ = ['DAFA', 'Draw', 'agreement_score']
