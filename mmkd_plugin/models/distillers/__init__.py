from .amd_distiller import AMDDistiller
from .crosskd import CrossKD
from .feature_distiller import FeatureDistiller
from .sokd_distiller import SoKDDistiller

__all__ = ['AMDDistiller', 'CrossKD', 'FeatureDistiller', 'SoKDDistiller']
