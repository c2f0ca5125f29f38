"""These tests run in separate processes (see `test_triton_interpreter`): Triton reads TRITON_INTERPRET on import."""

import sys
from pathlib import Path

from alignpro_kernels.triton_support import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]

sys.path.insert(0, str(Path(__file__).parents[1]))  # problems shared with other tests
