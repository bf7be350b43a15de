"""What can be resumed, and what a file that cannot is."""
import pytest
import torch
from mmengine.config import Config

from mmkd_plugin.checkpoints.resume import resume_from

RUN = dict(meta=dict(epoch=1, iter=2, seed=7), message_hub={}, state_dict={'architecture.w': torch.ones(1)})


def resume(tmp_path, content, distillation=True, **options):
    torch.save(content, tmp_path / 'x.pth')
    model = dict(architecture=dict(type='X')) if distillation else dict(type='X')
    cfg = Config(dict(model=model, work_dir=str(tmp_path), load_from=str(tmp_path / 'x.pth')))
    assert resume_from(cfg, **options) == [f'--resume: continues {tmp_path}/x.pth, after 2 iterations']
    return cfg


def test_a_run_gives_its_seed(tmp_path):
    assert resume(tmp_path, RUN).randomness.seed == 7
    assert resume(tmp_path, dict(RUN, state_dict={'w': torch.ones(1)}), distillation=False).randomness.seed == 7


@pytest.mark.parametrize('content, distillation, why', [
    ({'w': torch.ones(1)}, True, 'has no state_dict, expected a training checkpoint.*model.student_ckpt .*inherit'),
    ([1], True, 'has no state_dict'),
    (dict(state_dict=RUN['state_dict']), True, 'no meta.epoch, meta.iter, message_hub'),
    (dict(RUN, meta=dict(epoch=3)), True, 'no meta.iter. To start'),
    (dict(RUN, state_dict={'w': torch.ones(1)}), True,
     'is of a plain model, expected a checkpoint of a distillation.*To start from its weights, leave'),
    (RUN, False, 'is of a distillation, expected a checkpoint of a plain model.*load_from to the file$'),
    (dict(RUN, meta=dict(RUN['meta'], config='import os')), True, 'run the config in its meta as Python.*trust-check'),
])
def test_what_is_no_run_is_a_sentence(tmp_path, content, distillation, why):
    with pytest.raises(ValueError, match=f"^--resume: '.*x.pth' .*{why}"):
        resume(tmp_path, content, distillation)


def test_an_old_run_that_is_trusted(tmp_path):
    old = dict(RUN, meta=dict(RUN['meta'], config='import os'))
    assert resume(tmp_path, old, trust_checkpoint=True).randomness.seed == 7
