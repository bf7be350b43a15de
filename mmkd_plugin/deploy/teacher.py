"""The teacher of a distillation as a model of its own, on the student's data."""
import copy

from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import init_default_scope

from ..config.cfg_path import build_model
from ..models.algorithms.inherit import num_classes
from ..models.algorithms.teacher_inputs import TeacherInputs
from ..models.dummy_input import check_size
from .student import plain_config


def build_teacher(cfg: Config, field: str, teacher: dict, student: BaseModel, trust_checkpoint: bool = False,
                  input_size: object = None) -> BaseModel:
    """Returns a teacher with random weights, in eval mode, that gets its images as in the distillation.

    Args:
        cfg: config of the distillation.
        field: field of the teacher, for error messages.
        teacher: its config. If this has no preprocessor, the teacher gets the student's.
        student: the plain student.
        trust_checkpoint: whether files that the model reads when it is built may run code.
        input_size: its ``teacher_input_size``.

    Raises:
        ValueError: the teacher lacks classes of the student, or a field is wrong.
    """
    teacher = {key: value for key, value in teacher.items() if key != 'pretrained'}
    preprocessor = plain_config(cfg).model.get('data_preprocessor') or cfg.get('data_preprocessor')
    if preprocessor and not teacher.get('cfg_path'):
        teacher.setdefault('data_preprocessor', preprocessor)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = build_model(field, teacher, trust_checkpoint)
    own, classes = num_classes(model), num_classes(student)
    if own and classes and not set(classes) <= set(own):
        raise ValueError(f"{field}: has {own} classes and the student {classes}, so it does not fit the student's data")
    if input_size:
        model.data_preprocessor = _Resized(student.data_preprocessor, model.data_preprocessor, input_size)
    return model.eval()


class _Resized(BaseDataPreprocessor):
    """Preprocessor of a teacher with ``teacher_input_size``, which prepares its images as the distillation does."""

    def __init__(self, student: BaseDataPreprocessor, teacher: BaseDataPreprocessor, size: object) -> None:
        super().__init__()
        self.student = copy.deepcopy(student)
        self.inputs = TeacherInputs.between(student, teacher, check_size('teacher_input_size', size))

    def forward(self, data: dict, training: bool = False) -> dict:
        data = self.student(data, training)
        images, samples = data['inputs'], data.get('data_samples')
        own = self.inputs(images, samples)
        return dict(data, inputs=own, data_samples=self.inputs.samples(samples, images.shape[2:], own.shape[2:]))
