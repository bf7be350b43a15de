from .teacher_student_val_loop import TeacherStudentValLoop
from .unlabelled_train_loop import UnlabelledEpochBasedTrainLoop, UnlabelledIterBasedTrainLoop

__all__ = ['TeacherStudentValLoop', 'UnlabelledEpochBasedTrainLoop', 'UnlabelledIterBasedTrainLoop']
