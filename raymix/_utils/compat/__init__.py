"""Private API of other libraries: every use stands here, with what it is for.

`ray_core`, `ray_train`, `ray_data`, `torch`, `cpython` and `native` (glibc, LAPACK) import their
library at the top, so import them where that library is loaded anyway. Each name was read in the
version that `requirements.lock` pins; `tests/unit/repository/test_compat.py` fails, naming it, when
a release moves or changes it.
"""
