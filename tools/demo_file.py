#!/usr/bin/env python3
"""Write a file of pseudo-random bytes: `demo_file.py PATH MEBIBYTES`. The same bytes every time."""

from __future__ import annotations

import random
import sys
from pathlib import Path


def main() -> int:
    """Command line entry; 0 when the file is there."""
    path, size = Path(sys.argv[1]), int(sys.argv[2]) << 20
    if not path.exists() or path.stat().st_size != size:
        path.write_bytes(random.Random(232).randbytes(size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
