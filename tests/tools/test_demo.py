"""The parts of the demo that decide what it reports; the whole of it is `make demo`."""
import importlib
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / 'tools')
    demo = importlib.import_module('demo')


def result(seed, ap):
    return dict(seed=seed, bbox_mAP=ap, bbox_mAP_50=ap + 0.2, params=1000, flops=2000, latency_ms=3.0, file_bytes=4000)


def test_several_seeds_give_mean_and_spread():
    summary = demo.summary([result(0, 0.4), result(1, 0.5), result(2, 0.6)])
    assert summary['bbox_mAP'] == pytest.approx(0.5)
    assert summary['bbox_mAP_std'] == pytest.approx(0.1)
    assert summary['seeds'] == {'0': 0.4, '1': 0.5, '2': 0.6}
    assert 'bbox_mAP_std' not in demo.summary([result(0, 0.4)])


def test_the_table_has_a_row_for_each_variant():
    report = dict(teacher=demo.summary([result(0, 0.6)]), amd=demo.summary([result(0, 0.4), result(1, 0.5)]))
    lines = demo.table(report).splitlines()
    assert len(lines) == 4
    assert lines[2] == '| teacher | 0.600 | 0.800 | 1,000 | 2,000 | 3.0 | 4,000 |'
    assert '0.450 ± 0.071' in lines[3]


def test_a_failing_command_ends_with_its_log(tmp_path):
    log = tmp_path / 'train.log'
    log.write_text('a reason')
    with pytest.raises(SystemExit, match='a reason'):
        demo.check(1, ['train'], log)
