from .amd_distiller import AMDDistiller

__all__ = ['AMDDistiller']
