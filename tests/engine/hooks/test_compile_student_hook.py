"""A compiled student is recorded, learns and is saved as one that is not."""
import pytest
import torch
from conftest import retinanet
from test_freeze_policy_hook import MODEL, POLICY, train  # noqa: F401

AMD = dict(MODEL, distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck', 'backbone.layer3'],
                                 amd=dict(scale_free=True)))


@pytest.mark.parametrize('model, policy, parts', [
    (AMD, {}, {'backbone.layer1', 'backbone.layer3', 'neck', 'bbox_head'}),
    (MODEL, POLICY, {'backbone', 'neck', 'bbox_head'}),
], ids=['AMD', 'SoKD'])
def test_learns_the_same_from_compiled_parts(train, model, policy, parts):  # noqa: F811
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    hooks = [dict(search_epochs=1)] if policy else []
    plain = train('plain', epochs=1, model=model, policy=policy, hooks=hooks)
    compiled = train('compiled', epochs=1, model=model, policy=policy, hooks=[
        *hooks, dict(type='mmkd_plugin.CompileStudentHook', backend=backend)])
    listed = compiled.log.partition('Compiled parts of the student: ')[2].partition('\n')[0].split(', ')
    assert parts <= set(listed) and len(graphs) >= len(parts)
    assert ('backbone' in listed) == ('backbone' in parts)
    after = compiled.model.state_dict()
    assert after.keys() == plain.model.state_dict().keys()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)


def test_a_plain_model_has_no_student(train):  # noqa: F811
    with pytest.raises(ValueError, match='RetinaNet has no student. For a plain model, set compile=True'):
        train('a', epochs=1, model=retinanet(8), policy={}, hooks=[
            dict(type='mmkd_plugin.CompileStudentHook', backend='eager')])
