"""The graph tests share small networks (`nets.py`), checks (`checks.py`) and a generator of random ones (`fuzz.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
