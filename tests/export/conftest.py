"""The export tests share small networks (`small_nets.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
