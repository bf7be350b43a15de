"""Data that needs no download, and what losses need beside an image."""
from .crd_dataset import CRDDataset

__all__ = ['CRDDataset']
