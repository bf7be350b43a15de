"""How many tensor operations a step of distillation adds to the student's step and the teacher's forward.

On a GPU each of them is a kernel launch. Views are left out. RetinaNet with the five levels of its COCO configs.
"""
import copy

import pytest
from conftest import detection_batch, retinanet
from operations import count_operations

NOTHING = dict(type='ConfigurableDistiller', teacher_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')))
AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True, local_grid=2))
SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'])
MOST = dict(operations=['ShearX', 'Noise'], magnitude_init=0.3, beta_init=0.999999)  # of the draws that can come
CASES = {  # distiller, whether the search has ended, most operations
    'AMD': (AMD, False, 150),
    'SoKD on FitNet, in search': (dict(SOKD, base='fitnet'), False, 387),
    'SoKD on FitNet, frozen': (dict(SOKD, base='fitnet'), True, 297),
    'SoKD on FitNet, frozen, the dearest draw': (dict(SOKD, base='fitnet', dafa=MOST), True, 309),
    'SoKD on PKD, in search': (dict(SOKD, base='pkd'), False, 422),
    'SoKD on PKD, frozen': (dict(SOKD, base='pkd'), True, 332),
}


def operations(build, distiller, frozen):
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8, levels=5),
                       teacher=retinanet(8, levels=5), allow_random_teacher=True, distiller=distiller)).train()
    if frozen:
        model.distiller.dafa.freeze()
    data = model.data_preprocessor(copy.deepcopy(detection_batch(128)), True)

    def step():
        model.parse_losses(model(**data, mode='loss'))[0].backward()

    step()  # what is kept between steps is made in the first
    return sum(count_operations(step).values())


@pytest.mark.parametrize('name', CASES)
def test_a_step_adds_few_operations(build, name):
    distiller, frozen, most = CASES[name]
    added = operations(build, distiller, frozen) - operations(build, NOTHING, False)
    assert 0 < added <= most
