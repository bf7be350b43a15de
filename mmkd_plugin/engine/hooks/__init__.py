from .best_student_hook import BestStudentHook
from .check_teacher_hook import CheckTeacherHook
from .compile_student_hook import CompileStudentHook
from .distill_visualization_hook import DistillVisualizationHook
from .freeze_policy_hook import FreezePolicyHook
from .non_finite_loss_hook import NonFiniteLossHook
from .reseed_hook import ReseedHook
from .safe_checkpoint_hook import SafeCheckpointHook

__all__ = ['BestStudentHook', 'CheckTeacherHook', 'CompileStudentHook', 'DistillVisualizationHook', 'FreezePolicyHook',
           'NonFiniteLossHook', 'ReseedHook', 'SafeCheckpointHook']
