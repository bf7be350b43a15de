from .amd_distiller import AMDDistiller
from .sokd_distiller import SoKDDistiller

__all__ = ['AMDDistiller', 'SoKDDistiller']
