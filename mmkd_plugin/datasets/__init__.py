"""Data sets that need no download, and a wrapper with the indices that CRD needs."""
from .crd_dataset import CRDDataset

__all__ = ['CRDDataset']
