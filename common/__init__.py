"""What the detectors share: `npu` (environment), `coco` (data and evaluation), `fps` (measuring).

Import this package before torch: torch loads an installed torch_npu by itself, and without CANN
that makes `import torch` fail. `common.npu.device` loads it instead, with a helpful message.
"""

import os

__version__ = "1.0.0"  # of the whole project; the only place that has it

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
