"""Knowledge distillation for MMDetection and MMPretrain, built on MMRazor: AMD, SoKD and others."""
from .compat import check_stack, leave_multimodal_out, let_constructors_see_the_student, make_mmrazor_importable

__version__ = '0.2.0'

check_stack()
leave_multimodal_out()
make_mmrazor_importable()
let_constructors_see_the_student()
