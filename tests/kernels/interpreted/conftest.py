"""These tests run in a process of their own, see `test_triton_interpreter`: Triton reads TRITON_INTERPRET on import."""

from alignpro_kernels.triton_support import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]
