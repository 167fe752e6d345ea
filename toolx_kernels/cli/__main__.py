"""``python -m toolx_kernels.cli``."""

import sys

from toolx_kernels.cli import main

sys.exit(main())
