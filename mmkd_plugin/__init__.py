"""AMD and SoKD knowledge distillation for MMDetection and MMPretrain, in MMRazor's manner."""
from .compat import check_stack, let_constructors_see_the_student, make_mmrazor_importable

__version__ = '0.2.0'

check_stack()
make_mmrazor_importable()
let_constructors_see_the_student()
