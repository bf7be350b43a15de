import miniature
import numpy as np
import pytest
import torch

from mmkd_plugin.datasets import CRDDataset


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """24 images of 8 classes."""
    root = miniature.make_imagenet(tmp_path_factory.mktemp('data') / 'imagenet', train=24)
    return dict(type='mmpretrain.ImageNet', data_root=str(root), split='train',
                pipeline=[dict(type='mmpretrain.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')])


def test_negatives_are_all_images_of_other_classes_and_equally_likely(imagenet):
    dataset = CRDDataset(imagenet, neg_num=21_000)
    labels = np.array(dataset.dataset.get_gt_labels())
    for idx in (0, 5, 23):
        drawn = dataset.draw(idx)
        assert drawn[0] == idx and len(drawn) == 21_001
        counts = np.bincount(drawn[1:], minlength=24)
        assert (counts[labels == labels[idx]] == 0).all()
        assert (abs(counts[labels != labels[idx]] - 1000) < 160).all()  # five standard deviations


def test_data_samples_have_what_crd_reads(imagenet):
    plain, dataset = CRDDataset(imagenet, neg_num=5).dataset, CRDDataset(imagenet, neg_num=5)
    assert len(dataset) == 24 and dataset.metainfo == plain.metainfo
    data, expected = dataset[7], plain[7]
    sample = data['data_samples']
    assert torch.equal(data['inputs'], expected['inputs'])
    assert sample.gt_label == expected['data_samples'].gt_label and sample.img_path == expected['data_samples'].img_path
    assert sample.sample_idx.shape == () and sample.sample_idx == 7
    assert sample.contrast_sample_idxs.shape == (6, ) and sample.contrast_sample_idxs.dtype == torch.int64
    assert {'sample_idx', 'contrast_sample_idxs'} <= set(sample.keys())  # data, so that they follow to the device


def test_each_time_other_negatives(imagenet):
    dataset = CRDDataset(imagenet, neg_num=50)
    assert (dataset.draw(3) != dataset.draw(3)).any()


@pytest.mark.parametrize('fields, message', [
    (dict(neg_num=0), 'CRDDataset.neg_num must be a whole number >= 1, got 0'),
    (dict(indices=1), 'images of at least two classes, got 1 of class 0'),
])
def test_mistakes(imagenet, fields, message):
    dataset = dict(imagenet, **{key: value for key, value in fields.items() if key == 'indices'})
    with pytest.raises(ValueError, match=message):
        CRDDataset(dataset, **{key: value for key, value in fields.items() if key != 'indices'})
