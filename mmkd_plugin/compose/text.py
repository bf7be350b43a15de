"""The config of a distillation as readable Python."""
from dataclasses import dataclass
from textwrap import wrap

from ..models.distillers.presets import PRESETS

METHODS = dict(amd='AMDDistiller', sokd='SoKDDistiller', feature='FeatureDistiller')
BASES = tuple(name for name in PRESETS if name != 'crd')  # crd needs a data set and its size
_WIDTH = 120
_UNSET = dict(work_dir=None, resume=False, load_from=None)


@dataclass
class Plan:
    """The content of the config."""
    method: str  # one of METHODS
    base: str | None  # one of BASES; None for AMD
    student: str  # its name in _base_
    teacher: str
    teacher_ckpt: str
    trust_checkpoint: bool
    layers: list[str | tuple[str, str]]  # a pair if the names or the strides in student and teacher differ
    strides: list[int | float]  # of the layers' maps; empty if unknown
    inherit: list[str]
    logits: tuple[str, str] | None  # layers in student and teacher, if logits are distilled
    task_loss: str | None  # type, if logits are distilled and the student's config does not set the loss
    detector: bool
    length: dict[str, int]  # max_epochs or max_iters
    hooks: bool  # whether the student has custom_hooks
    remarks: list[str]
    constructor: str | None = None  # of the student's optim_wrapper
    own_run: tuple[str, ...] = ()  # fields of the student's config that belong to its own run


def config_text(plan: Plan) -> str:
    """Returns the config as Python."""
    title = METHODS[plan.method].removesuffix('Distiller') + (f' on {plan.base}' if plan.base else '')
    lines = _comment(f'{title}: {plan.teacher} teaches {plan.student}.')
    for remark in plan.remarks:
        lines += _comment(remark)
    lines += [f'_base_ = [{plan.student!r}]', '']
    if plan.own_run:
        lines += ["# Not those of the student's own run.", *(f'{name} = {_UNSET[name]}' for name in plan.own_run), '']
    if plan.logits:
        loss = f' = dict(type={plan.task_loss!r}, loss_weight=0.1)' if plan.task_loss else '.loss_weight = 0.1'
        lines += [f'_base_.model.head.loss{loss}  # weight of the labels; 0.9 is the weight of the teacher', '']
    lines += ['model = dict(',
              '    _delete_=True,',
              "    type='mmkd_plugin.TeacherStudentDistill',",
              '    architecture=_base_.model,',
              f'    teacher=dict(cfg_path={plan.teacher!r}),{_seen_from(plan.teacher)}',
              f'    teacher_ckpt={plan.teacher_ckpt!r},{_seen_from(plan.teacher_ckpt)}']
    if plan.trust_checkpoint:
        lines.append('    trust_checkpoint=True,  # the file may run code')
    if plan.inherit:
        lines += _list('    inherit=', plan.inherit, "start from the teacher's weights where shapes agree")
    if plan.base == 'reviewkd':
        end = 'end=1, by_epoch=True' if 'max_epochs' in plan.length else f'end={max(1, _length(plan) // 100)}'
        lines.append(f"    loss_schedules={{'loss_reviewkd*': dict(start_factor=0.0, {end})}},  # a warm-up")
    lines += ['    distiller=dict(', f"        type='mmkd_plugin.{METHODS[plan.method]}',"]
    strides = f'stride {", ".join(map(str, plan.strides))}' if plan.strides else ''
    lines += _list('        layers=', plan.layers, strides)
    lines += dict(amd=_amd, sokd=_sokd, feature=_feature)[plan.method](plan)
    return '\n'.join(line if len(line) <= _WIDTH else f'{line}  # noqa: E501' for line in lines) + '\n'


def _length(plan: Plan) -> int:
    return next(iter(plan.length.values()))


def _comment(text: str) -> list[str]:
    return wrap(text, _WIDTH, initial_indent='# ', subsequent_indent='# ', break_long_words=False,
                break_on_hyphens=False)


def _seen_from(path: str) -> str:
    return '' if '::' in path or '://' in path else '  # relative to the working directory'


def _list(start: str, values: list, comment: str) -> list[str]:
    """Returns ``start`` and a list, on one line if they fit with the comment."""
    comment = f'  # {comment}' if comment else ''
    line = f'{start}{values!r},{comment}'
    if len(line) <= _WIDTH:
        return [line]
    indent = ' ' * (len(start) - len(start.lstrip()))
    return [f'{start}[{comment}', *(f'{indent}    {value!r},' for value in values), f'{indent}],']


def _amd(plan: Plan) -> list[str]:
    if plan.detector:
        return ['        amd=dict(scale_free=True, local_grid=2)))  # one weight for small and large maps']
    if not plan.logits:
        return ['        amd=dict(loss_weight=1000.0)))  # per layer; the paper has no value']
    return ['        amd=dict(loss_weight=1000.0),  # per layer; the paper has no value',
            f"        student_recorders=dict(logits=dict(type='ModuleOutputs', source={plan.logits[0]!r})),",
            f"        teacher_recorders=dict(logits=dict(type='ModuleOutputs', source={plan.logits[1]!r})),",
            "        distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4, loss_weight=0.9)),",
            '        loss_forward_mappings=dict(',
            '            loss_kd=dict(',
            "                preds_S=dict(recorder='logits', from_student=True),",
            "                preds_T=dict(recorder='logits', from_student=False)))))"]


def _feature(plan: Plan) -> list[str]:
    return [f'        base={plan.base!r}{_weight(plan)}))']


def _weight(plan: Plan) -> str:
    """Returns FitNet's weight for classifiers, that of CRD's benchmark (arXiv 1910.10699). The default is for pyramids.
    """
    return ', loss_weight=100.0' if plan.base == 'fitnet' and not plan.detector else ''


def _sokd(plan: Plan) -> list[str]:
    unit = 'search_epochs' if 'max_epochs' in plan.length else 'search_iters'
    hook = f"dict(type='mmkd_plugin.FreezePolicyHook', {unit}={max(1, round(_length(plan) / 6))})"
    dam = ('detect_loss_weight=0.3, area_loss_weight=0.9)))  # with the defaults, DAM outweighs the task'
           if plan.detector else "anchor='attention')))")
    return [f'        base={plan.base!r}{_weight(plan)},',
            f'        dam=dict({dam}',
            *_optim_wrapper(plan),
            '# The policy is searched in the first sixth of the training.',
            f'custom_hooks = [{"*_base_.custom_hooks, " if plan.hooks else ""}{hook}]']


def _optim_wrapper(plan: Plan) -> list[str]:
    constructor = "constructor='mmkd_plugin.PolicyOptimWrapperConstructor'"
    if not plan.constructor:
        return [f'optim_wrapper = dict({constructor})']
    return ['optim_wrapper = dict(', f'    {constructor},', f'    student_constructor={plan.constructor!r})']
