#!/usr/bin/env python3
"""Print the FPS of a run: `python3 calc_fps.py xxx.log.json GPU_NUMS BATCH_SIZE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.fps.calc_fps import main

if __name__ == "__main__":
    main()
