from .teacher_student_distill import TeacherStudentDistill

__all__ = ['TeacherStudentDistill']
