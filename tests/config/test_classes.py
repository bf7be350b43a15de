"""Class names of teachers and data."""
import re

import pytest
import torch
from mmengine.config import Config

from mmkd_plugin.config.classes import other_classes


@pytest.mark.parametrize('meta, said', [
    (dict(dataset_meta=dict(classes=('dog', 'cat'))), "2 class names .*'dog' instead of 'cat'"),
    (dict(CLASSES=('cat', 'wolf')), "1 class names .*'wolf' instead of 'dog'"),
    (dict(dataset_meta=dict(classes=('cat', 'dog'))), None), (dict(dataset_meta=dict(classes=('cat', ))), None),
    (dict(), None), (None, None)])
def test_a_teacher_with_other_classes_is_named(tmp_path, meta, said):
    file = str(tmp_path / 't.pth')
    torch.save(dict(meta=meta, state_dict={}), file)
    cfg = Config(dict(model=dict(architecture={}, teacher=dict(type='X'), teacher_ckpt=file), train_dataloader=dict(
        dataset=dict(type='RepeatDataset', dataset=dict(metainfo=dict(classes=('cat', 'dog')))))))
    found = list(other_classes(cfg))
    assert len(found) == (said is not None) and all(re.search(said, each) for each in found)
    torch.save(dict(state_dict={}, other=Config()), file)  # the build refuses it
    assert list(other_classes(cfg)) == []
    cfg.train_dataloader = None
    assert list(other_classes(cfg)) == []
