# Sourced: `source test/env_npu.sh`, the environment of a run on Ascend NPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/env_npu.sh"
