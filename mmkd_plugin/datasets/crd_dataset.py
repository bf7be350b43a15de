"""Wrapper that adds the indices for MMRazor's CRD loss to MMPretrain's data sets."""
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmrazor.datasets import CRDDataset as RazorCRDDataset

from ..registry import DATASETS
from ..utils import check_number


@DATASETS.register_module()
class CRDDataset(RazorCRDDataset):
    """Adds the indices of an image and its negatives in CRD's memory bank [0]. Negatives are images of other classes.

    [0] Tian, Krishnan, Isola, Contrastive Representation Distillation, arXiv 1910.10699.

    Data samples get ``sample_idx``, an integer tensor (), and ``contrast_sample_idxs``, (1 + ``neg_num``), whose first
    entry is ``sample_idx``. Negatives are drawn with replacement, as in [0] on ImageNet.

    MMRazor's own wrapper needs ``PackCRDClsInputs``, which MMPretrain does not have. It also keeps, for each class, a
    list of all images of the other classes, which takes 10 GB for ImageNet. This wrapper keeps one list.

    Args:
        dataset: a data set of MMPretrain whose pipeline ends with ``PackInputs``.
        neg_num: number of negatives per image; 16384 in [0].

    Raises:
        ValueError: ``neg_num`` is not a positive whole number, or all images have the same class.
    """

    def __init__(self, dataset: dict | BaseDataset, neg_num: int = 16384) -> None:
        check_number('CRDDataset.neg_num', neg_num, least=1, whole=True)
        super().__init__(dataset, neg_num, percent=1.0)

    def _parse_fullset_contrast_info(self) -> None:
        self.gt_labels = np.asarray(self.dataset.get_gt_labels())
        self.by_class = np.argsort(self.gt_labels, kind='stable')  # the images, sorted by class
        self.ends = np.cumsum(np.bincount(self.gt_labels))  # the end of each class in by_class
        if self.gt_labels.min() == self.gt_labels.max():
            raise ValueError('CRDDataset.dataset must have images of at least two classes, got '
                             f'{len(self.gt_labels)} of class {self.gt_labels[0]}')

    def draw(self, idx: int) -> np.ndarray:
        """Returns ``idx``, then the indices of its negatives, (1 + ``neg_num``)."""
        label = self.gt_labels[idx]
        end = self.ends[label]
        begin = self.ends[label - 1] if label else 0
        places = np.random.randint(len(self) - (end - begin), size=self.neg_num)
        places[places >= begin] += end - begin
        return np.concatenate([[idx], self.by_class[places]])

    def prepare_data(self, idx: int) -> Any:
        data = self.dataset.prepare_data(idx)
        if data is not None:
            sample = data['data_samples']
            sample.pop('sample_idx', None)  # it is in the metainfo
            sample.set_field(torch.tensor(idx), 'sample_idx')
            sample.set_field(torch.from_numpy(self.draw(idx)), 'contrast_sample_idxs')
        return data
