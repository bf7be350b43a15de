from .amd_distiller import AMDDistiller
from .feature_distiller import FeatureDistiller
from .sokd_distiller import SoKDDistiller

__all__ = ['AMDDistiller', 'FeatureDistiller', 'SoKDDistiller']
